"""gae in Triton: a program owns a row and walks it from the end in blocks, each one scan of affine maps.

A step maps (A, V) of what comes after it to (decay A + gamma V + r - v, v); a masked one, skipped, changes nothing. Such
maps compose: A' = a A + b V + c, and V' is set or passed on. Not in log space, where a discount of many steps
underflows.

Floor on an H100: 17 bytes a step, 4096 x 2048 in 47.5 us at 3.0 TB/s. Predicted, not measured: 55 us.

Letters: B rows, L steps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LARGEST_BLOCK = 2048


def forward(
    rewards_BL: Tensor,
    values_BL: Tensor,
    mask_BL: Tensor,
    bootstrap_B: Tensor,
    gamma: float,
    decay: float,
    decays: bool,
    advantages_BL: Tensor,
    returns_BL: Tensor,
) -> None:
    """Fill the last two; `decay` is gamma * lam."""
    B, L = values_BL.shape
    block = min(_LARGEST_BLOCK, max(16, triton.next_power_of_2(L)))
    _kernel[(B,)](
        rewards_BL, values_BL, mask_BL.view(torch.uint8), bootstrap_B, advantages_BL, returns_BL, L, gamma, decay,
        DECAYS=decays, BLOCK=block, num_warps=max(1, min(8, block // 256)),
    )  # fmt: skip


@triton.jit
def _compose(a1, b1, c1, v1, sets1, a2, b2, c2, v2, sets2):
    """The first map is that of the later steps."""
    return (
        a2 * a1,
        a2 * b1 + b2 * (1.0 - sets1),
        a2 * c1 + c2 + b2 * v1 * sets1,
        v2 * sets2 + v1 * (1.0 - sets2),
        tl.maximum(sets1, sets2),
    )


@triton.jit(do_not_specialize=["L"])
def _kernel(
    rewards_ptr, values_ptr, mask_ptr, bootstrap_ptr, advantages_ptr, returns_ptr, L, gamma, decay,
    DECAYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    start = row.to(tl.int64) * L
    lane = tl.arange(0, BLOCK)
    after = 0.0  # the advantage and the next value, behind the block
    following = tl.load(bootstrap_ptr + row)
    for back in range(0, L, BLOCK):
        first = (L - 1) // BLOCK * BLOCK - back
        t = first + lane
        exists = t < L
        counts = tl.load(mask_ptr + start + t, mask=exists, other=0) != 0
        reward = tl.load(rewards_ptr + start + t, mask=counts, other=0.0)
        value = tl.load(values_ptr + start + t, mask=counts, other=0.0)
        taken = counts
        if DECAYS:
            taken = exists
        sets = taken.to(tl.float32)
        a, b, c, v, has = tl.associative_scan(
            (tl.where(taken, decay, 1.0), sets * gamma, reward - value, value, sets),
            0,
            _compose,
            reverse=True,
        )
        advantage = a * after + b * following + c
        tl.store(advantages_ptr + start + t, tl.where(counts, advantage, 0.0), mask=exists)
        tl.store(returns_ptr + start + t, tl.where(counts, advantage + value, 0.0), mask=exists)
        after = tl.sum(tl.where(lane == 0, advantage, 0.0), 0)
        following = tl.sum(tl.where(lane == 0, v * has + following * (1.0 - has), 0.0), 0)
