"""Attention over one row of packed trees: every prompt once, every answer over its prompt and itself.

    out_i = sum_j softmax_j(score_ij) v_j,   score_ij = cap(scale * q_i . k_j)     cap(x) = softcap * tanh(x / softcap)

where j runs over the tokens before i (and i itself) in i's own segment, and over the whole prompt if the segment
is an answer. With a window w, only keys at a distance below w count. Answers do not see each other.

Letters: T tokens of the row, H query heads, K key heads (H a multiple of K), E head width, S segments.
Not done here: dropout, biases on the scores, attention sinks, a cache for decoding.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignfast.kernels import packed_attention_flash as flash
from alignfast.kernels._autograd import Function, only_once
from alignfast.kernels._backend import named, native_refusal, never_refuses, register, resolve, triton_refusal
from alignfast.kernels._layout import PackedLayout, Segment
from alignfast.kernels._native import launch, native_op, unit_columns
from alignfast.kernels._workspace import workspace


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
        backend: `auto`, `torch`, `native` or `triton`. On a GPU `torch` is flash attention for 16-bit tensors, and `auto`
            takes it where it can.

    Returns:
        Output of the queries' shape and dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together or the layout, or an option is out of range.
        RuntimeError: the named backend can't run this input.

    >>> q_THE = torch.randn(5, 2, 8)
    >>> packed_attention(q_THE, q_THE, q_THE, PackedLayout((2,), ((2, 1),))).shape
    torch.Size([5, 2, 8])
    """
    _check(query_THE, key_TKE, value_TKE, layout)
    options = attention_options(query_THE.shape[-1], scale, window, softcap)
    implementation = resolve("packed_attention", query_THE.device, query_THE.dtype, backend)
    # On a GPU a library's flash attention comes first, in the parts that `_Torch` cuts: Triton's has not been measured
    # beside it yet. Its cutting is Python that a traced graph had better not hold.
    if named(backend) == "auto" and flash.takes(query_THE, options) and not torch.compiler.is_compiling():
        implementation = _Torch
    return _PackedAttention.apply(query_THE, key_TKE, value_TKE, layout, options, implementation)[0]


def attention_options(
    width: int, scale: float | None, window: int | None, softcap: float | None
) -> AttentionOptions:
    """The options of attention over heads of a width, checked.

    Raises:
        ValueError: one is out of range.
    """
    if window is not None and window < 1:
        raise ValueError(f"window must be >= 1, or None for no limit, got {window}")
    if softcap is not None and (not softcap > 0 or math.isinf(softcap)):
        raise ValueError(f"softcap must be a positive number, or None for no cap, got {softcap}")
    return AttentionOptions(width**-0.5 if scale is None else scale, window or 0, softcap or 0.0)


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
    # compiled code takes addresses as they are
    if not query_THE.device == key_TKE.device == value_TKE.device:
        raise ValueError(
            f"query is on {query_THE.device}, key on {key_TKE.device}, value on {value_TKE.device}; move them to one"
        )


