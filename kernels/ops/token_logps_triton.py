"""token_logps in Triton: one read of each row forward; one read and one write backward.

Floor on an H100 (3.0 TB/s), 8192 rows of 128256 bf16: forward 2.10 GB, 0.70 ms; backward 4.20 GB, 1.40 ms.
Predicted, not measured: forward 0.72 ms, backward 1.46 ms. The loops compile to 10 and 17 instructions an element
(with the entropy 12 and 20), of the 20 and 39 that the card can issue in the time of the floor.

A row is walked in blocks of LANES x PER. Every lane of PER neighbours (one 16-byte load) keeps a running maximum
and sums of its own, rescaled once a load: 1 + 1/PER exponentials an element, and no exchange between threads
before the row's end.

Letters: T rows, V vocabulary; s = sum e, u = sum e (x - m), q = sum e^2, total = sum x, with e = exp(x - m).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alignfast.kernels._triton_math import LOG2E, LOWEST, expm1, log1p, softplus, tanh
from alignfast.kernels.token_logps import ENTROPY, IS_TOP1, MEAN_LOGIT, SUM_SQ_PROBS, RowOptions

_ENTROPY = tl.constexpr(1 << ENTROPY)
_MEAN_LOGIT = tl.constexpr(1 << MEAN_LOGIT)
_SUM_SQ_PROBS = tl.constexpr(1 << SUM_SQ_PROBS)
_IS_TOP1 = tl.constexpr(1 << IS_TOP1)

# Forward: 8 warps of 2 loads a thread, one block ahead, so that 4 programs keep 64 KiB in flight on an SM.
_LANES, _FORWARD_WARPS = 512, 8
# Backward: the same depth.
_BLOCK, _BACKWARD_WARPS = 4096, 8


def forward(logits_TV: Tensor, targets_T: Tensor, options: RowOptions) -> Tensor:
    """stats_KT of `token_logps._Torch.forward`."""
    T, V = logits_TV.shape
    stats_KT = torch.empty((6, T), dtype=torch.float32, device=logits_TV.device)
    if T == 0:
        return stats_KT
    per = 16 // logits_TV.element_size()
    lanes = min(_LANES, triton.next_power_of_2(triton.cdiv(V, per)))
    _forward_kernel[(T,)](
        logits_TV, targets_T.contiguous(), stats_KT, T, *logits_TV.stride(), *_factors(options), options.ignore_index,
        V=V, WANTED=options.wanted, SOFTCAP=options.softcap > 0, LANES=lanes, PER=per,
        num_warps=max(1, _FORWARD_WARPS * lanes // _LANES),
    )  # fmt: skip
    return stats_KT


def backward(
    logits_TV: Tensor,
    targets_T: Tensor,
    stats_KT: Tensor,
    dstats_KT: Tensor,
    options: RowOptions,
    out_TV: Tensor,
) -> None:
    """Write the gradient of the raw logits into `out_TV`, which may be `logits_TV` itself."""
    T, V = logits_TV.shape
    if T == 0:
        return
    block = min(_BLOCK, triton.next_power_of_2(V))
    _backward_kernel[(T,)](
        logits_TV, targets_T.contiguous(), stats_KT, dstats_KT, out_TV,
        *logits_TV.stride(), *stats_KT.stride(), *dstats_KT.stride(), *out_TV.stride(),
        *_factors(options), options.ignore_index,
        V=V, WANTED=options.wanted, SOFTCAP=options.softcap > 0, BLOCK=block,
        num_warps=max(1, _BACKWARD_WARPS * block // _BLOCK),
    )  # fmt: skip


def _factors(options: RowOptions) -> tuple[float, float]:
    """(inner, outer): x = outer * tanh(inner * z) with a softcap, outer * z without."""
    if options.softcap:
        return options.scale / options.softcap, options.softcap / options.temperature
    return 1.0, options.scale / options.temperature


@triton.jit
def _transform(z, inner, outer, SOFTCAP: tl.constexpr):
    """x and dx/dz."""
    z = z.to(tl.float32)
    if SOFTCAP:
        t = tanh(z * inner)
        return t * outer, (1.0 - t * t) * (inner * outer)
    else:
        return z * outer, outer


@triton.jit
def _fold(
    x, columns, start, target, m, s, u, q, total, V: tl.constexpr, BLOCK: tl.constexpr, WANTED: tl.constexpr
):
    """Take one block into the lanes' running statistics. The target is left out of all of them but the total."""
    if _MEAN_LOGIT & WANTED:
        total += tl.sum(x, 1)
    holds_target = (target >= start) & (target < start + BLOCK)
    if holds_target | (V < start + BLOCK):  # seldom; without the branch 2 instructions an element
        x = tl.where((columns == target - start) | (columns >= V - start), -float("inf"), x)
    m_new = tl.maximum(m, tl.max(x, 1))
    shift = tl.maximum(m - m_new, LOWEST)
    keep = tl.exp2(shift * LOG2E)
    d = x - m_new[:, None]
    e = tl.exp2(d * LOG2E)  # tl.exp guards against denormal results: 4 more instructions an element
    if _ENTROPY & WANTED:
        # an entry of -inf has e = 0, and 0 * -inf is NaN: bounded below, the product is 0
        u = keep * (u + s * shift) + tl.sum(e * tl.maximum(d, LOWEST), 1)
    if _SUM_SQ_PROBS & WANTED:
        q = keep * keep * q + tl.sum(e * e, 1)
    return m_new, keep * s + tl.sum(e, 1), u, q, total


