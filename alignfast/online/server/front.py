"""What a request meets before the routes do, outermost first; and the way of a vote past them.

    errors -> Measure -> Guard -> BodyLimit -> Votes -> FastAPI

It stands before FastAPI and not among its middlewares: what FastAPI does around them takes half as long as a vote.
"""

from __future__ import annotations

import json
from collections.abc import Collection

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from alignfast.online.server.errors import ApiError, invalid, unexpected
from alignfast.online.server.guard import VOTING, BodyLimit, Guard, caller_of
from alignfast.online.server.metrics import Measure
from alignfast.online.server.schema import FeedbackRequest
from alignfast.online.server.service import Service
from alignfast.online.server.votes import keep


class Front:
    """The server's ASGI application.

    Args:
        app: the routes.
        service: of theirs.
        open_to_all: paths that need no key.

    Attributes:
        app: as given.
    """

    def __init__(self, app: FastAPI, service: Service, open_to_all: Collection[str]) -> None:
        limited = BodyLimit(Votes(app, service), max_bytes=service.limits.max_body_bytes)
        measured = Measure(Guard(limited, service, open_to_all), service.metrics)
        self.app, self._first = app, ServerErrorMiddleware(measured, handler=unexpected)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        await self._first(scope, receive, send)


class Votes:
    """ASGI middleware: takes votes. What the schema says of them, and other methods, are the route's own.

    Args:
        app: behind it.
        service: that keeps them.
    """

    path = VOTING  # by which the metrics count them

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or (scope["path"], scope["method"]) != (VOTING, "POST"):
            await self.app(scope, receive, send)
            return
        scope["route"] = self
        request = Request(scope, receive)
        try:
            response = await self._take(request)
        except ValidationError as error:
            response = await invalid(request, error)
        except ApiError as error:
            response = error.response()
        await response(scope, receive, send)

    async def _take(self, request: Request) -> JSONResponse:
        body = _vote_in(await request.body())
        kept = await keep(self.service, body, caller_of(request), request.headers.get("idempotency-key"))
        if not kept.replayed:
            self.service.metrics.votes.labels(body.kind).inc()
        told = {"object": "feedback", "id": kept.vote.id, "replaces": kept.replaces, "kind": kept.vote.kind}
        return JSONResponse(told)


def _vote_in(body: bytes) -> FeedbackRequest:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(422, f"the body is no JSON: {error}", code="json_invalid") from error
    return FeedbackRequest.model_validate(found)
