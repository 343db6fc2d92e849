"""Cross-entropy fused with the head, as PyTorch and Liger define it; what `compat.torch` and `compat.liger` share.

    nll_t  = (1 - e) w_t (lse - x_t) + e (lse - mean_v x_v) + z lse^2        e label smoothing, z lse_square_scale
    mean   = sum_t nll_t / sum_t w_t        over the rows whose target is not ignored; w is 1 without class weights

Letters: T rows, D width, V vocabulary.
Not done here: class weights together with smoothing, whose sum over the vocabulary no statistic holds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from alignfast.kernels import Stats, linear_loss
from alignfast.kernels.linear_loss import Metrics
from alignfast.kernels.linear_token_logps import linear_token_stats

REDUCTIONS = ("mean", "sum", "none")


class CrossEntropy(NamedTuple):
    """How rows are scored."""

    class_weight_V: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    lse_square_scale: float = 0.0
    softcap: float | None = None
    token_scaling: bool = False  # each row's loss times its probability, a constant
    accuracy: bool = False  # count rows whose target is the likeliest class
    chunk_rows: int | None = None

    def check(self, reduction: str) -> None:
        """Refuse what is out of range.

        Raises:
            ValueError: names the option.
        """
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction={reduction!r} is not one of {', '.join(REDUCTIONS)}")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {self.label_smoothing}")
        if self.class_weight_V is not None and (self.label_smoothing or self.token_scaling):
            raise ValueError(
                "class weights together with label smoothing or token scaling are not fused; take one of them, or "
                "make the logits and call torch.nn.functional.cross_entropy"
            )

    @property
    def stats(self) -> tuple[str, ...]:
        """The statistics that the loss reads."""
        asked = {"lse": self.label_smoothing or self.lse_square_scale, "mean_logit": self.label_smoothing}
        return (
            "logps",
            *(name for name, use in asked.items() if use),
            *(("is_top1",) if self.accuracy else ()),
        )

    def rows(self, stats: Stats, target_T: Tensor) -> tuple[Tensor, Tensor]:
        """(loss_T, z_loss_T), 0 where the target is ignored; `z_loss_T` is part of the loss."""
        loss_T = -stats.logps
        if self.class_weight_V is not None:
            loss_T = loss_T * self.weights(target_T).to(loss_T.dtype)
        if self.label_smoothing:
            e = self.label_smoothing
            loss_T = (1 - e) * loss_T + e * (stats.lse - stats.mean_logit)
        if self.token_scaling:
            loss_T = loss_T * stats.logps.detach().exp()
        if not self.lse_square_scale:
            return loss_T, torch.zeros_like(loss_T)
        z_loss_T = self.lse_square_scale * stats.lse.square()
        return loss_T + z_loss_T, z_loss_T

    def weights(self, target_T: Tensor) -> Tensor:
        """What each row counts in a mean."""
        counts_T = target_T != self.ignore_index
        if self.class_weight_V is None:
            return counts_T
        return torch.where(counts_T, self.class_weight_V[torch.where(counts_T, target_T, 0)], 0)


def fused_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    bias_V: Tensor | None,
    how: CrossEntropy,
    reduction: str,
    divisor: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """(loss, metrics): the loss of shape () or, without a reduction, (T,); metrics are reduced likewise.

    A reduced loss has its gradient by the time it is returned, in three GEMMs; one that is not takes four.

    Args:
        hidden_TD: hidden states.
        weight_VD: the head.
        target_T: int64 class of each row.
        bias_V: bias of the head.
        how: how rows are scored.
        reduction: mean, sum or none.
        divisor: of a mean; None is the sum of the rows' weights.

    Raises:
        ValueError: shapes, types or options do not fit.
    """
    how.check(reduction)
    if how.token_scaling and how.lse_square_scale:
        raise ValueError("use_token_scaling and lse_square_scale together are not fused; take one of them")
    keywords = {"bias_V": bias_V, "softcap": how.softcap, "ignore_index": how.ignore_index}
    if reduction == "none":
        stats = linear_token_stats(hidden_TD, weight_VD, target_T, stats=how.stats, **keywords)  # type: ignore[arg-type]
        loss_T, z_loss_T = how.rows(stats, target_T)
        metrics = {"z_loss": z_loss_T.detach()}
        return loss_T, metrics | ({"accuracy": stats.is_top1} if how.accuracy else {})
    if reduction == "mean" and divisor is None:
        divisor = how.weights(target_T).sum()

    def loss_fn(stats: Stats, rows: slice) -> tuple[Tensor, Metrics]:
        loss_T, z_loss_T = how.rows(stats, target_T[rows])
        sums = {"z_loss": z_loss_T.sum()} | ({"accuracy": stats.is_top1.sum()} if how.accuracy else {})
        loss = loss_T.sum()
        if divisor is None:
            return loss, sums
        return loss / divisor, sums | {"z_loss": sums["z_loss"] / divisor}

    return linear_loss(
        hidden_TD, weight_VD, target_T, loss_fn, stats=how.stats, chunk_rows=how.chunk_rows, **keywords,  # type: ignore[arg-type]
    )  # fmt: skip
