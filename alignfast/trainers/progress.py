"""What a person sees while training: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_SHOWN = (
    "loss",
    "eval_loss",
    "rewards/accuracies",
    "eval_rewards/accuracies",
    "rewards/margins",
    "reward",
    "eval_reward",
    "kl",
    "objective/kl",
    "grad_norm",
)


class ProgressReport:
    """Progress of one run. Silent on all ranks but the first.

    Args:
        num_steps: steps of the whole run.
        step: steps done before this process began.
        bar: draw a bar where standard error is a terminal.
        silent: say nothing at all.
    """

    def __init__(self, num_steps: int, step: int, bar: bool, silent: bool) -> None:
        self.num_steps, self.step, self.silent = num_steps, step, silent
        self.console = Console(file=sys.stderr, quiet=silent, highlight=False)
        self.bar = None
        if bar and not silent and self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[now]}"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            )  # fmt: skip
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task("training", total=num_steps, completed=step, now="")

    def __enter__(self) -> ProgressReport:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, step: int) -> None:
        """A step is done."""
        self.step = step
        if self.bar is not None:
            self.bar.update(self.task, completed=step)

    def say(self, text: str) -> None:
        """A line that stays, above the bar."""
        self.console.print(text, markup=False, soft_wrap=True)

    def log(self, metrics: Mapping[str, float], seconds_left: float | None) -> None:
        """Show the metrics of a log."""
        words = [f"{name} {metrics[name]:.4g}" for name in _SHOWN if name in metrics]
        if "tokens_per_second" in metrics:
            words.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
        if self.bar is not None:
            self.bar.update(self.task, now="  ".join(words))
            return
        if not words:
            return
        if seconds_left is not None:
            words.append(f"{duration(seconds_left)} left")
        self.say(f"step {self.step}/{self.num_steps}  " + "  ".join(words))


def duration(seconds: float) -> str:
    """Seconds as a person writes them.

    >>> duration(7), duration(75), duration(7500)
    ('7 s', '1:15 min', '2:05 h')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, unit = (seconds, "min") if seconds < 3600 else (seconds / 60, "h")
    return f"{int(minutes) // 60}:{int(minutes) % 60:02d} {unit}"
