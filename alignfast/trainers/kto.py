"""Kahneman-Tversky optimisation: the model learns from thumbs, each on one answer, measured against a reference.

The reference point is z0 = max(0, mean over the step's rows of log pi(y'|x) - log ref(y'|x)), y' being the answer of
another row (`alignfast.data.mismatched`). It is the whole step's, in evaluation that of all rows, so that 8 x 1 equals
1 x 8 and two ranks equal one; TRL 1.16 has one a micro-batch. It wants no gradient: a pass before the step's first
micro-batch brings it, in which the reference sees both answers of a prompt, the prompt once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from alignfast.data import THUMBS_FORMATS, Batch, Prepared, Rows, Tree, mismatched, pack, prepare_thumbs
from alignfast.losses import KTO_STATS, kto_loss, kto_metrics
from alignfast.trainers.batches import Counts, Data, Share, longest_row, num_predictions, pack_rows
from alignfast.trainers.config import TrainerConfig, config
from alignfast.trainers.loop import Trainer
from alignfast.trainers.metrics import Metrics
from alignfast.trainers.reference import (
    FrozenModel,
    Reference,
    ReferenceOptions,
    Table,
    answer_sums,
    make_reference,
)

_GOOD_BALANCE = (1, 4 / 3)  # arXiv 2402.01306 eq. 8


@config
class KTOConfig(TrainerConfig):
    """Options of KTOTrainer."""

    learning_rate: float = 1e-6
    """AdamW's step size at its highest."""
    loss_type: str = "kto"
    """`kto`, or `apo_zero_unpaired` (arXiv 2408.06266), which has no reference point."""
    beta: float = 0.1
    """How sharply a reward counts as a gain or a loss, > 0: how much staying near the reference counts."""
    desirable_weight: float = 1.0
    """Factor on the losses of thumbs up. This times their number, over the same of thumbs down, is best in [1, 4/3]."""
    undesirable_weight: float = 1.0
    """Factor on the losses of thumbs down."""
    train_sampling_strategy: str = "random"
    """`random` or `sequential`. (TRL's default: `sequential`, since a drawn order would break its reference point; here it
    then takes answers from other rows than the step's.)"""
    precompute_ref_log_probs: bool = False
    """Compute the reference's log-probs once before training, and keep them on disk: no second model in memory."""

    @property
    def loss_options(self) -> dict[str, Any]:
        """What `kto_loss` takes of these options."""
        names = ("loss_type", "beta", "desirable_weight", "undesirable_weight")
        return {name: getattr(self, name) for name in names}

    @property
    def has_reference_point(self) -> bool:
        """Whether the loss compares with the mean divergence of other rows' answers."""
        return self.loss_type == "kto"

    def __post_init__(self) -> None:
        super().__post_init__()
        kto_loss((), (), torch.zeros(0), num_thumbs=1, **self.loss_options)  # tells a wrong option


