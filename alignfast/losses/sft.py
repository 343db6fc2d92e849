"""Supervised fine-tuning: the likelihood of the tokens that carry loss.

    nll: -logp        dft: -p logp, p held fixed        both divided by the tokens of the whole step

Letter: P predictions, one row of the head each.
"""

from __future__ import annotations

from torch import Tensor

from alignfast.kernels.linear_loss import LossFn, Metrics, Stats

SFT_STATS = ("logps", "entropy", "is_top1")


def sft_loss(num_tokens: int, *, loss_type: str = "nll") -> LossFn:
    """The loss of supervised fine-tuning, for `linear_loss`; additive over any division of the rows.

    Args:
        num_tokens: predictions of the whole step: all micro-batches, all ranks.
        loss_type: `nll`, or `dft` (Dynamic Fine-Tuning, arXiv 2508.05629), where a token counts as much as
            the policy already expects it.

    Returns:
        `loss_fn(stats, rows) -> (loss, metrics)` on the statistics `SFT_STATS`. Metrics bear TRL's names and
        are sums, which `sft_counts` turns into TRL's means.

    Raises:
        ValueError: `loss_type` is unknown, or `num_tokens` is below 1.
    """
    if loss_type not in ("nll", "dft"):
        raise ValueError(f"loss_type={loss_type!r} is not one of nll, dft")
    if num_tokens < 1:
        raise ValueError(f"a step needs at least one token that carries loss, got num_tokens={num_tokens}")

    def loss_fn(stats: Stats, rows: slice) -> tuple[Tensor, Metrics]:
        logps_P = stats.logps
        if loss_type == "dft":
            logps_P = logps_P.detach().exp() * logps_P
        metrics = {"entropy": stats.entropy.sum(), "mean_token_accuracy": stats.is_top1.sum()}
        return -logps_P.sum() / num_tokens, metrics

    return loss_fn


def sft_counts(num_tokens: int) -> dict[str, int]:
    """What each summed metric is divided by: the predictions of the whole step."""
    return {"entropy": num_tokens, "mean_token_accuracy": num_tokens}
