"""A stand-in for a vLLM server: answers written after the schema of vLLM 0.30, and a log of what was asked.

The schema: `CompletionRequest` and `CompletionResponseChoice` (/v1/completions), the routes of weight transfer and of the
prefix cache (VLLM_SERVER_DEV_MODE=1), FastAPI's own 404. No real server was recorded: there was none with a GPU.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Answer = (
    Any  # JSON; (status, JSON or text); a function of the request's body that gives one; None for no body
)


def choice(
    tokens: Sequence[int], values: Sequence[float] | None = None, *, index: int = 0, reason: str = "length",
    by: int | str | None = None, text: str = "", prompt: Sequence[int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A completion as a server gives it."""
    values = [-0.5 - 0.125 * i for i in range(len(tokens))] if values is None else values
    return {
        "index": index, "text": text, "finish_reason": reason, "stop_reason": by, "prompt_logprobs": None,
        "token_ids": list(tokens), "prompt_token_ids": None if prompt is None else list(prompt),
        "logprobs": {
            "text_offset": [0] * len(tokens), "token_logprobs": list(values), "tokens": ["?"] * len(tokens),
            "top_logprobs": [{"?": value} for value in values],
        },
    }  # fmt: skip


def answer(*choices: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": "cmpl-1", "object": "text_completion", "created": 1790000000, "model": "tiny", "choices": list(choices),
        "usage": {"prompt_tokens": 2, "total_tokens": 4, "completion_tokens": 2},
    }  # fmt: skip


def card(name: str, parent: str | None = None) -> dict[str, Any]:
    return {
        "id": name, "object": "model", "created": 1790000000, "owned_by": "vllm", "root": f"/models/{name}",
        "parent": parent, "max_model_len": 48, "permission": [],
    }  # fmt: skip


def settings(logprobs_mode: str) -> dict[str, Any]:
    config = {
        "model_config": {"logprobs_mode": logprobs_mode},
        "weight_transfer_config": {"backend": "nccl"},
    }
    return {"vllm_config": config, "vllm_env": {}, "system_env": {}}


class RecordedServer:
    """Answers what `answers` says of a route, or what a list there says next; other routes are 404."""

    def __init__(self, tokenize: Callable[[str], list[int]]) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, Answer] = {
            "/health": None,
            "/version": {"version": "0.30.1rc1"},
            "/v1/models": {"object": "list", "data": [card("tiny")]},
            "/server_info": settings("processed_logprobs"),
            "/tokenize": lambda body: {
                "count": 0,
                "max_model_len": 48,
                "tokens": tokenize(body["prompt"]),
                "token_strs": None,
            },
            "/v1/completions": lambda body: answer(
                *(choice(([3, 4] * 24)[: body["max_tokens"]], index=i) for i in range(body["n"]))
            ),
            "/get_world_size": {"world_size": 2},
            "/init_weight_transfer_engine": {"message": "Weight transfer initialized"},
            "/pause": {"status": "paused"},
            "/start_weight_update": {"message": "Weight update started"},
            "/update_weights": {"message": "Weights updated"},
            "/finish_weight_update": {"message": "Weight update finished"},
            "/reset_prefix_cache": {"success": True},
            "/resume": {"status": "resumed"},
        }
        self.keys: set[str | None] = set()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def asked_of(self, route: str) -> list[dict[str, Any]]:
        return [body for asked, body in self.asked if asked == route]

    def _answer(self, route: str, body: dict[str, Any]) -> tuple[int, bytes]:
        said = self.answers.get(route, (404, {"detail": "Not Found"}))
        if isinstance(said, list):
            said = said.pop(0)
        if callable(said):
            said = said(body)
        status, content = said if isinstance(said, tuple) else (200, said)
        text = "" if content is None else content if isinstance(content, str) else json.dumps(content)
        return status, text.encode()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        recorded = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                address = urlsplit(self.path)
                body = json.loads(self.rfile.read(length)) if length else {}
                query = {name: value for name, (value,) in parse_qs(address.query).items()}
                recorded.asked.append((address.path, {**body, **query}))
                recorded.keys.add(self.headers.get("Authorization"))
                status, content = recorded._answer(address.path, body)
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_GET

            def log_message(self, *args: Any) -> None:
                pass

        return Handler


def hang(seconds: float) -> Callable[[dict[str, Any]], Answer]:
    """An answer that comes too late."""

    def wait(body: dict[str, Any]) -> Answer:
        time.sleep(seconds)
        return None

    return wait
