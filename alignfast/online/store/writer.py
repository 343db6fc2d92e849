"""One thread of a process that writes, for as many callers as there are.

    caller 1 --.                       begin
    caller 2 ---+-> queue -> batch ->  caller 1's statements     -> commit -> every caller of the batch is answered
    caller 3 --'                       caller 2's statements ...

A commit to disk takes milliseconds, whatever is in it: while one is under way the next batch gathers, and nobody waits
for more to come. Where one of a batch fails, all of it is done again with a savepoint before each, which costs a third
of the rate: so what is to be written must give the same when it is begun again.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, NamedTuple, TypeAlias, TypeVar

from sqlalchemy import Connection, Engine

from alignfast.online.store.database import StoreError, writing

Result = TypeVar("Result")
AnyFuture = TypeVar("AnyFuture", Future[Any], asyncio.Future[Any])
Work: TypeAlias = Callable[[Connection], Any]
_Waiting: TypeAlias = "Future[Any] | asyncio.Future[Any]"

_MAX_BATCH = 256  # callers of one commit
_STOP = None


class Outcome(NamedTuple):
    """What became of a caller's statements: `result`, which is on disk, or an error, and then nothing of them is."""

    result: Any
    error: BaseException | None = None


class _OneByOne(Exception):
    """Something in a batch failed before its commit."""


def commit(engine: Engine, batch: Sequence[Work]) -> list[Outcome]:
    """One transaction for all, in which each succeeds or fails by itself.

    Args:
        engine: of `database.connect`.
        batch: statements of each caller; they may be called a second time.

    Raises:
        BaseException: of the commit, which may have been made: not to be tried again.
    """
    try:
        with writing(engine) as connection:
            try:
                return [Outcome(work(connection)) for work in batch]
            except Exception as error:
                raise _OneByOne from error
    except _OneByOne:
        return _commit_each(engine, batch)


def _commit_each(engine: Engine, batch: Sequence[Work]) -> list[Outcome]:
    """The same with a savepoint before each, to which one that fails goes back."""
    outcomes: list[Outcome] = []
    with writing(engine) as connection:
        for work in batch:
            try:
                with connection.begin_nested():
                    outcomes.append(Outcome(work(connection)))
            except Exception as error:
                outcomes.append(Outcome(None, error))
    return outcomes


class Writer:
    """A thread that gathers what callers want written, and answers them.

    Args:
        commit: writes a batch, as `commit` does.
    """

    def __init__(self, commit: Callable[[Sequence[Work]], Sequence[Outcome]]) -> None:
        self._commit, self._pid = commit, os.getpid()
        self._queue: queue.SimpleQueue[tuple[Work, _Waiting] | None] = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()  # between a call and the end
        self._thread = threading.Thread(target=self._run, name="alignfast-store", daemon=True)
        self._thread.start()

    def write(self, work: Callable[[Connection], Result]) -> Result:
        """What `work` returns, once all it did is on disk; nothing of it is done if it raises.

        Args:
            work: its statements, on the connection that it is given; it may be called a second time.

        Raises:
            StoreError: the store is closed, or was opened before this process was forked.
        """
        future: Future[Result] = Future()
        return self._ask(work, future).result()

    async def write_from_loop(self, work: Callable[[Connection], Result]) -> Result:
        """`write` for a coroutine, whose loop is woken once for all of a batch. To cancel it takes nothing back.

        Raises:
            StoreError: as `write`.
        """
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        return await self._ask(work, future)

    def _ask(self, work: Work, future: AnyFuture) -> AnyFuture:
        if os.getpid() != self._pid:
            raise StoreError("a store does not survive a fork: open one in each process")
        with self._lock:
            if self._closed:
                raise StoreError("the store is closed")
            self._queue.put((work, future))
        return future

    def close(self) -> None:
        """End after what was asked for; a second call does nothing."""
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed and os.getpid() == self._pid:
            self._queue.put(_STOP)
            self._thread.join()

    def _run(self) -> None:
        while (first := self._queue.get()) is not _STOP:
            batch = [first]
            while len(batch) < _MAX_BATCH and not self._queue.empty():
                following = self._queue.get()
                if following is _STOP:
                    self._queue.put(_STOP)
                    break
                batch.append(following)
            waiting = [future for _, future in batch]
            try:
                outcomes = self._commit([work for work, _ in batch])
            except BaseException as error:  # nobody is told that what they wrote is on disk
                outcomes = [Outcome(None, error)] * len(batch)
            _answer(waiting, outcomes)


def _answer(waiting: Sequence[_Waiting], outcomes: Sequence[Outcome]) -> None:
    """Tell those who wait in threads at once, and those who wait in a loop by one call of it."""
    in_loops: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Outcome]]] = {}
    for future, outcome in zip(waiting, outcomes, strict=True):
        if isinstance(future, Future):
            tell(future, outcome)
        else:
            in_loops.setdefault(future.get_loop(), []).append((future, outcome))
    for loop, told in in_loops.items():
        with suppress(RuntimeError):  # the loop has ended, and all that waited in it
            loop.call_soon_threadsafe(_answer_here, told)


def _answer_here(told: Sequence[tuple[asyncio.Future[Any], Outcome]]) -> None:
    for future, outcome in told:
        tell(future, outcome)


def tell(future: Future[Any] | asyncio.Future[Any], outcome: Outcome) -> None:
    """Answer who waits, if they have not left."""
    if future.done():
        return
    if outcome.error is not None:
        future.set_exception(outcome.error)
    else:
        future.set_result(outcome.result)
