"""Direct preference optimisation: the model learns to prefer the chosen answer, measured against a reference."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from alignfast.data import PREFERENCE_FORMATS, Batch, Prepared, Rows, Tree, prepare_preference
from alignfast.kernels._pairwise import LOSSES
from alignfast.losses import dpo_counts, dpo_groups, dpo_loss, dpo_stats
from alignfast.trainers.batches import Counts, num_predictions
from alignfast.trainers.config import TrainerConfig, config
from alignfast.trainers.loop import Trainer
from alignfast.trainers.metrics import Metrics, means
from alignfast.trainers.reference import (
    FrozenModel,
    NoReference,
    Reference,
    ReferenceOptions,
    Table,
    make_reference,
)


@config
class DPOConfig(TrainerConfig):
    """Options of DPOTrainer."""

    learning_rate: float = 1e-6
    """AdamW's step size at its highest."""
    beta: float = 0.1
    """Weight of the implicit reward, > 0: how much staying near the reference counts."""
    loss_type: str | list[str] = "sigmoid"
    """A loss of `alignfast.kernels.preference_loss`, or several; among several, `sft` adds the chosen's likelihood."""
    loss_weights: list[float] | None = None
    """A factor for each of them; None is 1 for each."""
    label_smoothing: float = 0.0
    """Probability in [0, 0.5) that a preference is the wrong way round."""
    f_divergence_type: str = "reverse_kl"
    """Distance from the reference: reverse_kl, forward_kl, js_divergence, alpha_divergence."""
    f_alpha_divergence_coef: float = 0.5
    """Alpha of alpha_divergence."""
    discopop_tau: float = 0.05
    """Temperature of the discopop loss, > 0."""
    simpo_gamma: float = 0.5
    """Target margin of the simpo loss."""
    use_weighting: bool = False
    """Weigh pairs by how likely the model is to write them (WPO, arXiv 2406.11827)."""
    ld_alpha: float | None = None
    """Weight in [0, 1] of tokens beyond the shorter answer's length (LD-DPO, arXiv 2409.06411)."""
    precompute_ref_log_probs: bool = False
    """Compute the reference's log-probs once before training, and keep them on disk: no second model in memory."""

    @property
    def loss_options(self) -> dict[str, Any]:
        """What `dpo_loss` takes of these options."""
        names = (
            "loss_type",
            "loss_weights",
            "use_weighting",
            "ld_alpha",
            "beta",
            "label_smoothing",
            "backend",
        )
        more = ("f_divergence_type", "f_alpha_divergence_coef", "discopop_tau", "simpo_gamma")
        return {name: getattr(self, name) for name in names + more}

    @property
    def reference_options(self) -> ReferenceOptions:
        """What of these options bears on the reference."""
        names = [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type
        needed = any(LOSSES[name].reference for name in names if name != "sft")
        return ReferenceOptions(needed, self.precompute_ref_log_probs, self.ld_alpha)

    def __post_init__(self) -> None:
        super().__post_init__()
        # tells a wrong option
        dpo_loss((), None, None, num_pairs=1, num_chosen_tokens=1, **self.loss_options)


class DPOTrainer(Trainer):
    """Align on pairs of a chosen and a rejected answer.

    Args:
        model: as of every trainer.
        ref_model: the reference; None is the model as given: its base where `peft_config` adds adapters, the base with
            a copy of the adapters where it came with some, else a frozen copy, or no second model at all with
            `precompute_ref_log_probs=True`.
        args: as of every trainer, like all that follows.

    >>> pairs = [("Prompt 1", "Preferred", "Dispreferred")]
    >>> trainer = DPOTrainer(model=model, tokenizer=tokenizer, dataset=pairs, beta=0.1)  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    """

    args: DPOConfig
    config_class = DPOConfig
    formats = PREFERENCE_FORMATS
    reference: Reference

    def __init__(
        self, model: Any, ref_model: Any = None, args: DPOConfig | None = None, *more: Any, **rest: Any
    ) -> None:
        self.ref_model = ref_model
        super().__init__(model, args, *more, **rest)

    def prepare(self, rows: Rows) -> Prepared:
        """Trees of a prompt with its chosen and its rejected answer."""
        return prepare_preference(
            rows,
            self.processing_class,
            max_length=self.args.max_length,
            truncation_mode=self.args.truncation_mode,
        )

    def count(self, tree: Tree) -> Counts:
        """Pairs, and the tokens of each side that carry loss."""
        chosen, rejected = num_predictions(tree)
        return {"pairs": 1, "chosen": chosen, "rejected": rejected}

    @property
    def modules_in_memory(self) -> list[nn.Module]:
        """The policy, and the reference where it is a second model."""
        return [self.module, *([self.reference.policy] if isinstance(self.reference, FrozenModel) else [])]

    def before_training(self) -> None:
        """Take the reference while the model still is it."""
        self.reference = make_reference(self, self.ref_model, self.args.reference_options)
        self.forwards_beside = int(not isinstance(self.reference, (NoReference, Table)))

    def compute_loss(self, batch: Batch, counts: Counts, router_weight: float) -> tuple[Tensor, Metrics]:
        """The preference loss, a mean over the step's pairs."""
        ref_S = self.reference.answer_logps(batch)
        refs = (None, None) if ref_S is None else (ref_S[::2], ref_S[1::2])
        loss_fn = dpo_loss(
            batch.lengths,
            *refs,
            num_pairs=counts["pairs"],
            num_chosen_tokens=counts["chosen"],
            **self.args.loss_options,
        )
        loss, sums = self.policy(
            batch,
            loss_fn,
            stats=dpo_stats(self.args.use_weighting),
            group_sizes=dpo_groups(batch.lengths, self.args.loss_type),
            router_weight=router_weight,
        )
        return loss, means(sums, dpo_counts(counts["pairs"], counts["chosen"], counts["rejected"]))
