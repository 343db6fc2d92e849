"""Holds any backend of an op to the op's definition in float64.

A backend may be at most twice as wrong as PyTorch's own expression of the same thing in the dtype that the
backend computes in, plus two units in the last place of the largest value:

    max |backend - gold|  <=  2 max |peer - gold| + 2 ulp(max |gold|)

Inputs are drawn once, in the low precision, and gold is computed from them in float64: so what is measured is
the arithmetic, not the rounding of the inputs. The largest of a few errors is luck: where a backend is run on
a few rows, the peer's error is taken over a crowd of them. Infinities and NaN must stand where gold has them.

A test of an op gives three functions of the same leaves: the backend's call, the peer (the textbook, with
autograd's own gradient) and the definition. `conform` does the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from alignfast.kernels import _backend

Run = Callable[..., "Tensor | Sequence[Tensor]"]
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
# Triton's interpreter takes 10 ms a block, and is no code that torch.compile could trace.
INTERPRETED = () if torch.cuda.is_available() else ("triton",)
COMPILED = ("native",) if INTERPRETED else ("native", "triton")
FAST = ("torch", *COMPILED)


def backends_for(
    op: str, *, only: Sequence[str] = (*FAST, *INTERPRETED), every_isa: bool = False
) -> list[Any]:
    """Parameters `(backend, device)` for the implementations of an op on every device of this machine.

    One that can't run here is a skipped test that says why.

    Args:
        op: the name under which it is registered.
        only: the backends to take.
        every_isa: native code on the CPU once for each instruction set that it was compiled for.
    """
    parameters = []
    for device in DEVICES:
        for name, implementation in _backend._OPS[op].items():
            reason = implementation.refusal(torch.device(device), torch.float32)
            if name not in only:
                continue
            if reason is not None:
                parameters.append(
                    pytest.param(name, device, id=f"{name}-{device}", marks=pytest.mark.skip(reason))
                )
            elif (name, device) == ("native", "cpu") and every_isa:
                for isa in import_module("alignfast._cpu").isas:
                    parameters.append(
                        pytest.param(name, device, id=f"native-{isa}", marks=pytest.mark.isa(isa))
                    )
            else:
                parameters.append(pytest.param(name, device, id=f"{name}-{device}"))
    return parameters


class Error(NamedTuple):
    """The largest difference of a tensor from gold, and where it is."""

    largest: float
    position: tuple[int, ...]


def error(actual: Tensor, gold: Tensor) -> Error:
    """Where gold is not finite, a difference from it is an infinite error; else the absolute one counts."""
    actual, gold = actual.detach().double().cpu(), gold.detach().double().cpu()
    assert actual.shape == gold.shape, f"shape {tuple(actual.shape)} instead of {tuple(gold.shape)}"
    if gold.numel() == 0:
        return Error(0.0, ())
    same = (actual == gold) | (actual.isnan() & gold.isnan())
    difference = torch.where(same, 0.0, (actual - gold).abs()).nan_to_num(nan=math.inf)
    position = torch.unravel_index(difference.argmax(), difference.shape)
    return Error(difference.max().item(), tuple(int(index) for index in position))


def slack(actual: Tensor, gold: Tensor) -> float:
    """Two units in the last place of gold's largest finite value, in the dtype of `actual`."""
    finite = gold[gold.isfinite()]
    if finite.numel() == 0:
        return 0.0
    _, exponent = math.frexp(finite.abs().max().item())
    info = torch.finfo(actual.dtype)
    return 2 * max(info.eps * math.ldexp(1.0, exponent - 1), info.smallest_normal * info.eps)


def hold(name: str, actual: Tensor, peer: Tensor, gold: Tensor, *, crowd_error: float = 0.0) -> None:
    """Fail unless `actual` is at most twice as wrong as `peer`; the message shows both errors and where.

    Args:
        name: what the tensors are, for the message.
        actual: of the backend.
        peer: by PyTorch, from the same inputs.
        gold: by the definition in float64.
        crowd_error: the peer's largest error on more inputs of the same kind.
    """
    found, allowed = error(actual, gold), error(peer, gold)
    limit = 2 * max(allowed.largest, crowd_error) + slack(actual, gold)
    if found.largest <= limit:
        return
    at = found.position
    pytest.fail(
        f"{name} is off by {found.largest:.3e} at {at}: {actual[at].item()!r} for {gold[at].item()!r}; "
        f"PyTorch is off by {allowed.largest:.3e} at {allowed.position}, in the crowd by {crowd_error:.3e}, "
        f"so {limit:.3e} is allowed"
    )


