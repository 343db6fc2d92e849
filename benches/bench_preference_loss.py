"""Loss of preference pairs from token log-probs, with the sums over tokens and the gradient.

Bytes are nothing here (a float read and one written a token): what counts is launches and Python. TRL has no function
for it that could be called without its trainer; its expression is the eager one.
Letters: N pairs, L tokens of a completion, P = 2 N L tokens, M = 2 N + 1 offsets.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import compiled, device, measure, relative_error, sizes
from torch import Tensor

from alignfast.kernels import packed_preference_loss, report

OURS = [name for name, state in report()["preference_loss"].items() if state == "available"]
PROVIDERS = [*(f"alignfast {name}" for name in OURS), "eager", "compile"]
SHAPES = sizes([(8, 64), (64, 512)], [(2, 3)], [(8, 64)])


def eager(logps_P: Tensor, offsets_M: Tensor, ref_chosen_N: Tensor, ref_rejected_N: Tensor) -> Tensor:
    """Equal lengths, so that summing is a view: the best case for plain torch."""
    chosen_N, rejected_N = logps_P.view(len(offsets_M) // 2, 2, -1).sum(-1).unbind(1)
    return -F.logsigmoid(0.1 * ((chosen_N - ref_chosen_N) - (rejected_N - ref_rejected_N)))


def provider(name: str):  # type: ignore[no-untyped-def]
    if name.startswith("alignfast"):
        backend = name.split()[1]
        return lambda *inputs: packed_preference_loss(*inputs, beta=0.1, backend=backend).loss_N
    return compiled(eager) if name == "compile" else eager


@pytest.mark.parametrize(("N", "L"), SHAPES)
@pytest.mark.parametrize("name", PROVIDERS)
def bench_forward_backward(benchmark, name: str, N: int, L: int) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = "preference_loss forward+backward"
    generator = torch.Generator().manual_seed(0)
    logps_P = (-torch.rand(2 * N * L, generator=generator)).to(device()).requires_grad_()
    offsets_M = torch.arange(0, 2 * N * L + 1, L, device=device())
    refs = tuple(-L / 2 + torch.randn(N, generator=generator).to(device()) for _ in range(2))
    call = provider(name)

    def step() -> Tensor:
        return torch.autograd.grad(call(logps_P, offsets_M, *refs).sum(), logps_P)[0]

    exact_P = logps_P.detach().double().requires_grad_()
    gold_P = torch.autograd.grad(eager(exact_P, offsets_M, *(x.double() for x in refs)).sum(), exact_P)[0]
    plain_P = torch.autograd.grad(eager(logps_P, offsets_M, *refs).sum(), logps_P)[0]
    allowed = 2 * relative_error(plain_P, gold_P) + 2 * torch.finfo(torch.float32).eps
    measure(
        benchmark, step, provider=name, shape=f"{N} pairs x {L} tokens", error=relative_error(step(), gold_P),
        allowed_error=allowed, moved_bytes=2 * logps_P.nbytes, flops=2 * len(logps_P), rounds=200,
    )  # fmt: skip
