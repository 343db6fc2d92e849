"""Advantages of samples within their groups: what each reward is above the mean of the samples beside it.

    A_i = (r_i - mean of its group) / (s + 1e-4)

s is the standard deviation of the group (GRPO, arXiv 2402.03300 section 4.1.2), or of all rewards; or nothing is
divided (Dr. GRPO, arXiv 2503.20783). Deviations have N - 1 in the denominator, as TRL's do.

Letters: N samples, G groups.
Not done here: weights of several rewards, statistics across ranks (gather the rewards first), a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALES = ("group", "batch", "none")
_EPSILON = 1e-4


def group_advantages(rewards_N: Tensor, group_N: Tensor, *, scale: str = "group") -> Tensor:
    """Advantages of N samples, of which those with the same number in `group_N` are compared.

    Args:
        rewards_N: reward of each sample; NaN for one that has none: it counts for no statistic.
        group_N: number of each sample's group: any integers in any order, groups of any size.
        scale: divide by the deviation of the `group`, of the `batch` (all samples here), or by `none`.

    Returns:
        advantages_N: float32, or float64 for float64 rewards; computed in float64. Exactly 0 where the reward is NaN,
        where all rewards of the group are equal, and in groups of one.

    Raises:
        ValueError: shapes, types or devices do not fit, the scale is unknown, or a reward is infinite.

    >>> rewards_N = torch.tensor([1.0, 0.5, 0.0, 0.7, float("nan"), 0.7])
    >>> group_advantages(rewards_N, torch.tensor([4, 9, 4, 9, 9, 2]), scale="none")
    tensor([ 0.5000, -0.1000, -0.5000,  0.1000,  0.0000,  0.0000])
    """
    _check(rewards_N, group_N, scale)
    dtype = torch.float64 if rewards_N.dtype == torch.float64 else torch.float32
    rewards_N = rewards_N.detach().double()
    counts_N = ~rewards_N.isnan()
    if rewards_N.isinf().any():
        at = int(rewards_N.isinf().nonzero()[0])
        raise ValueError(f"reward {at} is {rewards_N[at].item()}; mark a sample without a reward by NaN")
    if not counts_N.any():
        return torch.zeros_like(rewards_N, dtype=dtype)
    _, index_N, size_G = torch.unique(group_N, return_inverse=True, return_counts=True)
    order_N = index_N.argsort(stable=True)

    def reduced(x_N: Tensor, how: str) -> Tensor:
        """Of each sample's group. Sorted, since index_add on a GPU adds in no fixed order."""
        return torch.segment_reduce(x_N[order_N], how, lengths=size_G)[index_N]

    members_N = reduced(counts_N.double(), "sum")
    # From the group's least reward: the mean of equal ones is then 0 to the last bit, which that of 0.1 is not
    least_N = reduced(rewards_N.masked_fill(~counts_N, torch.inf), "min")
    above_N = torch.where(counts_N, rewards_N - least_N, 0)
    mean_N = reduced(above_N, "sum") / members_N.clamp(min=1)
    advantages_N = torch.where(counts_N, above_N - mean_N, 0)
    if scale == "group":
        variance_N = reduced(advantages_N.square(), "sum") / (members_N - 1).clamp(min=1)
        advantages_N = advantages_N / (variance_N.sqrt() + _EPSILON)
    if scale == "batch":
        above = rewards_N[counts_N] - rewards_N[counts_N].min()
        deviation = above.std() if len(above) > 1 else 0.0
        advantages_N = advantages_N / (deviation + _EPSILON)
    return advantages_N.to(dtype)


def _check(rewards_N: Tensor, group_N: Tensor, scale: str) -> None:
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is not one of {', '.join(SCALES)}")
    if rewards_N.ndim != 1 or group_N.shape != rewards_N.shape:
        raise ValueError(
            "expected one reward and one group a sample, got "
            f"{tuple(rewards_N.shape)} rewards and {tuple(group_N.shape)} groups"
        )
    if group_N.is_floating_point() or group_N.is_complex() or group_N.dtype == torch.bool:
        raise ValueError(f"groups are numbered by integers, got {group_N.dtype}")
    if rewards_N.device != group_N.device:
        raise ValueError(f"rewards are on {rewards_N.device}, groups on {group_N.device}; move one of them")
