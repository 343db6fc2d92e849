"""Many clients at once from one thread, over plain sockets: a client library would take the cores from the server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


def request(path: str, body: Any, key: str, **headers: str) -> bytes:
    """The bytes of a POST."""
    content = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {key}", "Content-Type: application/json",
        f"Content-Length: {len(content)}", *(f"{name}: {value}" for name, value in headers.items()),
    ]  # fmt: skip
    return "\r\n".join([*lines, "", ""]).encode() + content


@dataclass
class Stream:
    """One streamed chat, as far as it was read."""

    status: int = 0
    events: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether it was told to its end."""
        return self.status == 200 and self.events[-1:] == ["[DONE]"]

    @property
    def told(self) -> dict[str, Any]:
        """What its last choice says beside OpenAI's fields."""
        found: dict[str, Any] = json.loads(self.events[-2])["alignfast"]
        return found


class Crowd:
    """Chats that are under way; to be used in one event loop.

    Args:
        url: of the server.
        key: by which they ask.
    """

    def __init__(self, url: str, key: str) -> None:
        address = urlsplit(url)
        self.host, self.port, self.key = address.hostname, address.port, key
        self.streams: list[Stream] = []
        self._readers: list[asyncio.Task[None]] = []

    async def begin(self, bodies: Sequence[dict[str, Any]]) -> None:
        """Ask, and return when each was told that its answer begins."""
        begun = []
        for body in bodies:
            stream, started = Stream(), asyncio.Event()
            self.streams.append(stream)
            self._readers.append(asyncio.ensure_future(self._read(body, stream, started)))
            begun.append(started.wait())
        await asyncio.gather(*begun)

    async def end(self) -> None:
        """Return when the server has ended all."""
        await asyncio.gather(*self._readers)

    async def _read(self, body: dict[str, Any], stream: Stream, started: asyncio.Event) -> None:
        try:
            reader, writer = await asyncio.open_connection(self.host, self.port)
            writer.write(
                request("/v1/chat/completions", {**body, "stream": True}, self.key, Connection="close")
            )
            stream.status = int((await reader.readuntil(b"\r\n\r\n")).split()[1])
            started.set()
            while line := await reader.readline():
                if line.startswith(b"data: "):
                    stream.events.append(line[6:].decode().strip())
            writer.close()
        except (OSError, asyncio.IncompleteReadError):
            pass  # what was read tells how far it came
        finally:
            started.set()
