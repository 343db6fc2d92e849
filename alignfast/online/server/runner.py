"""The thread that steps the engines, and tickets through which handlers of asyncio hear of their tokens.

    handler: submit -> ticket        thread: [commands that came] -> a step of each engine -> tokens to the tickets
    handler: async for drawn in ticket, or cancel(ticket), which is done before the next step

A version has an engine of its own. When another one is opened, new requests go to it and the old one runs empty: no
request waits or is cut, every answer comes from one version whole, and while both run both are in memory. A canary's
engine runs beside the current one, and gets the prompts that are named for it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from alignfast.online.server.versions import Version
from alignfast.rollout.live import Drawn, LiveEngine, Request
from alignfast.rollout.sampling import Sampling

log = logging.getLogger("alignfast.server")


class QueueFull(Exception):
    """As many completions as the server takes on are running or waiting.

    Attributes:
        retry_after_s: when there may be room, by the pace of late.
    """

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the server is busy; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class GenerationFailed(Exception):
    """A request ended without an answer, by no fault of its own."""


@dataclass(eq=False)
class Serving:
    """An engine and the version that it serves."""

    engine: LiveEngine
    version: Version
    num_tickets: int = 0


class Ticket:
    """Tokens of what was submitted, as they come.

    Attributes:
        servings: the engine that draws each prompt's.
        num_sequences: completions in all, those of the first prompt first.
    """

    def __init__(self, servings: Sequence[Serving], num_sequences: int) -> None:
        self.servings, self.num_sequences = tuple(servings), num_sequences
        self.first_of: dict[Request, int] = {}  # number of a request's first completion
        self.left = num_sequences
        self.closed = False
        self.loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[list[Drawn] | Exception] = asyncio.Queue()

    def version(self, index: int) -> Version:
        """That draws a completion."""
        return self.servings[index * len(self.servings) // self.num_sequences].version

    def put(self, what: list[Drawn] | Exception) -> None:
        """For the loop's own thread."""
        self._queue.put_nowait(what)

    async def steps(self, seconds: float) -> AsyncIterator[list[tuple[int, Drawn]]]:
        """What each step drew: (number of the completion, what).

        Raises:
            TimeoutError: it took longer.
            GenerationFailed: the engine broke down, or the model gave no numbers.
        """
        # The deadline comes through the queue: before Python 3.12, asyncio.wait_for forgets that it was cancelled when a
        # token comes at the same moment, and a client that left was then written to until its answer's end.
        late = TimeoutError(f"the answer was not complete after {seconds:g} s")
        deadline = self.loop.call_later(seconds, self.put, late)
        left = self.num_sequences
        try:
            while left:
                what = await self._queue.get()
                if isinstance(what, Exception):
                    raise what
                for drawn in what:
                    if drawn.fault is not None:
                        raise GenerationFailed(drawn.fault)
                left -= sum(drawn.completion is not None for drawn in what)
                yield [(self.first_of[drawn.request] + drawn.index, drawn) for drawn in what]
        finally:
            deadline.cancel()


