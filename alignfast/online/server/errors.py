"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}, whatever went wrong."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

log = logging.getLogger("alignfast.server")

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """What a client is told.

    Args:
        status: of HTTP.
        message: what came, what was expected, what to do.
        param: the field that it is about.
        code: a word for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def install(app: FastAPI) -> None:
    """Have every error of an app answered in this shape."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, unexpected)


async def _api_error(request: Request, error: Any) -> JSONResponse:
    response: JSONResponse = error.response()
    return response


async def invalid(request: Request, error: Any) -> JSONResponse:
    """The answer to a body that is not as it should be, by pydantic's error."""
    errors = error.errors()
    # of what may be one of several types, the first error is often that it is none of the others
    first = next((each for each in errors if not each["type"].endswith("_type")), errors[0])
    path = [str(part) for part in first["loc"] if part != "body"]
    where = ".".join(path)
    if first["type"] == "extra_forbidden":
        message = f"there is no field {where!r} here"
    elif first["type"] == "json_invalid":
        message = f"the body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}"
    else:
        message = f"{where}: {first['msg']}" if where else str(first["msg"])
    # what came may hold half characters, which JSON can't be written from
    message = message.encode(errors="backslashreplace").decode()
    param = path[0].encode(errors="backslashreplace").decode() if path else None
    return ApiError(422, message, param=param, code=str(first["type"])).response()


async def _http(request: Request, error: Any) -> JSONResponse:
    return ApiError(error.status_code, str(error.detail), headers=error.headers).response()


async def unexpected(request: Request, error: Exception) -> JSONResponse:
    """The answer where the server is at fault."""
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return ApiError(500, "the server failed; its log says why").response()
