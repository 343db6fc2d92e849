"""The seconds of a step's parts, by the clock of the device that computes them.

    seconds/prefill, decode      of a draw, by an engine that tells its parts
    seconds/sampling, rewards    of a draw: all of sampling, and the reward functions
    seconds/logps                of a draw: the reference's log-probs, the critic's values
    seconds/forward              of a step: the passes that are trained on, of DPO and KTO the reference's too; the fused
                                 head makes its gradient here
    seconds/backward, optimizer  of a step; with several ranks backward waits for the others

Each is a mean over ranks. What is left of a step is packing, callbacks and Python.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stages:
    """Takes the time of parts; the same part may come several times.

    Args:
        device: where the parts compute.

    >>> stages = Stages(torch.device("cpu"))
    >>> with stages.of("forward"):
    ...     pass
    >>> list(stages.read()), list(stages.read())
    (['forward'], [])
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str, Any, Any]] = []  # begin and end: seconds, or CUDA events

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """What is done inside the block is of this part."""
        began = self._now()
        yield
        self._marks.append((name, began, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last call. On a GPU it waits for what was started: to be called once a step."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds: dict[str, float] = {}
        for name, began, ended in self._marks:
            # events tell milliseconds
            took = ended - began if isinstance(began, float) else began.elapsed_time(ended) / 1000
            seconds[name] = seconds.get(name, 0.0) + took
        self._marks = []
        return seconds

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # passes are launched ahead of the device
        event.record()
        return event
