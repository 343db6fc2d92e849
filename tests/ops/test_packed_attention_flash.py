"""packed_attention by a library's flash attention: how a row is cut into calls, and their results merged.

Letters: T tokens, H query heads, K key heads, E head width, N another number of rows.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ops import conformance as c
from ops.attention import LAYOUTS, inputs, textbook
from torch import Tensor

from alignfast.kernels import PackedLayout, packed_attention_flash
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


@pytest.mark.parametrize("window", [0, 1, 4, 75])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_flash_parts_merge_to_the_definition(
    layout: PackedLayout, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU's library calls replaced by dense ones: what is held here is the cutting and the merging."""
    monkeypatch.setattr(packed_attention_flash, "_attend", dense_part)
    monkeypatch.setattr(packed_attention_flash, "_attend_backward", dense_part_backward)
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
