"""The page: its own files, and who its visitor is.

GET /   GET /label   GET /loop   GET /static/*      files of ../page, open to anybody: they hold no figure and no name
GET /v1/session                                     who asks, so that a page knows whether to ask for a key
DELETE /v1/session                                  forget the cookie

The files are read once, and a path that is none of theirs is nothing; what they ask the server for is guarded as any
request is. The headers allow scripts and styles of these files alone, no request elsewhere, no frame, and no text to
become markup.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from alignfast.online.server.guard import COOKIE, caller_of

_FOLDER = Path(__file__).resolve().parent.parent / "page"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked for again each time, and answered 304: a new server never meets an old page
}


class File(NamedTuple):
    """A file of the page."""

    content: bytes
    headers: dict[str, str]


def _read() -> dict[str, File]:
    found = {}
    for path in sorted(_FOLDER.iterdir()):
        if path.suffix not in _TYPES:
            continue
        where = f"/static/{path.name}"
        if path.suffix == ".html":
            where = "/" if path.stem == "index" else f"/{path.stem}"
        content = path.read_bytes()
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        found[where] = File(content, {**_HEADERS, "Content-Type": _TYPES[path.suffix], "ETag": tag})
    return found


FILES = _read()

router = APIRouter()


async def _file(request: Request) -> Response:
    """A file of the page."""
    content, headers = FILES[request.url.path]
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers)


for _path in FILES:
    router.add_api_route(_path, _file, methods=["GET", "HEAD"], include_in_schema=False, response_model=None)


@router.get("/v1/session")
async def who(request: Request) -> dict[str, Any]:
    """Who asks, and by what they are known."""
    caller = caller_of(request)
    return {"object": "session", "user": caller.user, "role": caller.role, "by": caller.by}


@router.delete("/v1/session", response_model=None)
async def leave(request: Request) -> Response:
    """Have a browser forget its cookie, which stays good until it ends."""
    response = JSONResponse({"object": "session", "deleted": True})
    response.delete_cookie(COOKIE, httponly=True, samesite="strict", secure=request.url.scheme == "https")
    return response
