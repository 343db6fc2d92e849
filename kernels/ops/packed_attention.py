"""Attention over one row of packed trees: every prompt once, every answer over its prompt and itself.

    out_i = sum_j softmax_j(score_ij) v_j,   score_ij = cap(scale * q_i . k_j)     cap(x) = softcap * tanh(x / softcap)

where j runs over the tokens before i (and i itself) in i's own segment, and over the whole prompt if the segment
is an answer. With a window w, only keys at a distance below w count. Answers do not see each other.

A compiled kernel walks a segment's two key ranges in one softmax. Where attention comes as a library call
(torch's varlen attention), the two ranges are two calls, "parts", merged by their log-sum-exps; the backward
of each part is handed the merged output and log-sum-exp, which makes its probabilities the merged ones.

Letters: T tokens of the row, H query heads, K key heads (H a multiple of K), E head width, S segments.
Not done here: dropout, biases on the scores, attention sinks, a cache for decoding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignfast.kernels._backend import native_refusal, register, resolve, triton_refusal
from alignfast.kernels.token_logps import refuse_double_backward


@dataclass(frozen=True)
class PackedLayout:
    """How a row of packed tokens divides into trees: a prompt, then the answers that continue it, tree by tree.

    A sequence that shares nothing is a tree with a prompt and no answers, or no prompt and one answer.

    Attributes:
        prompts: tokens of each tree's prompt, >= 0.
        answers: for each tree, the tokens of each of its answers, >= 1.

    Raises:
        ValueError: the two differ in length, or a length is out of range.

    >>> layout = PackedLayout(prompts=(3, 2), answers=((2, 1), ()))
    >>> layout.num_tokens
    8
    >>> layout.segments
    ((0, 3, 0, 0), (3, 2, 0, 3), (5, 1, 0, 3), (6, 2, 0, 0))
    """

    prompts: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.answers):
            raise ValueError(f"got {len(self.prompts)} prompts and {len(self.answers)} lists of answers")
        if any(prompt < 0 for prompt in self.prompts) or any(n < 1 for tree in self.answers for n in tree):
            raise ValueError(
                f"a prompt has >= 0 tokens, an answer >= 1, got {self.prompts} and {self.answers}"
            )

    @classmethod
    def of_sequences(cls, lengths: Iterable[int]) -> PackedLayout:
        """Sequences that share nothing, laid end to end."""
        lengths = tuple(lengths)
        return cls(lengths, ((),) * len(lengths))

    @cached_property
    def segments(self) -> tuple[tuple[int, int, int, int], ...]:
        """(start, length, prompt_start, prompt_length) of each segment; a prompt has prompt_length 0 itself."""
        found, start = [], 0
        for prompt, answers in zip(self.prompts, self.answers):
            prompt_start = start
            if prompt:
                found.append((start, prompt, start, 0))
                start += prompt
            for length in answers:
                found.append((start, length, prompt_start, prompt))
                start += length
        return tuple(found)

    @cached_property
    def num_tokens(self) -> int:
        """Tokens in the row."""
        return sum(self.prompts) + sum(map(sum, self.answers))

    @cached_property
    def segments_S4(self) -> Tensor:
        """`segments` as an int32 tensor on the CPU, what compiled kernels read."""
        return torch.tensor(self.segments, dtype=torch.int32).reshape(-1, 4)

    def positions(self) -> Tensor:
        """Position of each token in its own sequence, int64 on the CPU: answers go on where their prompt ends.

        >>> PackedLayout((2,), ((2, 1),)).positions().tolist()
        [0, 1, 2, 3, 2]
        """
        ranges = [torch.arange(prefix, prefix + length) for _, length, _, prefix in self.segments]
        return torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.int64)


class AttentionOptions(NamedTuple):
    """Plain numbers that cross into compiled code; 0 means none for window and softcap."""

    scale: float
    window: int = 0
    softcap: float = 0.0


def packed_attention(
    query_THE: Tensor,
    key_TKE: Tensor,
    value_TKE: Tensor,
    layout: PackedLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of packed trees, differentiable; prompts are computed once for all their answers.

    Args:
        query_THE: queries; any strides with a contiguous last dimension are read as they are.
        key_TKE: keys, K dividing H (grouped queries).
        value_TKE: values, of the keys' shape.
        layout: how the T tokens divide into prompts and answers.
        scale: factor on the scores; None is E ** -0.5.
        window: a key counts when its distance to the query is below it; None is no limit.
        softcap: scores become softcap * tanh(score / softcap); None is no cap.
        backend: `auto`, `torch`, `native` or `triton`.

    Returns:
        Output of the queries' shape and dtype.

    Raises:
        ValueError: shapes do not fit together or the layout, or an option is out of range.
        RuntimeError: the named backend can't run this input.

    >>> q_THE = torch.randn(5, 2, 8)
    >>> packed_attention(q_THE, q_THE, q_THE, PackedLayout((2,), ((2, 1),))).shape
    torch.Size([5, 2, 8])
    """
    _check(query_THE, key_TKE, value_TKE, layout)
    if window is not None and window < 1:
        raise ValueError(f"window must be >= 1, or None for no limit, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, or None for no cap, got {softcap}")
    scale = query_THE.shape[-1] ** -0.5 if scale is None else scale
    options = AttentionOptions(scale, window or 0, softcap or 0.0)
    implementation = resolve("packed_attention", query_THE.device, query_THE.dtype, backend)
    return _PackedAttention.apply(query_THE, key_TKE, value_TKE, layout, options, implementation)[0]