def values_and_gradients(run: Run, leaves: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
    """What `run` returns, then the gradient of each leaf under the upstream gradients."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]  # detach keeps strides
    values = run(*leaves)
    values = [values] if isinstance(values, Tensor) else list(values)
    gradients = torch.autograd.grad(
        values[: len(upstream)], leaves, [g.to(v.device, v.dtype) for g, v in zip(upstream, values)]
    )
    return [*(value.detach() for value in values), *gradients]


class Case(NamedTuple):
    """An op's call on some leaves, by PyTorch and by the definition."""

    peer: Run
    definition: Run
    leaves: Sequence[Tensor]

    def gold_and_peer(self, seed: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Upstream gradients, and values and gradients under them in float64 and in the leaves' dtype."""
        gold_leaves = [leaf.double() for leaf in self.leaves]
        upstream = random_like(self.definition(*(leaf.requires_grad_() for leaf in gold_leaves)), seed)
        gold = values_and_gradients(self.definition, gold_leaves, upstream)
        return upstream, gold, values_and_gradients(self.peer, self.leaves, upstream)


def conform(run: Run, case: Case, *, crowd: Case | None = None, seed: int = 0) -> None:
    """Hold values and gradients of `run`, under random upstream gradients, and see that it wrote to no leaf.

    Args:
        run: the backend's call on the case's leaves, strides and all; of several tensors, those with a
            gradient come first.
        case: the same call by PyTorch's own functions, and in float64.
        crowd: PyTorch on more inputs of the same kind: its error is the largest over both.
        seed: of the upstream gradients.
    """
    before = [leaf.clone() for leaf in case.leaves]
    upstream, gold, theirs = case.gold_and_peer(seed)
    ours = values_and_gradients(run, case.leaves, upstream)
    crowd_errors = [0.0] * len(gold)
    if crowd is not None:
        _, crowd_gold, crowd_peer = crowd.gold_and_peer(seed + 1)
        crowd_errors = [error(peer, exact).largest for peer, exact in zip(crowd_peer, crowd_gold)]
    num_values = len(gold) - len(case.leaves)
    for i, tensors in enumerate(zip(ours, theirs, gold, strict=True)):
        name = f"value {i}" if i < num_values else f"gradient {i - num_values}"
        hold(name, *tensors, crowd_error=crowd_errors[i])
    for leaf, copy in zip(case.leaves, before):
        assert torch.equal(leaf.nan_to_num(), copy.nan_to_num()), "an input was written to"


def random_like(values: Tensor | Sequence[Tensor], seed: int) -> list[Tensor]:
    """Upstream gradients for the values that have one, float32, none of them 1."""
    values = [values] if isinstance(values, Tensor) else values
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(value.shape, generator=generator) for value in values if value.requires_grad]


def assert_backward_twice(run: Run, leaves: Sequence[Tensor]) -> None:
    """A retained graph gives the same gradients twice, bit for bit; the upstream gradient is not 1."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    values = run(*leaves)
    values = [value for value in ([values] if isinstance(values, Tensor) else values) if value.requires_grad]
    upstream = [3 * torch.ones_like(value) for value in values]
    first = [g.clone() for g in torch.autograd.grad(values, leaves, upstream, retain_graph=True)]
    second = torch.autograd.grad(values, leaves, upstream)
    for one, other in zip(first, second):
        assert torch.equal(one, other)


def assert_double_backward_refused(run: Run, leaves: Sequence[Tensor]) -> None:
    """A gradient penalty meets an error that speaks of the second derivative, not a zero."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    values = run(*leaves)
    value = values if isinstance(values, Tensor) else values[0]

    def penalise() -> None:
        gradients = torch.autograd.grad(value.square().sum(), leaves, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)

    with pytest.raises(RuntimeError, match="second derivative"):
        penalise()


def assert_compiles(run: Run, leaves: Sequence[Tensor]) -> None:
    """torch.compile takes it without a graph break, and values and gradients stay the same.

    aot_eager traces forward, backward and aliasing as inductor does, without seconds of C++ compiler a case.
    """
    torch._dynamo.reset()
    eager = run(*leaves)
    upstream = [torch.ones_like(value) for value in ([eager] if isinstance(eager, Tensor) else eager)]
    expected = values_and_gradients(run, leaves, upstream)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for name, actual, wanted in zip(range(99), values_and_gradients(compiled, leaves, upstream), expected):
        assert torch.allclose(actual, wanted, rtol=1e-6, atol=1e-7, equal_nan=True), name


def layouts(x_TV: Tensor) -> dict[str, Tensor]:
    """The same numbers in every memory layout that an op must read as it is."""
    T, V = x_TV.shape
    wide = torch.full((T, V + 3), math.nan, dtype=x_TV.dtype, device=x_TV.device)
    wide[:, 2 : V + 2] = x_TV
    skipping = torch.full((T, 2 * V), math.nan, dtype=x_TV.dtype, device=x_TV.device)
    skipping[:, ::2] = x_TV
    return {
        "contiguous": x_TV.contiguous(),
        "a slice of wider rows, not aligned": wide[:, 2 : V + 2],
        "every second column": skipping[:, ::2],
        "transposed": x_TV.t().contiguous().t(),
        "one row expanded": x_TV[:1].expand(T, V),
    }
