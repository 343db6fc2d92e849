"""Divergence of a policy's distributions from a reference's, straight from the hidden states of both.

    z = cap(scale * (h W^T + b))    y = cap(scale * (h_ref W_ref^T + b_ref))    kl_divergence(z, y)

Two tiles of logits live at a time, one of each model, and outlive no chunk of rows. In the backward pass both are formed
again, and the policy's is overwritten with its gradient and multiplied back: six GEMMs, of which two are the
reference's. Formulas and names of the divergences: kl_divergence.py.

Letters: T tokens, N rows of a chunk, D width, E width of the reference, V vocabulary, K what is kept of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignfast.kernels._autograd import Function, only_once
from alignfast.kernels._backend import resolve
from alignfast.kernels._head import Head, autocast_head, check_projection, chunk_rows_for, loss_scale
from alignfast.kernels._workspace import workspace
from alignfast.kernels.kl_divergence import (
    DIVERGENCE,
    REVERSE,
    KlOptions,
    kl_options,
    refuse_gradient,
)
from alignfast.kernels.linear_loss import plan

# The gradient of a logit is at most 16 upstream ones where `loss_scale` sets the room, but p |log p - log q - KL| grows
# with the logits' own spread: 16 times more is a log-ratio of 256.
_REVERSE_ROOM = 16.0


def linear_kl_divergence(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    ref_hidden_TE: Tensor,
    ref_weight_VE: Tensor,
    *,
    kind: str = "forward",
    bias_V: Tensor | None = None,
    ref_bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Divergence of every row under logits cap(scale * (h W + b)) / temperature from the reference's, in nats.

    Args:
        hidden_TD: the policy's hidden states, one row a token.
        weight_VD: the policy's head; no gradient is computed where it needs none.
        ref_hidden_TE: the reference's hidden states of the same tokens; a constant, as all of the reference.
        ref_weight_VE: the reference's head, over the same vocabulary.
        kind: `forward` is KL(reference || policy), `reverse` KL(policy || reference), `js` Jensen and Shannon's.
        bias_V: bias of the policy's head.
        ref_bias_V: bias of the reference's.
        scale: factor on the raw logits of both.
        softcap: cap of the scaled logits of both, None for none.
        temperature: divisor of both after the cap, > 0.
        chunk_rows: rows of logits held at once; None chooses by device and V.
        backend: implementation of the row pass: `auto`, `torch`, `native` or `triton`.

    Returns:
        kl_T: float32 (float64 for float64 inputs), differentiable in the policy's hidden states, weight and bias.

    Raises:
        ValueError: shapes, types or options do not fit, or a tensor of the reference requires a gradient.
        RuntimeError: the named backend can't run this input.

    >>> hidden_TD, weight_VD = torch.ones(2, 3), torch.zeros(4, 3)
    >>> linear_kl_divergence(hidden_TD, weight_VD, hidden_TD, torch.ones(4, 3), kind="js")
    tensor([0., 0.])
    """
    for name, x in (("hidden", ref_hidden_TE), ("weight", ref_weight_VE), ("bias", ref_bias_V)):
        refuse_gradient(f"the reference's {name}", x)
    policy = autocast_head(hidden_TD, weight_VD, bias_V)
    reference = autocast_head(ref_hidden_TE, ref_weight_VE, ref_bias_V)
    check_projection(*policy)
    check_projection(*reference)
    hidden_TD, ref_hidden_TE = policy[0], reference[0]
    shapes = [(len(hidden), len(weight)) for hidden, weight, _ in (policy, reference)]
    if shapes[0] != shapes[1] or shapes[0][1] == 0:
        raise ValueError(f"expected one T and one V >= 1, got {shapes[0]} and for the reference {shapes[1]}")
    if hidden_TD.dtype != ref_hidden_TE.dtype or hidden_TD.device != ref_hidden_TE.device:
        raise ValueError(
            f"the policy is {hidden_TD.dtype} on {hidden_TD.device}, the reference {ref_hidden_TE.dtype} on "
            f"{ref_hidden_TE.device}; cast or move one of them"
        )
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be >= 1, got {chunk_rows}")
    options = kl_options(kind, scale, softcap, temperature)
    implementation = resolve("kl_divergence", hidden_TD.device, hidden_TD.dtype, backend)
    rows = chunk_rows or max(1, chunk_rows_for(hidden_TD, shapes[0][1]) // 2)  # of either of two tiles
    return _LinearRowDivergence.apply(*policy, *reference, options, implementation, rows)[DIVERGENCE]


class _Tiles:
    """The logits of both models, chunk by chunk, in memory that is lent for the walk."""

    def __init__(self, head: Head, ref_head: Head, chunk_rows: int) -> None:
        self.heads = (head, ref_head)
        self.chunks = [pieces[0] for pieces in plan(len(head.hidden_TD), None, chunk_rows)]

    def __iter__(self) -> Any:
        """(rows, tile_NV, ref_tile_NV)"""
        device, compute = self.heads[0].hidden_TD.device, self.heads[0].compute
        shape = (self.chunks[0].stop, len(self.heads[0].weight_VD))
        # the types are chosen by now; under autocast every product would cast its operands again
        with (
            torch.autocast(device.type, enabled=False),
            workspace(shape, compute, device) as tile_NV,
            workspace(shape, compute, device) as ref_tile_NV,
        ):
            for rows in self.chunks:
                tiles = [tile[: rows.stop - rows.start] for tile in (tile_NV, ref_tile_NV)]
                for head, tile in zip(self.heads, tiles):
                    head.project(rows, tile)
                yield rows, *tiles


class _LinearRowDivergence(Function):
    @staticmethod
    def forward(
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        ref_hidden_TE: Tensor,
        ref_weight_VE: Tensor,
        ref_bias_V: Tensor | None,
        options: KlOptions,
        implementation: Any,
        chunk_rows: int,
    ) -> Tensor:
        head = Head(hidden_TD, weight_VD, bias_V, (False, False, False))
        ref_head = Head(ref_hidden_TE, ref_weight_VE, ref_bias_V, (False, False, False))
        tiles = _Tiles(head, ref_head, chunk_rows)
        parts = [implementation.forward(tile_NV, ref_NV, options) for _, tile_NV, ref_NV in tiles]
        return torch.cat(parts, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.options, ctx.implementation, ctx.chunk_rows = inputs
        ctx.save_for_backward(*tensors, output)

    @staticmethod
    def backward(ctx: Any, dstats_KT: Tensor) -> tuple[Tensor | None, ...]:
        settings = (ctx.options, ctx.implementation, ctx.chunk_rows, ctx.needs_input_grad[:3])

        def gradients(*inputs: Tensor) -> tuple[Tensor | None, ...]:
            return _gradients(*inputs, *settings)

        return (
            *only_once("linear_kl_divergence", gradients, dstats_KT, *ctx.saved_tensors),
            *(None,) * 6,
        )


def _gradients(
    dstats_KT: Tensor,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    ref_hidden_TE: Tensor,
    ref_weight_VE: Tensor,
    ref_bias_V: Tensor | None,
    stats_KT: Tensor,
    options: KlOptions,
    implementation: Any,
    chunk_rows: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Form both tiles again, overwrite the policy's with its gradient and multiply it back."""
    head = Head(hidden_TD, weight_VD, bias_V, needs)
    ref_head = Head(ref_hidden_TE, ref_weight_VE, ref_bias_V, (False, False, False))
    dkl_T = dstats_KT[DIVERGENCE]
    slope = abs(options.scale) / options.temperature * (_REVERSE_ROOM if options.kind == REVERSE else 1.0)
    scale = loss_scale(dkl_T, slope, head.compute)
    if scale is not None:
        dkl_T = dkl_T * scale
    for rows, tile_NV, ref_NV in _Tiles(head, ref_head, chunk_rows):
        implementation.backward(tile_NV, ref_NV, stats_KT[:, rows], dkl_T[rows], options, tile_NV)
        head.multiply_back(tile_NV, rows, scale)
    return tuple(None if x is None else x.to(hidden_TD.dtype) for x in head.gradients())
