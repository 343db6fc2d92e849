"""Pieces that packed_attention's Triton kernels are made of: tiles in and out, scores, what a query sees.

Letters: K key heads, G query heads a key head, E head width, EP the next power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from alignfast.kernels._triton_math import LN2, LOG2E, tanh


@triton.jit
def load(ptr, offsets, inside, columns, E: tl.constexpr):
    """A tile (rows, EP) from rows at `offsets`; zeros outside."""
    return tl.load(
        ptr + offsets[:, None] + columns[None, :], mask=inside[:, None] & (columns < E)[None, :], other=0.0
    )


@triton.jit
def store(ptr, offsets, inside, columns, tile, E: tl.constexpr):
    tile = tile.to(ptr.dtype.element_ty)
    tl.store(ptr + offsets[:, None] + columns[None, :], tile, mask=inside[:, None] & (columns < E)[None, :])


@triton.jit
def dot(a, b, acc, WIDEN: tl.constexpr):
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")  # for float32; the default, TF32, keeps 10 bits


@triton.jit
def scores(a, b, scale, softcap, SOFTCAP: tl.constexpr, WIDEN: tl.constexpr):
    """Scores in units of log 2, so that exp2 is the softmax's exponential, and d score / d (a . b) over `scale`."""
    s = dot(a, tl.trans(b), None, WIDEN) * (scale * LOG2E)
    slope = 1.0
    if SOFTCAP:
        t = tanh(s * (LN2 / softcap))
        s, slope = t * (softcap * LOG2E), 1.0 - t * t
    return s, slope


@triton.jit
def query_tile(tiles_ptr, K: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr):
    """A program's block of queries: heads, rows, positions, which of them exist; and its sequence's lie."""
    block = tiles_ptr + tl.program_id(0) // K * 5
    first, start, length = tl.load(block), tl.load(block + 1), tl.load(block + 2)
    prompt_start, prompt_length = tl.load(block + 3), tl.load(block + 4)
    r = first + tl.arange(0, ROWS)
    heads = tl.program_id(0) % K * G + r % G
    token = r // G
    return (
        heads,
        start + token,
        prompt_length + token,
        token < length,
        first,
        start,
        length,
        prompt_start,
        prompt_length,
    )


@triton.jit
def key_range(
    first, length, prompt_length, window,
    G: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The keys of a block of queries: from `low` to `high`, and up to `full` seen by every query."""
    nearest = prompt_length + first // G  # the first query's position
    high = prompt_length + tl.minimum((first + ROWS - 1) // G + 1, length)
    low = 0
    full = (nearest + 1) // KEYS * KEYS
    if WINDOW:
        low = tl.maximum(nearest - window + 1, 0) // KEYS * KEYS
        full = low
    return low, full, high


@triton.jit
def key_tile(first, high, start, prompt_start, prompt_length, KEYS: tl.constexpr):
    """Positions of a block of a sequence's keys, their rows, and which of them exist."""
    v = first + tl.arange(0, KEYS)
    rows = v + tl.where(v < prompt_length, prompt_start, start - prompt_length)
    return v, rows.to(tl.int64), v < high


@triton.jit
def unseen(positions, v, inside, window, WINDOW: tl.constexpr):
    """-inf where a query does not see a key, else 0."""
    distance = positions[:, None] - v[None, :]
    seen = (distance >= 0) & inside[None, :]
    if WINDOW:
        seen = seen & (distance < window)
    return tl.where(seen, 0.0, -float("inf"))


@triton.jit
def norms(norms_ptr, at, exists, dtype: tl.constexpr):
    """Base and factor. The factor of 16-bit queries is 1, and not read."""
    base = tl.load(norms_ptr + 2 * at, mask=exists, other=0.0)
    factor = base
    if dtype == tl.float32:
        factor = tl.load(norms_ptr + 2 * at + 1, mask=exists, other=0.0)
    return base, factor


@triton.jit
def probability(s, base, factor, dtype: tl.constexpr):
    p = tl.exp2(s - base)
    if dtype == tl.float32:
        p *= factor
    return p
