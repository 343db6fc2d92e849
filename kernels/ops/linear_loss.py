"""Any loss on log-probs, fused with the LM head: the logits are never stored and never computed twice.

Per chunk of rows: logits by GEMM into a tile, one pass for the row statistics, then `loss_fn` on those small
vectors. Its gradient says what dlogits is; the tile is overwritten with it and multiplied back at once:

    tile = h W^T        stats = rows(tile)        dstats = d loss_fn / d stats
    tile <- d tile by dstats       dh = tile W       dW += tile^T h

Three GEMMs of 2 T D V FLOPs each, where forming log-probs first and their gradient later takes four. Rows whose
gradient is zero are dropped before the last two. A group of rows that the loss couples and that fits no tile takes
two passes: statistics of all its rows, then each piece again with its gradient.

Letters: T tokens, N rows of a chunk, D width, V vocabulary, K the statistics of a row.
Not done here: a second derivative; gradients to tensors that `loss_fn` captured (refused).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignfast.kernels._autograd import Function, only_once, saved_is_ours
from alignfast.kernels._backend import resolve
from alignfast.kernels._head import Head, autocast_head, check_head, chunk_rows_for, loss_scale
from alignfast.kernels._targets import check_targets
from alignfast.kernels._workspace import workspace
from alignfast.kernels.token_logps import IS_TOP1, STATS, RowOptions, row_options

Metrics = dict[str, Tensor]


class Stats(NamedTuple):
    """Statistics of a chunk's rows, those that were asked for; the others are None. Meanings in `token_logps`."""

    logps: Tensor = None  # type: ignore[assignment]
    lse: Tensor = None  # type: ignore[assignment]
    entropy: Tensor = None  # type: ignore[assignment]
    mean_logit: Tensor = None  # type: ignore[assignment]
    is_top1: Tensor = None  # type: ignore[assignment]
    sum_sq_probs: Tensor = None  # type: ignore[assignment]


LossFn = Callable[[Stats, slice], tuple[Tensor, Metrics]]


def linear_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    loss_fn: LossFn,
    *,
    stats: Sequence[str] = ("logps",),
    group_sizes: Sequence[int] | None = None,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Metrics]:
    """A loss on the log-probs of `targets_T` under logits cap(scale * (h W + b)) / temperature.

    Args:
        hidden_TD: hidden states, one row a token.
        weight_VD: the head; no gradient is computed where it needs none.
        targets_T: int64 class of each row, or `ignore_index`.
        loss_fn: `loss_fn(stats, rows) -> (loss, metrics)`. `stats` is a `Stats` with the fields asked for, float32,
            one entry a row; `rows` the slice of rows they stand for. The loss is a 0-d tensor, additive over chunks,
            so its normaliser must be known before. `metrics` holds 0-d tensors; they are summed over chunks, or
            combined by max or min where the name starts so. Statistics of ignored rows are 0.
        stats: any of logps, lse, entropy, mean_logit, is_top1, sum_sq_probs; all differentiable but is_top1.
        group_sizes: host integers that sum to T: consecutive rows that the loss couples and that must reach it in
            one call (the two answers of a pair, say). None: every row for itself.
        bias_V: bias of the head.
        scale: factor on the raw logits.
        softcap: cap of the scaled logits, None for none.
        temperature: divisor after the cap, > 0.
        ignore_index: rows with this target count for nothing.
        chunk_rows: rows of logits held at once; None chooses by device and V.
        backend: implementation of the row pass: `auto`, `torch`, `native` or `triton`.

    Returns:
        (loss, metrics): a float32 scalar that backpropagates to hidden states, weight and bias; detached metrics.

    Raises:
        ValueError: shapes, types or options do not fit, a CPU target lies outside the vocabulary, or what `loss_fn`
            returned is not of 0-d tensors.
        RuntimeError: `loss_fn` captured a tensor that wants a gradient; the named backend can't run; the result is
            differentiated twice.

    >>> hidden_TD, weight_VD = torch.ones(3, 2, requires_grad=True), torch.zeros(4, 2)
    >>> loss, _ = linear_loss(hidden_TD, weight_VD, torch.tensor([0, 1, 3]), lambda s, rows: (-s.logps.sum() / 3, {}))
    >>> round(loss.item(), 4)
    1.3863
    """
    hidden_TD, weight_VD, bias_V = autocast_head(hidden_TD, weight_VD, bias_V)
    check_head(hidden_TD, weight_VD, targets_T, bias_V)
    options = row_options(scale, softcap, temperature, ignore_index, tuple(stats))
    if not stats:
        raise ValueError(
            f"stats is empty, so the loss would have nothing to be of; name one of {', '.join(STATS)}"
        )
    implementation = resolve("token_logps", hidden_TD.device, hidden_TD.dtype, backend)
    check_targets(targets_T, weight_VD.shape[0], ignore_index)
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be >= 1, got {chunk_rows}")
    units = plan(len(targets_T), group_sizes, chunk_rows or chunk_rows_for(hidden_TD, weight_VD.shape[0]))
    grad_enabled = torch.is_grad_enabled()
    wants = [x is not None and x.requires_grad and grad_enabled for x in (hidden_TD, weight_VD, bias_V)]
    # The types are chosen by now; under autocast every product would cast its operands again
    with torch.no_grad(), torch.autocast(hidden_TD.device.type, enabled=False):
        head = Head(hidden_TD, weight_VD, bias_V, tuple(wants))  # type: ignore[arg-type]
        walk = _Walk(
            head, targets_T, loss_fn, tuple(stats), options, implementation, any(wants), grad_enabled
        )
        loss, metrics = walk.run(units)
    if any(wants):
        loss = _WithGradients.apply(loss, hidden_TD, weight_VD, bias_V, *head.gradients())
    return loss, metrics


