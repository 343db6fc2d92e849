"""What the tests of preference_loss share: pairs of sums, pairs of tokens end to end, and the textbook.

Letters: N pairs, P tokens of all completions, M = 2N + 1 offsets.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops import conformance as c
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignfast.kernels import packed_preference_loss, preference_loss
from alignfast.kernels._pairwise import LOSSES

COMPILED = [name for name, loss in LOSSES.items() if loss.code is not None]
on_every_backend = pytest.mark.parametrize(
    ("backend", "device"), c.backends_for("preference_loss", every_isa=True)
)
every_loss = pytest.mark.parametrize("name", LOSSES)
every_compiled_loss = pytest.mark.parametrize("name", COMPILED)


def smoothing_of(name: str) -> float:
    return 0.1 if LOSSES[name].smooths else 0.0


class Pairs:
    """N pairs of summed log-probs, as the arguments of preference_loss."""

    def __init__(self, N: int = 7, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal() -> Tensor:
            return (
                (-6 + 3 * torch.randn(N, generator=generator, dtype=torch.float64)).clamp(max=-0.1).to(dtype)
            )

        self.policy = (normal(), normal())
        self.refs = (normal(), normal())
        lengths_2N = torch.randint(1, 9, (2, N), generator=generator)
        self.lengths = {"chosen_len_N": lengths_2N[0], "rejected_len_N": lengths_2N[1]}

    def loss(self, name: str, *policy: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        options = {"loss_type": name, "label_smoothing": smoothing_of(name), "beta": 0.3} | options
        refs = self.refs if LOSSES[name].reference else ()
        return preference_loss(*(policy or self.policy), *refs, **self.lengths, **options, backend="torch")


class Packed:
    """Token log-probs of N pairs, as the arguments of packed_preference_loss."""

    def __init__(
        self, lengths: list[int], dtype: torch.dtype = torch.float32, *, spread: float = 1.0, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.offsets_M = torch.tensor([0, *lengths]).cumsum(0)
        P, N = sum(lengths), len(lengths) // 2
        self.logps_P = (-spread * torch.rand(P, generator=generator, dtype=torch.float64)).to(dtype)
        sums_2N = self.sums(self.logps_P.double())
        noise_2N = spread * torch.randn(2, N, generator=generator, dtype=torch.float64)
        self.refs = tuple((sums_2N.mT.reshape(2, N) + 2 * noise_2N).to(dtype))

    def sums(self, logps_P: Tensor) -> Tensor:
        """By the textbook: (N, 2)."""
        completion_P = torch.arange(len(self.offsets_M) - 1).repeat_interleave(self.offsets_M.diff())
        sums = logps_P.new_zeros(len(self.offsets_M) - 1)
        return sums.index_add(0, completion_P.to(logps_P.device), logps_P).view(-1, 2)

    def run(self, logps_P: Tensor, name: str, backend: str, **options: Any) -> list[Tensor]:
        refs = [ref_N.to(logps_P.device, logps_P.dtype) for ref_N in self.refs]
        offsets_M = self.offsets_M.to(logps_P.device)
        options = {"label_smoothing": smoothing_of(name), "beta": 0.3} | options
        return list(
            packed_preference_loss(logps_P, offsets_M, *refs, loss_type=name, backend=backend, **options)
        )

    def peer(self, logps_P: Tensor, name: str, beta: float = 0.3) -> list[Tensor]:
        """The four compiled losses as one writes them in PyTorch."""
        logps_P = logps_P if logps_P.dtype == torch.float64 else logps_P.float()
        chosen_N, rejected_N = self.sums(logps_P).unbind(1)
        ref_chosen_N, ref_rejected_N = (ref_N.to(logps_P.device, logps_P.dtype) for ref_N in self.refs)
        ratios = chosen_N - ref_chosen_N, rejected_N - ref_rejected_N
        tokens_2N = self.offsets_M.diff().clamp(min=1).view(-1, 2).to(logps_P.device).T
        margin_N, eps = beta * (ratios[0] - ratios[1]), smoothing_of(name)
        loss_N = {
            "sigmoid": lambda: -(1 - eps) * logsigmoid(margin_N) - eps * logsigmoid(-margin_N),
            "hinge": lambda: torch.relu(1 - margin_N),
            "ipo": lambda: (ratios[0] / tokens_2N[0] - ratios[1] / tokens_2N[1] - 1 / (2 * beta)) ** 2,
            "robust": lambda: (
                (-(1 - eps) * logsigmoid(margin_N) + eps * logsigmoid(-margin_N)) / (1 - 2 * eps)
            ),
        }[name]()
        metrics = (beta * ratios[0], beta * ratios[1], chosen_N, rejected_N)
        return [loss_N, *(metric_N.detach() for metric_N in metrics)]

    def case(self, device: str, name: str, logps_P: Tensor | None = None, **options: Any) -> c.Case:
        return c.Case(
            lambda x_P: self.peer(x_P, name, **options),
            lambda x_P: self.run(x_P, name, "torch", **options),
            [(self.logps_P if logps_P is None else logps_P).to(device)],
        )


def ragged(N: int, longest: int, seed: int = 0) -> list[int]:
    """Lengths of 2N completions, up to the longest; those of every eighth pair are 0."""
    lengths = torch.randint(1, longest + 1, (N, 2), generator=torch.Generator().manual_seed(seed))
    lengths[7::8] = 0
    return lengths.flatten().tolist()
