"""packed_attention by a library's flash attention: how a row is cut into calls, and their results merged.

Letters: T tokens, H query heads, K key heads, E head width, N another number of rows.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ops import conformance as c
from ops.attention import LAYOUTS, inputs, textbook
from torch import Tensor

from alignfast.kernels import PackedLayout, packed_attention, packed_attention_flash
from alignfast.kernels.packed_attention import AttentionOptions


def dense_part(query_THE: Tensor, key_NKE: Tensor, value_NKE: Tensor, part: Any, options: Any) -> tuple:
    """What the library call of a part gives: outputs and log-sum-exps of each of its sequences."""
    outs, lses, start, key_start = [], [], 0, 0
    for queries, keys in zip(part.query_lengths, part.key_lengths):
        query_HQE = query_THE[start : start + queries].transpose(0, 1)
        group = query_THE.shape[1] // key_NKE.shape[1]
        key_HNE, value_HNE = (
            x[key_start : key_start + keys].transpose(0, 1).repeat_interleave(group, 0)
            for x in (key_NKE, value_NKE)
        )
        scores_HQN = query_HQE @ key_HNE.mT * options.scale
        distance_QN = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
        hidden_QN = (distance_QN < 0) & part.causal | (distance_QN >= (part.window or math.inf))
        scores_HQN = scores_HQN.masked_fill(hidden_QN, -math.inf)
        lses.append(scores_HQN.logsumexp(-1))
        outs.append((scores_HQN.softmax(-1) @ value_HNE).transpose(0, 1))
        start, key_start = start + queries, key_start + keys
    return torch.cat(outs), torch.cat(lses, 1)


def dense_part_backward(
    dout_THE: Tensor, query_THE: Tensor, key_NKE: Tensor, value_NKE: Tensor, out_THE: Tensor, lse_HT: Tensor,
    part: Any, options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of a part whose probabilities are exp(score - the given log-sum-exp), as flash attention's."""
    leaves = [x.detach().requires_grad_() for x in (query_THE, key_NKE, value_NKE)]
    with torch.enable_grad():
        part_THE, part_HT = dense_part(*leaves, part, options)
        share_TH1 = (part_HT.detach() - lse_HT).exp().T[:, :, None]
        part_delta_TH1 = (dout_THE * part_THE.detach()).sum(-1, keepdim=True)
        delta_TH1 = (dout_THE * out_THE).sum(-1, keepdim=True)
        pull = (part_THE * dout_THE * share_TH1).sum() + (
            part_HT.T[:, :, None] * (part_delta_TH1 - delta_TH1) * share_TH1
        ).sum()
        return torch.autograd.grad(pull, leaves)


def hold_to_the_definition(layout: PackedLayout, window: int) -> None:
    """Values and gradients of the parts, merged, beside the textbook's in float64."""
    leaves = inputs(layout.num_tokens, (4, 2, 8), torch.float64)
    dout_THE = torch.randn(leaves[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = c.values_and_gradients(
        lambda *x: textbook(*x, layout, window=window or None), leaves, [dout_THE]
    )
    options = AttentionOptions(8**-0.5, window)
    out_THE, lse_HT = packed_attention_flash.forward(*leaves, layout, options)
    gradients = packed_attention_flash.backward(dout_THE, *leaves, out_THE, lse_HT, layout, options)
    for actual, expected in zip((out_THE, *gradients), wanted, strict=True):
        assert (actual - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("window", [0, 1, 4, 75])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_flash_parts_merge_to_the_definition(
    layout: PackedLayout, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU's library calls replaced by dense ones: what is held here is the cutting and the merging."""
    monkeypatch.setattr(packed_attention_flash, "_attend", dense_part)
    monkeypatch.setattr(packed_attention_flash, "_attend_backward", dense_part_backward)
    hold_to_the_definition(layout, window)


class FlashAttn2:
    """flash_attn.flash_attn_interface of flash-attn 2.7 and 2.8: their parameters, dense arithmetic."""

    @staticmethod
    def _flash_attn_varlen_forward(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1,
        window_size_right: int = -1, softcap: float = 0.0, alibi_slopes: Tensor | None = None,
        return_softmax: bool = False, block_table: Tensor | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        part, options = FlashAttn2.read(
            cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size_left,
            window_size_right,
        )  # fmt: skip
        return (*dense_part(q, k, v, part, options), torch.empty(0), torch.empty(2))

    @staticmethod
    def _flash_attn_varlen_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor,
        dv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
        dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int,
        softcap: float, alibi_slopes: Tensor | None, deterministic: bool, rng_state: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        part, options = FlashAttn2.read(
            cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size_left,
            window_size_right,
        )  # fmt: skip
        gradients = dense_part_backward(dout, q, k, v, out, softmax_lse, part, options)
        for to, gradient in zip((dq, dk, dv), gradients, strict=True):
            assert to.shape == gradient.shape
            to.copy_(gradient)
        return torch.empty(0)

    @staticmethod
    def read(
        cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, scale: float,
        causal: bool, left: int, right: int,
    ) -> tuple[Any, Any]:  # fmt: skip
        query_lengths, key_lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert (max(query_lengths), max(key_lengths)) == (max_seqlen_q, max_seqlen_k)
        assert right == (-1 if left == -1 else 0)
        part = SimpleNamespace(
            query_lengths=query_lengths, key_lengths=key_lengths, causal=causal, window=left + 1
        )
        return part, SimpleNamespace(scale=scale)


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_flash_attn_2_is_called_as_it_wants(
    layout: PackedLayout, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is installed: grouped heads go in as they are, bounds and lengths by its names."""
    monkeypatch.setattr(packed_attention_flash, "flash_attn_2", lambda: FlashAttn2)
    hold_to_the_definition(layout, window)


@pytest.mark.parametrize("backend", ["auto", "native"])
def test_auto_takes_it_where_it_can_and_a_named_backend_never(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(packed_attention_flash, "takes", lambda *_: True)
    monkeypatch.setattr(packed_attention_flash, "_attend", lambda *x: calls.append(x) or dense_part(*x))
    leaves = inputs(5, (2, 1, 8))
    packed_attention(*leaves, PackedLayout((2,), ((3,),)), backend=backend)
    assert bool(calls) == (backend == "auto")


@pytest.mark.parametrize(
    ("installed", "width", "softcap", "taken"),
    [
        (False, 64, 0.0, True),
        (False, 64, 5.0, False),
        (True, 64, 5.0, True),
        (True, 60, 0.0, False),
        (True, 264, 0.0, False),
    ],
)
def test_what_flash_attention_takes(
    installed: bool, width: int, softcap: float, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_attention_flash, "flash_attn_2", lambda: FlashAttn2 if installed else None)
    query = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(5, 4, width))
    assert packed_attention_flash.takes(query, AttentionOptions(0.1, 0, softcap)) == taken  # type: ignore[arg-type]