class Runner:
    """Engines and their thread.

    Args:
        max_sequences: that an engine runs at once.
        max_queue: completions that wait beyond those.

    Attributes:
        current: where new requests go; None before the first version is opened.
        canary: where the prompts go that are named for it; None: there is none.
        fault: what the last step died of; None since one went well.
    """

    def __init__(self, max_sequences: int, max_queue: int) -> None:
        self.capacity = max_sequences + max_queue
        self.max_sequences = max_sequences
        self.current: Serving | None = None
        self.canary: Serving | None = None
        self.fault: str | None = None
        self.in_flight = 0  # completions submitted and not ended
        self._servings: list[Serving] = []
        self._tickets: dict[Request, Ticket] = {}
        self._ended_at: deque[float] = deque(maxlen=64)
        self._inbox: list[Callable[[], None]] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="alignfast-engine", daemon=True)

    @property
    def num_running(self) -> int:
        """Sequences that get a token in each step."""
        return sum(serving.engine.num_running for serving in self._servings)

    @property
    def num_engines(self) -> int:
        """Versions in memory: the current one, the canary, and old ones that run empty."""
        return len(self._servings)

    @property
    def alive(self) -> bool:
        """Whether the thread runs and its last step went well."""
        return self._thread.is_alive() and self.fault is None

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End: what is unfinished fails, the engines are closed."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def open(
        self, make: Callable[[], LiveEngine], version: Version, *, canary: bool = False
    ) -> Future[Version]:
        """Make an engine in the thread, between two steps, and send new requests to it, or a canary's alone."""
        done: Future[Version] = Future()

        def opened() -> None:
            try:
                serving = Serving(make(), version)
            except Exception as error:
                done.set_exception(error)
                return
            with self._changed:
                self._servings.append(serving)
                if canary:
                    self.canary = serving
                else:
                    self.current = serving
            done.set_result(version)

        self._post(opened)
        return done

    def end_canary(self, *, promote: bool = False) -> None:
        """Have no canary from the next request on; with `promote` it is the current version from then on."""
        with self._changed:
            if promote:
                assert self.canary is not None
                self.current = self.canary
            self.canary = None
        self._post(lambda: None)  # so that the thread closes what has run empty

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        numbers: Sequence[int],
        canary_at: int | None = None,
    ) -> Ticket:
        """Queue `sampling.n` completions of each prompt, to be called in the loop that reads the ticket.

        Args:
            prompts: tokens of each.
            sampling: of each.
            numbers: of each completion, by which its random numbers are keyed.
            canary_at: place of the prompt that the canary draws, if there is a canary still.

        Raises:
            QueueFull: there is no room.
            ValueError: a prompt can never run.
        """
        count = len(prompts) * sampling.n
        with self._changed:
            serving = self.current
            if serving is None or self._stopping:
                raise QueueFull(1)
            if count > self.capacity:
                raise ValueError(
                    f"{count} answers were asked for, this server takes {self.capacity} on at most"
                )
            if self.in_flight + count > self.capacity:
                raise QueueFull(self._retry_after(count))
            other = self.canary or serving
            servings = [other if i == canary_at else serving for i in range(len(prompts))]
            for each, ids in zip(servings, prompts):
                each.engine.check(ids, sampling)
            ticket = Ticket(servings, count)
            self.in_flight += count
            for each in servings:
                each.num_tickets += 1
        self._post(lambda: self._submitted(ticket, prompts, sampling, numbers))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End what has not ended of a ticket before the next step; any thread may ask, and more than once."""
        self._post(lambda: self._close(ticket))

    # --- in the thread ---

    def _post(self, command: Callable[[], None]) -> None:
        with self._changed:
            self._inbox.append(command)
            self._changed.notify()

    def _run(self) -> None:
        while not self._stopping:
            with self._changed:
                while not (self._inbox or self._stopping or self._tickets):
                    self._changed.wait()
                inbox, self._inbox = self._inbox, []
            for command in inbox:
                try:
                    command()
                except Exception:
                    log.exception("a command to the engine failed")  # the thread must go on for the others
            for serving in self._servings:
                self._step(serving)
            self._retire()
        for ticket in dict.fromkeys(self._tickets.values()):
            self._fail(ticket, GenerationFailed("the server stopped"))
        for serving in self._servings:
            serving.engine.close()

    def _submitted(
        self, ticket: Ticket, prompts: Sequence[Sequence[int]], sampling: Sampling, numbers: Sequence[int]
    ) -> None:
        if ticket.closed:
            return
        n = sampling.n
        for i, ids in enumerate(prompts):
            engine = ticket.servings[i].engine
            request = engine.submit(ids, sampling, numbers=numbers[i * n : (i + 1) * n])
            ticket.first_of[request] = i * n
            self._tickets[request] = ticket

    def _step(self, serving: Serving) -> None:
        engine = serving.engine
        if not engine.num_running + engine.num_waiting:
            return
        try:
            drawn = engine.step()
        except Exception as error:
            log.exception("a step of version %s failed", serving.version.name)
            self.fault = f"{type(error).__name__}: {error}"
            lost = dict.fromkeys(self._tickets[request] for request in engine.abort())
            for ticket in lost:
                self._fail(ticket, GenerationFailed("the engine failed; see the server's log"))
            return
        self.fault = None
        of_ticket: dict[Ticket, list[Drawn]] = {}
        for what in drawn:
            of_ticket.setdefault(self._tickets[what.request], []).append(what)
        of_loop: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, list[Drawn]]]] = {}
        for ticket, parts in of_ticket.items():
            of_loop.setdefault(ticket.loop, []).append((ticket, parts))
            ticket.left -= sum(part.completion is not None for part in parts)
            if not ticket.left or any(part.fault is not None for part in parts):
                self._close(ticket)
        for loop, told in of_loop.items():
            _call(loop, told)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        self._close(ticket)
        _call(ticket.loop, [(ticket, error)])

    def _close(self, ticket: Ticket) -> None:
        if ticket.closed:
            return
        ticket.closed = True
        for request, serving in zip(ticket.first_of, ticket.servings):
            serving.engine.cancel(request)
            del self._tickets[request]
        with self._changed:
            self.in_flight -= ticket.num_sequences
            for serving in ticket.servings:
                serving.num_tickets -= 1
        self._ended_at.extend([time.monotonic()] * ticket.num_sequences)

    def _retire(self) -> None:
        with self._changed:
            kept = (self.current, self.canary)
            empty = [s for s in self._servings if s not in kept and not s.num_tickets]
            self._servings = [s for s in self._servings if s not in empty]
        for serving in empty:
            serving.engine.close()

    def _retry_after(self, count: int) -> int:
        """Seconds until so many completions more may have ended, by the pace of the last ones; 1 to 60."""
        ended = list(self._ended_at)
        if len(ended) < 2 or ended[-1] <= ended[0]:
            return 1
        pace = len(ended) / (time.monotonic() - ended[0])
        return min(60, max(1, math.ceil((self.in_flight + count - self.capacity) / pace)))


def _call(loop: asyncio.AbstractEventLoop, told: Sequence[tuple[Ticket, list[Drawn] | Exception]]) -> None:
    """Hand news to tickets in their loop's thread; a loop that is gone has no one waiting."""

    def put() -> None:
        for ticket, what in told:
            ticket.put(what)

    try:
        loop.call_soon_threadsafe(put)
    except RuntimeError:
        log.debug("a loop was closed before its tickets ended")
