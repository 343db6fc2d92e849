"""What a trainer defines, beside its config; the loop does all else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from accelerate import Accelerator
from torch import Tensor

from alignfast.data import Batch, Prepared, Rows, Tree
from alignfast.models.load import load_policy
from alignfast.models.trunk import Trunk
from alignfast.trainers.batches import Counts, Data, Share
from alignfast.trainers.config import TrainerConfig
from alignfast.trainers.estimate import describe_run
from alignfast.trainers.held_out import evaluate_on
from alignfast.trainers.metrics import Metrics
from alignfast.trainers.plan import Plan


class Hooks:
    """The methods that the loop calls, with what most trainers want of them."""

    config_class: ClassVar[type[TrainerConfig]]
    formats: ClassVar[tuple[str, ...]]  # of rows that it trains on
    forwards_beside = 0  # passes over a batch's tokens beside the trained one
    args: Any  # a config_class
    accelerator: Accelerator
    train_data: Data
    plan: Plan

    def load(self, model: Any, peft_config: Any) -> Trunk:
        """The module that is trained, from what the trainer was given."""
        return load_policy(model, peft_config=peft_config, **self.args.loading)

    def prepare(self, rows: Rows) -> Prepared:
        """Rows to trees of tokens."""
        raise NotImplementedError

    def count(self, tree: Tree) -> Counts:
        """What a tree adds to the counts by which loss and metrics are divided."""
        raise NotImplementedError

    def compute_loss(self, batch: Batch, counts: Counts, router_weight: float) -> tuple[Tensor, Metrics]:
        """A batch's share of loss and metrics: sums over the batch, divided by `counts`, which are the whole step's."""
        raise NotImplementedError

    def draw_size(self) -> tuple[int, int]:
        """(rows of the data set that are used at once, steps made of them)."""
        args = self.args
        return (
            args.per_device_train_batch_size
            * args.gradient_accumulation_steps
            * self.accelerator.num_processes,
            1,
        )

    def rows_of(self, step: int) -> tuple[Data, list[int]]:
        """What a step trains on: data, and the rows of it over all ranks. To be called on all ranks."""
        return self.train_data, self.plan.rows(step)

    def describe(self) -> str:
        """What is said before the first step."""
        return describe_run(self)  # type: ignore[arg-type]

    def save_more(self, folder: Path) -> None:
        """Write what else a checkpoint must hold; called on the first rank."""

    def load_more(self, folder: Path) -> None:
        """Read what `save_more` wrote; called on all ranks."""

    def before_step(self, data: Data, share: Share) -> None:
        """What a loss must know of the whole step before its first micro-batch; called on all ranks, in evaluation too,
        where the step is all rows."""

    def after_evaluation(self, data: Data) -> dict[str, float]:
        """Figures of an evaluation that are no sums over batches; called on all ranks."""
        return {}

    def after_log(self) -> None:
        """What else is told when the steps since the last log are; called on all ranks."""

    def before_training(self) -> None:
        """What must happen while the model still is as it was given; called before it is wrapped or loaded."""

    def evaluate_on(self, data: Data) -> dict[str, float]:
        """Figures of one set of rows. To be called on all ranks."""
        return evaluate_on(self, data)  # type: ignore[arg-type]
