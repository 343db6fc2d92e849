"""packed_attention by varlen flash attention, which knows neither trees nor prompts: in parts, merged.

flash-attn 2 where it is installed, which has grouped heads and softcaps; torch's own build of it otherwise.

    lse = log(e^lse_1 + e^lse_2)        out = e^(lse_1 - lse) out_1 + e^(lse_2 - lse) out_2

A part is one call over sequences of its own. Each part's backward is handed the merged output and log-sum-exp, which
makes its probabilities those of the whole softmax, and the parts' gradients simply add up.

Letters: T tokens of the row, H query heads, K key heads, E head width; N keys of a part.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from alignfast.kernels._layout import PackedLayout

if TYPE_CHECKING:  # packed_attention.py imports this file
    from alignfast.kernels.packed_attention import AttentionOptions


class Part(NamedTuple):
    """Which rows are a call's queries and keys, and where they split into sequences."""

    query_rows: Tensor | slice
    key_rows: Tensor | slice
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    causal: bool  # aligned at the end: the last query sees the last key
    window: int = 0


def takes(query_THE: Tensor, options: AttentionOptions) -> bool:
    """Whether flash attention can: 16-bit tensors on a GPU, heads of 8 to 256 by eights, no softcap in torch's build."""
    sixteen_bit = query_THE.dtype in (torch.bfloat16, torch.float16)
    width = query_THE.shape[2]
    fits = query_THE.device.type == "cuda" and sixteen_bit and width <= 256 and width % 8 == 0
    return fits and (not options.softcap or flash_attn_2() is not None)


@cache
def flash_attn_2() -> Any:
    """flash-attn 2's functions, or None where it is not installed."""
    if importlib.util.find_spec("flash_attn_2_cuda") is None:
        return None
    return importlib.import_module("flash_attn.flash_attn_interface")


def parts_of(layout: PackedLayout, window: int, device: torch.device) -> list[Part]:
    """The calls that make up the attention of a layout.

    Without a window that bites: each segment over itself, and the answers of a tree, which lie together, over
    their prompt in one block. With one, each answer's keys are gathered with the window's end of its prompt, since
    where the window starts differs from query to query.
    """
    segments = layout.segments
    lengths = tuple(segment.length for segment in segments)
    if window and max((s.prompt_length + s.length for s in segments), default=0) > window:
        rows, key_lengths = [], []
        for segment in segments:
            kept = min(segment.prompt_length, window - 1)
            rows += [torch.arange(segment.prompt.stop - kept, segment.prompt.stop)]
            rows += [torch.arange(segment.own.start, segment.own.stop)]
            key_lengths.append(kept + segment.length)
        return [Part(slice(None), torch.cat(rows).to(device), lengths, tuple(key_lengths), True, window)]
    parts = [Part(slice(None), slice(None), lengths, lengths, True)]
    query_rows, key_rows, query_lengths, key_lengths, start = [], [], [], [], 0
    for prompt, answers in zip(layout.prompts, layout.answers):
        answered = sum(answers)
        if prompt and answered:
            key_rows.append(torch.arange(start, start + prompt))
            query_rows.append(torch.arange(start + prompt, start + prompt + answered))
            query_lengths.append(answered)
            key_lengths.append(prompt)
        start += prompt + answered
    if query_rows:
        rows_Q, rows_K = torch.cat(query_rows).to(device), torch.cat(key_rows).to(device)
        parts.append(Part(rows_Q, rows_K, tuple(query_lengths), tuple(key_lengths), False))
    return parts


