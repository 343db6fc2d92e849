"""Who asks, before any route runs: a key, a signed cookie, or a token that allows votes on one response.

    token  = "fbt-" + response_id + "." + HMAC(secret, "vote" | response_id)
    cookie = base64(JSON [user, end, role, id of the key]) + "." + HMAC(secret, "user" | base64)

Whatever is not named open here is refused without a good key, so that a new route is guarded before anybody thinks of
it. With no key at all the server is on the loopback, and whoever reaches it owns the machine's session; the Host header
must then name the loopback, which keeps out pages that point a name of theirs at it.
A cookie has its key's rights for as long as the key opens anything. Browsers send it by themselves, so that an admin's is
good only beside the header `X-Alignfast-Page`, which a page of another origin can't send without asking first, and is
never told yes; where the browser says how the two origins stand (Sec-Fetch-Site), it must say that they are one.
Keys, their roles and the secret are the store's.
Not done here: TLS (a proxy's), limits on a user's rate of answers.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from alignfast.online.feedback import ANONYMOUS
from alignfast.online.server.errors import ApiError
from alignfast.online.store.keys import Role

if TYPE_CHECKING:
    from alignfast.online.server.service import Service

COOKIE, TOKEN = "alignfast_session", "fbt-"
OPEN, VOTING = frozenset({"/health"}), "/v1/feedback"
PAGE_HEADER = "X-Alignfast-Page"  # of requests by this server's page
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
_BODY_SECONDS = 30  # for a body to arrive
_KEY_SECONDS, _MOST_KEYS = 1.0, 10_000  # that a good key is remembered, and how many are


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Attributes:
        user: whose vote it is; `anonymous` for all who hold a response's token and nothing else.
        role: what is allowed.
        response_id: the one response that a token lets its holder vote on, whoever it was shown to.
        by: how the caller was known; a cookie is given for a key alone.
        key_id: of the key, or of the one that the cookie was given for; empty: of none.
    """

    user: str
    role: Role = "user"
    response_id: str | None = None
    by: Literal["key", "cookie", "token", "loopback"] = "key"
    key_id: str = ""

    @property
    def own(self) -> str:
        """Whose idempotency keys are one set: holders of tokens share their name and nothing else."""
        return self.user if self.by != "token" else f"{self.user}/{self.response_id}"


def caller_of(request: Request) -> Caller:
    """Who the guard found to ask."""
    caller: Caller = request.state.caller
    return caller


def require(request: Request, *roles: Role) -> Caller:
    """Who asks, if they may.

    Raises:
        ApiError: 403 for another role, and for an admin's cookie that came by another page than this server's.
    """
    caller = caller_of(request)
    if caller.role not in roles:
        raise ApiError(403, f"this needs a key of role {' or '.join(roles)}; yours is {caller.role}")
    if (caller.by, caller.role) == ("cookie", "admin") and not _of_own_page(request):
        raise ApiError(
            403, f"an admin's cookie is good on this server's own page alone, which sends {PAGE_HEADER}"
        )
    return caller


def _of_own_page(request: Request) -> bool:
    """Whether a browser sends it for this server's page. Host and Origin are no help: proxies change the one."""
    headers = request.headers
    return PAGE_HEADER in headers and headers.get("sec-fetch-site", "same-origin") == "same-origin"


class Signer:
    """Makes and reads tokens and cookies.

    >>> signer = Signer(b"secret")
    >>> token = signer.token("cmpl-1")
    >>> signer.response_of(token), signer.response_of(token + "x"), signer.response_of("fbt-cmpl-2.AAAA")
    ('cmpl-1', None, None)
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def token(self, response_id: str) -> str:
        """Allows votes on one response."""
        return f"{TOKEN}{response_id}.{self._sign('vote', response_id)}"

    def response_of(self, token: str) -> str | None:
        """The response that a token is for; None if it was not made here."""
        response_id, _, mac = token.removeprefix(TOKEN).rpartition(".")
        return response_id if _same(mac, self._sign("vote", response_id)) else None

    def cookie(self, user: str, seconds: float, role: Role = "user", key_id: str = "") -> str:
        """Says who a browser's user is, for some time, and by which key."""
        body = _text(json.dumps([user, int(time.time() + seconds), role, key_id]).encode())
        return f"{body}.{self._sign('user', body)}"

    def caller_of(self, cookie: str) -> Caller | None:
        """Who a cookie is of; None if it was not made here or is over."""
        body, _, mac = cookie.rpartition(".")
        if not _same(mac, self._sign("user", body)):
            return None
        user, end, role, *key_id = json.loads(base64.urlsafe_b64decode(body + "=="))
        if not key_id or time.time() >= end:  # before alignfast kept the key's id, or over
            return None
        return Caller(str(user), role, by="cookie", key_id=key_id[0])

    def _sign(self, purpose: str, text: str) -> str:
        digest = hmac.digest(self._secret, f"{purpose}|{text}".encode(errors="replace"), "sha256")
        return _text(digest)


def _text(raw: bytes) -> str:
    """In base64 without its `=`, which a cookie would have to quote."""
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _same(a: str, b: str) -> bool:
    return hmac.compare_digest(a.encode(errors="replace"), b.encode(errors="replace"))


