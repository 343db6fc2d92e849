"""packed_attention in Triton: every answer walks its prompt and itself as one run of keys, in one softmax.

A sequence's key v lies at row `prompt_start + v` while v is in the prompt, at `start + v - prompt_length` after
it, so a walk over v needs no second range, no merge and no gathered copy. Backward, a prompt's key is seen by all
rows from itself to the end of its tree, an answer's by all rows to the answer's end: again one run, of queries.

The query heads that share a key head are rows of one tile, row r being token r // G under head r % G: a short
answer still fills tiles, keys are read once a group, and their gradients need no sum over heads. No atomics: the
same input gives the same bits.

Floor on an H100 (798 TF/s bf16) for one causal segment of 8192 tokens, 32 heads of width 128: forward 2 products,
0.55 TFLOP, 0.69 ms; backward 7 (the scores and dp are formed in both kernels), 1.92 TFLOP, 2.41 ms.
Predicted, not measured: forward 1.4 ms (400 TF/s), backward 5.5 ms (350 TF/s).

Letters: T tokens, H query heads, K key heads, G = H / K, E head width, EP the next power of two; N blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alignfast.kernels._attention_tiles import Tile, key_tiles, positions, query_tiles, tile_of
from alignfast.kernels._attention_triton import (
    dot,
    key_range,
    key_tile,
    load,
    norms,
    probability,
    query_tile,
    scores,
    store,
    unseen,
)
from alignfast.kernels._triton_math import LOWEST
from alignfast.kernels.packed_attention import AttentionOptions, PackedLayout

_WIDEST = 256  # of a head


def forward(
    query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, layout: PackedLayout, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """(out_THE, norms_HT2): the numbers of each query with which p = exp2(score - base) * factor.

    Raises:
        RuntimeError: the heads are wider than 256.
    """
    T, H, E = query_THE.shape
    device = query_THE.device
    if E > _WIDEST:
        raise RuntimeError(
            f"Triton attention takes heads up to {_WIDEST} wide, got {E}; pass backend='torch'"
        )
    query_THE, key_TKE, value_TKE = (_unit_columns(x) for x in (query_THE, key_TKE, value_TKE))
    out_THE = torch.empty((T, H, E), dtype=query_THE.dtype, device=device)
    norms_HT2 = torch.empty((H, T, 2), dtype=torch.float32, device=device)
    if T:
        sizes, tile = _sizes("forward", query_THE, key_TKE, options)
        tiles_N5 = query_tiles(layout, sizes["G"], tile.rows, device)
        _forward_kernel[(len(tiles_N5) * sizes["K"],)](
            query_THE, key_TKE, value_TKE, out_THE, norms_HT2, tiles_N5,
            *_strides(query_THE, key_TKE, value_TKE), T, *options, **sizes,
        )  # fmt: skip
    return out_THE, norms_HT2


def backward(
    dout_THE: Tensor,
    query_THE: Tensor,
    key_TKE: Tensor,
    value_TKE: Tensor,
    out_THE: Tensor,
    norms_HT2: Tensor,
    layout: PackedLayout,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dquery_THE, dkey_TKE, dvalue_TKE), contiguous."""
    inputs = tuple(_unit_columns(x) for x in (dout_THE, query_THE, key_TKE, value_TKE))
    dquery_THE, dkey_TKE, dvalue_TKE = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[1:]
    )
    T, device = query_THE.shape[0], query_THE.device
    if T == 0:
        return dquery_THE, dkey_TKE, dvalue_TKE
    delta_HT = norms_HT2.new_empty(norms_HT2.shape[:2])
    strides = _strides(*inputs)

    sizes, tile = _sizes("dquery", query_THE, key_TKE, options)
    tiles_N5 = query_tiles(layout, sizes["G"], tile.rows, device)
    _dquery_kernel[(len(tiles_N5) * sizes["K"],)](
        *inputs, out_THE, norms_HT2, delta_HT, dquery_THE, tiles_N5, *strides, T, *options, **sizes
    )
    sizes, tile = _sizes("dkey", query_THE, key_TKE, options)
    tiles_N3 = key_tiles(layout, tile.keys, options.window, device)
    positions_T = positions(layout, device) if options.window else tiles_N3  # not read without a window
    _dkey_kernel[(len(tiles_N3) * sizes["K"],)](
        *inputs,
        norms_HT2,
        delta_HT,
        positions_T,
        dkey_TKE,
        dvalue_TKE,
        tiles_N3,
        *strides,
        T,
        *options,
        **sizes,
    )
    return dquery_THE, dkey_TKE, dvalue_TKE


