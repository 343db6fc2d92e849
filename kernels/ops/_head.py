"""The LM head as GEMMs over chunks of rows: a tile of logits forward, its gradient multiplied back.

Shared by the ops that fuse a head. The tile is the only thing of width V, and it outlives no chunk.

Letters: T tokens, N rows of a chunk, D width of the hidden state, V vocabulary, K the statistics of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of a chunk. On a GPU 4096 rows keep the GEMMs near their peak; on a CPU the tile stays within 128 MiB, and
# the pass over the weight's gradient (12 bytes an entry each chunk) within a few percent of the GEMM.
_GPU_ROWS = 4096
_CPU_TILE_BYTES = 128 << 20
_MIN_ROWS = 128
# A float16 tile of gradients: its largest upstream gradient is scaled into [2^10, 2^11). The gradient of a logit is
# at most 16 times as large (|dlogp| + |dlse| + (ln V / 4 + 2) |dentropy| + ...), so half of float16's 65504 is left.
# The lower end keeps a float32 sum of tiles finite when it goes from the smallest scale to the largest.
_FLOAT16_TOP = 2.0**11
_LARGEST_SCALE, _SMALLEST_SCALE = 2.0**40, 2.0**-20


def chunk_rows_for(hidden_TD: Tensor, vocabulary: int) -> int:
    """How many rows of logits to hold at once."""
    if hidden_TD.device.type != "cpu":
        return _GPU_ROWS
    return max(_MIN_ROWS, _CPU_TILE_BYTES // (tile_dtype(hidden_TD).itemsize * vocabulary))


def tile_dtype(hidden_TD: Tensor) -> torch.dtype:
    """Type of the logits tile: the input's on a GPU; at least float32 on a CPU, whose 16-bit GEMMs are 6 to 16
    times slower than float32 ones."""
    if hidden_TD.device.type == "cpu" and hidden_TD.dtype != torch.float64:
        return torch.float32
    return hidden_TD.dtype


def check_head(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, bias_V: Tensor | None) -> None:
    """Refuse shapes, types and devices that do not fit together.

    Raises:
        ValueError: says what came and what was expected.
    """
    check_projection(hidden_TD, weight_VD, bias_V)
    if targets_T.shape != hidden_TD.shape[:1] or targets_T.dtype != torch.int64:
        raise ValueError(
            f"expected int64 targets of shape ({hidden_TD.shape[0]},), got {targets_T.dtype} {tuple(targets_T.shape)}"
        )
    if targets_T.device != hidden_TD.device:
        raise ValueError(f"hidden is on {hidden_TD.device}, targets on {targets_T.device}; move one of them")


def check_projection(hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> None:
    """What `check_head` asks of a head without targets.

    Raises:
        ValueError: says what came and what was expected.
    """
    if hidden_TD.ndim != 2 or weight_VD.ndim != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"expected hidden (T, D) and weight (V, D), got {tuple(hidden_TD.shape)} and {tuple(weight_VD.shape)}"
        )
    if bias_V is not None and bias_V.shape != weight_VD.shape[:1]:
        raise ValueError(f"expected a bias of shape ({weight_VD.shape[0]},), got {tuple(bias_V.shape)}")
    for name, other in (("weight", weight_VD), ("bias", bias_V)):
        if other is not None and other.dtype != hidden_TD.dtype:
            raise ValueError(f"hidden is {hidden_TD.dtype} and {name} {other.dtype}; cast one of them")
        if other is not None and other.device != hidden_TD.device:
            raise ValueError(f"hidden is on {hidden_TD.device}, {name} on {other.device}; move one of them")


def autocast_head(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inputs in autocast's type where autocast is on: the weight is cast once, not once a chunk."""
    device = hidden_TD.device.type
    if not torch.is_autocast_enabled(device):
        return hidden_TD, weight_VD, bias_V
    dtype = torch.get_autocast_dtype(device)
    return hidden_TD.to(dtype), weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)


