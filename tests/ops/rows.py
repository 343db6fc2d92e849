"""What the tests of token_logps share: inputs, the textbook, and a backend held to both.

Letters: T rows, V vocabulary, K the six statistics.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops import conformance as c
from torch import Tensor

from alignfast.kernels.token_logps import IS_TOP1, STATS, RowOptions, row_options, row_stats

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# scale, softcap, temperature: none; as Gemma 2 and a sampler have them; a small scale under a tight cap
OPTIONS = [(1.0, None, 1.0), (1.0, 30.0, 0.7), (0.25, 2.0, 1.3)]
on_every_backend = pytest.mark.parametrize(
    ("backend", "device"), c.backends_for("token_logps", every_isa=True)
)


def options_of(scale: float = 1.0, softcap: float | None = None, temperature: float = 1.0) -> RowOptions:
    return row_options(scale, softcap, temperature, -100, STATS)


def inputs(T: int, V: int, dtype: torch.dtype = torch.float32, *, ignored: float = 0.3, seed: int = 0) -> Any:
    """Logits of a trained model's spread (a few nats) and targets of which a share is ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits_TV = (3 * torch.randn(T, V, generator=generator)).to(dtype)
    targets_T = torch.randint(0, V, (T,), generator=generator)
    targets_T[torch.rand(T, generator=generator) < ignored] = -100
    return logits_TV, targets_T


def textbook(logits_TV: Tensor, targets_T: Tensor, options: RowOptions) -> list[Tensor]:
    """The statistics by log_softmax and gather, but is_top1, which has no gradient and a test of its own."""
    x_TV = (logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()) * options.scale
    if options.softcap:
        x_TV = options.softcap * (x_TV / options.softcap).tanh()
    x_TV = x_TV / options.temperature
    ignored_T = targets_T == options.ignore_index
    index_T1 = targets_T.masked_fill(ignored_T, 0)[:, None]
    logp_TV = x_TV.log_softmax(1)
    p_TV = logp_TV.exp()
    stats = [
        logp_TV.gather(1, index_T1)[:, 0], x_TV.logsumexp(1), -(p_TV * logp_TV).sum(1), x_TV.mean(1),
        p_TV.square().sum(1),
    ]  # fmt: skip
    return [stat_T.masked_fill(ignored_T, 0) for stat_T in stats]


def statistics(stats_KT: Tensor) -> list[Tensor]:
    """Rows of stats_KT in the order of `textbook`."""
    return [stats_KT[k] for k in range(len(STATS)) if k != IS_TOP1]


def conform(
    backend: str,
    device: str,
    logits_TV: Tensor,
    targets_T: Tensor,
    options: RowOptions,
    *,
    seen_TV: Tensor | None = None,
    logps_alone: bool = False,
) -> None:
    """Hold a backend on `seen_TV`, the first of the logits in some layout; all of them are the crowd.

    Of all statistics, lse has PyTorch's least exact gradient: `logps_alone` sets the stricter bar.
    """
    logits_TV, targets_T = logits_TV.to(device), targets_T.to(device)
    chosen = slice(1) if logps_alone else slice(None)

    def by(backend: str) -> c.Run:
        return lambda x_TV: statistics(row_stats(x_TV, targets_T[: len(x_TV)], options, backend))[chosen]

    def peer(x_TV: Tensor) -> list[Tensor]:
        return textbook(x_TV, targets_T[: len(x_TV)], options)[chosen]

    case = c.Case(peer, by("torch"), [logits_TV if seen_TV is None else seen_TV.to(device)])
    c.conform(by(backend), case, crowd=c.Case(peer, by("torch"), [logits_TV]))
