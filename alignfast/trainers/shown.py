"""Completions of the last draw for people to read: in samples.jsonl at each log, and on the terminal where asked."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from alignfast.trainers.experience import Drawn
from alignfast.trainers.metrics import lines_up_to

if TYPE_CHECKING:
    from alignfast.trainers.on_policy import OnPolicyTrainer

SAMPLES = "samples.jsonl"
_KEPT = 4  # completions of a draw that the file gets


class Shown:
    """The first rank's affair alone.

    Args:
        trainer: whose draws these are.
    """

    def __init__(self, trainer: OnPolicyTrainer) -> None:
        self.trainer = trainer
        self.rows: list[dict[str, Any]] = []  # of the last draw, until a log tells them

    def begin(self, step: int) -> None:
        """A run begins, or goes on after `step`: what the file says of later steps is of a run that is given up."""
        if self.trainer.accelerator.is_main_process:
            self.rows = []
            file = self.trainer.args.folder / SAMPLES
            if file.exists():
                file.write_text("".join(line + "\n" for line in lines_up_to(file, step)))

    def take(self, drawn: Sequence[Drawn], rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
        """A draw, whose completions continue the prompts of `rows`, by their groups; `names` are the rewards'."""
        args = self.trainer.args
        number = max(_KEPT, args.num_completions_to_print or len(drawn)) if args.log_completions else _KEPT
        self.rows = [
            {
                "prompt": rows[of.group]["prompt"],
                "completion": of.completion.text,
                "reward": _number(of.reward),
                "rewards": {name: _number(reward) for name, reward in zip(names, of.rewards)},
            }
            for of in drawn[:number]
        ]

    def tell(self) -> None:
        """Write what was drawn since the last log, and print it where asked."""
        trainer, args, told = self.trainer, self.trainer.args, self.rows
        self.rows = []
        if not told or not trainer.accelerator.is_main_process:
            return
        args.folder.mkdir(parents=True, exist_ok=True)
        with (args.folder / SAMPLES).open("a") as lines:
            for row in told[:_KEPT]:
                line = {"step": trainer.state.global_step, **row}
                lines.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        if args.log_completions:
            for row in told[: args.num_completions_to_print]:
                trainer.log.say(
                    f"prompt: {row['prompt']}\n  completion: {row['completion']}\n  reward: {row['reward']}"
                )


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