@triton.jit(
    do_not_specialize=["T", "ignore_index"], do_not_specialize_on_alignment=["targets_ptr", "stats_ptr"]
)
def _forward_kernel(
    logits_ptr, targets_ptr, stats_ptr, T, row_stride, column_stride, inner, outer, ignore_index,
    V: tl.constexpr, WANTED: tl.constexpr, SOFTCAP: tl.constexpr, LANES: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # T * V passes 2**31 at 16k tokens of a 128k vocabulary
    stats_ptr += row
    target = tl.load(targets_ptr + row)
    if (target == ignore_index) | (target < 0) | (target >= V):
        fill = tl.where(target == ignore_index, 0.0, float("nan"))
        for k in tl.static_range(6):
            tl.store(stats_ptr + k * T, fill)
        return

    BLOCK: tl.constexpr = LANES * PER
    target = target.to(tl.int32)
    logits_ptr += row * row_stride
    columns = tl.arange(0, LANES)[:, None] * PER + tl.arange(0, PER)[None, :]
    step = tl.cast(column_stride, tl.int64)  # of a transposed view it is T: the last column is past 2**31 too
    pointers = logits_ptr + columns * step
    x_target, _ = _transform(tl.load(logits_ptr + target * step), inner, outer, SOFTCAP)
    m = tl.full([LANES], LOWEST, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    u, q, total = s, s, s
    z = tl.load(pointers, mask=columns < V, other=0.0)
    for start in range(0, V, BLOCK):
        pointers += BLOCK * step
        ahead = tl.load(pointers, mask=start + BLOCK + columns < V, other=0.0)
        x, _ = _transform(z, inner, outer, SOFTCAP)
        m, s, u, q, total = _fold(x, columns, start, target, m, s, u, q, total, V, BLOCK, WANTED)
        z = ahead
    _finish(stats_ptr, T, x_target, m, s, u, q, total, V, WANTED)


@triton.jit
def _finish(stats_ptr, T, x_target, m, s, u, q, total, V: tl.constexpr, WANTED: tl.constexpr):
    """The lanes become one, then the target joins."""
    m_others = tl.max(m, 0)
    shift = tl.maximum(m - m_others, LOWEST)
    keep = tl.exp(shift)
    s_others = tl.sum(keep * s, 0)
    # in this order: m + log s = 10004.4 would keep no digit that counts, m - x = 0 loses none
    tl.store(stats_ptr, -softplus((m_others - x_target) + tl.log(s_others)))

    m_all = tl.maximum(m_others, x_target)
    shift_others = tl.maximum(m_others - m_all, LOWEST)
    keep_others, e_target = tl.exp(shift_others), tl.exp(x_target - m_all)
    s_others_kept = keep_others * s_others
    s_all = s_others_kept + e_target
    # where the target is the largest, e_target is 1, and 1 + others would round the others off
    log_s = tl.where(e_target == 1.0, log1p(s_others_kept), tl.log(s_all))
    tl.store(stats_ptr + T, m_all + log_s)

    entropy, mean_logit, squares = 0.0, 0.0, 0.0
    if _ENTROPY & WANTED:
        u_others = tl.sum(keep * (u + s * shift), 0)
        u_all = keep_others * (u_others + s_others * shift_others)
        u_all += e_target * tl.maximum(x_target - m_all, LOWEST)
        entropy = log_s - u_all / s_all
    if _MEAN_LOGIT & WANTED:
        mean_logit = tl.sum(total, 0) / V
    if _SUM_SQ_PROBS & WANTED:
        q_others = tl.sum(keep * keep * q, 0)
        squares = (keep_others * keep_others * q_others + e_target * e_target) / (s_all * s_all)
    tl.store(stats_ptr + 2 * T, entropy)
    tl.store(stats_ptr + 3 * T, mean_logit)
    # a NaN anywhere in the row makes its sum NaN, and then no target is the largest
    is_top1 = (x_target >= m_others) & (s_others == s_others)
    tl.store(stats_ptr + 4 * T, tl.where(is_top1 & (_IS_TOP1 & WANTED != 0), 1.0, 0.0))
    tl.store(stats_ptr + 5 * T, squares)


@triton.jit(
    do_not_specialize=["stats_stride", "dstats_stride", "dstats_row_stride", "ignore_index"],
    do_not_specialize_on_alignment=["targets_ptr", "stats_ptr", "dstats_ptr"],
)
def _backward_kernel(
    logits_ptr, targets_ptr, stats_ptr, dstats_ptr, out_ptr,
    row_stride, column_stride, stats_stride, stats_row_stride, dstats_stride, dstats_row_stride,
    out_row_stride, out_column_stride, inner, outer, ignore_index,
    V: tl.constexpr, WANTED: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    step, out_step = tl.cast(column_stride, tl.int64), tl.cast(out_column_stride, tl.int64)
    out_ptr += row * out_row_stride
    stats_ptr += row * stats_row_stride
    dstats_ptr += row * dstats_row_stride

    target = tl.load(targets_ptr + row)
    dlogp, dlse = tl.load(dstats_ptr), tl.load(dstats_ptr + dstats_stride)
    dentropy, dmean, dsquares = 0.0, 0.0, 0.0
    entropy, squares = 0.0, 0.0
    if _ENTROPY & WANTED:
        dentropy, entropy = tl.load(dstats_ptr + 2 * dstats_stride), tl.load(stats_ptr + 2 * stats_stride)
    if _MEAN_LOGIT & WANTED:
        dmean = tl.load(dstats_ptr + 3 * dstats_stride) / V
    if _SUM_SQ_PROBS & WANTED:
        dsquares, squares = tl.load(dstats_ptr + 5 * dstats_stride), tl.load(stats_ptr + 5 * stats_stride)
    ignored = target == ignore_index
    flat = (dlogp == 0.0) & (dlse == 0.0) & (dentropy == 0.0) & (dmean == 0.0) & (dsquares == 0.0)
    bad = (target < 0) | (target >= V)
    if ignored | flat | bad:
        fill = tl.full([BLOCK], 0.0, tl.float32) + tl.where(bad & (ignored == 0), float("nan"), 0.0)
        for start in range(0, V, BLOCK):
            here = start + columns
            tl.store(out_ptr + here * out_step, fill.to(out_ptr.dtype.element_ty), mask=here < V)
        return

    logits_ptr += row * row_stride
    x_target, _ = _transform(tl.load(logits_ptr + target * step), inner, outer, SOFTCAP)
    tl.debug_barrier()  # `out` may be the logits: no thread writes the target's before all have read it
    logp_target, lse = tl.load(stats_ptr), tl.load(stats_ptr + stats_stride)
    # logp = (x - base) + offset: the target's logit and log-prob, or the lse, whichever lost less when stored
    by_target = tl.abs(logp_target) < tl.abs(lse)
    base, offset = tl.where(by_target, x_target, lse), tl.where(by_target, logp_target, 0.0)
    if (tl.abs(logp_target) >= 16.0) & (tl.abs(lse) >= 16.0):
        # Either lost 5e-7 or more, which is minus the log of the sum of the p that it gives. Few rows of a trained
        # model are so unlikely, so few are read twice.
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            here = start + columns
            z = tl.load(logits_ptr + here * step, mask=here < V, other=0.0)
            x, _ = _transform(z, inner, outer, SOFTCAP)
            total += tl.where(here < V, tl.exp2(((x - base) + offset) * LOG2E), 0.0)
        offset -= tl.log(tl.sum(total, 0))
    at_target = -dlogp * expm1(logp_target)
    target = target.to(tl.int32)
    z = tl.load(logits_ptr + columns * step, mask=columns < V, other=0.0)
    for start in range(0, V, BLOCK):
        here, next_columns = start + columns, start + BLOCK + columns
        ahead = tl.load(logits_ptr + next_columns * step, mask=next_columns < V, other=0.0)
        x, slope = _transform(z, inner, outer, SOFTCAP)
        logp = (x - base) + offset
        p = tl.exp2(logp * LOG2E)
        dx = p * dlse + tl.where(here == target, at_target, -dlogp * p)
        if _ENTROPY & WANTED:
            # an entry of -inf has p = 0, and 0 * -inf is NaN: bounded below, the product is 0
            dx -= dentropy * p * tl.maximum(logp + entropy, LOWEST)
        if _MEAN_LOGIT & WANTED:
            dx += dmean
        if _SUM_SQ_PROBS & WANTED:
            dx += 2.0 * dsquares * p * (p - squares)
        dz = (dx * slope).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + here * out_step, dz, mask=here < V)
        z = ahead
