"""A writer in a process of its own, which shares no interpreter with a server's event loop.

    loop   --- what was asked in one turn of the loop --->  child: all that has come -> writer.commit
           <-- what became of each, in the same order ---

To take a request, and to write its vote, is Python on both sides, so that in one interpreter the two wait for each other:
apart they use two cores. What is sent must be picklable: a module's function with its arguments.

The child ends when its pipe does, whatever became of the process that started it. A signal to a whole group (Ctrl-C, a
service manager's SIGTERM) leaves it alone, for the server goes on to answer what it has taken.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import IO, Any

from sqlalchemy import Connection, Engine

from alignfast.online.store.database import StoreError, connect
from alignfast.online.store.writer import Outcome, Result, Work, commit, tell

_HEAD = 8  # bytes before a message: its length, little-endian
_PIECE = 1 << 20  # bytes that are read at once


class Apart:
    """The child and those who wait for it, in one event loop; `Apart.start` makes one.

    Args:
        url: of the database, as `database.connect` takes it.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._child: _Child | None = None
        self._starting = asyncio.Lock()
        self._closed = False

    @classmethod
    async def start(cls, url: str) -> Apart:
        """Start the child, and wait until it has the database open.

        Raises:
            StoreError: it can't; its own words are on stderr.
        """
        apart = cls(url)
        await apart._running()
        return apart

    async def write(self, work: Callable[[Connection], Result]) -> Result:
        """`Writer.write`, done by the child, which is started anew where it has ended. To cancel it takes nothing back.

        Raises:
            StoreError: the child ended under it, and whether the commit was made is not known; or it was closed.
        """
        if self._closed:
            raise StoreError("the store is closed")
        child = self._child
        if child is None or child.ended:
            child = await self._running()
        result: Result = await child.ask(work)
        return result

    async def close(self) -> None:
        """End the child, after what it writes; a second call does nothing."""
        self._closed = True
        if self._child is not None:
            await self._child.end()

    async def _running(self) -> _Child:
        async with self._starting:
            if self._child is None or self._child.ended:
                self._child = await _Child.start(self._url)
            return self._child


class _Child:
    """A process, until it ends."""

    def __init__(self, process: Process) -> None:
        self._process, self._loop = process, asyncio.get_running_loop()
        self._asked: list[Any] = []
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self._reading = self._loop.create_task(self._read())

    @classmethod
    async def start(cls, url: str) -> _Child:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import main; main()",
            stdin=PIPE, stdout=PIPE,
        )  # fmt: skip
        child = cls(process)
        # by the pipe and not as a word of the command, which every user of the machine may read
        await child.ask(url)
        return child

    @property
    def ended(self) -> bool:
        return self._reading.done()

    def ask(self, message: Any) -> asyncio.Future[Any]:
        future = self._loop.create_future()
        if not self._asked:
            self._loop.call_soon(self._send)
        self._asked.append(message)
        self._waiting.append(future)
        return future

    async def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._reading

    def _send(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(_message(self._asked))
        self._asked = []

    async def _read(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            while True:
                size = int.from_bytes(await self._process.stdout.readexactly(_HEAD), "little")
                for outcome in pickle.loads(await self._process.stdout.readexactly(size)):
                    tell(self._waiting.popleft(), outcome)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # it has ended
        finally:
            self._process.stdin.close()
            code = await self._process.wait()
            error = StoreError(
                f"the process that writes to the database ended (exit code {code}), and whether it kept what it was sent "
                "is not known: send it again, with the same Idempotency-Key"
            )
            for future in self._waiting:
                tell(future, Outcome(None, error))


def _message(items: Sequence[Any]) -> bytes:
    body = pickle.dumps(items)
    return len(body).to_bytes(_HEAD, "little") + body


def main() -> None:
    """The child: an address, then works, until the pipe ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anybody prints is not an answer
    batches = _batches(0)
    (url,) = next(batches)
    engine = connect(url, create=False)
    with suppress(BrokenPipeError):  # who asked has ended
        _answer(answers, [Outcome(None)])
        for batch in batches:
            _answer(answers, _outcomes(engine, batch))


def _batches(pipe: int) -> Iterator[list[Any]]:
    """All that has come, again and again."""
    came = b""
    while piece := os.read(pipe, _PIECE):
        came += piece
        batch: list[Any] = []
        while len(came) >= _HEAD and len(came) >= (end := _HEAD + int.from_bytes(came[:_HEAD], "little")):
            batch += pickle.loads(came[_HEAD:end])
            came = came[end:]
        if batch:
            yield batch


def _outcomes(engine: Engine, batch: Sequence[Work]) -> list[Outcome]:
    try:
        found = commit(engine, batch)
    except Exception as error:  # of the commit, which may have been made
        found = [Outcome(None, error)] * len(batch)
    return [one if one.error is None else Outcome(None, _sendable(one.error)) for one in found]


def _sendable(error: BaseException) -> BaseException:
    """The error, or the words that it says where its class can't be made again on the other side."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return StoreError(f"{type(error).__name__}: {error}")
    return error


def _answer(answers: IO[bytes], outcomes: Sequence[Outcome]) -> None:
    answers.write(_message(outcomes))
    answers.flush()