def plan(num_rows: int, group_sizes: Sequence[int] | None, chunk_rows: int) -> list[list[slice]]:
    """Runs of rows that reach `loss_fn` together, each as the pieces that fit a tile: one, but for large groups.

    Raises:
        ValueError: the group sizes are not positive or do not sum to the number of rows.

    >>> plan(5, None, 2)
    [[slice(0, 2, None)], [slice(2, 4, None)], [slice(4, 5, None)]]
    >>> plan(7, [1, 1, 5], 3)
    [[slice(0, 2, None)], [slice(2, 5, None), slice(5, 7, None)]]
    """
    if group_sizes is None:
        # no rows: one empty call, so that the metrics have names
        starts = range(0, max(num_rows, 1), chunk_rows)
        return [[slice(start, min(start + chunk_rows, num_rows))] for start in starts]
    if sum(group_sizes) != num_rows or any(size < 0 for size in group_sizes):
        raise ValueError(f"group_sizes must be >= 0 and sum to the {num_rows} rows, got {list(group_sizes)}")
    units, start, stop = [], 0, 0
    for size in group_sizes:
        if stop > start and stop + size - start > chunk_rows:
            units.append(_pieces(start, stop, chunk_rows))
            start = stop
        stop += size
    units.append(_pieces(start, stop, chunk_rows))
    return units


def _pieces(start: int, stop: int, chunk_rows: int) -> list[slice]:
    return [slice(at, min(at + chunk_rows, stop)) for at in range(start, max(stop, start + 1), chunk_rows)]


class _Pending(NamedTuple):
    """Rows whose statistics went through the loss, and that have yet to be multiplied back."""

    rows: slice
    tile_NV: Tensor
    formed: bool  # whether the tile holds the logits of all these rows; else they are formed again, piece by piece
    stats_KN: Tensor
    dstats_KN: Tensor
    active: _Active


def _reads_late(device: torch.device) -> bool:
    """Whether the host runs ahead of the device, so that to read a number is to wait for all work before it."""
    return device.type == "cuda"


