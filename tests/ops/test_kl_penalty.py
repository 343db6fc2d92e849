"""kl_penalty: the estimators by hand and by what they estimate, every backend against the definition; refusals.

Letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import conformance as c
from torch import Tensor

from alignfast.kernels import kl_penalty
from alignfast.kernels.kl_penalty import KINDS

on_every_backend = pytest.mark.parametrize(
    ("backend", "device"), c.backends_for("kl_penalty", every_isa=True)
)
every_kind = pytest.mark.parametrize("kind", KINDS)
# as one writes them
TEXTBOOK: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda d: -d,
    "abs": torch.abs,
    "k2": lambda d: 0.5 * d**2,
    "k3": lambda d: torch.expm1(d) - d,
}


class Tokens:
    """Log-probs of T tokens by a policy and its reference, `spread` nats apart."""

    def __init__(self, *shape: int, spread: float = 1.0, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logps = -3 * torch.rand(shape, generator=generator)
        self.refs = self.logps + spread * torch.randn(shape, generator=generator)

    def run(self, logps: Tensor, kind: str, backend: str) -> Tensor:
        return kl_penalty(logps, self.refs.to(logps.device), kind=kind, backend=backend)

    def case(self, device: str, kind: str) -> c.Case:
        def peer(logps: Tensor) -> Tensor:
            return TEXTBOOK[kind](self.refs.to(logps.device, logps.dtype) - logps)

        return c.Case(peer, lambda logps: self.run(logps, kind, "torch"), [self.logps.to(device)])


# --- the definition ---


@pytest.mark.parametrize(
    ("kind", "of_up", "of_down"),
    [("k1", -0.5, 2.0), ("abs", 0.5, 2.0), ("k2", 0.125, 2.0), ("k3", 0.1487212707, 1.1353352832)],
)
def test_by_hand(kind: str, of_up: float, of_down: float) -> None:
    """The reference half a nat above the policy, and two below."""
    logps_T = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    refs_T = torch.tensor([-0.5, -3.0], dtype=torch.float64)
    assert kl_penalty(logps_T, refs_T, kind=kind).tolist() == pytest.approx([of_up, of_down], rel=1e-9)


def test_what_they_estimate_and_what_a_loss_of_them_follows() -> None:
    """Expected over the policy's own tokens, exactly: values, and gradients by the logits."""
    generator = torch.Generator().manual_seed(0)
    logits_V, ref_V = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    logits_V.requires_grad_()
    logps_V, ref_V = logits_V.log_softmax(0), ref_V.log_softmax(0)
    p_V = logps_V.exp()
    reverse = (p_V * (logps_V - ref_V)).sum()
    forward = (ref_V.exp() * (ref_V - logps_V)).sum()
    slopes = [torch.autograd.grad(kl, logits_V, retain_graph=True)[0] for kl in (reverse, forward)]
    mean = {kind: (p_V.detach() * kl_penalty(logps_V, ref_V, kind=kind)).sum() for kind in KINDS}
    follows = {kind: torch.autograd.grad(mean[kind], logits_V, retain_graph=True)[0] for kind in KINDS}
    for kind in ("k1", "k3"):
        assert mean[kind].item() == pytest.approx(reverse.item(), rel=1e-12)
    assert torch.allclose(follows["k1"], torch.zeros(50, dtype=torch.float64), atol=1e-15)
    assert torch.allclose(follows["k2"], slopes[0], atol=1e-14)
    assert torch.allclose(follows["k3"], slopes[1], atol=1e-14)


@every_kind
def test_gradcheck(kind: str) -> None:
    tokens = Tokens(2, 9)
    logps = tokens.logps.double().requires_grad_()
    run = lambda x: kl_penalty(x, tokens.refs.double(), kind=kind)  # noqa: E731
    assert torch.autograd.gradcheck(run, logps)
    assert torch.autograd.gradgradcheck(run, logps)


def exact_k3(d: float) -> float:
    with localcontext() as context:
        context.prec = 60
        return float(Decimal(d).exp() - 1 - Decimal(d))