class _PackedAttention(Function):
    @staticmethod
    def forward(
        query_THE: Tensor,
        key_TKE: Tensor,
        value_TKE: Tensor,
        layout: PackedLayout,
        options: AttentionOptions,
        implementation: Any,
    ) -> tuple[Tensor, Tensor]:
        """Returns the output, and what the implementation's backward makes the probabilities from.

        Flash attention has one log-sum-exp a query for it. Ours have norms_HT2, two numbers a query with which
        p = exp(score - base) * factor: the largest score and 1 over the sum of exponentials. A log-sum-exp of 40
        nats, being one number, is rounded by 2e-6, and with it all probabilities of its row.
        """
        return implementation.forward(query_THE, key_TKE, value_TKE, layout, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        query_THE, key_TKE, value_TKE, ctx.layout, ctx.options, ctx.implementation = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(query_THE, key_TKE, value_TKE, *output)

    @staticmethod
    def backward(ctx: Any, dout_THE: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        layout, options, implementation = ctx.layout, ctx.options, ctx.implementation

        def gradients(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return implementation.backward(*inputs, layout, options)

        return (*only_once("packed_attention", gradients, dout_THE, *ctx.saved_tensors), None, None, None)


class _Torch:
    """The definition: each segment's queries attend densely to its prompt and itself.

    On a GPU, 16-bit tensors go through torch's flash attention instead (packed_attention_flash.py).
    """

    name = "torch"
    refusal = staticmethod(never_refuses)

    @staticmethod
    def forward(
        query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, layout: PackedLayout, options: AttentionOptions
    ) -> tuple[Tensor, Tensor]:
        if flash.takes(query_THE, options):
            return flash.forward(query_THE, key_TKE, value_TKE, layout, options)
        H = query_THE.shape[1]
        query_HTE, key_HTE, value_HTE = (_heads_first(x, H) for x in (query_THE, key_TKE, value_TKE))
        out_HTE = torch.empty_like(query_HTE)
        for segment in layout.segments:
            own = segment.own
            scores_HQN, _ = _scores(query_HTE[:, own], _seen(key_HTE, segment), segment, options)
            out_HTE[:, own] = scores_HQN.softmax(-1) @ _seen(value_HTE, segment)
        # the backward computes all anew
        return _tokens_first(out_HTE, query_THE.dtype), query_THE.new_empty(0)

    @staticmethod
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
        if flash.takes(query_THE, options):
            return flash.backward(
                dout_THE, query_THE, key_TKE, value_TKE, out_THE, norms_HT2, layout, options
            )
        H, K = query_THE.shape[1], key_TKE.shape[1]
        dout_HTE, query_HTE, key_HTE, value_HTE = (
            _heads_first(x, H) for x in (dout_THE, query_THE, key_TKE, value_TKE)
        )
        dquery_HTE, dkey_HTE, dvalue_HTE = (torch.zeros_like(x) for x in (query_HTE, key_HTE, value_HTE))
        for segment in layout.segments:
            own, prompt, prompt_length = segment.own, segment.prompt, segment.prompt_length
            key_HNE = _seen(key_HTE, segment)
            scores_HQN, slope = _scores(query_HTE[:, own], key_HNE, segment, options)
            p_HQN = scores_HQN.softmax(-1)
            dp_HQN = dout_HTE[:, own] @ _seen(value_HTE, segment).mT
            ds_HQN = p_HQN * (dp_HQN - (p_HQN * dp_HQN).sum(-1, keepdim=True)) * slope
            dquery_HTE[:, own] = ds_HQN @ key_HNE
            for total_HTE, gradient_HNE in (
                (dkey_HTE, ds_HQN.mT @ query_HTE[:, own]),
                (dvalue_HTE, p_HQN.mT @ dout_HTE[:, own]),
            ):
                total_HTE[:, prompt] += gradient_HNE[:, :prompt_length]
                total_HTE[:, own] += gradient_HNE[:, prompt_length:]
        dkey_KTE, dvalue_KTE = (x.unflatten(0, (K, H // K)).sum(1) for x in (dkey_HTE, dvalue_HTE))
        dtype = query_THE.dtype
        return (
            _tokens_first(dquery_HTE, dtype),
            _tokens_first(dkey_KTE, dtype),
            _tokens_first(dvalue_KTE, dtype),
        )


def _heads_first(x_NKE: Tensor, heads: int) -> Tensor:
    """(N, K, E) -> (H, N, E) in the compute type, key heads repeated for the queries that share them."""
    compute = torch.promote_types(x_NKE.dtype, torch.float32)
    return x_NKE.transpose(0, 1).to(compute).repeat_interleave(heads // x_NKE.shape[1], 0)


def _tokens_first(x_HNE: Tensor, dtype: torch.dtype) -> Tensor:
    return x_HNE.transpose(0, 1).to(dtype, memory_format=torch.contiguous_format)


def _seen(x_HTE: Tensor, segment: Segment) -> Tensor:
    """Rows of the segment's prompt, then its own."""
    return torch.cat((x_HTE[:, segment.prompt], x_HTE[:, segment.own]), 1)


def _scores(
    query_HQE: Tensor, key_HNE: Tensor, segment: Segment, options: AttentionOptions
) -> tuple[Tensor, Tensor | float]:
    """Scores of one segment, -inf where masked, and their derivative by the raw q . k."""
    scores_HQN = query_HQE @ key_HNE.mT * options.scale
    slope: Tensor | float = options.scale
    if options.softcap:
        tanh_HQN = torch.tanh(scores_HQN / options.softcap)
        scores_HQN, slope = tanh_HQN * options.softcap, (1 - tanh_HQN.square()) * options.scale
    positions_N = torch.arange(segment.prompt_length + segment.length, device=query_HQE.device)
    distance_QN = positions_N[segment.prompt_length :, None] - positions_N[None, :]
    masked_QN = distance_QN < 0
    if options.window:
        masked_QN = masked_QN | (distance_QN >= options.window)
    return scores_HQN.masked_fill(masked_QN, -math.inf), slope


class _Native:
    """csrc/cpu/packed_attention.cpp and csrc/cuda/packed_attention.cu."""

    name = "native"
    refusal = staticmethod(native_refusal)

    @staticmethod
    def forward(
        query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, layout: PackedLayout, options: AttentionOptions
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.alignfast.packed_attention_forward(
            query_THE, key_TKE, value_TKE, layout.segments_S4, *options
        )

    @staticmethod
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
        return torch.ops.alignfast.packed_attention_backward(
            dout_THE, query_THE, key_TKE, value_TKE, out_THE, norms_HT2, layout.segments_S4, *options
        )


def _empty_outputs(query_THE: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    T, H, _E = query_THE.shape
    return query_THE.new_empty(query_THE.shape), query_THE.new_empty((H, T, 2), dtype=torch.float32)


def _empty_gradients(_: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    query_THE, key_TKE, value_TKE = (x.new_empty(x.shape) for x in inputs[:3])
    return query_THE, key_TKE, value_TKE


@native_op(
    "packed_attention_forward(Tensor query, Tensor key, Tensor value, Tensor segments, float scale, int window, "
    "float softcap) -> (Tensor, Tensor)",
    fake=_empty_outputs,
)
def _native_forward(
    query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, segments_S4: Tensor, *options: float
) -> tuple[Tensor, Tensor]:
    inputs = (unit_columns(x) for x in (query_THE, key_TKE, value_TKE))
    outputs = _empty_outputs(query_THE)
    launch("packed_attention_forward", *inputs, segments_S4.to(query_THE.device), *options, *outputs)
    return outputs


@native_op(
    "packed_attention_backward(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor out, Tensor norms, "
    "Tensor segments, float scale, int window, float softcap) -> (Tensor, Tensor, Tensor)",
    fake=_empty_gradients,
)
def _native_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, segments_S4, scale, window, softcap = inputs
    tensors = [unit_columns(x) for x in tensors]
    _, query_THE, key_TKE, _, _, norms_HT2 = tensors
    gradients = _empty_gradients(*tensors)
    arguments = (*tensors, segments_S4.to(query_THE.device), scale, window, softcap)
    if query_THE.device.type == "cuda":
        delta_HT = norms_HT2.new_empty(norms_HT2.shape[:2])
        launch("packed_attention_backward", *arguments, delta_HT, *gradients)
        return gradients
    num_slabs = torch.empty(1, dtype=torch.int64)
    launch("packed_attention_slabs", query_THE, key_TKE, segments_S4, window, num_slabs)
    # Where one slab is enough, dkey and dvalue are it, if they are float32.
    count = 0 if num_slabs == 1 and key_TKE.dtype == torch.float32 else int(num_slabs)
    with workspace((count, 2, *key_TKE.shape), torch.float32, key_TKE.device) as slabs:
        launch("packed_attention_backward", *arguments, slabs, *gradients)
    return gradients


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


register("packed_attention", _Torch, _Native, _Triton)