def forward(
    query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, layout: PackedLayout, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """(out_THE, lse_HT), the log-sum-exps in float32."""
    T, H, _ = query_THE.shape
    if T == 0:
        return torch.empty_like(query_THE), query_THE.new_empty((H, 0), dtype=torch.float32)
    own, *others = parts_of(layout, options.window, query_THE.device)
    out_THE, lse_HT = _attend(query_THE, key_TKE[own.key_rows], value_TKE[own.key_rows], own, options)
    for part in others:
        rows = part.query_rows
        part_THE, part_HT = _attend(
            query_THE[rows], key_TKE[part.key_rows], value_TKE[part.key_rows], part, options
        )
        before_HT = lse_HT[:, rows]
        merged_HT = torch.logaddexp(before_HT, part_HT)
        keep_T1, take_T1 = ((lse - merged_HT).exp().T[:, :, None] for lse in (before_HT, part_HT))
        out_THE[rows] = (out_THE[rows] * keep_T1 + part_THE * take_T1).to(out_THE.dtype)
        lse_HT[:, rows] = merged_HT
    return out_THE, lse_HT


def backward(
    dout_THE: Tensor,
    query_THE: Tensor,
    key_TKE: Tensor,
    value_TKE: Tensor,
    out_THE: Tensor,
    lse_HT: Tensor,
    layout: PackedLayout,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dquery_THE, dkey_TKE, dvalue_TKE), summed over the parts in float32."""
    compute = torch.promote_types(query_THE.dtype, torch.float32)
    inputs = (query_THE, key_TKE, value_TKE)
    dquery_THE, dkey_TKE, dvalue_TKE = (torch.zeros_like(x, dtype=compute) for x in inputs)
    for part in parts_of(layout, options.window, query_THE.device) if layout.num_tokens else ():
        queries, keys = part.query_rows, part.key_rows
        dq_THE, dk_NKE, dv_NKE = _attend_backward(
            dout_THE[queries], query_THE[queries], key_TKE[keys], value_TKE[keys], out_THE[queries],
            lse_HT[:, queries], part, options,
        )  # fmt: skip
        for total, rows, gradient in (
            (dquery_THE, queries, dq_THE),
            (dkey_TKE, keys, dk_NKE),
            (dvalue_TKE, keys, dv_NKE),
        ):
            if isinstance(rows, slice):
                total += gradient
            else:
                total.index_add_(0, rows, gradient.to(compute))  # a gathered key row may come several times
    return dquery_THE.to(query_THE.dtype), dkey_TKE.to(key_TKE.dtype), dvalue_TKE.to(value_TKE.dtype)


def _attend(
    query_THE: Tensor, key_NKE: Tensor, value_NKE: Tensor, part: Part, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    theirs = flash_attn_2()
    if theirs is not None:
        out_THE, lse_HT, *_ = theirs._flash_attn_varlen_forward(
            query_THE, key_NKE, value_NKE, *_lengths(part, query_THE.device),
            dropout_p=0.0, softmax_scale=options.scale, causal=part.causal, softcap=options.softcap, **_window(part),
        )  # fmt: skip
        return out_THE, lse_HT
    out_THE, lse_HT, *_ = torch.ops.aten._flash_attention_forward(
        query_THE, *_repeated(query_THE, key_NKE, value_NKE), *_lengths(part, query_THE.device),
        0.0, part.causal, False, scale=options.scale, **_window(part),
    )  # fmt: skip
    return out_THE, lse_HT


def _attend_backward(
    dout_THE: Tensor,
    query_THE: Tensor,
    key_NKE: Tensor,
    value_NKE: Tensor,
    out_THE: Tensor,
    lse_HT: Tensor,
    part: Part,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    theirs = flash_attn_2()
    if theirs is not None:
        gradients = tuple(
            torch.empty_like(x, memory_format=torch.contiguous_format)
            for x in (query_THE, key_NKE, value_NKE)
        )
        theirs._flash_attn_varlen_backward(
            dout_THE.contiguous(), query_THE, key_NKE, value_NKE, out_THE, lse_HT.contiguous(), *gradients,
            *_lengths(part, query_THE.device), dropout_p=0.0, softmax_scale=options.scale, causal=part.causal,
            softcap=options.softcap, alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(), **_bounds(part),
        )  # fmt: skip
        return gradients
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=query_THE.device)
    dquery_THE, *dkey_value = torch.ops.aten._flash_attention_backward(
        dout_THE.contiguous(), query_THE, *_repeated(query_THE, key_NKE, value_NKE), out_THE, lse_HT.contiguous(),
        *_lengths(part, query_THE.device), 0.0, part.causal, no_dropout, no_dropout.new_empty(0),
        scale=options.scale, **_window(part),
    )  # fmt: skip
    K = key_NKE.shape[1]
    dkey_NKE, dvalue_NKE = (x.unflatten(1, (K, -1)).float().sum(2) for x in dkey_value)
    return dquery_THE, dkey_NKE, dvalue_NKE


def _repeated(query_THE: Tensor, key_NKE: Tensor, value_NKE: Tensor) -> tuple[Tensor, Tensor]:
    """Key heads repeated for the queries that share them: the aten op of torch 2.11 lacks grouped queries."""
    times = query_THE.shape[1] // key_NKE.shape[1]
    return key_NKE.repeat_interleave(times, 1), value_NKE.repeat_interleave(times, 1)


def _lengths(part: Part, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """Where the sequences of queries and of keys begin, and the longest of each."""
    return (
        _cumulative(part.query_lengths, device),
        _cumulative(part.key_lengths, device),
        max(part.query_lengths),
        max(part.key_lengths),
    )


def _cumulative(lengths: Sequence[int], device: torch.device) -> Tensor:
    return (
        torch.tensor([0, *lengths], dtype=torch.int32)
        .cumsum(0, dtype=torch.int32)
        .to(device, non_blocking=True)
    )


def _window(part: Part) -> dict[str, int]:
    return _bounds(part) if part.window else {}


def _bounds(part: Part) -> dict[str, int]:
    """How far a query sees back and ahead; -1 is no limit."""
    left, right = (part.window - 1, 0) if part.window else (-1, -1)
    return {"window_size_left": left, "window_size_right": right}
