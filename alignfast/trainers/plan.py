"""Which rows make up which step: a function of the seed alone, so that a run goes on anywhere without replaying."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from transformers import TrainerState

from alignfast.trainers.config import TrainerConfig, steps_of


@dataclass(frozen=True)
class Plan:
    """The steps of a run. An epoch is a permutation drawn from (seed, epoch); its last step may be short.

    Attributes:
        num_rows: rows of the data set.
        rows_per_step: rows of a full step over all ranks; of prompts, those that are sampled from at once.
        num_steps: steps of the whole run.
        seed: of the order.
        shuffled: otherwise rows come in their own order.
        drop_last: an epoch's last rows are left out where they fill no step.
        steps_per_draw: steps that train on what was made of the same rows.

    >>> plan = Plan(num_rows=5, rows_per_step=2, num_steps=4, seed=0, shuffled=False, drop_last=False)
    >>> [plan.rows(step) for step in range(4)]
    [[0, 1], [2, 3], [4], [0, 1]]
    """

    num_rows: int
    rows_per_step: int
    num_steps: int
    seed: int
    shuffled: bool
    drop_last: bool
    steps_per_draw: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass over the rows, >= 1."""
        return self.steps_per_draw * steps_per_epoch(self.num_rows, self.rows_per_step, self.drop_last)

    def rows(self, step: int) -> list[int]:
        """Rows of a step, counted from 0, over all ranks."""
        epoch, position = divmod(step, self.steps_per_epoch)
        position //= self.steps_per_draw
        order = np.arange(self.num_rows)
        if self.shuffled:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.num_rows)
        first = position * self.rows_per_step
        return order[first : first + self.rows_per_step].tolist()

    def epoch(self, steps_done: int) -> float:
        """Passes over the data after so many steps."""
        return steps_done / self.steps_per_epoch

    def ends_epoch(self, steps_done: int) -> bool:
        """Whether so many steps make whole epochs."""
        return steps_done % self.steps_per_epoch == 0


def steps_per_epoch(num_rows: int, rows_per_step: int, drop_last: bool) -> int:
    """Steps of one pass over the rows.

    Raises:
        ValueError: the rows don't fill one step and `drop_last` is on, or there are none.
    """
    steps = num_rows // rows_per_step if drop_last else math.ceil(num_rows / rows_per_step)
    if not steps:
        raise ValueError(
            f"{num_rows} rows make no step of {rows_per_step} rows; give more data, or lower "
            "per_device_train_batch_size or gradient_accumulation_steps"
        )
    return steps


def lay_out(
    config: TrainerConfig, num_rows: int, rows_per_step: int, steps_per_draw: int, state: TrainerState
) -> Plan:
    """The plan that a config asks for; `state` is told its length and the intervals of logs and saves."""
    per_epoch = steps_per_draw * steps_per_epoch(num_rows, rows_per_step, config.dataloader_drop_last)
    num_steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * per_epoch)
    state.max_steps, state.num_train_epochs = num_steps, math.ceil(num_steps / per_epoch)
    state.logging_steps = steps_of(config.logging_steps, num_steps)
    state.eval_steps = steps_of(config.eval_steps or config.logging_steps, num_steps)
    state.save_steps = steps_of(config.save_steps, num_steps)
    return Plan(
        num_rows=num_rows,
        rows_per_step=rows_per_step,
        num_steps=num_steps,
        seed=config.seed if config.data_seed is None else config.data_seed,
        shuffled=config.train_sampling_strategy == "random",
        drop_last=config.dataloader_drop_last,
        steps_per_draw=steps_per_draw,
    )
