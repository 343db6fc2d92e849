"""Attention of one new token a sequence over keys and values that lie in pages: a step of decoding.

    out_s = sum_j softmax_j(score_sj) v_j,   score_sj = cap(scale * q_s . k_j)     cap(x) = softcap * tanh(x / softcap)

where j runs over the tokens of sequence s, its newest last, whose key is stored already. Token j lies in page
`pages_SM[s, j // P]`, at row `j % P`: sequences that begin alike may name the same pages (Kwon et al., arXiv
2309.06180). With a window w, only the last w tokens count.

Letters: S sequences, H query heads, K key heads (H a multiple of K), E head width, N pages, P tokens of a page, M pages
of a sequence at most.
Not done here: a gradient, more than one token a sequence, storing keys. There is no CUDA C++: Triton serves a GPU, and
flash-attn where it is asked for by name.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from alignfast.kernels._backend import native_refusal, never_refuses, register, resolve, triton_refusal
from alignfast.kernels._native import launch, native_op, unit_columns
from alignfast.kernels.packed_attention import AttentionOptions, attention_options

_WIDEST = 1024  # head of compiled code, which keeps a row on its stack


def paged_attention(
    query_SHE: Tensor,
    key_NPKE: Tensor,
    value_NPKE: Tensor,
    pages_SM: Tensor,
    length_S: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of each sequence's newest token; a constant.

    Args:
        query_SHE: one query a sequence.
        key_NPKE: all pages of keys, contiguous, K dividing H.
        value_NPKE: values, of the keys' shape. What lies beyond a sequence's length is never used, and may be NaN; for
            `flash` it must be finite.
        pages_SM: int32 numbers of each sequence's pages, in order; any page in places that are not reached.
        length_S: int32 tokens of each sequence, its newest included, in [1, M * P]. Trusted, as the pages are: to look
            would wait for the device.
        scale: factor on the scores; None is E ** -0.5.
        window: a key counts when its distance to the query is below it; None is no limit.
        softcap: scores become softcap * tanh(score / softcap); None is no cap.
        backend: `auto`, `torch`, `native` (a CPU's), `triton`, or `flash`, which `auto` never takes.

    Returns:
        Output of the queries' shape and dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or an option is out of range.
        RuntimeError: the named backend can't run this input.

    >>> key_NPKE = torch.randn(3, 2, 1, 4)  # sequence 0 has its 3 tokens in pages 2 and 0
    >>> pages_SM, length_S = torch.tensor([[2, 0]], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    >>> out_SHE = paged_attention(torch.zeros(1, 1, 4), key_NPKE, key_NPKE, pages_SM, length_S)
    >>> torch.allclose(out_SHE[0, 0], (key_NPKE[2].sum(0) + key_NPKE[0, 0])[0] / 3)
    True
    """
    _check(query_SHE, key_NPKE, value_NPKE, pages_SM, length_S)
    options = attention_options(query_SHE.shape[-1], scale, window, softcap)
    implementation = resolve("paged_attention", query_SHE.device, query_SHE.dtype, backend)
    inputs = (x.detach() for x in (query_SHE, key_NPKE, value_NPKE, pages_SM, length_S))
    return implementation.forward(*inputs, options)


def _check(
    query_SHE: Tensor, key_NPKE: Tensor, value_NPKE: Tensor, pages_SM: Tensor, length_S: Tensor
) -> None:
    shapes = (
        f"{tuple(query_SHE.shape)}, {tuple(key_NPKE.shape)}, {tuple(value_NPKE.shape)}, {tuple(pages_SM.shape)} "
        f"and {tuple(length_S.shape)}"
    )
    if (query_SHE.ndim, key_NPKE.ndim, pages_SM.ndim, length_S.ndim) != (3, 4, 2, 1):
        raise ValueError(
            f"expected query (S, H, E), key and value (N, P, K, E), pages (S, M), lengths (S), got {shapes}"
        )
    S, H, E = query_SHE.shape
    if key_NPKE.shape != value_NPKE.shape or key_NPKE.shape[3] != E or H % key_NPKE.shape[2]:
        raise ValueError(
            f"keys and values must be alike, as wide as queries, and their heads divide the queries', got {shapes}"
        )
    if len(pages_SM) != S or len(length_S) != S:
        raise ValueError(f"expected a row of pages and a length for each of {S} sequences, got {shapes}")
    if not query_SHE.dtype == key_NPKE.dtype == value_NPKE.dtype:
        raise ValueError(f"dtypes differ: {query_SHE.dtype}, {key_NPKE.dtype}, {value_NPKE.dtype}")
    if not pages_SM.dtype == length_S.dtype == torch.int32:
        raise ValueError(f"pages and lengths must be int32, got {pages_SM.dtype} and {length_S.dtype}")
    devices = {x.device for x in (query_SHE, key_NPKE, value_NPKE, pages_SM, length_S)}
    if len(devices) > 1:
        raise ValueError(f"all must be on one device, got {', '.join(sorted(map(str, devices)))}; move them")
    if not key_NPKE.is_contiguous() or not value_NPKE.is_contiguous():
        raise ValueError(
            "key and value pages must be contiguous: copying them would cost more than the attention"
        )


