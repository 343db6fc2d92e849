"""Leaving well: SIGTERM and SIGINT finish the step, write a checkpoint and end the process with a code of their own."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import torch
from accelerate import Accelerator

INTERRUPTED_EXIT_CODE = 75  # sysexits.h: try again later


class TrainingInterrupted(SystemExit):
    """Raised by `train()` when a signal asked it to stop and the checkpoint is written.

    Uncaught it ends the process with `INTERRUPTED_EXIT_CODE`, without a traceback.

    Attributes:
        checkpoint: the folder to go on from.
    """

    def __init__(self, checkpoint: str) -> None:
        super().__init__(INTERRUPTED_EXIT_CODE)
        self.checkpoint = checkpoint


class NonFiniteError(RuntimeError):
    """Several steps in a row had a loss or gradient that is no number; the weights are those before them."""


class EvaluationStopped(Exception):
    """Leaves an evaluation that a signal asked to stop; the loop then saves and ends."""


class StopRequest:
    """Notes SIGTERM and SIGINT inside a `with` block instead of dying of them; more than one is as good as one.

    In a thread that is not the main one nothing is caught: Python delivers signals to the main thread alone.
    """

    _signals = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def of_any_rank(self, accelerator: Accelerator) -> bool:
        """Whether a signal came to any rank, so that all leave together; to be called on all ranks."""
        if accelerator.num_processes == 1:
            return self.received is not None
        received = torch.tensor(float(self.received is not None), device=accelerator.device)
        return bool(accelerator.reduce(received, "sum") > 0)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {name: signal.signal(name, self._note) for name in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self._previous.items():
            signal.signal(name, handler)  # type: ignore[arg-type]
        self.received = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