class _Late:
    """A number on its way from the device to the host, behind the work that was queued before."""

    def __init__(self, number: Tensor) -> None:
        self._pinned = torch.empty((), dtype=number.dtype, pin_memory=True)
        self._pinned.copy_(number, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def read(self) -> int:
        """The number, once that work is done; what was queued later goes on."""
        self._event.synchronize()
        return int(self._pinned)


class _Active:
    """Which rows of a chunk have a gradient at all. On a GPU the count crosses to the host behind later work."""

    def __init__(self, dstats_KN: Tensor, ignored_N: Tensor) -> None:
        self._all, self._late, self._index_N = len(ignored_N), None, None
        if torch.compiler.is_compiling():
            return  # a count that depends on data would break the graph: take every row
        differentiable_KN = dstats_KN[[k for k in range(len(STATS)) if k != IS_TOP1]]
        active_N = (differentiable_KN != 0).any(0) & ~ignored_N
        if _reads_late(active_N.device):
            # the active ones first, in order
            self._index_N = (~active_N).to(torch.uint8).argsort(stable=True)
            self._late = _Late(active_N.sum())
        else:
            self._index_N = active_N.nonzero()[:, 0]

    def rows(self) -> Tensor | None:
        """Index of the active rows within the chunk; None where that is all of them."""
        index_N = self._index_N
        if self._late is not None:
            index_N = index_N[: self._late.read()]
        return None if index_N is None or len(index_N) == self._all else index_N


class _Walk:
    """One pass over all chunks: what `linear_loss` carries from one to the next."""

    def __init__(
        self,
        head: Head,
        targets_T: Tensor,
        loss_fn: LossFn,
        fields: tuple[str, ...],
        options: RowOptions,
        implementation: Any,
        differentiate: bool,
        grad_enabled: bool,
    ) -> None:
        self.head, self.targets_T, self.loss_fn, self.fields = head, targets_T, loss_fn, fields
        self.options, self.implementation = options, implementation
        self.differentiate, self.grad_enabled = differentiate, grad_enabled
        self.loss: Tensor | None = None
        self.metrics: Metrics = {}

    def run(self, units: list[list[slice]]) -> tuple[Tensor, Metrics]:
        """Loss and metrics of all rows; gradients gather in the head."""
        device, vocabulary = self.targets_T.device, self.head.weight_VD.shape[0]
        longest = max(piece.stop - piece.start for unit in units for piece in unit)
        # On a GPU a chunk is multiplied back while the next one's statistics run, so that the host never waits
        # for its count of active rows (but for the last one's); that takes a second tile.
        num_tiles = 2 if _reads_late(device) and self.differentiate else 1
        pending: deque[_Pending] = deque()
        with ExitStack() as stack:
            tiles = [
                stack.enter_context(workspace((longest, vocabulary), self.head.compute, device))
                for _ in range(num_tiles)
            ]
            for number, pieces in enumerate(units):
                tile_NV, rows = tiles[number % num_tiles], slice(pieces[0].start, pieces[-1].stop)
                # A group too large for the tile takes two passes: the statistics of every piece, and each again
                parts = [self._statistics(piece, tile_NV[: piece.stop - piece.start]) for piece in pieces]
                stats_KN = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
                dstats_KN = self._apply_loss(stats_KN, rows)
                if self.differentiate:
                    active = _Active(dstats_KN, self.targets_T[rows] == self.options.ignore_index)
                    pending.append(_Pending(rows, tile_NV, len(parts) == 1, stats_KN, dstats_KN, active))
                    if len(pending) == num_tiles:
                        self._multiply_back(pending.popleft())
            while pending:
                self._multiply_back(pending.popleft())
        assert self.loss is not None
        return self.loss, self.metrics

    def _statistics(self, rows: slice, tile_NV: Tensor) -> Tensor:
        self.head.project(rows, tile_NV)
        return self.implementation.forward(tile_NV, self.targets_T[rows], self.options)

    def _apply_loss(self, stats_KN: Tensor, rows: slice) -> Tensor:
        """Run `loss_fn`, add up its results, and return the gradient of the statistics."""

        def on_values(*values: Tensor) -> tuple[Tensor, Metrics]:
            loss, metrics = self.loss_fn(Stats(**dict(zip(self.fields, values))), rows)
            _check_scalars({"loss": loss, **metrics})
            return loss, metrics

        values = tuple(stats_KN[STATS.index(field)] for field in self.fields)
        dvalues: tuple[Tensor, ...] = ()
        # a captured tensor that wants a gradient shows in the loss
        with torch.set_grad_enabled(self.grad_enabled):
            if self.differentiate:
                argnums = tuple(range(len(values)))
                differentiated = torch.func.grad_and_value(on_values, argnums, has_aux=True)
                dvalues, (loss, metrics) = differentiated(*values)
            else:
                loss, metrics = on_values(*values)
        if loss.requires_grad:
            raise RuntimeError(
                "loss_fn captured a tensor that requires a gradient and would silently get none; detach it, or "
                "make it a part of hidden states or weight"
            )
        self._add(loss, metrics)
        dstats_KN = torch.zeros_like(stats_KN)
        for field, gradient_N in zip(self.fields, dvalues):
            dstats_KN[STATS.index(field)] = gradient_N.detach()
        return dstats_KN

    def _add(self, loss: Tensor, metrics: Metrics) -> None:
        self.loss = loss if self.loss is None else self.loss + loss
        for name, value in metrics.items():
            value = value.detach()
            if name not in self.metrics:
                self.metrics[name] = value
            elif name.startswith("max"):
                self.metrics[name] = torch.maximum(self.metrics[name], value)
            elif name.startswith("min"):
                self.metrics[name] = torch.minimum(self.metrics[name], value)
            else:
                self.metrics[name] = self.metrics[name] + value

    def _multiply_back(self, chunk: _Pending) -> None:
        """Overwrite logits with their gradient, active rows alone, and hand it to the head's GEMMs."""
        index_A = chunk.active.rows()
        num_rows = chunk.rows.stop - chunk.rows.start
        if not chunk.formed:
            if index_A is None:
                index_A = torch.arange(num_rows, device=chunk.stats_KN.device)
            for index_N in index_A.split(len(chunk.tile_NV)):
                rows_N, tile_NV = index_N + chunk.rows.start, chunk.tile_NV[: len(index_N)]
                self.head.project(rows_N, tile_NV)
                self._gradient(tile_NV, rows_N, chunk.stats_KN[:, index_N], chunk.dstats_KN[:, index_N])
        elif index_A is None:
            self._gradient(chunk.tile_NV[:num_rows], chunk.rows, chunk.stats_KN, chunk.dstats_KN)
        elif len(index_A):
            shape = (len(index_A), chunk.tile_NV.shape[1])
            with workspace(shape, self.head.compute, index_A.device) as tile_AV:
                torch.index_select(chunk.tile_NV, 0, index_A, out=tile_AV)
                stats_KA, dstats_KA = chunk.stats_KN[:, index_A], chunk.dstats_KN[:, index_A]
                self._gradient(tile_AV, index_A + chunk.rows.start, stats_KA, dstats_KA)

    def _gradient(self, tile_NV: Tensor, rows: slice | Tensor, stats_KN: Tensor, dstats_KN: Tensor) -> None:
        slope = abs(self.options.scale) / self.options.temperature
        scale = loss_scale(dstats_KN, slope, self.head.compute)
        if scale is not None:
            dstats_KN = dstats_KN * scale
        self.implementation.backward(
            tile_NV, self.targets_T[rows], stats_KN, dstats_KN, self.options, tile_NV
        )
        self.head.multiply_back(tile_NV, rows, scale)


def _check_scalars(returned: dict[str, Any]) -> None:
    for name, value in returned.items():
        if not isinstance(value, Tensor) or value.ndim:
            came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ValueError(
                f"loss_fn must return a 0-d loss and a dict of 0-d metrics, summed over its rows; {name!r} came with "
                f"{came}: sum a vector, make a number a tensor"
            )


class _WithGradients(Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(
        loss: Tensor,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        dhidden_TD: Tensor | None,
        dweight_VD: Tensor | None,
        dbias_V: Tensor | None,
    ) -> Tensor:
        return loss.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        *leaves, dhidden_TD, dweight_VD, dbias_V = ctx.saved_tensors
        dtype, known = leaves[0].dtype, (dhidden_TD, dweight_VD, dbias_V)
        if saved_is_ours(dloss):  # a second copy of the weight's gradient may be the most memory of a step
            scaled = (None if x is None else x.mul_(dloss).to(dtype) for x in known)
            return (None, *scaled, None, None, None)

        def gradients(dloss: Tensor, *known_and_leaves: Tensor | None) -> tuple[Tensor | None, ...]:
            return tuple(None if x is None else (x * dloss).to(dtype) for x in known_and_leaves[:3])

        return (None, *only_once("linear_loss", gradients, dloss, *known, *leaves), None, None, None)
