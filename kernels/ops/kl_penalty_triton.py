"""kl_penalty in Triton: one launch, 12 bytes a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alignfast.kernels.kl_penalty import KINDS

_K1, _ABS, _K2 = (tl.constexpr(KINDS.index(name)) for name in ("k1", "abs", "k2"))
_BLOCK = 1024


def forward(logps: Tensor, ref_logps: Tensor, code: int, slope: bool) -> Tensor:
    """What `kl_penalty._Native` gives."""
    out = torch.empty_like(logps)
    tokens = out.numel()
    if tokens:
        _kernel[(triton.cdiv(tokens, _BLOCK),)](
            logps, ref_logps, out, tokens, CODE=code, SLOPE=slope, BLOCK=_BLOCK, num_warps=4
        )
    return out


@triton.jit
def exponential(d):
    """(exp(d), exp(d) - 1, exp(d) - 1 - d) to the last digits, as csrc/kl.h has them; the last is k3."""
    y = 0.5 * d
    p = y * (1.0 / 39916800) + 1.0 / 3628800
    p = p * y + 1.0 / 362880
    p = p * y + 1.0 / 40320
    p = p * y + 1.0 / 5040
    p = p * y + 1.0 / 720
    p = p * y + 1.0 / 120
    p = p * y + 1.0 / 24
    p = p * y + 1.0 / 6
    p = p * y + 0.5
    s = p * y * y
    h = y + s
    value = tl.exp(d)
    is_far = tl.abs(d) > 2.0
    minus1 = tl.where(is_far, value - 1.0, h * (h + 2.0))
    return value, minus1, tl.where(is_far, value - 1.0 - d, h * h + 2.0 * s)


@triton.jit(do_not_specialize=["tokens"])
def _kernel(
    logps_ptr, ref_ptr, out_ptr, tokens, CODE: tl.constexpr, SLOPE: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = token < tokens
    d = tl.load(ref_ptr + token, mask=exists, other=0.0) - tl.load(logps_ptr + token, mask=exists, other=0.0)
    if CODE == _K1:
        out = -d
        if SLOPE:
            out = tl.zeros([BLOCK], tl.float32) + 1.0
    elif CODE == _ABS:
        out = tl.abs(d)
        if SLOPE:
            out = tl.where(d < 0.0, 1.0, tl.where(d > 0.0, -1.0, 0.0))
    elif CODE == _K2:
        out = 0.5 * d * d
        if SLOPE:
            out = -d
    else:
        _, minus1, out = exponential(d)
        if SLOPE:
            out = -minus1
    tl.store(out_ptr + token, out, mask=exists)