@on_every_backend
def test_k3_keeps_its_digits_near_0(backend: str, device: str) -> None:
    """From 1e-18 to 60 nats, in units of the last place; the plain difference has no digit left below 1e-7."""
    size_T = torch.logspace(-18, math.log10(60), 500)
    d_T = torch.cat((size_T, -size_T)).to(device)
    leaf_T = torch.zeros_like(d_T, requires_grad=True)
    k3_T = kl_penalty(leaf_T, d_T, kind="k3", backend=backend)
    (slope_T,) = torch.autograd.grad(k3_T.sum(), leaf_T)
    gold_T = torch.tensor([exact_k3(d) for d in d_T.tolist()], dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    allowed = 2 if device == "cpu" else 32  # a GPU's exp rounds its argument, up to 60 of its units
    assert ((k3_T.cpu() - gold_T) / gold_T).abs().max() < allowed * eps
    slope_gold_T = -d_T.double().cpu().expm1()
    assert ((slope_T.cpu() - slope_gold_T) / slope_gold_T).abs().max() < allowed * eps
    assert (k3_T >= 0).all()
    exact_T = kl_penalty(torch.zeros_like(gold_T), d_T.cpu().double(), kind="k3")
    assert ((exact_T - gold_T) / gold_T).abs().max() < 3e-11


# --- every backend ---


# T: one; below, at and past a vector of 16; past a block of 1,024
@pytest.mark.parametrize("shape", [(1,), (15,), (16,), (3, 11), (1500,)])
@every_kind
@on_every_backend
def test_holds(backend: str, device: str, kind: str, shape: tuple[int, ...]) -> None:
    tokens, crowd = Tokens(*shape), Tokens(2000, seed=1)
    run = lambda logps: tokens.run(logps, kind, backend)  # noqa: E731
    c.conform(run, tokens.case(device, kind), crowd=crowd.case(device, kind))


@every_kind
@on_every_backend
def test_infinite_and_nan_tokens(backend: str, device: str, kind: str) -> None:
    """Each as the definition has it, and the tokens beside them as they were."""
    tokens = Tokens(12)
    tokens.refs[3:6] = torch.tensor([-1e4, 1e4, math.nan])
    tokens.refs[7], tokens.logps[8] = -math.inf, -math.inf
    leaf, gold_leaf = tokens.logps.to(device).requires_grad_(), tokens.logps.double().requires_grad_()
    ours = tokens.run(leaf, kind, backend)
    gold = kl_penalty(gold_leaf, tokens.refs.double(), kind=kind)
    (gradient,) = torch.autograd.grad(ours.sum(), leaf)
    (gold_gradient,) = torch.autograd.grad(gold.sum(), gold_leaf)
    for actual, expected in ((ours, gold), (gradient, gold_gradient)):
        assert torch.equal(actual.isnan().cpu(), expected.isnan())
        c.hold(kind, actual, expected.float(), expected)
    assert ours.isnan().nonzero().tolist() in ([[5]], [[5], [8]])  # k3 of +inf is inf - inf


@on_every_backend
def test_types_and_strides(backend: str, device: str) -> None:
    logps, refs = Tokens(6, 20).logps.bfloat16().to(device), Tokens(6, 20, seed=1).refs.to(device)
    expected = kl_penalty(logps.float(), refs, kind="k3", backend=backend)
    leaf = logps.T.contiguous().T.requires_grad_()
    actual = kl_penalty(leaf, refs.double(), kind="k3", backend=backend)
    assert torch.equal(actual, expected)
    (gradient,) = torch.autograd.grad(actual.sum(), leaf)
    assert gradient.dtype == torch.bfloat16
    assert kl_penalty(logps[:, ::2], refs[:, ::2], backend=backend).shape == (6, 10)


@on_every_backend
def test_nothing(backend: str, device: str) -> None:
    empty = torch.zeros(0, 3, device=device, requires_grad=True)
    out = kl_penalty(empty, empty.detach(), kind="k3", backend=backend)
    (gradient,) = torch.autograd.grad(out.sum(), empty)
    assert out.shape == gradient.shape == (0, 3)


# --- autograd, tracing ---


@on_every_backend
def test_backward_twice(backend: str, device: str) -> None:
    tokens = Tokens(30)
    c.assert_backward_twice(lambda x: tokens.run(x, "k3", backend), [tokens.logps.to(device)])


@pytest.mark.parametrize(("backend", "device"), c.backends_for("kl_penalty", only=("native", "triton")))
def test_compiled_code_has_no_second_derivative(backend: str, device: str) -> None:
    tokens = Tokens(30)
    c.assert_double_backward_refused(lambda x: tokens.run(x, "k3", backend), [tokens.logps.to(device)])


@every_kind
@on_every_backend
def test_inside_torch_func(backend: str, device: str, kind: str) -> None:
    tokens = Tokens(30)
    logps = tokens.logps.to(device)
    gradient, value = torch.func.grad_and_value(lambda x: tokens.run(x, kind, backend).sum())(logps)
    leaf = logps.clone().requires_grad_()
    expected = tokens.run(leaf, kind, backend).sum()
    assert torch.equal(value, expected)
    assert torch.equal(gradient, torch.autograd.grad(expected, leaf)[0])


@every_kind
@pytest.mark.parametrize(("backend", "device"), c.backends_for("kl_penalty", only=c.FAST))
def test_compiles(backend: str, device: str, kind: str) -> None:
    tokens = Tokens(5, 9)
    c.assert_compiles(lambda x: tokens.run(x, kind, backend), [tokens.logps.to(device)])


@pytest.mark.parametrize("slope", [False, True])
@pytest.mark.parametrize(("backend", "device"), c.backends_for("kl_penalty", only=("native",)))
def test_native_op_is_registered_right(backend: str, device: str, slope: bool) -> None:
    tokens = Tokens(3, 11)
    inputs = (tokens.logps.to(device), tokens.refs.to(device), KINDS.index("k3"), slope)
    torch.library.opcheck(torch.ops.alignfast.kl_penalty, inputs)


@pytest.mark.parametrize(("backend", "device"), c.backends_for("kl_penalty", only=("native",)))
def test_threads_change_nothing(backend: str, device: str) -> None:
    tokens = Tokens(600_001)  # past half a million numbers, where threads begin
    before, results = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(tokens.run(tokens.logps.to(device), "k3", backend))
    torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "k4"}, "kind='k4' is not one of k1, abs, k2, k3"),
        ({"ref_logps": torch.zeros(3)}, r"alike, got \(2,\) on cpu and \(3,\) on cpu"),
        ({"ref_logps": torch.zeros(2, requires_grad=True)}, "constants, but they require a gradient; detach"),
        ({"logps": torch.zeros(2, dtype=torch.int64)}, "floating-point log-probs, got torch.int64"),
        ({"backend": "cuda"}, "backend='cuda' is not one of"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"logps": torch.zeros(2), "ref_logps": torch.zeros(2)}
    with pytest.raises(ValueError, match=message):
        kl_penalty(**arguments | change)


def hold_any_tokens(backend: str, device: str, data: st.DataObject) -> None:
    T, kind = data.draw(st.integers(0, 60), "T"), data.draw(st.sampled_from(KINDS), "kind")
    spread = data.draw(st.sampled_from([1e-6, 0.01, 1.0, 10.0]), "spread")
    seed = data.draw(st.integers(0, 2**20), "seed")
    tokens, crowd = Tokens(T, spread=spread, seed=seed), Tokens(500, spread=spread, seed=seed + 1)
    run = lambda logps: tokens.run(logps, kind, backend)  # noqa: E731
    c.conform(run, tokens.case(device, kind), crowd=crowd.case(device, kind))


@pytest.mark.parametrize(("backend", "device"), c.backends_for("kl_penalty", only=c.FAST))
@given(data=st.data())
def test_any_tokens(backend: str, device: str, data: st.DataObject) -> None:
    hold_any_tokens(backend, device, data)


@pytest.mark.parametrize(("backend", "device"), c.backends_for("kl_penalty", only=c.INTERPRETED))
@settings(max_examples=40)
@given(data=st.data())
def test_any_tokens_interpreted(backend: str, device: str, data: st.DataObject) -> None:
    hold_any_tokens(backend, device, data)
