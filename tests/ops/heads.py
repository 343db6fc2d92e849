"""What the tests of the ops that fuse an LM head share: inputs, the textbook, and a counter of what is computed.

Letters: T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from alignfast.kernels import Stats

T, D, V = 37, 16, 101  # odd sizes: the last chunk is ragged, no dimension equals another


class Inputs:
    """Random inputs with a weight for every token, so that swapped or dropped rows show."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden_TD = normal(T, D).requires_grad_()
        self.weight_VD = normal(V, D).requires_grad_()
        self.bias_V = normal(V).requires_grad_()
        self.targets_T = torch.randint(0, V, (T,), generator=generator)
        self.targets_T[[3, 20]] = -100
        self.advantage_T = normal(T)
        self.leaves = (self.hidden_TD, self.weight_VD, self.bias_V)

    def loss_fn(self, stats: Stats, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        weight_N = self.advantage_T[rows].to(stats.logps.dtype)
        return (stats.logps * weight_N).sum(), {
            "sum": stats.logps.sum(),
            "max_logp": stats.logps.max(),
            "min_logp": stats.logps.min(),
        }

    def expected(
        self, *, scale: float = 1.0, softcap: float | None = None, temperature: float = 1.0
    ) -> Tensor:
        """Log-probs by the textbook, from logits in full; 0 where ignored."""
        logits_TV = (self.hidden_TD @ self.weight_VD.T + self.bias_V) * scale
        if softcap is not None:
            logits_TV = softcap * torch.tanh(logits_TV / softcap)
        logps_TV = (logits_TV / temperature).log_softmax(1)
        ignored_T = self.targets_T == -100
        return logps_TV.gather(1, self.targets_T.masked_fill(ignored_T, 0)[:, None])[:, 0].masked_fill(
            ignored_T, 0
        )


HEAD = {"scale": 0.7, "softcap": 5.0, "temperature": 1.3}


def assert_close(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for x, y in zip(got, expected, strict=True):
        assert float((x - y).abs().max()) <= 1e-13 * max(1.0, float(y.abs().max()))


class Gemms(TorchDispatchMode):
    """Counts matrix products as (rows, inner, columns), and the largest tensor that an op returns."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, int, int]] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm"):
            left, right = args[:2] if name == "mm" else args[1:3]
            self.shapes.append((left.shape[0], left.shape[1], right.shape[1]))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return result
