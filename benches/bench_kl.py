"""How far a policy is from its reference: estimates from log-probs, and whole distributions from logits.

Ours by backend, eager torch, torch.compile. Floors: `kl_penalty` reads two numbers a token and writes one, and once more
for the gradient; `kl_divergence` reads both rows of logits, and backward reads them again and writes a gradient.
Letters: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import compiled, device, measure, relative_error, seeded, sizes
from torch import Tensor

from alignfast.kernels import kl_divergence, kl_penalty, report

TOKENS = sizes([2048, 65_536, 1 << 20], [16], [65_536])
LOGITS = sizes([(512, 32_000), (128, 128_256)], [(4, 33)], [(128, 32_000)])
PENALTIES = ("k1", "k3")
DIVERGENCES = ("forward", "reverse", "js")
Call = Callable[[Tensor, Tensor], Tensor]


def providers(op: str) -> list[str]:
    ours = [f"alignfast {name}" for name, state in report()[op].items() if state == "available"]
    return [*ours, "eager", "compile"]


def eager_penalty(kind: str) -> Call:
    """The plain expression."""
    if kind == "k1":
        return lambda logps_T, ref_T: logps_T - ref_T
    return lambda logps_T, ref_T: (ref_T - logps_T).exp() - (ref_T - logps_T) - 1


def eager_divergence(kind: str) -> Call:
    """Both log-softmaxes in full, and torch's kl_div."""

    def divergence(logits_TV: Tensor, ref_logits_TV: Tensor) -> Tensor:
        own_TV, ref_TV = logits_TV.log_softmax(-1), ref_logits_TV.log_softmax(-1)
        if kind == "forward":
            return F.kl_div(own_TV, ref_TV, reduction="none", log_target=True).sum(-1)
        if kind == "reverse":
            return F.kl_div(ref_TV, own_TV, reduction="none", log_target=True).sum(-1)
        mixed_TV = torch.logaddexp(own_TV, ref_TV) - torch.log(torch.tensor(2.0, dtype=own_TV.dtype))
        halves = (F.kl_div(mixed_TV, x_TV, reduction="none", log_target=True) for x_TV in (own_TV, ref_TV))
        return sum(half_TV.sum(-1) for half_TV in halves) / 2  # type: ignore[return-value]

    return divergence


def provider(op: str, name: str, kind: str) -> Call:
    """The same call for everyone."""
    if name.startswith("alignfast"):
        ours = kl_penalty if op == "kl_penalty" else kl_divergence
        return lambda x, ref: ours(x, ref, kind=kind, backend=name.split()[1])
    eager = eager_penalty(kind) if op == "kl_penalty" else eager_divergence(kind)
    return compiled(eager) if name == "compile" else eager


def inputs(*shape: int) -> tuple[Tensor, Tensor]:
    """Numbers of the size of logits, and a reference near by."""
    generator = seeded()
    x = 3 * torch.randn(shape, generator=generator, device=device())
    return x, x + 0.3 * torch.randn(shape, generator=generator, device=device())


def gradient(call: Call, x: Tensor, ref: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    out = call(leaf, ref)
    return torch.autograd.grad(out, leaf, torch.ones_like(out))[0]


def errors(op: str, name: str, kind: str, with_gradient: bool) -> tuple[float, float]:
    """Error against float64, and twice the eager one's (plus 2 units in the last place); of the gradient or the value.

    The eager k3 loses its digits where the two agree: ours is far below what is allowed.
    """
    x, ref = inputs(*((4099,) if op == "kl_penalty" else (16, 4999)))

    def run(call: Call, x: Tensor, ref: Tensor) -> Tensor:
        return gradient(call, x, ref) if with_gradient else call(x, ref)

    eager, eps = provider(op, "eager", kind), torch.finfo(torch.float32).eps
    gold = run(provider(op, "alignfast torch", kind), x.double(), ref.double())
    found, plain = (relative_error(run(call, x, ref), gold) for call in (provider(op, name, kind), eager))
    return found, float("inf") if name == "compile" else 2 * plain + 2 * eps


@pytest.mark.parametrize("with_gradient", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("T", TOKENS)
@pytest.mark.parametrize("kind", PENALTIES)
@pytest.mark.parametrize("name", providers("kl_penalty"))
def bench_kl_penalty(benchmark, name: str, kind: str, T: int, with_gradient: bool) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = f"kl_penalty {kind} forward{'+backward' if with_gradient else ''}"
    error, allowed = errors("kl_penalty", name, kind, with_gradient)
    call, (logps_T, ref_T) = provider("kl_penalty", name, kind), inputs(T)
    run = (lambda: gradient(call, logps_T, ref_T)) if with_gradient else (lambda: call(logps_T, ref_T))
    measure(
        benchmark, run, provider=name, shape=str(T), error=error, allowed_error=allowed,
        moved_bytes=(24 if with_gradient else 12) * T, flops=4 * T, rounds=50,
    )  # fmt: skip


@pytest.mark.parametrize("with_gradient", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize(("T", "V"), LOGITS)
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("name", providers("kl_divergence"))
def bench_kl_divergence(benchmark, name: str, kind: str, T: int, V: int, with_gradient: bool) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = f"kl_divergence {kind} forward{'+backward' if with_gradient else ''}"
    error, allowed = errors("kl_divergence", name, kind, with_gradient)
    call, (logits_TV, ref_TV) = provider("kl_divergence", name, kind), inputs(T, V)
    run = (lambda: gradient(call, logits_TV, ref_TV)) if with_gradient else (lambda: call(logits_TV, ref_TV))
    nbytes = (
        {"moved_bytes": 5.0 * logits_TV.nbytes} if with_gradient else {"read_bytes": 2.0 * logits_TV.nbytes}
    )
    measure(
        benchmark, run, provider=name, shape=f"{T} x {V}", error=error, allowed_error=allowed,
        flops=(14 if with_gradient else 8) * logits_TV.numel(), **nbytes,
    )  # fmt: skip
