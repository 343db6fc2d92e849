"""Importance weights of tokens that an older policy, or another engine, sampled.

    rho_t = exp(now_t - then_t)                         level="token"
    rho_s = exp(sum over s of (now_t - then_t))         level="sequence": one weight for all tokens of a completion

    w = min(max(rho, floor), cap)                       mode="truncate"
    w = rho where floor <= rho <= cap, else 0           mode="mask"

The meaning of TRL's `vllm_importance_sampling_mode`, `_clip_max` (cap) and `_clip_min` (floor). Truncation is biased
and keeps every sample; a mask drops what is too far off policy. `then` must be the log-probs of the distribution that
was drawn from: with top-k or top-p, the truncated one.

Letters: P tokens, S completions end to end, N weights (P of them, or S).
Not done here: the ratio of the policy being trained to the one that sampled, which carries the gradient
(`policy_loss`); tokens that nobody sampled (tool results), which are no predictions and so no part of P.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LEVELS = ("token", "sequence")
MODES = ("truncate", "mask")
_NAME = "sampling/importance_sampling_ratio"


class ImportanceWeights(NamedTuple):
    """A constant weight for each token, and what to log of them.

    Attributes:
        weights_P: float32, or float64 for float64 log-probs.
        metrics: 0-d tensors, over tokens or over completions as the level says; empty without tokens.
            `.../min`, `/mean` and `/max` of the weights in use, as in TRL; `/raw_mean` and `/raw_max` before they
            were cut (a mean far from 1 says that the two policies are far apart); `/cut` the share outside floor and
            cap; `/ess` the effective sample size (sum w)^2 / sum w^2 as a share of N; and
            `sampling/sampling_logp_difference/mean` and `/max` of |now - then| over tokens whose `then` is known.
    """

    weights_P: Tensor
    metrics: dict[str, Tensor]


@torch.no_grad()
def importance_weights(
    logps_now_P: Tensor,
    logps_then_P: Tensor,
    lengths: Sequence[int],
    *,
    level: str = "token",
    mode: str = "truncate",
    cap: float | None = 3.0,
    floor: float | None = None,
) -> ImportanceWeights:
    """Weights that turn means over what was sampled then into means over what would be sampled now.

    Args:
        logps_now_P: log-probs of the tokens under the policy of now, at the temperature of sampling.
        logps_then_P: under the policy or engine that sampled them. NaN: not known, taken as equal.
        lengths: tokens of each completion, in order.
        level: `token` or `sequence`.
        mode: `truncate` or `mask`.
        cap: largest weight, > 0; None for no bound.
        floor: smallest weight, >= 0; None for no bound.

    Raises:
        ValueError: the numbers of tokens differ, or an option is out of range.

    >>> then_P = torch.tensor([-1.0, -1.0, -2.0])
    >>> now_P = then_P + torch.tensor([0.5, 2.0, -1.0])
    >>> importance_weights(now_P, then_P, [2, 1]).weights_P
    tensor([1.6487, 3.0000, 0.3679])
    >>> importance_weights(now_P, then_P, [2, 1], level="sequence", mode="mask", cap=10).weights_P
    tensor([0.0000, 0.0000, 0.3679])
    """
    _check_options(level, mode, cap, floor)
    if logps_now_P.ndim != 1 or logps_now_P.shape != logps_then_P.shape or sum(lengths) != len(logps_now_P):
        raise ValueError(
            f"expected two log-probs for each of the {sum(lengths)} tokens that lengths count, got "
            f"{tuple(logps_now_P.shape)} now and {tuple(logps_then_P.shape)} then"
        )
    # In float64: a sum over a thousand tokens, and an exp that float32 ends at 88 nats.
    difference_P = logps_now_P.double() - logps_then_P.double()
    known_P = ~logps_then_P.isnan()
    log_ratio_N = difference_P = torch.where(known_P, difference_P, 0.0)
    lengths_S = torch.tensor(lengths, device=logps_now_P.device, dtype=torch.long)
    if level == "sequence":
        log_ratio_N = torch.segment_reduce(difference_P, "sum", lengths=lengths_S, initial=0)
    ratio_N = log_ratio_N.exp()
    low, high = 0.0 if floor is None else floor, float("inf") if cap is None else cap
    outside_N = (ratio_N < low) | (ratio_N > high)
    weights_N = ratio_N.clamp(low, high) if mode == "truncate" else ratio_N.masked_fill(outside_N, 0.0)
    metrics = _metrics(ratio_N, weights_N, outside_N, difference_P[known_P])
    weights_P = weights_N if level == "token" else weights_N.repeat_interleave(lengths_S)
    return ImportanceWeights(
        weights_P.to(torch.promote_types(logps_now_P.dtype, torch.float32)),
        {name: value.float() for name, value in metrics.items()},
    )


def _check_options(level: str, mode: str, cap: float | None, floor: float | None) -> None:
    if level not in LEVELS:
        raise ValueError(f"level={level!r} is not one of {', '.join(LEVELS)}")
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not one of {', '.join(MODES)}")
    if cap is not None and not cap > 0:
        raise ValueError(f"cap must be above 0, or None for no bound, got {cap}")
    if floor is not None and not 0 <= floor <= (float("inf") if cap is None else cap):
        raise ValueError(f"floor must lie between 0 and cap, or be None, got {floor} with cap={cap}")


def _metrics(
    ratio_N: Tensor, weights_N: Tensor, outside_N: Tensor, difference_K: Tensor
) -> dict[str, Tensor]:
    """What `ImportanceWeights` names; K tokens are known under both policies."""
    if not len(ratio_N):
        return {}
    largest = weights_N.max().clamp(min=torch.finfo(torch.float64).tiny)
    share_N = weights_N / largest  # so that squares neither overflow nor vanish; all weights 0 give 0
    metrics = {
        f"{_NAME}/min": weights_N.min(),
        f"{_NAME}/mean": weights_N.mean(),
        f"{_NAME}/max": weights_N.max(),
        f"{_NAME}/raw_mean": ratio_N.mean(),
        f"{_NAME}/raw_max": ratio_N.max(),
        f"{_NAME}/cut": outside_N.double().mean(),
        f"{_NAME}/ess": share_N.sum() ** 2 / share_N.square().sum().clamp(min=1e-300) / len(ratio_N),
    }
    if len(difference_K):
        metrics["sampling/sampling_logp_difference/mean"] = difference_K.abs().mean()
        metrics["sampling/sampling_logp_difference/max"] = difference_K.abs().max()
    return metrics
