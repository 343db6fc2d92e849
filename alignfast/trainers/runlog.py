"""What a run tells: lines and a bar on the terminal, metrics.jsonl, trackers, transformers' log history."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerState

from alignfast.trainers.config import TrainerConfig
from alignfast.trainers.metrics import Meter, MetricsFile, Trackers, tracker_names
from alignfast.trainers.progress import ProgressReport

logger = logging.getLogger("alignfast")


class RunLog:
    """The figures of one run and the places they go to. Files and trackers are the first rank's alone.

    Attributes:
        meter: metrics since the last log.
        num_tokens: tokens trained on, a prompt counted for each of its answers, as TRL counts them.
        seconds: since the start of the run, over all processes that went on with it.
    """

    def __init__(self, config: TrainerConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.tracker_names = tracker_names(config.report_to)
        self.meter = Meter(accelerator.device)
        self.num_tokens = 0
        self.seconds = 0.0
        self._tokens_since = self._steps_since = 0
        self._seconds_since = 0.0
        self._file: MetricsFile | None = None
        self._trackers: Trackers | None = None
        self._progress = ProgressReport(0, 0, bar=False, silent=not accelerator.is_main_process)

    def open(self, stack: ExitStack, num_steps: int, step: int) -> None:
        """Begin to report, until `stack` is closed."""
        config, main = self.config, self.accelerator.is_main_process
        self._progress = stack.enter_context(
            ProgressReport(num_steps, step, bar=not config.disable_tqdm, silent=not main)
        )
        self._began = time.perf_counter() - self.seconds
        if not main:
            return
        config.folder.mkdir(parents=True, exist_ok=True)
        (config.folder / "config.yaml").write_text(config.to_yaml())
        self._file = MetricsFile(config.folder, step)
        run_name = config.run_name or config.folder.resolve().name
        self._trackers = Trackers(self.tracker_names, run_name, config.folder, config.to_dict())
        stack.callback(self._close)

    def _close(self) -> None:
        if self._trackers is not None:
            self._trackers.finish()
        self._trackers = None  # metrics.jsonl still takes what evaluate() gives after the run

    def stages(self, seconds: Mapping[str, float]) -> None:
        """How long parts of the step that is made took on this rank; all ranks have the same parts."""
        ranks = self.accelerator.num_processes
        self.meter.add({f"seconds/{name}": torch.tensor(value / ranks) for name, value in seconds.items()})

    def step_done(self, step: int, tokens: int, seconds: float) -> None:
        """A step is over: it trained on so many tokens and took so long."""
        self.meter.end_step()
        self.num_tokens += tokens
        self._tokens_since += tokens
        self._seconds_since += seconds
        self._steps_since += 1
        self._progress.advance(step)

    def log_steps(self, state: TrainerState, last: Mapping[str, float]) -> dict[str, float]:
        """Report the steps since the last log; to be called on all ranks.

        Args:
            state: where the run is.
            last: figures of the last step alone.
        """
        means = self.meter.read(self.accelerator)
        row = {
            **means,
            **last,
            "num_tokens": self.num_tokens,
            "tokens_per_second": self._tokens_since / max(self._seconds_since, 1e-9),
        }
        left = (state.max_steps - state.global_step) * self._seconds_since / max(1, self._steps_since)
        self.write(state, row, left)
        self.meter.clear()
        self._tokens_since, self._seconds_since, self._steps_since = 0, 0.0, 0
        return row

    def write(self, state: TrainerState, row: Mapping[str, float], seconds_left: float | None = None) -> None:
        """Send one row of figures everywhere."""
        full = {**row, "epoch": state.epoch}
        state.log_history.append({**full, "step": state.global_step})
        self._progress.log(row, seconds_left)
        if self._file is not None:
            self.seconds = time.perf_counter() - self._began
            self._file.write({"step": state.global_step, "time": self.seconds, **full})
        if self._trackers is not None:
            self._trackers.log(full, state.global_step)

    def say(self, text: str) -> None:
        """A line for people, on the first rank."""
        self._progress.say(text)

    def warn(self, text: str) -> None:
        """Something that must not be missed: on the terminal, or in the log where there is none."""
        if self.accelerator.is_main_process:
            logger.warning(text)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; to be called on all ranks."""
        if self._file is not None:
            self.seconds = time.perf_counter() - self._began
        return {
            "meter": self.meter.state(self.accelerator),
            "num_tokens": self.num_tokens,
            "seconds": self.seconds,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.meter.load(state["meter"], self.accelerator.is_main_process)
        self.num_tokens, self.seconds = state["num_tokens"], state["seconds"]