class KTOTrainer(Trainer):
    """Align on single answers with a thumb up or down.

    Args:
        model: as of every trainer.
        ref_model: the reference; None as in DPOTrainer.
        args: as of every trainer, like all that follows.

    >>> thumbs = [{"prompt": "2 + 2 =", "completion": " 4", "label": True},
    ...           {"prompt": "2 + 3 =", "completion": " 6", "label": False}]
    >>> trainer = KTOTrainer("my-model", train_dataset=thumbs, beta=0.1)  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    """

    args: KTOConfig
    config_class: ClassVar[type[KTOConfig]] = KTOConfig
    formats = THUMBS_FORMATS
    reference: Reference
    reference_point: Tensor | float = 0.0  # z0 of the step
    ref_logps: dict[tuple[int, ...], Tensor]  # of the step's micro-batches, by their rows

    def __init__(
        self, model: Any, ref_model: Any = None, args: KTOConfig | None = None, *more: Any, **rest: Any
    ) -> None:
        self.ref_model = ref_model
        self.mismatched: dict[int, Data] = {}  # by the number of the first row
        super().__init__(model, args, *more, **rest)
        if self.train_data.trees:
            self._check_balance([tree.label for tree in self.train_data.trees])

    def prepare(self, rows: Rows) -> Prepared:
        """Trees of a prompt with its completion."""
        return prepare_thumbs(
            rows,
            self.processing_class,
            max_length=self.args.max_length,
            truncation_mode=self.args.truncation_mode,
        )

    def count(self, tree: Tree) -> Counts:
        """Thumbs of each kind, and the tokens that carry loss under each."""
        (tokens,), up = num_predictions(tree), int(tree.label)
        return {"up": up, "down": 1 - up, "up_tokens": up * tokens, "down_tokens": (1 - up) * tokens}

    @property
    def modules_in_memory(self) -> list[nn.Module]:
        """The policy, and the reference where it is a second model."""
        return [self.module, *([self.reference.policy] if isinstance(self.reference, FrozenModel) else [])]

    def before_training(self) -> None:
        """Take the reference while the model still is it."""
        options = ReferenceOptions(precompute=self.args.precompute_ref_log_probs)
        self.reference = make_reference(self, self.ref_model, options)
        passes = 0 if isinstance(self.reference, Table) else 1
        self.forwards_beside = 2 * passes + 1 if self.args.has_reference_point else passes

    def before_step(self, data: Data, share: Share) -> None:
        """The reference's log-probs, and the reference point."""
        self.ref_logps = {}
        total = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        for i, run in enumerate(share.runs):
            ref_S = self.reference.answer_logps(self._both(data, run))
            assert ref_S is not None
            self.ref_logps[tuple(data.first + row for row in run)] = ref_S[: len(run)]
            if self.args.has_reference_point:
                ratio_N = self._mismatched_logps(data, run) - ref_S[len(run) :]
                total += ratio_N.double().sum() * (i < share.num_real)
        rows = share.counts["up"] + share.counts["down"]
        self.reference_point = self.accelerator.reduce(total, "sum").div(rows).clamp(min=0)

    def compute_loss(self, batch: Batch, counts: Counts, router_weight: float) -> tuple[Tensor, Metrics]:
        """The loss of thumbs, a mean over the step's."""
        loss_fn = kto_loss(
            batch.lengths,
            batch.labels,
            self.ref_logps[batch.rows],
            self.reference_point,
            num_thumbs=counts["up"] + counts["down"],
            **self.args.loss_options,
        )
        loss, sums = self.policy(
            batch, loss_fn, stats=KTO_STATS, group_sizes=batch.lengths, router_weight=router_weight
        )
        return loss, kto_metrics(sums, *(counts[name] for name in ("up", "down", "up_tokens", "down_tokens")))

    def _read(self, source: Any) -> Data:
        data, args = super()._read(source), self.args
        if not data.trees or not args.has_reference_point:
            return data
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        trees = mismatched(
            data.trees,
            per_step * self.accelerator.num_processes,
            longest_row(args.max_length, self.module.positions),
            keep_end=args.truncation_mode == "keep_end",
        )
        # Rows of their own among all that was read: so the reference's table knows them too.
        self.mismatched[data.first] = Data(trees, data.sources, data.report, data.first + len(data.trees))
        self.all_data.append(self.mismatched[data.first])
        return data

    def _both(self, data: Data, run: list[int]) -> Batch:
        """Each prompt with its own answer and, where the loss wants it, with another row's: all of one, then the other."""
        sources = [data, self.mismatched[data.first]] if self.args.has_reference_point else [data]
        trees = [source.trees[row] for source in sources for row in run]
        numbers = [source.first + row for source in sources for row in run]
        return pack(trees, numbers, self.args.layout, self.pad_id).to(self.accelerator.device)

    def _mismatched_logps(self, data: Data, run: list[int]) -> Tensor:
        """The policy's log-probs of other rows' answers, without dropout, as the reference's are."""
        batch = pack_rows(self.mismatched[data.first], run, self.args.layout, self.pad_id)
        batch, training = batch.to(self.accelerator.device), self.module.training
        self.policy.eval()
        logps_P = self.policy(batch)
        self.policy.train(training)
        return answer_sums(logps_P, batch.lengths)

    def _check_balance(self, labels: Sequence[float]) -> None:
        """Refuse rows of one sign; say where the weights leave the sides out of balance."""
        up = int(sum(labels))
        down = len(labels) - up
        if not up or not down:
            raise ValueError(
                f"all {len(labels)} rows have label {'true' if up else 'false'}, and KTO sets thumbs up against thumbs "
                "down: give rows of both"
            )
        balance = self.args.desirable_weight * up / max(self.args.undesirable_weight * down, 1e-9)
        low, high = _GOOD_BALANCE
        if self.args.has_reference_point and not low <= balance <= high:
            self.log.warn(
                f"{up} thumbs up and {down} down, with these weights {balance:.2f} to 1; arXiv 2402.01306 advises 1 to "
                f"1.33: desirable_weight={self.args.undesirable_weight * down / up:.3g} would give 1"
            )
