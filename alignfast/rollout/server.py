"""A vLLM server over HTTP: time limits, bounded repeats, and errors that say what to do.

A request is repeated where the server could not be reached or was too busy, and only if asking twice does no harm:
completions are keyed by their seed; a weight update is never sent twice. Proxies of the environment are passed by: a
server that takes weights belongs on the trainer's own network.

Not done here: TLS with certificates of one's own; streams.
"""

from __future__ import annotations

import json
import time
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, Request, build_opener

START = (
    "pip install vllm, in an environment of its own, and start it on other GPUs than the trainer's: "
    "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --host 127.0.0.1 --port 8000 --logprobs-mode processed_logprobs "
    '--generation-config vllm --weight-transfer-config \'{"backend": "nccl"}\''
)
_BUSY = (429, 502, 503, 504)
_PAUSE_S = 1.0  # before the first repeat; twice as long before each further one


class ServerError(RuntimeError):
    """The server is not there, or does not do what is asked of it."""


class RouteMissing(ServerError):
    """The server has no such route: it is too old, or was started without what opens it."""


class Server:
    """One server.

    Args:
        url: such as `http://127.0.0.1:8000`.
        timeout: seconds that an answer may take, > 0.
        retries: repeats of a request that may be repeated, >= 0.
        api_key: what the server was started with as `--api-key`, if anything.

    Raises:
        ValueError: an option is out of range, or the address is none.

    >>> Server("localhost:8000")
    Traceback (most recent call last):
    ValueError: server_url must begin with http:// or https://, got 'localhost:8000'
    """

    def __init__(
        self, url: str, *, timeout: float = 600.0, retries: int = 3, api_key: str | None = None
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"server_url must begin with http:// or https://, got {url!r}")
        if not timeout > 0 or retries < 0:
            raise ValueError(f"expected timeout > 0 and retries >= 0, got {timeout} and {retries}")
        self.url, self.timeout, self.retries = url.rstrip("/").removesuffix("/v1"), timeout, retries
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._opener = build_opener(ProxyHandler({}))

    def get(self, route: str, **query: str) -> Any:
        """What the server answers, from JSON; None where it answers nothing.

        Raises:
            ServerError: it can't be reached, takes too long, or refuses.
        """
        return self._ask(self._request("GET", route, None, query), route, self.retries)

    def post(self, route: str, body: dict[str, Any], *, repeat: bool = False, **query: str) -> Any:
        """The same for a request with a body, sent once unless it may be repeated."""
        return self._ask(self._request("POST", route, body, query), route, self.retries if repeat else 0)

    def wait_until_up(self, seconds: float) -> None:
        """Ask after the server's health until it answers.

        Raises:
            ServerError: it does not within so many seconds; 0 asks once, with the repeats of any request.
        """
        end = time.monotonic() + seconds
        while True:
            try:
                self.get("/health")
            except ServerError:
                if time.monotonic() >= end:
                    raise
                time.sleep(_PAUSE_S)
            else:
                return

    def _request(
        self, method: str, route: str, body: dict[str, Any] | None, query: dict[str, str]
    ) -> Request:
        address = f"{self.url}{route}" + (f"?{urlencode(query)}" if query else "")
        data = None if body is None else json.dumps(body).encode()
        return Request(address, data=data, headers=self._headers, method=method)

    def _ask(self, request: Request, route: str, repeats: int) -> Any:
        for attempt in range(repeats + 1):
            try:
                with self._opener.open(request, timeout=self.timeout) as answer:
                    return _parsed(answer.read(), self.url, route)
            except HTTPError as error:
                if error.code not in _BUSY or attempt == repeats:
                    raise self._refused(error, route) from error
            except TimeoutError as error:
                if attempt == repeats:
                    raise self._late(route, repeats) from error
            except URLError as error:
                if attempt == repeats:
                    if isinstance(error.reason, TimeoutError):
                        raise self._late(route, repeats) from error
                    raise self._unreachable(error.reason, repeats) from error
            except (OSError, HTTPException) as error:  # the connection broke while the answer came
                if attempt == repeats:
                    raise self._unreachable(error, repeats) from error
            time.sleep(_PAUSE_S * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _unreachable(self, reason: object, repeats: int) -> ServerError:
        return ServerError(
            f"no vLLM server can be reached at {self.url} ({reason}; asked {repeats + 1} times). To have one: {START}"
        )

    def _late(self, route: str, repeats: int) -> ServerError:
        return ServerError(
            f"the vLLM server at {self.url} did not answer {route} within {self.timeout:g} s (asked {repeats + 1} "
            "times): raise timeout, or lower max_new_tokens or the number of prompts"
        )

    def _refused(self, error: HTTPError, route: str) -> ServerError:
        said = _message(error.read())
        if error.code == 404 and said == "Not Found":
            return RouteMissing(
                f"the vLLM server at {self.url} has no route {route}: it is too old, or was started without "
                f"VLLM_SERVER_DEV_MODE=1. To have one: {START}"
            )
        if error.code in (401, 403):
            return ServerError(
                f"the vLLM server at {self.url} asks for a key ({error.code}): pass its api_key"
            )
        return ServerError(f"the vLLM server at {self.url} refused {route} ({error.code}): {said}")


def _parsed(data: bytes, url: str, route: str) -> Any:
    try:
        return json.loads(data) if data.strip() else None
    except ValueError as error:
        raise ServerError(
            f"{url} answered {route} with {data[:80]!r}, expected JSON: is it a vLLM server?"
        ) from error


def _message(data: bytes) -> str:
    """What an error says, in any of the forms that vLLM's versions give it.

    >>> _message(b'{"error": {"message": "no", "code": 400}}'), _message(b'{"detail": "Not Found"}'), _message(b"oops")
    ('no', 'Not Found', 'oops')
    """
    text = data.decode(errors="replace")
    try:
        body = json.loads(text)
    except ValueError:
        return text[:500]
    while isinstance(body, dict):
        body = next((body[key] for key in ("error", "message", "detail") if key in body), str(body))
    return str(body)[:500]
