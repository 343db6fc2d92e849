"""From a folder to a server that listens, and its end: on SIGTERM or SIGINT no new connection is taken, what runs ends."""

from __future__ import annotations

import gc
import ipaddress
import signal
from types import FrameType
from typing import Any

import uvicorn

from alignfast.online.server.app import make_app
from alignfast.online.server.service import Service


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0"), is_loopback("example.org")
    (True, True, False, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_address(service: Service, host: str) -> None:
    """Refuse to listen where others can reach a server that asks for no key.

    Raises:
        ValueError: the address is not the loopback and there is no key.
    """
    if service.keyless and not is_loopback(host):
        raise ValueError(
            f"host={host!r} can be reached by others and there is no key: make one with `alignfast keys make USER "
            "--role admin --db ...`, or listen on 127.0.0.1"
        )


def serve(service: Service, host: str, port: int, *, retention_days: float | None = None) -> None:
    """Listen until a signal; returns when the last answer has ended.

    Args:
        service: of the routes.
        host: address to listen on.
        port: to listen on.
        retention_days: how long answers are kept; None: for ever.

    Raises:
        ValueError: as `check_address`.
    """
    check_address(service, host)
    config = uvicorn.Config(
        make_app(service, retention_days=retention_days, apart=True), host=host, port=port, access_log=False, log_level="info", server_header=False,
        timeout_graceful_shutdown=int(service.limits.request_seconds) + 5,
    )  # fmt: skip
    # uvicorn sends itself the signal again when all is done, which would end the process as if it had been killed
    previous = {name: signal.signal(name, _done) for name in (signal.SIGTERM, signal.SIGINT)}
    # what torch and the routes are made of stays as long as the server: a full collection that walked through all of it
    # held every request up for as long as some hundred votes take
    gc.collect()
    gc.freeze()
    try:
        uvicorn.Server(config).run()
    finally:
        gc.unfreeze()
        for name, handler in previous.items():
            signal.signal(name, handler)


def _done(number: int, frame: FrameType | None) -> Any:
    pass
