"""The routes. OpenAI's clients and this server's page know no others.

POST /v1/chat/completions   POST /v1/completions   GET /v1/models   GET /v1/models/{id}
POST /v1/feedback           POST /v1/session       GET /metrics     GET /health   GET /openapi.json
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response

import alignfast
from alignfast.online.server.errors import ApiError, install
from alignfast.online.server.generate import answer, make_job
from alignfast.online.server.guard import COOKIE, BodyLimit, Guard, fresh_user
from alignfast.online.server.metrics import Measure
from alignfast.online.server.recorder import Caller, KeyReused, UnknownResponse, Vote
from alignfast.online.server.schema import ChatRequest, CompletionRequest, FeedbackRequest
from alignfast.online.server.service import Service

router = APIRouter()
_LONGEST_KEY = 255  # of an Idempotency-Key


def make_app(service: Service) -> FastAPI:
    """The ASGI application of a service whose first version is open; it stops the service when it ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    app = FastAPI(
        title="alignfast", version=alignfast.__version__, lifespan=lifespan,
        docs_url=None, redoc_url=None,  # their pages load scripts from elsewhere
    )  # fmt: skip
    app.state.service, app.state.began = service, int(time.time())
    app.include_router(router)
    install(app)
    # the last one added comes first
    app.add_middleware(BodyLimit, max_bytes=service.limits.max_body_bytes)
    app.add_middleware(Guard, recorder=service.recorder, signer=service.signer, keyless=service.keyless)
    app.add_middleware(Measure, metrics=service.metrics)
    return app


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation."""
    job = await make_job(_service(request), body, _caller(request))
    return await answer(_service(request), job, request.receive)


@router.post("/v1/completions", response_model=None)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continue texts."""
    job = await make_job(_service(request), body, _caller(request))
    return await answer(_service(request), job, request.receive)


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The one model, and the version of it that a new request gets."""
    return {"object": "list", "data": [_model(request)]}


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """The model by its name."""
    if name != _service(request).name:
        raise ApiError(404, f"there is no model {name!r} here", param="model", code="model_not_found")
    return _model(request)


def _model(request: Request) -> dict[str, Any]:
    service = _service(request)
    told = {
        "id": service.name,
        "object": "model",
        "created": request.app.state.began,
        "owned_by": "alignfast",
    }
    current = service.runner.current
    assert current is not None, "a version is opened before the server is"
    return {**told, "alignfast": current.version._asdict()}


@router.post("/v1/feedback")
async def feedback(request: Request, body: FeedbackRequest) -> dict[str, Any]:
    """Vote on an answer or on a conversation."""
    service, caller = _service(request), _caller(request)
    if body.user is not None and body.user != caller.user:
        message = "whose vote it is, is known by the key or the cookie: leave 'user' out"
        raise ApiError(403, message, param="user")
    if caller.response_id is not None and (
        body.response_id != caller.response_id or body.kind in ("pair", "ranking")
    ):
        raise ApiError(403, f"the token is for votes on {caller.response_id!r} alone", param="response_id")
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= _LONGEST_KEY:
        raise ApiError(422, f"Idempotency-Key must have 1 to {_LONGEST_KEY} characters, got {len(key)}")
    vote = Vote(body.kind, body.plain_value(), body.response_id, body.episode_id, body.comment)
    try:
        told = await asyncio.to_thread(service.recorder.vote, vote, caller, key)
    except UnknownResponse as error:
        raise ApiError(404, str(error), param="response_id") from error
    except KeyReused as error:
        raise ApiError(422, str(error), code="idempotency_key_reused") from error
    service.metrics.votes.labels(body.kind).inc()
    return {"object": "feedback", **told}


@router.post("/v1/session")
async def session(request: Request) -> JSONResponse:
    """Give a browser a cookie that says who its user is, for a key; on the loopback without keys, a new user."""
    service, caller = _service(request), _caller(request)
    if caller.by not in ("key", "loopback"):
        raise ApiError(403, "a session is begun with a key, not with a cookie")
    user, seconds = fresh_user() if service.keyless else caller.user, 3600 * service.limits.session_hours
    response = JSONResponse({"object": "session", "user": user, "expires_in": int(seconds)})
    response.set_cookie(
        COOKIE, service.signer.cookie(user, seconds), max_age=int(seconds), httponly=True, samesite="strict",
        secure=request.url.scheme == "https",
    )  # fmt: skip
    return response


@router.get("/metrics", response_model=None)
async def metrics(request: Request) -> Response:
    """Figures for Prometheus; with an admin's key."""
    _admins_alone(request)
    return Response(_service(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/health", response_model=None)
async def health(request: Request) -> Response:
    """Whether answers can be had; to anybody, so it tells nothing else."""
    alive = _service(request).runner.alive
    return JSONResponse({"status": "ok" if alive else "failing"}, 200 if alive else 503)


def _admins_alone(request: Request) -> None:
    if _caller(request).role != "admin":
        raise ApiError(403, "this needs an admin's key")