def _unit_columns(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    """Strides of tokens and heads."""
    return [x.stride(k) for x in tensors for k in (0, 1)]


def _sizes(
    kernel: str, query_THE: Tensor, key_TKE: Tensor, options: AttentionOptions
) -> tuple[dict[str, int | bool], Tile]:
    _, K, E = key_TKE.shape
    width = max(16, triton.next_power_of_2(E))  # a product wants at least 16
    tile = tile_of(kernel, query_THE.element_size(), width, query_THE.device)
    return {
        "K": K,
        "G": query_THE.shape[1] // K,
        "E": E,
        "EP": width,
        "WINDOW": options.window > 0,
        "SOFTCAP": options.softcap > 0,
        "WIDEN": query_THE.device.type == "cpu",  # the interpreter multiplies the bit patterns of bfloat16
        "ROWS": tile.rows,
        "KEYS": tile.keys,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }, tile


@triton.jit
def _attend(
    q, positions, acc, m, total, k_ptr, v_ptr, k_stride, v_stride, columns, low, high, limit,
    start, prompt_start, prompt_length, scale, softcap, window,
    E: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Take the keys from `low` to `high` into the running softmax."""
    for first in range(low, high, KEYS):
        v, rows, inside = key_tile(first, limit, start, prompt_start, prompt_length, KEYS)
        k = load(k_ptr, rows * k_stride, inside, columns, E)
        s, _ = scores(q, k, scale, softcap, SOFTCAP, WIDEN)
        if MASKED:
            s += unseen(positions, v, inside, window, WINDOW)
        m_new = tl.maximum(m, tl.max(s, 1))
        keep = tl.exp2(m - m_new)
        p = tl.exp2(s - m_new[:, None])
        total = total * keep + tl.sum(p, 1)
        value = load(v_ptr, rows * v_stride, inside, columns, E)
        acc = dot(p.to(value.dtype), value, acc * keep[:, None], WIDEN)
        m = m_new
    return acc, m, total


@triton.jit(do_not_specialize=["T", "window"])
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, norms_ptr, tiles_ptr,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, T, scale, window, softcap,
    K: tl.constexpr, G: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    heads, rows, positions, exists, first, start, length, prompt_start, prompt_length = query_tile(
        tiles_ptr, K, G, ROWS
    )
    low, full, high = key_range(first, length, prompt_length, window, G, ROWS, KEYS, WINDOW)
    columns = tl.arange(0, EP)
    rows = rows.to(tl.int64)
    k_ptr += tl.program_id(0) % K * k_head_stride
    v_ptr += tl.program_id(0) % K * v_head_stride
    q = load(q_ptr, rows * q_stride + heads * q_head_stride, exists, columns, E)
    acc = tl.zeros([ROWS, EP], tl.float32)
    m = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if not WINDOW:
        acc, m, total = _attend(
            q, positions, acc, m, total, k_ptr, v_ptr, k_stride, v_stride, columns, low, full, high,
            start, prompt_start, prompt_length, scale, softcap, window, E, KEYS, False, WINDOW, SOFTCAP, WIDEN,
        )  # fmt: skip
    acc, m, total = _attend(
        q, positions, acc, m, total, k_ptr, v_ptr, k_stride, v_stride, columns, full, high, high,
        start, prompt_start, prompt_length, scale, softcap, window, E, KEYS, True, WINDOW, SOFTCAP, WIDEN,
    )  # fmt: skip
    store(out_ptr, (rows * K * G + heads) * E, exists, columns, acc / total[:, None], E)
    pair_ptr = norms_ptr + 2 * (heads.to(tl.int64) * T + rows)
    if q.dtype == tl.float32:
        tl.store(pair_ptr, m, mask=exists)
        tl.store(pair_ptr + 1, 1.0 / total, mask=exists)
    else:  # products of 16-bit numbers do not show what adding rounds off
        tl.store(pair_ptr, m + tl.log2(total), mask=exists)
        tl.store(pair_ptr + 1, 1.0, mask=exists)


@triton.jit
def _dquery_walk(
    dq, q, dout, base, factor, delta, positions, k_ptr, v_ptr, k_stride, v_stride, columns, low, high, limit,
    start, prompt_start, prompt_length, scale, softcap, window,
    E: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    for first in range(low, high, KEYS):
        v, rows, inside = key_tile(first, limit, start, prompt_start, prompt_length, KEYS)
        k = load(k_ptr, rows * k_stride, inside, columns, E)
        value = load(v_ptr, rows * v_stride, inside, columns, E)
        s, slope = scores(q, k, scale, softcap, SOFTCAP, WIDEN)
        if MASKED:
            s += unseen(positions, v, inside, window, WINDOW)
        p = probability(s, base[:, None], factor[:, None], q.dtype)
        dp = dot(dout, tl.trans(value), None, WIDEN)
        ds = p * (dp - delta[:, None]) * slope
        dq = dot(ds.to(k.dtype), k, dq, WIDEN)
    return dq


@triton.jit(do_not_specialize=["T", "window"])
def _dquery_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, norms_ptr, delta_ptr, dq_ptr, tiles_ptr,
    dout_stride, dout_head_stride, q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride,
    T, scale, window, softcap,
    K: tl.constexpr, G: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dq, and delta = sum dout * out of every query, which the kernel of the keys reads."""
    heads, rows, positions, exists, first, start, length, prompt_start, prompt_length = query_tile(
        tiles_ptr, K, G, ROWS
    )
    low, full, high = key_range(first, length, prompt_length, window, G, ROWS, KEYS, WINDOW)
    columns = tl.arange(0, EP)
    rows = rows.to(tl.int64)
    k_ptr += tl.program_id(0) % K * k_head_stride
    v_ptr += tl.program_id(0) % K * v_head_stride
    packed = (rows * K * G + heads) * E
    q = load(q_ptr, rows * q_stride + heads * q_head_stride, exists, columns, E)
    dout = load(dout_ptr, rows * dout_stride + heads * dout_head_stride, exists, columns, E)
    out = load(out_ptr, packed, exists, columns, E)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    at = heads.to(tl.int64) * T + rows
    tl.store(delta_ptr + at, delta, mask=exists)
    base, factor = norms(norms_ptr, at, exists, q.dtype)
    dq = tl.zeros([ROWS, EP], tl.float32)
    if not WINDOW:
        dq = _dquery_walk(
            dq, q, dout, base, factor, delta, positions, k_ptr, v_ptr, k_stride, v_stride, columns, low, full, high,
            start, prompt_start, prompt_length, scale, softcap, window, E, KEYS, False, WINDOW, SOFTCAP, WIDEN,
        )  # fmt: skip
    dq = _dquery_walk(
        dq, q, dout, base, factor, delta, positions, k_ptr, v_ptr, k_stride, v_stride, columns, full, high, high,
        start, prompt_start, prompt_length, scale, softcap, window, E, KEYS, True, WINDOW, SOFTCAP, WIDEN,
    )  # fmt: skip
    store(dq_ptr, packed, exists, columns, dq * scale, E)


@triton.jit
def _dkey_walk(
    dk, dv, k, value, keys, positions, dout_ptr, q_ptr, norms_ptr, delta_ptr, positions_ptr, dout_stride,
    dout_head_stride, q_stride, q_head_stride, T, columns, low, high, limit, scale, softcap, window,
    G: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Queries `low` to `high`, counted over the heads of the group too. Rows past `limit` load as zeros: no share."""
    for first in range(low, high, ROWS):
        r = first + tl.arange(0, ROWS)
        inside = r < limit
        rows, heads = (r // G).to(tl.int64), r % G
        q = load(q_ptr, rows * q_stride + heads * q_head_stride, inside, columns, E)
        dout = load(dout_ptr, rows * dout_stride + heads * dout_head_stride, inside, columns, E)
        at = heads.to(tl.int64) * T + rows
        base, factor = norms(norms_ptr, at, inside, q.dtype)
        delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
        s, slope = scores(k, q, scale, softcap, SOFTCAP, WIDEN)
        p = probability(s, base[None, :], factor[None, :], q.dtype)
        if MASKED:
            p = tl.where(keys[:, None] <= rows[None, :], p, 0.0)
        if WINDOW:
            at_position = tl.load(positions_ptr + rows, mask=inside, other=0)
            p = tl.where(at_position[None, :] - positions[:, None] < window, p, 0.0)
        dv = dot(p.to(dout.dtype), dout, dv, WIDEN)
        dp = dot(value, tl.trans(dout), None, WIDEN)
        ds = p * (dp - delta[None, :]) * slope
        dk = dot(ds.to(q.dtype), q, dk, WIDEN)
    return dk, dv


@triton.jit(do_not_specialize=["T", "window"], do_not_specialize_on_alignment=["positions_ptr"])
def _dkey_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, norms_ptr, delta_ptr, positions_ptr, dk_ptr, dv_ptr, tiles_ptr,
    dout_stride, dout_head_stride, q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride,
    T, scale, window, softcap,
    K: tl.constexpr, G: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys. A query sees a key when it lies at or after it: in rows, within the block's span."""
    tl.static_assert(KEYS % ROWS == 0)  # the diagonal ends where a block of queries does
    block = tiles_ptr + tl.program_id(0) // K * 3
    first, end, seen_until = tl.load(block), tl.load(block + 1), tl.load(block + 2)
    head = tl.program_id(0) % K
    columns = tl.arange(0, EP)
    keys = (first + tl.arange(0, KEYS)).to(tl.int64)
    exists = keys < end
    k = load(k_ptr + head * k_head_stride, keys * k_stride, exists, columns, E)
    value = load(v_ptr + head * v_head_stride, keys * v_stride, exists, columns, E)
    positions = keys
    if WINDOW:
        positions = tl.load(positions_ptr + keys, mask=exists, other=0)
    q_ptr += head * G * q_head_stride
    dout_ptr += head * G * dout_head_stride
    norms_ptr += (head * G).to(tl.int64) * T * 2
    delta_ptr += (head * G).to(tl.int64) * T
    dk = tl.zeros([KEYS, EP], tl.float32)
    dv = tl.zeros([KEYS, EP], tl.float32)
    limit = seen_until * G
    diagonal = tl.minimum((first + KEYS) * G, limit)
    dk, dv = _dkey_walk(
        dk, dv, k, value, keys, positions, dout_ptr, q_ptr, norms_ptr, delta_ptr, positions_ptr, dout_stride,
        dout_head_stride, q_stride, q_head_stride, T, columns, first * G, diagonal, limit, scale, softcap, window,
        G, E, ROWS, True, WINDOW, SOFTCAP, WIDEN,
    )  # fmt: skip
    dk, dv = _dkey_walk(
        dk, dv, k, value, keys, positions, dout_ptr, q_ptr, norms_ptr, delta_ptr, positions_ptr, dout_stride,
        dout_head_stride, q_stride, q_head_stride, T, columns, diagonal, limit, limit, scale, softcap, window,
        G, E, ROWS, False, WINDOW, SOFTCAP, WIDEN,
    )  # fmt: skip
    packed = (keys * K + head) * E
    store(dk_ptr, packed, exists, columns, dk * scale, E)
    store(dv_ptr, packed, exists, columns, dv, E)
