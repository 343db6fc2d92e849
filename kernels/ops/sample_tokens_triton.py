"""sample_tokens in Triton: a program owns a row, finds its largest logit, the least that the filters keep, the token.

Without filters a row is read once from memory and up to twice from the L2 cache: the top, the sum, the walk to the
token. A top-k or a top-p is a bisection, which reads it from there 16 times more (float32: 32).

Floor on an H100 (3.0 TB/s), 256 rows of 128256 bf16: 66 MB, 22 us. Predicted, not measured: 60 us, 250 with a top-p.

Letters: B rows, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alignfast.kernels._triton_math import softplus
from alignfast.kernels.sample_tokens import Drawn, SampleOptions

_BLOCK, _WARPS = 2048, 8
# Bits that a type leaves 0 in a float: steps that its bisection can do without.
_COARSE = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}


def forward(logits_BV: Tensor, sequence_B: Tensor, position_B: Tensor, options: SampleOptions) -> Drawn:
    """(tokens_B, logps_B, sampled_logps_B) of `sample_tokens._Torch.forward`."""
    B, V = logits_BV.shape
    tokens_B = torch.empty(B, dtype=torch.int64, device=logits_BV.device)
    logps_B, sampled_B = torch.empty((2, B), dtype=torch.float32, device=logits_BV.device)
    if B == 0:
        return tokens_B, logps_B, sampled_B
    block = min(_BLOCK, triton.next_power_of_2(V))
    _kernel[(B,)](
        logits_BV, sequence_B.contiguous(), position_B.contiguous(), tokens_B, logps_B, sampled_B, *logits_BV.stride(),
        options.seed, options.temperature, options.top_k, options.top_p, options.floor,
        V=V, TOP_K=0 < options.top_k < V, TOP_P=options.top_p < 1, GREEDY=options.greedy,
        COARSE=_COARSE[logits_BV.dtype], BLOCK=block, num_warps=max(1, _WARPS * block // _BLOCK),
    )  # fmt: skip
    return tokens_B, logps_B, sampled_B


@triton.jit
def _rank(x, COARSE: tl.constexpr):
    """Floats in the order of integers, -0 just below 0."""
    bits = x.to(tl.int32, bitcast=True)
    return (tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> COARSE).to(tl.int64)


@triton.jit
def _of_rank(rank, COARSE: tl.constexpr):
    fine = (rank << COARSE).to(tl.int32)
    bits = tl.where(fine < 0, (fine | ((1 << COARSE) - 1)) ^ 0x7FFFFFFF, fine)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _load(row_ptr, start, step, V: tl.constexpr, BLOCK: tl.constexpr):
    columns = start + tl.arange(0, BLOCK)
    return tl.load(row_ptr + columns * step, mask=columns < V, other=float("-inf")).to(tl.float32)


@triton.jit
def _count(row_ptr, step, least, V: tl.constexpr, BLOCK: tl.constexpr):
    """How many logits are at least `least`, which is no -inf."""
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        count += (_load(row_ptr, start, step, V, BLOCK) >= least).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def _mass(row_ptr, step, least, top, inverse, V: tl.constexpr, BLOCK: tl.constexpr):
    """The weights of all tokens, and of those from `least` on."""
    every, kept = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for start in range(0, V, BLOCK):
        z = _load(row_ptr, start, step, V, BLOCK)
        weight = tl.exp((z - top) * inverse).to(tl.float64)
        every += weight
        kept += tl.where(z >= least, weight, 0.0)
    return tl.sum(every, 0), tl.sum(kept, 0)


@triton.jit
def _least_kept(
    row_ptr, step, top, inverse, top_k, top_p, floor,
    V: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, COARSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The smallest logit that the filters leave."""
    lower = top * 0.0 - float("inf")
    if TOP_K:
        first, last = _rank(lower, COARSE), _rank(top, COARSE)
        while first < last:
            middle = first + (last - first + 1) // 2
            enough = _count(row_ptr, step, _of_rank(middle, COARSE), V, BLOCK) >= top_k
            first, last = tl.where(enough, middle, first), tl.where(enough, last, middle - 1)
        lower = _of_rank(first, COARSE)
    least = lower
    if TOP_P:
        _, mass = _mass(row_ptr, step, lower, top, inverse, V, BLOCK)
        first, last = _rank(lower, COARSE), _rank(top, COARSE)
        while first < last:
            middle = first + (last - first + 1) // 2
            _, above = _mass(row_ptr, step, _of_rank(middle, COARSE), top, inverse, V, BLOCK)
            enough = above >= top_p * mass
            first, last = tl.where(enough, middle, first), tl.where(enough, last, middle - 1)
        least = _of_rank(first, COARSE)
    exact = top.to(tl.float64) + floor
    rounded = exact.to(tl.float32)
    rounded = tl.where(rounded.to(tl.float64) < exact, _of_rank(_rank(rounded, 0) + 1, 0), rounded)
    return tl.maximum(least, rounded)


