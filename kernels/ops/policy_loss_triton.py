"""policy_loss in Triton: one launch gives the loss, the gradient and the sums of the metrics.

Floor on an H100: 8,192 tokens with a reference read and write 0.24 MB, 0.1 us at 3.0 TB/s, so the launch is what
counts. Predicted, not measured: 4 us on the device, where eager torch makes about 30 launches.

Letters: T tokens, K sums, B blocks of tokens.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from alignfast.kernels.kl_penalty_triton import exponential
from alignfast.kernels.policy_loss import BLOCK, outputs_like


def forward(
    logps_T: Tensor,
    old_logps_T: Tensor,
    advantages_T: Tensor,
    ref_logps_T: Tensor | None,
    mask_T: Tensor | None,
    scale_T: Tensor,
    low: float,
    high: float,
    cap: float,
    beta: float,
    corrects_kl: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss_T, dlogps_T, sums_KB) of `policy_loss._Native`."""
    outputs = outputs_like(logps_T)
    num_blocks = outputs[2].shape[1]
    if not logps_T.shape[0]:  # an expanded scale has no memory then
        outputs[2].zero_()
        return outputs
    _kernel[(num_blocks,)](
        logps_T, old_logps_T, advantages_T, logps_T if ref_logps_T is None else ref_logps_T,
        logps_T if mask_T is None else mask_T.view(torch.uint8), scale_T, *outputs, logps_T.shape[0], num_blocks,
        low, high, cap, math.log(low) if low else -math.inf, math.log(high), math.log(cap), beta,
        EXPANDED=scale_T.stride(0) == 0, HAS_REFERENCE=ref_logps_T is not None, HAS_MASK=mask_T is not None,
        CORRECTS=corrects_kl, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return outputs


@triton.jit
def _store_sum(sums_ptr, row, num_blocks, x, counts):
    sum_of_block = tl.sum(tl.where(counts, x, 0.0), 0)
    tl.store(sums_ptr + row * num_blocks + tl.program_id(0), sum_of_block)
    return sum_of_block


@triton.jit(
    do_not_specialize=["num_tokens", "num_blocks"],
    # a chunk's rows start anywhere: else a binary for each mix of aligned and not
    do_not_specialize_on_alignment=[
        "logps_ptr",
        "old_ptr",
        "advantages_ptr",
        "ref_ptr",
        "mask_ptr",
        "scale_ptr",
    ],
)
def _kernel(
    logps_ptr, old_ptr, advantages_ptr, ref_ptr, mask_ptr, scale_ptr, loss_ptr, dlogps_ptr, sums_ptr,
    num_tokens, num_blocks, low, high, cap, log_low, log_high, log_cap, beta,
    EXPANDED: tl.constexpr, HAS_REFERENCE: tl.constexpr, HAS_MASK: tl.constexpr, CORRECTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    token = block * BLOCK + tl.arange(0, BLOCK)
    exists = token < num_tokens
    counts = exists
    if HAS_MASK:
        counts = tl.load(mask_ptr + token, mask=exists, other=0) != 0
    logp = tl.load(logps_ptr + token, mask=counts, other=0.0)  # masked ones may be NaN
    x = logp - tl.load(old_ptr + token, mask=counts, other=0.0)
    advantage = tl.load(advantages_ptr + token, mask=counts, other=0.0)
    if EXPANDED:
        scale = tl.load(scale_ptr)
    else:
        scale = tl.load(scale_ptr + token, mask=exists, other=0.0)
    ratio, _, excess = exponential(x)

    is_up = advantage >= 0.0
    is_over = x > tl.where(is_up, log_high, log_cap)
    is_under = (x < log_low) & (is_up == 0)
    weight = tl.where(is_over, tl.where(is_up, high, cap), tl.where(is_under, low, ratio))
    loss = -advantage * weight
    slope = tl.where(is_over | is_under, 0.0, loss)
    kl = tl.zeros([BLOCK], tl.float32)
    if HAS_REFERENCE:
        d = tl.load(ref_ptr + token, mask=counts, other=0.0) - logp
        _, minus1, kl = exponential(d)
        kl_slope = -minus1
        if CORRECTS:
            kl = kl * ratio
            kl_slope = -d * ratio  # (k3 + dk3) times the ratio, whose own slope it is: exp(d) drops out
        loss += beta * kl
        slope += beta * kl_slope
    tl.store(loss_ptr + token, tl.where(counts, loss * scale, 0.0), mask=exists)
    tl.store(dlogps_ptr + token, tl.where(counts, slope * scale, 0.0), mask=exists)

    _store_sum(sums_ptr, 0, num_blocks, kl, counts)
    _store_sum(sums_ptr, 1, num_blocks, tl.where((advantage < 0.0) & (x < log_low), 1.0, 0.0), counts)
    _store_sum(sums_ptr, 2, num_blocks, tl.where((advantage > 0.0) & (x > log_high), 1.0, 0.0), counts)
    _store_sum(sums_ptr, 3, num_blocks, tl.where((advantage < 0.0) & (x > log_cap), 1.0, 0.0), counts)
    ratios = _store_sum(sums_ptr, 4, num_blocks, ratio, counts)
    _store_sum(sums_ptr, 5, num_blocks, -x, counts)
    _store_sum(sums_ptr, 6, num_blocks, excess, counts)
    # a ratio is never negative: their sum is NaN where one of them is, and so then is the largest
    largest = tl.max(tl.where(counts, ratio, 0.0), 0)
    tl.store(sums_ptr + 7 * num_blocks + block, tl.where(ratios != ratios, ratios, largest))
