"""Scalar functions that Triton's language lacks, from exp and log alone.

CUDA's libdevice has them, Triton's interpreter has no libdevice, and one definition must serve both. On a GPU
`tl.log` is libdevice's (1 ulp), `tl.exp` is `ex2.approx` of a scaled argument (2 ulp and the rounding of the
argument); the forms below keep that accuracy near zero, where the naive ones lose all of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# The most negative float32. Where a running maximum starts: from -inf, a row of -inf would give -inf - -inf.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def log1p(x):
    """log(1 + x) for finite x >= 0. The rounding of 1 + x is undone by the last factor (a trick of W. Kahan)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0, by the same trick; -1 at -inf."""
    u = tl.exp(x)
    near_zero = u == 1.0
    inside = (u > 0.0) & (u < 1.0)
    corrected = (u - 1.0) * (x / tl.where(inside, tl.log(tl.where(inside, u, 0.5)), 1.0))
    # past -17 the 1 is all there is, and x / log(u) would end in inf / inf; NaN takes this way too and stays NaN
    return tl.where(near_zero, x, tl.where((x > -17.0) & inside, corrected, u - 1.0))


@triton.jit
def softplus(x):
    """log(1 + exp(x)), exact at both ends: 0 at -inf, inf at inf."""
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def tanh(x):
    """Within 2 ulp: an odd polynomial below 0.65 (minimax in relative error, 7e-9), beyond it 1 - 2 / (exp(2x) + 1)."""
    w = x * x
    p = -0.005515293683856726
    p = p * w + 0.020469538867473602
    p = p * w - 0.053688060492277145
    p = p * w + 0.1333083063364029
    p = p * w - 0.3333325982093811
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(size * (2.0 * LOG2E)) + 1.0)
    return tl.where(size < 0.65, x + x * w * p, tl.where(x < 0.0, -far, far))