@triton.jit
def _find(row_ptr, step, least, top, inverse, wanted, V: tl.constexpr, BLOCK: tl.constexpr):
    """The token at which the sum of the kept weights passes `wanted`, and its logit; by rounding, the last one kept."""
    start, chosen = 0, 0
    passed = tl.zeros([], tl.float64)
    before = passed
    while (start < V) & (passed <= wanted):
        z = _load(row_ptr, start, step, V, BLOCK)
        weight = tl.where(z >= least, tl.exp((z - top) * inverse), 0.0).to(tl.float64)
        here = tl.sum(weight, 0)
        chosen, before = tl.where(here > 0, start, chosen), tl.where(here > 0, passed, before)
        passed += here
        start += BLOCK
    z = _load(row_ptr, chosen, step, V, BLOCK)
    weight = tl.where(z >= least, tl.exp((z - top) * inverse), 0.0).to(tl.float64)
    columns = tl.arange(0, BLOCK)
    passes = (before + tl.cumsum(weight, 0) > wanted) & (weight > 0)
    first = tl.min(tl.where(passes, columns, BLOCK), 0)
    drawn = tl.where(first < BLOCK, first, tl.max(tl.where(weight > 0, columns, 0), 0))
    return chosen + drawn, tl.sum(tl.where(columns == drawn, z, 0.0), 0)


@triton.jit(do_not_specialize=["top_k"])
def _kernel(
    logits_ptr, sequence_ptr, position_ptr, tokens_ptr, logps_ptr, sampled_ptr, row_stride, column_stride,
    seed: tl.int64, temperature: tl.float64, top_k, top_p: tl.float64, floor: tl.float64,
    V: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, GREEDY: tl.constexpr, COARSE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # B * V passes 2**31
    row_ptr = logits_ptr + row * row_stride
    # of a transposed view it is B: the last column may be past 2**31 too
    step = tl.cast(column_stride, tl.int64)
    inverse = (1.0 / tl.cast(temperature, tl.float64)).to(tl.float32)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        z = _load(row_ptr, start, step, V, BLOCK)
        largest = tl.maximum(largest, z)
        bad |= ((z < float("inf")) == 0).to(tl.int32)  # NaN too
    top = tl.max(largest, 0)
    if (tl.max(bad, 0) > 0) | (top == float("-inf")):
        tl.store(tokens_ptr + row, -1)
        tl.store(logps_ptr + row, float("nan"))
        tl.store(sampled_ptr + row, float("nan"))
        return

    least = _least_kept(row_ptr, step, top, inverse, top_k, top_p, floor, V, TOP_K, TOP_P, COARSE, BLOCK)
    every, kept = _mass(row_ptr, step, least, top, inverse, V, BLOCK)
    wanted = kept * 0.0
    if not GREEDY:
        sequence, position = tl.load(sequence_ptr + row), tl.load(position_ptr + row)
        high, low, _, _ = tl.philox(
            seed, position.to(tl.uint32), (position >> 32).to(tl.uint32),
            sequence.to(tl.uint32), (sequence >> 32).to(tl.uint32),
        )  # fmt: skip
        u = (high.to(tl.int64) << 21) | (low.to(tl.int64) >> 11)
        wanted = u.to(tl.float64) * 1.1102230246251565e-16 * kept  # 2^-53
    token, z = _find(row_ptr, step, least, top, inverse, wanted, V, BLOCK)

    weight = tl.exp((z - top) * inverse).to(tl.float64)
    exponent = (z.to(tl.float64) - top.to(tl.float64)) / temperature
    # in float64 a difference of sums keeps 1e-16, which a log-prob in float32 does not show
    tl.store(tokens_ptr + row, token)
    tl.store(logps_ptr + row, -softplus(tl.log(tl.maximum(every - weight, 0.0)) - exponent))
    sampled = -softplus(tl.log(tl.maximum(kept - weight, 0.0)) - exponent)
    tl.store(sampled_ptr + row, tl.where(GREEDY, 0.0, sampled))