def _check(query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, layout: PackedLayout) -> None:
    if query_THE.ndim != 3 or key_TKE.ndim != 3 or key_TKE.shape != value_TKE.shape:
        raise ValueError(
            "expected query (T, H, E), key and value (T, K, E) alike, got "
            f"{tuple(query_THE.shape)}, {tuple(key_TKE.shape)}, {tuple(value_TKE.shape)}"
        )
    T, H, E = query_THE.shape
    if key_TKE.shape[0] != T or key_TKE.shape[2] != E or H % key_TKE.shape[1]:
        raise ValueError(
            f"query {tuple(query_THE.shape)} and key {tuple(key_TKE.shape)} must agree in tokens and head width, "
            "and the key heads must divide the query heads"
        )
    if T != layout.num_tokens:
        raise ValueError(f"the layout describes {layout.num_tokens} tokens, the query has {T}")
    if not query_THE.dtype == key_TKE.dtype == value_TKE.dtype:
        raise ValueError(f"dtypes differ: {query_THE.dtype}, {key_TKE.dtype}, {value_TKE.dtype}")


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        query_THE: Tensor,
        key_TKE: Tensor,
        value_TKE: Tensor,
        layout: PackedLayout,
        options: AttentionOptions,
        implementation: Any,
    ) -> tuple[Tensor, Tensor]:
        """Returns (out_THE, lse_HT), the log-sum-exp of each query's scores in float32 (float64 for float64)."""
        return implementation.forward(query_THE, key_TKE, value_TKE, layout, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        query_THE, key_TKE, value_TKE, ctx.layout, ctx.options, ctx.implementation = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(query_THE, key_TKE, value_TKE, *output)

    @staticmethod
    def backward(ctx: Any, dout_THE: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("packed_attention")
        query_THE, key_TKE, value_TKE, out_THE, lse_HT = ctx.saved_tensors
        gradients = ctx.implementation.backward(
            dout_THE, query_THE, key_TKE, value_TKE, out_THE, lse_HT, ctx.layout, ctx.options
        )
        return (*gradients, None, None, None)


class Part(NamedTuple):
    """One call of attention over sequences of its own: which rows are its queries and keys, and where they split."""

    query_rows: Tensor | slice
    key_rows: Tensor | slice
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    causal: bool  # aligned at the end, as flash attention does: the last query sees the last key
    window: int = 0


def parts_of(layout: PackedLayout, options: AttentionOptions, device: torch.device) -> list[Part]:
    """The calls that make up the attention of a layout.

    Without a window that bites: each segment over itself, and the answers of a tree, which lie together, over
    their prompt in one block. With one, each answer's keys are gathered with the window's end of its prompt, since
    where the window starts differs from query to query.
    """
    lengths = tuple(length for _, length, _, _ in layout.segments)
    longest = max((length + prefix for _, length, _, prefix in layout.segments), default=0)
    if options.window and longest > options.window:
        rows, key_lengths = [], []
        for start, length, prefix_start, prefix in layout.segments:
            kept = min(prefix, options.window - 1)
            rows.append(torch.arange(prefix_start + prefix - kept, prefix_start + prefix))
            rows.append(torch.arange(start, start + length))
            key_lengths.append(kept + length)
        return [
            Part(slice(None), torch.cat(rows).to(device), lengths, tuple(key_lengths), True, options.window)
        ]
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


class _Torch:
    """The definition: each part attends densely, sequence by sequence; on a GPU by torch's varlen flash attention."""

    name = "torch"

    @staticmethod
    def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    @staticmethod
    def forward(
        query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, layout: PackedLayout, options: AttentionOptions
    ) -> tuple[Tensor, Tensor]:
        T, H, _ = query_THE.shape
        attend = _flash if _flash_takes(query_THE, options) else _dense
        out_THE, lse_HT = None, None
        for part in parts_of(layout, options, query_THE.device):
            rows = part.query_rows
            part_THE, part_HT = attend(
                query_THE[rows], key_TKE[part.key_rows], value_TKE[part.key_rows], part, options
            )
            if out_THE is None or lse_HT is None:
                out_THE, lse_HT = part_THE, part_HT
                continue
            # softmax over the union of two key sets: each part weighs by its share of the summed exponentials
            before_HT = lse_HT[:, rows]
            merged_HT = torch.logaddexp(before_HT, part_HT)
            keep_T, take_T = ((lse - merged_HT).exp().T[:, :, None] for lse in (before_HT, part_HT))
            out_THE[rows] = (out_THE[rows] * keep_T + part_THE * take_T).to(out_THE.dtype)
            lse_HT[:, rows] = merged_HT
        if out_THE is None or lse_HT is None:
            return query_THE.new_zeros(query_THE.shape), query_THE.new_zeros(
                (H, T), dtype=_compute(query_THE)
            )
        return out_THE, lse_HT

    @staticmethod
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
        attend = _flash_backward if _flash_takes(query_THE, options) else _dense_backward
        compute = _compute(query_THE)
        dquery_THE = torch.zeros_like(query_THE, dtype=compute)
        dkey_TKE = torch.zeros_like(key_TKE, dtype=compute)
        dvalue_TKE = torch.zeros_like(value_TKE, dtype=compute)
        for part in parts_of(layout, options, query_THE.device):
            queries, keys = part.query_rows, part.key_rows
            dq_THE, dk_TKE, dv_TKE = attend(
                dout_THE[queries], query_THE[queries], key_TKE[keys], value_TKE[keys], out_THE[queries],
                lse_HT[:, queries], part, options,
            )  # fmt: skip
            for total, rows, gradient in (
                (dquery_THE, queries, dq_THE),
                (dkey_TKE, keys, dk_TKE),
                (dvalue_TKE, keys, dv_TKE),
            ):
                if isinstance(rows, slice):
                    total += gradient
                else:
                    total.index_add_(
                        0, rows, gradient.to(compute)
                    )  # a gathered key row may come several times
        return dquery_THE.to(query_THE.dtype), dkey_TKE.to(key_TKE.dtype), dvalue_TKE.to(value_TKE.dtype)


def _compute(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scores(
    query_HQE: Tensor, key_HNE: Tensor, part: Part, options: AttentionOptions
) -> tuple[Tensor, Tensor | float]:
    """Scores of one sequence of a part, -inf where masked, and their derivative by the raw q . k."""
    scores_HQN = query_HQE @ key_HNE.mT * options.scale
    slope: Tensor | float = options.scale
    if options.softcap:
        tanh_HQN = torch.tanh(scores_HQN / options.softcap)
        scores_HQN, slope = tanh_HQN * options.softcap, (1 - tanh_HQN.square()) * options.scale
    if part.causal:
        queries, keys = scores_HQN.shape[1:]
        distance_QN = (
            torch.arange(keys - queries, keys, device=query_HQE.device)[:, None]
            - torch.arange(keys, device=query_HQE.device)[None, :]
        )
        masked_QN = distance_QN < 0
        if part.window:
            masked_QN = masked_QN | (distance_QN >= part.window)
        scores_HQN = scores_HQN.masked_fill(masked_QN, -math.inf)
    return scores_HQN, slope


def _heads_first(x_NKE: Tensor, heads: int) -> Tensor:
    """(N, K, E) -> (H, N, E) in the compute type, key heads repeated for the queries that share them."""
    x_KNE = x_NKE.transpose(0, 1).to(_compute(x_NKE))
    return x_KNE.repeat_interleave(heads // x_KNE.shape[0], 0)


def _sequences(part: Part) -> Iterable[tuple[slice, slice]]:
    query_start = key_start = 0
    for queries, keys in zip(part.query_lengths, part.key_lengths):
        yield slice(query_start, query_start + queries), slice(key_start, key_start + keys)
        query_start, key_start = query_start + queries, key_start + keys


def _dense(
    query_THE: Tensor, key_NKE: Tensor, value_NKE: Tensor, part: Part, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    H = query_THE.shape[1]
    outs, lses = [], []
    for queries, keys in _sequences(part):
        scores_HQN, _ = _scores(
            _heads_first(query_THE[queries], H), _heads_first(key_NKE[keys], H), part, options
        )
        lse_HQ = scores_HQN.logsumexp(-1)
        outs.append(
            ((scores_HQN - lse_HQ[:, :, None]).exp() @ _heads_first(value_NKE[keys], H)).transpose(0, 1)
        )
        lses.append(lse_HQ)
    if not outs:
        return query_THE.clone(), query_THE.new_zeros((H, 0), dtype=_compute(query_THE))
    return torch.cat(outs).to(query_THE.dtype), torch.cat(lses, 1)


def _dense_backward(
    dout_THE: Tensor,
    query_THE: Tensor,
    key_NKE: Tensor,
    value_NKE: Tensor,
    out_THE: Tensor,
    lse_HT: Tensor,
    part: Part,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    H, K = query_THE.shape[1], key_NKE.shape[1]
    compute = _compute(query_THE)
    dquery_THE = torch.zeros_like(query_THE, dtype=compute)
    dkey_NKE, dvalue_NKE = (torch.zeros_like(x, dtype=compute) for x in (key_NKE, value_NKE))
    for queries, keys in _sequences(part):
        query_HQE, key_HNE = _heads_first(query_THE[queries], H), _heads_first(key_NKE[keys], H)
        dout_HQE, out_HQE = _heads_first(dout_THE[queries], H), _heads_first(out_THE[queries], H)
        scores_HQN, slope = _scores(query_HQE, key_HNE, part, options)
        p_HQN = (scores_HQN - lse_HT[:, queries, None]).exp()
        dp_HQN = dout_HQE @ _heads_first(value_NKE[keys], H).mT
        ds_HQN = p_HQN * (dp_HQN - (dout_HQE * out_HQE).sum(-1, keepdim=True)) * slope
        dquery_THE[queries] = (ds_HQN @ key_HNE).transpose(0, 1)
        for total_NKE, gradient_HNE in ((dkey_NKE, ds_HQN.mT @ query_HQE), (dvalue_NKE, p_HQN.mT @ dout_HQE)):
            total_NKE[keys] = gradient_HNE.unflatten(0, (K, H // K)).sum(1).transpose(0, 1)
    return dquery_THE, dkey_NKE, dvalue_NKE


def _flash_takes(query_THE: Tensor, options: AttentionOptions) -> bool:
    """Flash attention: 16-bit tensors on a GPU, heads up to 256 wide; torch's build of it has no softcap."""
    sixteen_bit = query_THE.dtype in (torch.bfloat16, torch.float16)
    return (
        query_THE.device.type == "cuda" and sixteen_bit and query_THE.shape[2] <= 256 and not options.softcap
    )


def _cumulative(lengths: Sequence[int], device: torch.device) -> Tensor:
    return (
        torch.tensor([0, *lengths], dtype=torch.int32)
        .cumsum(0, dtype=torch.int32)
        .to(device, non_blocking=True)
    )


def _flash(
    query_THE: Tensor, key_NKE: Tensor, value_NKE: Tensor, part: Part, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    out_THE, lse_HT, *_ = torch.ops.aten._flash_attention_forward(
        query_THE, *_repeated(query_THE, key_NKE, value_NKE),
        _cumulative(part.query_lengths, query_THE.device), _cumulative(part.key_lengths, query_THE.device),
        max(part.query_lengths, default=0), max(part.key_lengths, default=0),
        0.0, part.causal, False, scale=options.scale, **_flash_window(part),
    )  # fmt: skip
    return out_THE, lse_HT


def _flash_backward(
    dout_THE: Tensor,
    query_THE: Tensor,
    key_NKE: Tensor,
    value_NKE: Tensor,
    out_THE: Tensor,
    lse_HT: Tensor,
    part: Part,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=query_THE.device)
    dquery_THE, *dkey_value = torch.ops.aten._flash_attention_backward(
        dout_THE.contiguous(), query_THE, *_repeated(query_THE, key_NKE, value_NKE), out_THE, lse_HT.contiguous(),
        _cumulative(part.query_lengths, query_THE.device), _cumulative(part.key_lengths, query_THE.device),
        max(part.query_lengths, default=0), max(part.key_lengths, default=0),
        0.0, part.causal, no_dropout, no_dropout.new_empty(0), scale=options.scale, **_flash_window(part),
    )  # fmt: skip
    K = key_NKE.shape[1]
    dkey_NKE, dvalue_NKE = (x.unflatten(1, (K, -1)).sum(2) if x.shape[1] != K else x for x in dkey_value)
    return dquery_THE, dkey_NKE, dvalue_NKE


def _repeated(query_THE: Tensor, key_NKE: Tensor, value_NKE: Tensor) -> tuple[Tensor, Tensor]:
    """Key heads repeated for the queries that share them: the aten op of torch 2.11 lacks grouped queries."""
    times = query_THE.shape[1] // key_NKE.shape[1]
    return key_NKE.repeat_interleave(times, 1), value_NKE.repeat_interleave(times, 1)


def _flash_window(part: Part) -> dict[str, int]:
    return {"window_size_left": part.window - 1, "window_size_right": 0} if part.window else {}


class _Native:
    """csrc/cpu/packed_attention.cpp and csrc/cuda/packed_attention.cu."""

    name = "native"
    refusal = staticmethod(native_refusal)


class _Triton:
    """packed_attention_triton.py, imported on the first call: triton is optional."""

    name = "triton"
    refusal = staticmethod(triton_refusal)

    @staticmethod
    def forward(
        query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, layout: PackedLayout, options: AttentionOptions
    ) -> tuple[Tensor, Tensor]:
        from alignfast.kernels import packed_attention_triton

        return packed_attention_triton.forward(query_THE, key_TKE, value_TKE, layout, options)

    @staticmethod
    def backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        from alignfast.kernels import packed_attention_triton

        return packed_attention_triton.backward(*inputs)


register("packed_attention", _Torch, _Triton)
