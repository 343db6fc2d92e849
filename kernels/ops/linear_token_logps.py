"""Log-probability of each target straight from hidden states: the head fused with the gather, logits never stored.

    z = cap(scale * (h W^T + b)) / temperature        logp = z_t - log sum_v exp z_v

For a caller who needs the log-probs as a tensor, whose gradient is only known later: each tile of logits is formed
again in the backward pass, four GEMMs in all. Where the loss can be written as a function of the log-probs,
`linear_loss` needs three.

Letters: T tokens, N rows of a chunk, D width, V vocabulary, K the statistics of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignfast.kernels._autograd import Function, only_once
from alignfast.kernels._backend import resolve
from alignfast.kernels._head import Head, autocast_head, check_head, chunk_rows_for, loss_scale
from alignfast.kernels._targets import check_targets
from alignfast.kernels._workspace import workspace
from alignfast.kernels.linear_loss import Stats
from alignfast.kernels.token_logps import STATS, RowOptions, row_options


def linear_token_logps(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of every target under logits cap(scale * (h W + b)) / temperature, in nats.

    Args:
        hidden_TD: hidden states, one row a token.
        weight_VD: the head.
        targets_T: int64 class of each row, or `ignore_index`.
        bias_V: bias of the head.
        scale: factor on the raw logits.
        softcap: cap of the scaled logits, None for none.
        temperature: divisor after the cap, > 0.
        ignore_index: rows with this target give 0 and get no gradient.
        entropy: also return the entropy of each row's distribution, differentiable.
        backend: implementation of the row pass: `auto`, `torch`, `native` or `triton`.

    Returns:
        logps_T, or (logps_T, entropy_T): float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, types or options do not fit, or a CPU target lies outside the vocabulary.
        RuntimeError: the named backend can't run this input.

    >>> linear_token_logps(torch.ones(2, 3), torch.zeros(4, 3), torch.tensor([0, 3]))
    tensor([-1.3863, -1.3863])
    """
    stats = linear_token_stats(
        hidden_TD, weight_VD, targets_T, stats=("logps", "entropy") if entropy else ("logps",), bias_V=bias_V,
        scale=scale, softcap=softcap, temperature=temperature, ignore_index=ignore_index, backend=backend,
    )  # fmt: skip
    return (stats.logps, stats.entropy) if entropy else stats.logps


def linear_token_stats(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    stats: Sequence[str] = ("logps",),
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    backend: str = "auto",
) -> Stats:
    """Any statistics of each row, of which `linear_token_logps` gives two; arguments, errors and types are its own.

    Args:
        hidden_TD: hidden states, one row a token.
        weight_VD: the head.
        targets_T: int64 class of each row, or `ignore_index`.
        stats: any of logps, lse, entropy, mean_logit, is_top1, sum_sq_probs; all differentiable but is_top1.
        bias_V: bias of the head.
        scale: factor on the raw logits.
        softcap: cap of the scaled logits, None for none.
        temperature: divisor after the cap, > 0.
        ignore_index: rows with this target give 0 and get no gradient.
        backend: implementation of the row pass.

    Returns:
        `Stats` with the fields asked for, one entry a row; the others are None.

    >>> linear_token_stats(torch.ones(1, 3), torch.zeros(4, 3), torch.tensor([3]), stats=("lse", "mean_logit"))[1:4]
    (tensor([1.3863]), None, tensor([0.]))
    """
    hidden_TD, weight_VD, bias_V = autocast_head(hidden_TD, weight_VD, bias_V)
    check_head(hidden_TD, weight_VD, targets_T, bias_V)
    options = row_options(scale, softcap, temperature, ignore_index, tuple(stats))
    implementation = resolve("token_logps", hidden_TD.device, hidden_TD.dtype, backend)
    check_targets(targets_T, weight_VD.shape[0], ignore_index)
    stats_KT = _LinearRowStats.apply(hidden_TD, weight_VD, bias_V, targets_T, options, implementation)
    return Stats(**{name: stats_KT[STATS.index(name)] for name in stats})


def _chunks(hidden_TD: Tensor, weight_VD: Tensor) -> list[slice]:
    size = chunk_rows_for(hidden_TD, weight_VD.shape[0])
    starts = range(0, max(len(hidden_TD), 1), size)
    return [slice(start, min(start + size, len(hidden_TD))) for start in starts]


def _exact_types(hidden_TD: Tensor) -> Any:
    """The types are chosen by now; under autocast every product would cast its operands again."""
    return torch.autocast(hidden_TD.device.type, enabled=False)


class _LinearRowStats(Function):
    @staticmethod
    def forward(
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        options: RowOptions,
        implementation: Any,
    ) -> Tensor:
        head = Head(hidden_TD, weight_VD, bias_V, (False, False, False))
        chunks = _chunks(hidden_TD, weight_VD)
        shape = (chunks[0].stop, len(weight_VD))
        with _exact_types(hidden_TD), workspace(shape, head.compute, hidden_TD.device) as tile_NV:
            parts = []
            for rows in chunks:
                piece_NV = tile_NV[: rows.stop - rows.start]
                head.project(rows, piece_NV)
                parts.append(implementation.forward(piece_NV, targets_T[rows], options))
        return torch.cat(parts, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        hidden_TD, weight_VD, bias_V, targets_T, ctx.options, ctx.implementation = inputs
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, targets_T, output)

    @staticmethod
    def backward(ctx: Any, dstats_KT: Tensor) -> tuple[Tensor | None, ...]:
        options, implementation, needs = ctx.options, ctx.implementation, ctx.needs_input_grad[:3]

        def gradients(*inputs: Tensor) -> tuple[Tensor | None, ...]:
            return _gradients(*inputs, options, implementation, needs)

        return (*only_once("linear_token_logps", gradients, dstats_KT, *ctx.saved_tensors), None, None, None)


def _gradients(
    dstats_KT: Tensor,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_T: Tensor,
    stats_KT: Tensor,
    options: RowOptions,
    implementation: Any,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Form each tile again, overwrite it with its gradient and multiply it back."""
    head = Head(hidden_TD, weight_VD, bias_V, needs)
    scale = loss_scale(dstats_KT, abs(options.scale) / options.temperature, head.compute)
    if scale is not None:
        dstats_KT = dstats_KT * scale
    chunks = _chunks(hidden_TD, weight_VD)
    shape = (chunks[0].stop, len(weight_VD))
    with _exact_types(hidden_TD), workspace(shape, head.compute, hidden_TD.device) as tile_NV:
        for rows in chunks:
            piece_NV = tile_NV[: rows.stop - rows.start]
            head.project(rows, piece_NV)
            implementation.backward(
                piece_NV, targets_T[rows], stats_KT[:, rows], dstats_KT[:, rows], options, piece_NV
            )
            head.multiply_back(piece_NV, rows, scale)
    return tuple(None if x is None else x.to(hidden_TD.dtype) for x in head.gradients())
