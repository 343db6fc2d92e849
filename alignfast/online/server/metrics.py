"""What the server tells Prometheus, at /metrics."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from alignfast.online.server.runner import Runner

_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

# a client may make up others
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Metrics:
    """The figures of one server, in a registry of its own."""

    def __init__(self, runner: Runner) -> None:
        self.registry, self._runner = CollectorRegistry(), runner
        here: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter(
            "alignfast_requests", "Requests answered", ["route", "method", "status"], **here
        )
        self.seconds = Histogram(
            "alignfast_request_seconds",
            "From a request to the end of its answer",
            ["route"],
            buckets=_SECONDS,
            **here,
        )
        self.first_token = Histogram(
            "alignfast_first_token_seconds", "From a request to its first token", buckets=_SECONDS, **here
        )
        self.tokens = Counter("alignfast_tokens", "Tokens of prompts and answers", ["kind"], **here)
        self.votes = Counter("alignfast_votes", "Votes taken", ["kind"], **here)
        self.cancelled = Counter("alignfast_cancelled", "Answers whose reader left", **here)
        Gauge("alignfast_sequences_running", "Answers being drawn", **here).set_function(
            lambda: runner.num_running
        )
        Gauge("alignfast_sequences_waiting", "Answers not yet begun", **here).set_function(
            lambda: max(0, runner.in_flight - runner.num_running)
        )
        Gauge("alignfast_engines", "Versions in memory", **here).set_function(lambda: runner.num_engines)
        self.version = Gauge(
            "alignfast_version", "1 for the version that new requests get", ["version", "weights"], **here
        )

    def text(self) -> bytes:
        """In Prometheus' format."""
        self.version.clear()
        if self._runner.current is not None:
            self.version.labels(*self._runner.current.version).set(1)
        return generate_latest(self.registry)


class Measure:
    """ASGI middleware: counts and times requests by their route."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 499  # nginx's number for a client that left

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, counted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self.metrics.requests.labels(route, method, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.monotonic() - began)