class _Torch:
    """The definition: every sequence's pages gathered, then dense attention."""

    name = "torch"
    refusal = staticmethod(never_refuses)

    @staticmethod
    def forward(
        query_SHE: Tensor,
        key_NPKE: Tensor,
        value_NPKE: Tensor,
        pages_SM: Tensor,
        length_S: Tensor,
        options: AttentionOptions,
    ) -> Tensor:
        S, H, E = query_SHE.shape
        P, K = key_NPKE.shape[1:3]
        compute = torch.promote_types(query_SHE.dtype, torch.float32)
        # C = M * P: a sequence's tokens, and what lies beyond its length
        positions_C = torch.arange(pages_SM.shape[1] * P, device=query_SHE.device)
        distance_SC = length_S[:, None] - 1 - positions_C
        unseen_SC = distance_SC < 0
        if options.window:
            unseen_SC = unseen_SC | (distance_SC >= options.window)
        key_SCKE, value_SCKE = (
            x_NPKE[pages_SM].flatten(1, 2).to(compute) for x_NPKE in (key_NPKE, value_NPKE)
        )
        value_SCKE = value_SCKE.masked_fill(unseen_SC[:, :, None, None], 0)  # a product with 0 would keep NaN
        query_SKGE = query_SHE.to(compute).view(S, K, H // K, E)
        scores_SKGC = torch.einsum("skge,scke->skgc", query_SKGE, key_SCKE) * options.scale
        if options.softcap:
            scores_SKGC = torch.tanh(scores_SKGC / options.softcap) * options.softcap
        p_SKGC = scores_SKGC.masked_fill(unseen_SC[:, None, None], -math.inf).softmax(-1)
        return torch.einsum("skgc,scke->skge", p_SKGC, value_SCKE).reshape(S, H, E).to(query_SHE.dtype)


class _Native:
    """csrc/cpu/paged_attention.cpp."""

    name = "native"

    @staticmethod
    def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
        """As every op's, and on a GPU that there is none."""
        if device.type == "cuda":
            return "compiled paged attention is a CPU's; pass backend='triton'"
        return native_refusal(device, dtype)

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        *tensors, options = arguments
        if tensors[0].shape[2] > _WIDEST:
            raise RuntimeError(
                f"compiled paged attention takes heads up to {_WIDEST} wide, got {tensors[0].shape[2]}; "
                "pass backend='torch'"
            )
        return torch.ops.alignfast.paged_attention(*tensors, *options)


@native_op(
    "paged_attention(Tensor query, Tensor key, Tensor value, Tensor pages, Tensor lengths, float scale, int window, "
    "float softcap) -> Tensor",
    fake=lambda query_SHE, *_: query_SHE.new_empty(query_SHE.shape),
)
def _native_forward(
    query_SHE: Tensor,
    key_NPKE: Tensor,
    value_NPKE: Tensor,
    pages_SM: Tensor,
    length_S: Tensor,
    *options: float,
) -> Tensor:
    out_SHE = query_SHE.new_empty(query_SHE.shape)
    tables = (pages_SM.contiguous(), length_S.contiguous())
    launch("paged_attention", unit_columns(query_SHE), key_NPKE, value_NPKE, *tables, *options, out_SHE)
    return out_SHE


class _Triton:
    """paged_attention_triton.py, imported on the first call: triton is optional."""

    name = "triton"
    refusal = staticmethod(triton_refusal)

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        from alignfast.kernels import paged_attention_triton

        return paged_attention_triton.forward(*arguments)


class _Flash:
    """paged_attention_flash.py, which imports flash-attn on the first call."""

    name = "flash"

    @staticmethod
    def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
        """That the library is not there, among others."""
        from alignfast.kernels import paged_attention_flash

        return paged_attention_flash.refusal(device, dtype)

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        from alignfast.kernels import paged_attention_flash

        return paged_attention_flash.forward(*arguments)


register("paged_attention", _Torch, _Native, _Triton, _Flash)
