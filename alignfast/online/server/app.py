"""The routes. OpenAI's clients and this server's page know no others.

POST /v1/chat/completions   POST /v1/completions   GET /v1/models   GET /v1/models/{id}
POST /v1/feedback           POST /v1/session       GET /metrics     GET /health   GET /openapi.json
GET  /v1/loop               POST /v1/loop/promote  POST /v1/loop/rollback             (loop.py)
GET  /v1/label/next         POST /v1/label/skip    GET /v1/label/agreement            (labelling.py)
GET  /v1/session            DELETE /v1/session     GET /, /label, /loop, /static/*    (pages.py)
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
from alignfast.online.server import labelling, loop, pages
from alignfast.online.server.errors import ApiError, install
from alignfast.online.server.front import Front
from alignfast.online.server.generate import answer, make_job
from alignfast.online.server.guard import COOKIE, OPEN, caller_of, fresh_user, require
from alignfast.online.server.schema import ChatRequest, CompletionRequest, FeedbackRequest
from alignfast.online.server.service import Service, service_of
from alignfast.online.server.watch import Watch

router = APIRouter()


def make_app(service: Service, *, retention_days: float | None = None, apart: bool = False) -> Front:
    """The ASGI application of a service whose first version is open; it stops the service when it ends.

    Args:
        service: of the routes.
        retention_days: how long answers are kept; None: for ever.
        apart: have votes written by a process of its own, some 50 MB, so that more come through; see `store.apart`.
    """
    watch = Watch(service, retention_days)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        writer = await service.store.apart() if apart else None
        if writer is not None:
            service.write_vote = writer.write
        watch.start()
        yield
        await asyncio.to_thread(watch.stop)
        await service.close()
        if writer is not None:
            await writer.close()

    app = FastAPI(
        title="alignfast", version=alignfast.__version__, lifespan=lifespan,
        docs_url=None, redoc_url=None,  # their pages load scripts from elsewhere
    )  # fmt: skip
    app.state.service, app.state.watch, app.state.began = service, watch, int(time.time())
    app.include_router(router)
    for more in (loop.router, labelling.router, pages.router):
        app.include_router(more)
    install(app)
    return Front(app, service, open_to_all=OPEN | pages.FILES.keys())


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation."""
    job = await make_job(service_of(request), body, caller_of(request))
    return await answer(service_of(request), job, request.receive)


@router.post("/v1/completions", response_model=None)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continue texts."""
    job = await make_job(service_of(request), body, caller_of(request))
    return await answer(service_of(request), job, request.receive)


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The one model, and the version of it that a new request gets."""
    return {"object": "list", "data": [_model(request)]}


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """The model by its name."""
    if name != service_of(request).name:
        raise ApiError(404, f"there is no model {name!r} here", param="model", code="model_not_found")
    return _model(request)


def _model(request: Request) -> dict[str, Any]:
    service = service_of(request)
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
    raise AssertionError("votes are taken by `front.Votes`; this is what the schema says of them")


@router.post("/v1/session")
async def session(request: Request) -> JSONResponse:
    """Give a browser a cookie that says who its user is, for a key; on the loopback without keys, a new user."""
    service, caller = service_of(request), caller_of(request)
    if caller.by not in ("key", "loopback"):
        raise ApiError(403, "a session is begun with a key, not with a cookie")
    user, seconds = fresh_user() if service.keyless else caller.user, 3600 * service.limits.session_hours
    # without keys whoever asks may do everything, but what a cookie says outlives that
    role = "user" if service.keyless else caller.role
    response = JSONResponse({"object": "session", "user": user, "expires_in": int(seconds)})
    response.set_cookie(
        COOKIE, service.signer.cookie(user, seconds, role, caller.key_id), max_age=int(seconds), httponly=True, samesite="strict",
        secure=request.url.scheme == "https",
    )  # fmt: skip
    return response


@router.get("/metrics", response_model=None)
async def metrics(request: Request) -> Response:
    """Figures for Prometheus; with an admin's key."""
    require(request, "admin")
    return Response(service_of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/health", response_model=None)
async def health(request: Request) -> Response:
    """Whether answers can be had; to anybody, so it tells nothing else."""
    alive = service_of(request).runner.alive
    return JSONResponse({"status": "ok" if alive else "failing"}, 200 if alive else 503)