def loss_scale(dstats_KN: Tensor, slope: float, compute: torch.dtype) -> Tensor | None:
    """What to multiply upstream gradients by, so that a tile of float16 gradients neither overflows nor underflows.

    A mean over T tokens has upstream gradients of 1 / T, and times the probability of a seldom word they end below
    float16's 6e-8; a sum has 1, and of a loss that a GradScaler multiplied 65,536.

    Args:
        dstats_KN: gradients of the statistics; what is not finite has no say.
        slope: the largest d x / d z of `token_logps`: |scale| / temperature.
        compute: type of the tile.

    Returns:
        A power of two on the device, which is never waited for; None where the tile is not float16, or empty.

    >>> loss_scale(torch.tensor([[1e-5, -1e-4]]), 1.0, torch.float16)
    tensor(16777216.)
    """
    if compute != torch.float16 or dstats_KN.numel() == 0:
        return None
    largest = torch.where(dstats_KN.isfinite(), dstats_KN.abs(), 0).amax() * slope
    largest = largest.clamp(_FLOAT16_TOP / _LARGEST_SCALE, _FLOAT16_TOP / _SMALLEST_SCALE)
    mantissa, _ = torch.frexp(largest)
    return mantissa / largest * _FLOAT16_TOP  # exact: the quotient is a power of two


class Head:
    """The three GEMMs of a chunk, with the gradients they add up to.

    Gradients are held in float32 where the inputs are 16 bit on a CPU or float16, and the weight's always, since
    a 16-bit sum over chunks biases training. A tile's loss scale is divided out again, exactly: it is a power of two.
    """

    def __init__(
        self, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, needs: tuple[bool, bool, bool]
    ) -> None:
        self.hidden_TD, self.compute = hidden_TD, tile_dtype(hidden_TD)
        self.weight_VD = weight_VD.to(self.compute)  # a copy for 16-bit weights on a CPU alone, made once
        self.bias_V = None if bias_V is None else bias_V.to(self.compute)
        exact = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
        keep = (
            hidden_TD.dtype if hidden_TD.dtype == torch.bfloat16 and hidden_TD.device.type != "cpu" else exact
        )
        self.dhidden_TD = torch.zeros_like(hidden_TD, dtype=keep) if needs[0] else None
        self.dweight_VD = torch.empty_like(weight_VD, dtype=exact) if needs[1] else None
        self.dbias_V = torch.zeros_like(bias_V, dtype=exact) if bias_V is not None and needs[2] else None
        self._touched = False
        self._held_scale: Tensor | None = None  # of dweight_VD

    def project(self, rows: slice | Tensor, out_NV: Tensor) -> None:
        """Logits of some rows, before scale, cap and temperature."""
        hidden_ND = self.hidden_TD[rows].to(self.compute)
        if self.bias_V is None:
            torch.mm(hidden_ND, self.weight_VD.T, out=out_NV)
        else:
            torch.addmm(self.bias_V, hidden_ND, self.weight_VD.T, out=out_NV)

    def multiply_back(self, dtile_NV: Tensor, rows: slice | Tensor, scale: Tensor | None) -> None:
        """Add what a tile of gradients, multiplied by `scale`, means for the hidden states, the weight and the bias."""
        if self.dhidden_TD is not None:
            dhidden_ND = _mm(dtile_NV, self.weight_VD, self.dhidden_TD.dtype)
            self.dhidden_TD[rows] = dhidden_ND if scale is None else dhidden_ND.div_(scale)
        if self.dweight_VD is not None:
            hidden_ND = self.hidden_TD[rows].to(self.compute)
            self._hold_weight_at(scale)
            _add_mm(self.dweight_VD, dtile_NV.T, hidden_ND, beta=1.0 if self._touched else 0.0)
            self._touched = True
        if self.dbias_V is not None:
            dbias_V = dtile_NV.sum(0, dtype=self.dbias_V.dtype)
            self.dbias_V += dbias_V if scale is None else dbias_V / scale

    def _hold_weight_at(self, scale: Tensor | None) -> None:
        """A GEMM adds to its output as it is: so the sum takes the tile's scale, in a pass over it where that is new."""
        if scale is None or scale is self._held_scale:
            return
        if self.dweight_VD is not None and self._held_scale is not None:
            self.dweight_VD *= scale / self._held_scale
        self._held_scale = scale

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden states, weight and bias, in the types they were summed in. Ends the sums."""
        if self.dweight_VD is not None and not self._touched:
            self.dweight_VD.zero_()
        elif self.dweight_VD is not None and self._held_scale is not None:
            self.dweight_VD /= self._held_scale
        return self.dhidden_TD, self.dweight_VD, self.dbias_V


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.mm(a, b) if a.dtype == dtype else torch.mm(a, b, out_dtype=dtype)


def _add_mm(total: Tensor, a: Tensor, b: Tensor, *, beta: float) -> None:
    if beta == 0.0 and a.shape[1] == 0:
        total.zero_()
    elif a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    else:
        torch.addmm(total, a, b, torch.float32, beta=beta, out=total)
