"""Calls of other people's functions with a time limit, on threads and in an event loop of our own.

Not done here: what the calls are for, and what their answers mean.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextvars import copy_context
from typing import Any, TypeVar

import torch

_MOST_STRAYS = 32  # a function that hangs at every call would fill the machine with threads
_T = TypeVar("_T")


class TooLong(Exception):
    """A call did not come back in time."""


class Threads:
    """Calls of one function, one at a time, each on a thread that can be given up.

    A thread takes over the caller's context variables, grad mode and CUDA device. It is a daemon: one that was given
    up does not keep the process from ending.
    """

    def __init__(self) -> None:
        self._strays: list[threading.Thread] = []

    def run(self, call: Callable[[], _T], timeout: float | None) -> _T:
        """What the call gives.

        Args:
            call: takes no arguments.
            timeout: seconds; None waits for ever.

        Raises:
            TooLong: it took longer, or too many earlier calls still run.
            Exception: what the call raised; what would end the process (SystemExit) becomes a RuntimeError.
        """
        self._strays = [thread for thread in self._strays if thread.is_alive()]
        if len(self._strays) >= _MOST_STRAYS:
            raise TooLong(f"not called: {len(self._strays)} earlier calls that took too long still run")
        answers: list[_T] = []
        errors: list[BaseException] = []
        context, grad = copy_context(), torch.is_grad_enabled()
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

        def work() -> None:
            try:
                torch.set_grad_enabled(grad)
                if device is not None:
                    torch.cuda.set_device(device)
                answers.append(context.run(call))
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=work, daemon=True, name="alignfast reward")
        thread.start()
        thread.join(timeout)
        if errors:
            raise _harmless(errors[0])
        if not answers:
            self._strays.append(thread)
            raise TooLong(f"took longer than {timeout:.3g} s")
        return answers[0]


class EventLoop:
    """An event loop that runs on a thread of its own until it is closed or forgotten.

    So coroutines run whether or not the caller stands in a loop already, and what belongs to a loop (the connections of
    a client) lives from call to call.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_run_for_ever, args=(self._loop,), daemon=True)
        self._thread.start()
        self.close = weakref.finalize(self, _stop, self._loop)

    def submit(self, coroutine: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Start a coroutine; its future may be waited for in any other thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)


async def in_time(call: Callable[[], Awaitable[_T]], timeout: float | None) -> _T:
    """What an async call gives; it is cancelled where it takes longer than `timeout` seconds.

    Raises:
        TooLong: it took longer.
        Exception: what the call raised; what would end the process (SystemExit) becomes a RuntimeError.
    """

    async def harmless() -> _T:
        try:
            return await call()
        except (SystemExit, KeyboardInterrupt) as error:  # would end the loop
            raise _harmless(error) from error

    # Not wait_for: before Python 3.11 nothing tells its time-out from one that the call raised.
    task = asyncio.ensure_future(harmless())
    done, _ = await asyncio.wait({task}, timeout=timeout)
    if not done:
        task.cancel()
        raise TooLong(f"took longer than {timeout:.3g} s")
    if task.cancelled():
        raise RuntimeError("cancelled itself")
    return task.result()


def _harmless(error: BaseException) -> Exception:
    return error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")


def _run_for_ever(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()
    pending = asyncio.all_tasks(loop)
    for task in pending:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
    loop.close()


def _stop(loop: asyncio.AbstractEventLoop) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(loop.stop)
