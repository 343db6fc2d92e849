"""Kahneman-Tversky optimisation: thumbs up and down, each on its own, measured against a reference point.

    r = sum over the completion's tokens of logp - its sum under the reference
    loss = sum over thumbs of  w sigmoid(-s beta (r - z0)) / thumbs of the step

s is 1 for a thumb up and -1 for one down, w its side's weight. `kto` is arXiv 2402.01306 eq. 7 and 8, z0 the step's
estimate of the policy's divergence from the reference, a constant in the gradient; `apo_zero_unpaired`, the unpaired
form of arXiv 2408.06266 eq. 7, is the same with z0 = 0.

Letters: N thumbs, P predictions, M = N + 1 offsets.
Not done here: the reference's log-probs and z0, which the trainer brings.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from alignfast.kernels.linear_loss import LossFn, Metrics, Stats

KTO_STATS = ("logps", "entropy", "mean_logit")
KTO_LOSSES = ("kto", "apo_zero_unpaired")


def kto_loss(
    lengths: Sequence[int],
    labels: Sequence[float],
    ref_logps_N: Tensor,
    reference_point: Tensor | float = 0.0,
    *,
    num_thumbs: int,
    loss_type: str = "kto",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossFn:
    """The loss of thumbs, for `linear_loss` with `group_sizes=lengths`.

    Args:
        lengths: predictions of each completion.
        labels: 1 for a thumb up, 0 for one down.
        ref_logps_N: the reference model's log-probs, summed over each completion.
        reference_point: z0 in nats, >= 0; unused by `apo_zero_unpaired`.
        num_thumbs: thumbs of the whole step: all micro-batches, all ranks.
        loss_type: `kto` or `apo_zero_unpaired`.
        beta: how sharply a reward counts as a gain or a loss, > 0.
        desirable_weight: factor on the losses of thumbs up.
        undesirable_weight: factor on those of thumbs down.

    Returns:
        `loss_fn(stats, rows) -> (loss, metrics)` on the statistics `KTO_STATS`. Metrics are sums, of which
        `kto_metrics` makes TRL's.

    Raises:
        ValueError: an option is out of its range, or there is not one label for each completion.
    """
    if loss_type not in KTO_LOSSES:
        raise ValueError(f"loss_type={loss_type!r} is not one of {', '.join(KTO_LOSSES)}")
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if min(desirable_weight, undesirable_weight) < 0 or not desirable_weight + undesirable_weight:
        raise ValueError(
            "desirable_weight and undesirable_weight must be at least 0, and one of them above it, got "
            f"{desirable_weight} and {undesirable_weight}"
        )
    if len(labels) != len(lengths):
        raise ValueError(f"expected a label for each of {len(lengths)} completions, got {len(labels)}")
    offsets = (0, *accumulate(lengths))
    offsets_M, end = torch.tensor(offsets), offsets[-1]
    thumb_at = {row: thumb for thumb, row in reversed([*enumerate(offsets)])}  # empty ones: the first wins
    up_N = torch.tensor(labels, dtype=torch.bool)
    point = reference_point if loss_type == "kto" else 0.0

    def loss_fn(stats: Stats, rows: slice) -> tuple[Tensor, Metrics]:
        if not {rows.start, rows.stop} <= thumb_at.keys():
            raise ValueError(f"{rows} cuts a completion: pass group_sizes=lengths")
        first, last = thumb_at[rows.start], len(lengths) if rows.stop == end else thumb_at[rows.stop]
        device = stats.logps.device
        chunk_M = offsets_M[first : last + 1].to(device, non_blocking=True) - rows.start
        chunk_up_N = up_N[first:last].to(device, non_blocking=True)
        logps_N = _by_completion(stats.logps, chunk_M)
        ratio_N = logps_N - ref_logps_N[first:last]
        side_N = chunk_up_N.to(ratio_N.dtype)  # 1 or 0; a bool times a float would be of float32
        weight_N = side_N * desirable_weight + (1 - side_N) * undesirable_weight
        loss_N = weight_N * torch.sigmoid((1 - 2 * side_N) * beta * (ratio_N - point))
        metrics = _metrics(stats, chunk_M, chunk_up_N, logps_N, beta * ratio_N)
        metrics["kl"] = torch.zeros_like(ratio_N).add(point).sum()  # a mean over thumbs again
        return loss_N.sum() / num_thumbs, metrics

    return loss_fn


def kto_metrics(
    sums: Metrics, num_up: int, num_down: int, num_up_tokens: int, num_down_tokens: int
) -> dict[str, Tensor]:
    """TRL's metrics of a step, from sums and from the numbers of thumbs and of their predictions in the whole step.

    A step that lacks a side has none of its metrics, so that they don't count in the mean of a log.

    >>> sums = {"rewards/chosen": torch.tensor(3.0), "entropy": torch.tensor(8.0), "rewards/rejected": torch.tensor(0.0)}
    >>> kto_metrics(sums, num_up=2, num_down=0, num_up_tokens=4, num_down_tokens=0)
    {'rewards/chosen': tensor(1.5000), 'entropy': tensor(2.)}
    """
    counts = {"kl": num_up + num_down, "entropy": num_up_tokens + num_down_tokens}
    for side, thumbs, tokens in (
        ("chosen", num_up, num_up_tokens),
        ("rejected", num_down, num_down_tokens),
    ):
        counts |= {f"rewards/{side}": thumbs, f"logps/{side}": thumbs, f"logits/{side}": tokens}
    metrics = {name: value / counts.get(name, 1) for name, value in sums.items() if counts.get(name, 1)}
    if num_up and num_down:
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics


def _by_completion(x_P: Tensor, offsets_M: Tensor) -> Tensor:
    """Sums over each completion: in float64, since one by one in float32 they lose digits."""
    return torch.segment_reduce(x_P.double(), "sum", offsets=offsets_M, initial=0).to(x_P.dtype)


def _metrics(stats: Stats, offsets_M: Tensor, up_N: Tensor, logps_N: Tensor, rewards_N: Tensor) -> Metrics:
    logits_N = _by_completion(stats.mean_logit, offsets_M)
    sums = {"entropy": stats.entropy.sum()}
    for side, of_side_N in (("chosen", up_N), ("rejected", ~up_N)):
        for name, value_N in (("rewards", rewards_N), ("logps", logps_N), ("logits", logits_N)):
            sums[f"{name}/{side}"] = torch.where(of_side_N, value_N, 0).sum()
    return sums