class Guard:
    """ASGI middleware: puts the caller into `scope["state"]["caller"]`, or answers 401.

    Args:
        app: behind it.
        service: whose store knows the keys.
        open_to_all: paths that anybody may ask for.
    """

    def __init__(self, app: ASGIApp, service: Service, open_to_all: Collection[str] = OPEN) -> None:
        self.app, self.service, self.open_to_all = app, service, frozenset(open_to_all)
        self._known: dict[bytes, tuple[Caller, float]] = {}  # by the key's digest, and when it was looked up
        self._opening: dict[str, float] = {}  # ids of good keys that cookies were given for, the same

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "lifespan" or scope.get("path") in self.open_to_all:
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"only HTTP is served, got {scope['type']!r}")
        try:
            scope.setdefault("state", {})["caller"] = await self._caller(scope)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    async def _caller(self, scope: Scope) -> Caller:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        keyless = self.service.keyless
        if keyless and re.sub(r":\d*$", "", host) not in _LOOPBACK:
            raise ApiError(403, f"without a key the server answers to localhost alone, not to {host!r}")
        scheme, _, key = headers.get(b"authorization", "").partition(" ")
        if key and scheme.lower() != "bearer":
            raise _unknown("expected 'Authorization: Bearer KEY'")
        known = await self._of_cookie(headers)
        if key.startswith(TOKEN):
            response_id = self.service.signer.response_of(key)
            if response_id is None or scope["path"] != VOTING:
                raise _unknown(f"the token is for votes on one response, at {VOTING}")
            return (
                Caller(ANONYMOUS, "user", response_id, "token")
                if known is None
                else replace(known, response_id=response_id)
            )
        if keyless:  # a key is not looked at: OpenAI's client always sends one
            return Caller("local", "admin", by="loopback") if known is None else replace(known, role="admin")
        if key:
            return await self._of_key(key)
        if known is not None:
            return known
        raise _unknown("a key is needed: 'Authorization: Bearer KEY'")

    async def _of_key(self, key: str) -> Caller:
        """Who a key is of, asked of the store once a second: a revoked key is good for so long."""
        digest, now = hashlib.sha256(key.encode(errors="replace")).digest(), time.monotonic()
        known, since = self._known.get(digest, (None, 0.0))
        if known is not None and now < since + _KEY_SECONDS:
            return known
        found = await self.service.in_store(lambda: self.service.store.keys.check(key))
        if found is None:
            self._known.pop(digest, None)
            raise _unknown("the key is not good")
        if len(self._known) >= _MOST_KEYS:
            self._known.clear()
        self._known[digest] = (Caller(found.user, found.role, key_id=found.id), now)
        return self._known[digest][0]

    async def _of_cookie(self, headers: dict[bytes, str]) -> Caller | None:
        """Who a cookie is of, if its key still opens anything; one that was given without a key is good without keys."""
        for part in headers.get(b"cookie", "").split(";"):
            name, _, value = part.strip().partition("=")
            if name == COOKIE:
                found = self.service.signer.caller_of(value)
                return found if found is not None and await self._opens(found.key_id) else None
        return None

    async def _opens(self, id: str) -> bool:
        """Whether a cookie's key does, asked of the store as `_of_key` does."""
        if not id or self.service.keyless:
            return not id and self.service.keyless
        now = time.monotonic()
        if now < self._opening.get(id, -_KEY_SECONDS) + _KEY_SECONDS:
            return True
        self._opening.pop(id, None)
        if not await self.service.in_store(lambda: self.service.store.keys.opens(id)):
            return False
        if len(self._opening) >= _MOST_KEYS:
            self._opening.clear()
        self._opening[id] = now
        return True


def _unknown(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def fresh_user() -> str:
    """A name for a browser that no key stands behind."""
    return f"browser-{secrets.token_hex(8)}"


@contextmanager
def _deadline(seconds: float, message: str) -> Iterator[None]:
    """Ends what the task waits for by a 408; asyncio.wait_for makes a task of its own, a tenth of a vote's time."""
    task, late = asyncio.current_task(), False
    assert task is not None

    def end() -> None:
        nonlocal late
        late = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, end)
    try:
        yield
    except asyncio.CancelledError:
        if late:
            raise ApiError(408, message) from None
        raise
    finally:
        timer.cancel()


class BodyLimit:
    """ASGI middleware: reads a body before any route does, up to a limit, and only JSON.

    A page of another site can post text or forms without asking, JSON it can't.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            with _deadline(_BODY_SECONDS, f"the body took longer than {_BODY_SECONDS} s"):
                body = await self._read(scope, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if body is None:
            return  # the client left
        first: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def replay() -> Message:
            nonlocal first
            message, first = first, None
            return await receive() if message is None else message

        await self.app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        headers: dict[bytes, Any] = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_bytes:
            raise self._too_large()
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.max_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                break
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if size and kind != b"application/json":
            raise ApiError(415, f"expected Content-Type: application/json, got {kind.decode('latin-1')!r}")
        return b"".join(parts)

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the body is larger than {self.max_bytes} bytes", headers={"Connection": "close"}
        )
