"""Reward models: a head learns from pairs or rankings which answer people like better."""

from __future__ import annotations

import json
import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from alignfast.data import RANKING_FORMATS, Batch, Prepared, Rows, Tree, prepare_ranking
from alignfast.evaluation.calibration import calibration
from alignfast.losses import bootstrap_counts, pair_leads, reward_counts, reward_loss
from alignfast.models import RewardModel, load_reward_model
from alignfast.trainers.batches import Counts, Data, Share
from alignfast.trainers.config import TrainerConfig, config
from alignfast.trainers.loop import Trainer
from alignfast.trainers.metrics import Metrics, means

CALIBRATION = "calibration.json"  # of the last evaluation, for the report


@config
class RewardConfig(TrainerConfig):
    """Options of RewardTrainer."""

    learning_rate: float = 1e-4
    """AdamW's step size at its highest."""
    center_rewards_coefficient: float | None = None
    """How much rewards are held around 0 (arXiv 2312.09244 eq. 2), 0.01 for instance; None is not at all."""
    num_heads: int = 1
    """Heads of the model, >= 1. Several are an ensemble on one trunk: the reward is their mean, and where they disagree the
    model has not seen enough."""
    bootstrap: bool = True
    """Each of several heads is trained on a draw of the rows of its own, with replacement. Otherwise all on all rows."""
    truncation_mode: str = "drop"
    """`drop` leaves a row out of which a sequence is longer than max_length, since the reward is read at its end;
    `keep_start` and `keep_end` cut it."""
    truncation_modes: ClassVar[tuple[str, ...]] = ("drop", "keep_start", "keep_end")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.num_heads >= 1, "num_heads", "at least 1")
        self._needs(self.num_heads > 1, "num_heads of 2 or more", "bootstrap")
        coefficient = self.center_rewards_coefficient
        self._require(
            coefficient is None or coefficient >= 0, "center_rewards_coefficient", "at least 0, or None"
        )


class RewardTrainer(Trainer):
    """Train a reward model on pairs of a chosen and a rejected answer, or on rankings.

    Args:
        model: folder or hub name of a causal language model, which gets a fresh head, or of a sequence classification
            model; or such a model as an object, with or without PEFT.
        args: as of every trainer, like all that follows.

    >>> rows = [{"prompt": "2 + 2 =", "ranking": [" 4", " 5", " a lot"]}]
    >>> trainer = RewardTrainer("my-model", train_dataset=rows, max_steps=100)  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    """

    args: RewardConfig
    config_class: ClassVar[type[RewardConfig]] = RewardConfig
    formats = RANKING_FORMATS
    module: RewardModel

    def __init__(self, model: Any, args: RewardConfig | None = None, *more: Any, **rest: Any) -> None:
        super().__init__(model, args, *more, **rest)
        args, tokenizer = self.args, self.processing_class
        if self.module.fresh_head:
            self.log.say(
                f"a fresh head of {_outputs(args.num_heads)} was added to {model}: it knows nothing yet"
            )
        own = self.module.base.config.get_text_config().pad_token_id
        if self.module.set_pad_token(tokenizer.pad_token_id, own, eos_id=tokenizer.eos_token_id) is None:
            self.log.warn(
                "the tokenizer has no pad token of its own, so transformers' forward of the saved model takes one sequence at "
                "a time: set tokenizer.pad_token to a token that ends no sequence if it shall take batches"
            )
        seed = args.seed if args.data_seed is None else args.data_seed
        drawn = args.bootstrap and args.num_heads > 1
        rows = len(self.train_data.trees)
        self.drawn_NH = bootstrap_counts(rows, args.num_heads, seed) if drawn and rows else None
        self.leads_Q = torch.zeros(0)  # of all pairs of the rows that are evaluated
        self.starts: dict[int, int] = {}  # first pair of each of those rows, by the row's number

    def load(self, model: Any, peft_config: Any) -> RewardModel:
        """The reward model."""
        return load_reward_model(
            model, num_heads=self.args.num_heads, peft_config=peft_config, **self.args.loading
        )

    def prepare(self, rows: Rows) -> Prepared:
        """Trees of a prompt with its answers, best first."""
        return prepare_ranking(
            rows,
            self.processing_class,
            max_length=self.args.max_length,
            truncation_mode=self.args.truncation_mode,
        )

    def count(self, tree: Tree) -> Counts:
        """Rows, answers, and pairs of answers."""
        return {"rows": 1, "answers": len(tree.answers), "pairs": _num_pairs(tree)}

    def compute_loss(self, batch: Batch, counts: Counts, router_weight: float) -> tuple[Tensor, Metrics]:
        """The negative log-likelihood of the rankings, a mean over the step's rows and over heads."""
        drawn = self.drawn_NH if self.module.training else None
        found: list[Tensor] = []

        def loss_fn(rewards_SH: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            found.append(rewards_SH.detach())
            return reward_loss(
                rewards_SH,
                batch.num_answers,
                batch.labels,
                num_rows=counts["rows"],
                center_rewards_coefficient=self.args.center_rewards_coefficient,
                weight_NH=None if drawn is None else drawn[list(batch.rows)],
            )

        loss, sums = self.policy(batch, loss_fn)
        if not self.module.training:
            self._note_leads(batch, found[0].mean(1))
        return loss, means(sums, reward_counts(counts["pairs"], counts["answers"]))

    def before_step(self, data: Data, share: Share) -> None:
        """In evaluation, a place for the lead of every pair."""
        if self.module.training:
            return
        starts = np.cumsum([0, *map(_num_pairs, data.trees)]).tolist()
        self.starts = {data.first + row: start for row, start in enumerate(starts[:-1])}
        self.leads_Q = torch.full((starts[-1],), torch.nan, device=self.accelerator.device)

    def after_evaluation(self, data: Data) -> dict[str, float]:
        """Accuracy's interval and the calibration error; the bins go to a file, for the report."""
        # a row is on one rank, or fills up
        leads_Q = self.accelerator.gather(self.leads_Q[None]).nanmean(0).cpu()
        if not leads_Q.isfinite().all():
            return dict.fromkeys(("accuracy_low", "accuracy_high", "ece"), math.nan)
        found = calibration(
            leads_Q.numpy(), [tree.prompt for tree in data.trees for _ in range(_num_pairs(tree))]
        )
        if self.accelerator.is_main_process:
            self.args.folder.mkdir(parents=True, exist_ok=True)
            (self.args.folder / CALIBRATION).write_text(json.dumps(found.to_dict()))
        _, low, high = found.accuracy
        return {"accuracy_low": low, "accuracy_high": high, "ece": found.ece}

    def _note_leads(self, batch: Batch, rewards_S: Tensor) -> None:
        for number, rewards_K in zip(batch.rows, rewards_S.split(batch.num_answers)):
            lead_Q = pair_leads(rewards_K[None])[0]
            self.leads_Q[self.starts[number] :][: len(lead_Q)] = lead_Q


def _num_pairs(tree: Tree) -> int:
    return len(tree.answers) * (len(tree.answers) - 1) // 2


def _outputs(number: int) -> str:
    return "1 output" if number == 1 else f"{number} outputs"
