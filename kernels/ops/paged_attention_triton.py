"""paged_attention in Triton: a sequence's tokens are divided among programs (split keys), whose softmaxes are merged.

One query a sequence is too little work for a card: 64 sequences with 8 key heads make 512 programs of one wave and a
long tail. So each (sequence, key head) is cut into splits of whole blocks; a second kernel adds them up. The number of
splits follows from the shapes alone, so that a captured graph serves every length.

Floor on an H100: the bytes of the keys and values, 64 sequences of 1024 tokens with 8 heads of 128 in bf16: 268 MB,
90 us at 3.0 TB/s. Predicted, not measured: 120 us.

Letters: S sequences, K key heads, G query heads a key head, GP the next power of two >= 16 (a tensor core's least), E
head width, EP the next power of two, N pages, P tokens of a page, M pages of a sequence, B splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alignfast.kernels._attention_triton import dot, load, scores, store
from alignfast.kernels._triton_math import LOWEST
from alignfast.kernels.packed_attention import AttentionOptions

_KEYS = {2: 64, 4: 32}  # of a block, by bytes of a number: more would spill
_PROGRAMS = 528  # four for each of an H100's 132 processors
_WIDEST = 256


def forward(
    query_SHE: Tensor,
    key_NPKE: Tensor,
    value_NPKE: Tensor,
    pages_SM: Tensor,
    length_S: Tensor,
    options: AttentionOptions,
) -> Tensor:
    """The op, of checked inputs.

    Raises:
        RuntimeError: the heads are wider than 256.
    """
    S, H, E = query_SHE.shape
    _, P, K, _ = key_NPKE.shape
    if E > _WIDEST:
        raise RuntimeError(
            f"Triton attention takes heads up to {_WIDEST} wide, got {E}; pass backend='torch'"
        )
    query_SHE, pages_SM, length_S = query_SHE.contiguous(), pages_SM.contiguous(), length_S.contiguous()
    out_SHE = torch.empty_like(query_SHE)
    if not S:
        return out_SHE
    keys, reach = _KEYS[query_SHE.element_size()], pages_SM.shape[1] * P
    blocks = triton.cdiv(min(reach, options.window) if options.window else reach, keys)
    B = max(1, min(blocks, _PROGRAMS // (S * K)))
    sizes = dict(
        K=K, G=H // K, GP=max(16, triton.next_power_of_2(H // K)), E=E, EP=max(16, triton.next_power_of_2(E))
    )
    out_SHBE = torch.empty((S, H, B, E), dtype=torch.float32, device=query_SHE.device)
    norms_SHB2 = torch.empty((S, H, B, 2), dtype=torch.float32, device=query_SHE.device)
    _split_kernel[(S * K, B)](
        query_SHE, key_NPKE, value_NPKE, pages_SM, length_S, out_SHBE, norms_SHB2, pages_SM.shape[1], B, *options,
        **sizes, P=P, KEYS=keys, WINDOW=options.window > 0, SOFTCAP=options.softcap > 0,
        WIDEN=query_SHE.device.type == "cpu",  # the interpreter multiplies the bit patterns of bfloat16
        num_warps=4,
    )  # fmt: skip
    _merge_kernel[(S * H,)](
        out_SHBE, norms_SHB2, out_SHE, B, E=E, EP=sizes["EP"], BP=triton.next_power_of_2(B), num_warps=1
    )
    return out_SHE


@triton.jit(do_not_specialize=["M", "B", "window"])
def _split_kernel(
    q_ptr, k_ptr, v_ptr, pages_ptr, length_ptr, out_ptr, norms_ptr, M, B, scale, window, softcap,
    K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, P: tl.constexpr,
    KEYS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One split of one key head's keys: unnormalised output, largest score and sum, of each query head."""
    s, key_head = (tl.program_id(0) // K).to(tl.int64), tl.program_id(0) % K
    length = tl.load(length_ptr + s)
    low = 0
    if WINDOW:
        low = tl.maximum(length - window, 0)
    share = tl.cdiv(tl.cdiv(length - low, B), KEYS) * KEYS
    first = low + tl.program_id(1) * share
    end = tl.minimum(first + share, length)
    columns, lane, g = tl.arange(0, EP), tl.arange(0, KEYS), tl.arange(0, GP)
    head = (s * K + key_head) * G + g
    q = load(q_ptr, head * E, g < G, columns, E)
    acc = tl.zeros([GP, EP], tl.float32)
    m = tl.full([GP], LOWEST, tl.float32)
    total = tl.zeros([GP], tl.float32)
    for block in range(first, end, KEYS):
        position = block + lane
        inside = position < end
        page = tl.load(pages_ptr + s * M + position // P, mask=inside, other=0).to(tl.int64)
        row = ((page * P + position % P) * K + key_head) * E
        x, _ = scores(q, load(k_ptr, row, inside, columns, E), scale, softcap, SOFTCAP, WIDEN)
        x = tl.where(inside[None, :], x, -float("inf"))
        m_new = tl.maximum(m, tl.max(x, 1))
        keep, p = tl.exp2(m - m_new), tl.exp2(x - m_new[:, None])
        total = total * keep + tl.sum(p, 1)
        value = load(v_ptr, row, inside, columns, E)
        acc = dot(p.to(value.dtype), value, acc * keep[:, None], WIDEN)
        m = m_new
    at = head * B + tl.program_id(1)
    store(out_ptr, at * E, g < G, columns, acc, E)
    tl.store(norms_ptr + 2 * at, m, mask=g < G)
    tl.store(norms_ptr + 2 * at + 1, total, mask=g < G)


@triton.jit(do_not_specialize=["B"])
def _merge_kernel(split_ptr, norms_ptr, out_ptr, B, E: tl.constexpr, EP: tl.constexpr, BP: tl.constexpr):
    """The splits of one query head; one without keys has a sum of 0."""
    at, columns, b = tl.program_id(0).to(tl.int64), tl.arange(0, EP), tl.arange(0, BP)
    exists = b < B
    m = tl.load(norms_ptr + 2 * (at * B + b), mask=exists, other=LOWEST)
    total = tl.load(norms_ptr + 2 * (at * B + b) + 1, mask=exists, other=0.0)
    weight = tl.exp2(m - tl.max(m, 0))
    out = tl.sum(load(split_ptr, (at * B + b) * E, exists, columns, E) * weight[:, None], 0) / tl.sum(
        total * weight, 0
    )
    tl.store(out_ptr + at * E + columns, out.to(out_ptr.dtype.element_ty), mask=columns < E)
