"""Loss of sampled tokens, forward and backward, with what trainers log of it: ours by backend, eager torch, torch.compile.

Floor: log-probs, old log-probs, advantages (and the reference) are read, the loss and its gradient written: 20 or 24 bytes
a token. What counts at a step's sizes is launches and Python. TRL's loss can't be called without its trainer; its
expression is the eager one, with the clip ratios (and the KL) that it logs.
Letters: S sequences, L tokens of each, T = S L tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import compiled, device, measure, relative_error, sizes
from torch import Tensor

from alignfast.kernels import policy_loss, report

OURS = [f"alignfast {name}" for name, state in report()["policy_loss"].items() if state == "available"]
PROVIDERS = [*OURS, "eager", "compile"]
SHAPES = sizes([(32, 64), (64, 1024), (512, 2048)], [(2, 8)], [(64, 1024)])
EPSILON = 0.2
CASES: dict[str, dict[str, Any]] = {
    "dapo": {"loss_type": "dapo"},
    "dapo with KL": {"loss_type": "dapo", "beta": 0.04, "use_bias_correction_kl": True},
    "grpo with KL": {"loss_type": "grpo", "beta": 0.04},
}
Call = Callable[..., tuple[Tensor, list[Tensor]]]  # the loss, and what is logged


def eager(case: str) -> Call:
    """Sequences of one length as rows, so that a mean over each is a view: the best case for plain torch."""
    options = CASES[case]
    beta, averages = options.get("beta", 0.0), options["loss_type"] == "grpo"

    def call(
        logps_T: Tensor, old_T: Tensor, advantages_T: Tensor, ref_T: Tensor, seq_T: Tensor, S: int
    ) -> tuple[Tensor, list[Tensor]]:
        ratio_T = (logps_T - old_T).exp()
        clipped_T = ratio_T.clamp(1 - EPSILON, 1 + EPSILON)
        loss_T = -torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T)
        with torch.no_grad():
            low_T = (ratio_T < 1 - EPSILON) & (advantages_T < 0)
            high_T = (ratio_T > 1 + EPSILON) & (advantages_T > 0)
            logged = [low_T.float().mean(), high_T.float().mean(), (low_T | high_T).float().mean()]
        if beta:
            d_T = ref_T - logps_T
            kl_T = d_T.exp() - d_T - 1
            if "use_bias_correction_kl" in options:
                kl_T = kl_T * ratio_T
            loss_T = loss_T + beta * kl_T
            logged.append(kl_T.detach().mean())
        return loss_T.view(S, -1).mean(1).mean() if averages else loss_T.sum() / len(loss_T), logged

    return call


def provider(name: str, case: str) -> Call:
    """The same call for everyone."""
    if not name.startswith("alignfast"):
        return compiled(eager(case)) if name == "compile" else eager(case)
    backend, options = name.split()[1], CASES[case]

    def ours(
        logps_T: Tensor, old_T: Tensor, advantages_T: Tensor, ref_T: Tensor, seq_T: Tensor, S: int
    ) -> tuple[Tensor, list[Tensor]]:
        loss_T, metrics = policy_loss(
            logps_T, old_T, advantages_T, ref_logps_T=ref_T if options.get("beta") else None, seq_T=seq_T,
            num_items=S if options["loss_type"] == "grpo" else len(logps_T), backend=backend, **options,
        )  # fmt: skip
        return loss_T.sum(), [*metrics.values()]

    return ours


def inputs(S: int, L: int) -> tuple[Tensor, ...]:
    """A policy 0.2 nats from the old one, so that a third is beyond the bounds; and each token's sequence."""
    generator = torch.Generator().manual_seed(0)
    start_T = -3 * torch.rand(S * L, generator=generator)
    near = (start_T + 0.2 * torch.randn(S * L, generator=generator) for _ in range(2))
    logps_T, old_T, ref_T = (x_T.to(device()) for x_T in (start_T, *near))
    advantages_T = torch.randn(S, generator=generator).repeat_interleave(L)
    seq_T = torch.arange(S, device=device()).repeat_interleave(L)
    return logps_T.requires_grad_(), old_T, advantages_T.to(device()), ref_T, seq_T


def gradient(call: Call, tensors: tuple[Tensor, ...], S: int) -> Tensor:
    return torch.autograd.grad(call(*tensors, S)[0], tensors[0])[0]


def errors(name: str, case: str) -> tuple[float, float]:
    """Error of the gradient against float64, and twice the eager one's (plus 2 units in the last place)."""
    S, L = 16, 61
    tensors = inputs(S, L)
    *floats, seq_T = (x_T.detach() for x_T in tensors)
    logps_T, *constants = (x_T.double() for x_T in floats)
    gold_T = gradient(eager(case), (logps_T.requires_grad_(), *constants, seq_T), S)
    found, plain = (
        relative_error(gradient(call, tensors, S), gold_T) for call in (provider(name, case), eager(case))
    )
    return found, 2 * plain + 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("S", "L"), SHAPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PROVIDERS)
def bench_forward_backward(benchmark, name: str, case: str, S: int, L: int) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = f"policy_loss forward+backward, {case}"
    error, allowed = errors(name, case)
    call, tensors = provider(name, case), inputs(S, L)
    measure(
        benchmark, lambda: gradient(call, tensors, S), provider=name, shape=f"{S} x {L}", error=error,
        allowed_error=float("inf") if name == "compile" else allowed,
        moved_bytes=(24 if CASES[case].get("beta") else 20) * S * L,
        flops=15 * S * L, rounds=100,
    )  # fmt: skip
