"""A writer in a process of its own, which shares no interpreter with a server's event loop.

    thread of a Writer  --- the works of a batch, pickled --->  child: writer.commit
                        <-- what became of each, pickled ---

To take a request, and to write its vote, is Python on both sides, so that in one interpreter the two wait for each other:
apart they use two cores. What is sent must be picklable: a module's function with its arguments.

The child ends when its pipe does, whatever became of the process that started it. A signal to a whole group (Ctrl-C, a
service manager's SIGTERM) leaves it alone, for the server goes on to answer what it has taken.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from alignfast.online.store.database import StoreError, connect
from alignfast.online.store.writer import Outcome, Work, commit


class Apart:
    """The child, started anew where it has ended.

    Args:
        url: of the database, as `database.connect` takes it.

    Raises:
        StoreError: the child can't start; its own words are on stderr.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._child = self._start()

    def commit(self, batch: Sequence[Work]) -> list[Outcome]:
        """`writer.commit`, done by the child; one thread at a time may ask.

        Raises:
            StoreError: the child ended under it; whether the commit was made is not known.
        """
        asked = pickle.dumps(list(batch))
        if self._child.poll() is not None:
            self._child = self._start()
        outcomes: list[Outcome] = self._ask(self._child, asked)
        return outcomes

    def close(self) -> None:
        """End the child, after what it writes; a second call does nothing."""
        self._end(self._child)

    def _start(self) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import main; main()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        # by the pipe and not as a word of the command, which every user of the machine may read
        self._ask(child, pickle.dumps(self._url))
        return child

    def _ask(self, child: subprocess.Popen[bytes], message: bytes) -> Any:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(message)
            child.stdin.flush()
            return pickle.load(child.stdout)
        except (OSError, EOFError) as error:
            self._end(child)
            raise StoreError(
                f"the process that writes to the database ended (exit code {child.returncode}), and whether it kept what it "
                "was sent is not known: send it again, with the same Idempotency-Key"
            ) from error

    @staticmethod
    def _end(child: subprocess.Popen[bytes]) -> None:
        assert child.stdin is not None
        assert child.stdout is not None
        with suppress(OSError):  # what its buffer holds can't be sent any more
            child.stdin.close()
        child.wait()
        child.stdout.close()


def main() -> None:
    """The child: an address, then batches, until the pipe ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    asked, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anybody prints is not an answer
    engine = connect(pickle.load(asked), create=False)
    _send(answers, pickle.dumps(None))
    with suppress(EOFError, BrokenPipeError):  # who asked has ended
        while True:
            batch = pickle.load(asked)
            try:
                outcomes = commit(engine, batch)
            except Exception as error:  # of the commit
                outcomes = [Outcome(None, error)] * len(batch)
            _send(answers, _pickled(outcomes))


def _send(answers: Any, message: bytes) -> None:
    answers.write(message)
    answers.flush()


def _pickled(outcomes: Sequence[Outcome]) -> bytes:
    return pickle.dumps(
        [one if one.error is None else Outcome(None, _sendable(one.error)) for one in outcomes]
    )


def _sendable(error: BaseException) -> BaseException:
    """The error, or the words that it says where its class can't be made again on the other side."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return StoreError(f"{type(error).__name__}: {error}")
    return error
