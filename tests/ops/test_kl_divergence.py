"""kl_divergence: the definition against F.kl_div, every backend against the definition, directions, refusals.

Letters: T rows, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import conformance as c
from ops.rows import DTYPES, OPTIONS
from torch import Tensor
from torch.nn.functional import kl_div

from alignfast.kernels import kl_divergence
from alignfast.kernels._backend import resolve
from alignfast.kernels.kl_divergence import DIVERGENCE, KINDS, KlOptions, kl_options, row_divergence

on_every_backend = pytest.mark.parametrize(
    ("backend", "device"), c.backends_for("kl_divergence", every_isa=True)
)
of_every_kind = pytest.mark.parametrize("kind", KINDS)


def inputs(T: int, V: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of a trained model's spread, and a reference half a nat away."""
    generator = torch.Generator().manual_seed(seed)
    logits_TV = 3 * torch.randn(T, V, generator=generator)
    ref_TV = logits_TV + 0.5 * torch.randn(T, V, generator=generator)
    return logits_TV.to(dtype), ref_TV.to(dtype)


def run(logits_TV: Tensor, ref_TV: Tensor, options: KlOptions, backend: str) -> Tensor:
    implementation = resolve("kl_divergence", logits_TV.device, logits_TV.dtype, backend)
    return row_divergence(logits_TV, ref_TV, options, implementation)[DIVERGENCE]


def textbook(logits_TV: Tensor, ref_TV: Tensor, options: KlOptions) -> Tensor:
    """As TRL's generalised JSD has it: beta 0, 1 and 0.5."""

    def logps(z_TV: Tensor) -> Tensor:
        x_TV = (z_TV if z_TV.dtype == torch.float64 else z_TV.float()) * options.scale
        if options.softcap:
            x_TV = options.softcap * (x_TV / options.softcap).tanh()
        return (x_TV / options.temperature).log_softmax(1)

    student_TV, teacher_TV = logps(logits_TV), logps(ref_TV)
    pairs = {"forward": [(student_TV, teacher_TV)], "reverse": [(teacher_TV, student_TV)]}
    mixture_TV = torch.logsumexp(torch.stack((student_TV, teacher_TV)) + math.log(0.5), 0)
    pairs["js"] = [(mixture_TV, teacher_TV), (mixture_TV, student_TV)]
    chosen = pairs[KINDS[options.kind]]
    return sum(kl_div(*pair, reduction="none", log_target=True).sum(1) for pair in chosen) / len(chosen)


def conform(
    backend: str,
    device: str,
    both: tuple[Tensor, Tensor],
    options: KlOptions,
    *,
    seen: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Hold a backend on `seen`, the first rows of both in some layout; all of them are the crowd."""
    logits_TV, ref_TV = (x.to(device) for x in both)
    seen_TV, seen_ref_TV = (x.to(device) for x in seen or both)

    def case(x_TV: Tensor, y_TV: Tensor) -> c.Case:
        peer = lambda x: textbook(x, y_TV.to(x.dtype), options)  # noqa: E731
        return c.Case(peer, lambda x: run(x, y_TV.to(x.dtype), options, "torch"), [x_TV])

    ours = lambda x: run(x, seen_ref_TV, options, backend)  # noqa: E731
    c.conform(ours, case(seen_TV, seen_ref_TV), crowd=case(logits_TV, ref_TV))


# --- the definition ---


@of_every_kind
@pytest.mark.parametrize("option", OPTIONS)
def test_definition_is_the_textbook(option: tuple, kind: str) -> None:
    logits_TV, ref_TV = inputs(7, 37, torch.float64)
    options = kl_options(kind, *option)
    leaf_TV = logits_TV.requires_grad_()
    ours_T, theirs_T = run(leaf_TV, ref_TV, options, "torch"), textbook(leaf_TV, ref_TV, options)
    upstream_T = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (our_gradient_TV,) = torch.autograd.grad(ours_T, leaf_TV, upstream_T)
    (their_gradient_TV,) = torch.autograd.grad(theirs_T, leaf_TV, upstream_T)
    assert (ours_T - theirs_T).abs().max() <= 1e-14
    assert (our_gradient_TV - their_gradient_TV).abs().max() <= 1e-14


@of_every_kind
def test_gradcheck(kind: str) -> None:
    logits_TV, ref_TV = inputs(4, 6, torch.float64)
    options = kl_options(kind, *OPTIONS[1])
    assert torch.autograd.gradcheck(lambda x: run(x, ref_TV, options, "torch"), (logits_TV.requires_grad_(),))


@on_every_backend
def test_directions_by_hand(backend: str, device: str) -> None:
    """A policy of (1/2, 1/2), a reference of (3/4, 1/4)."""
    policy_TV, ref_TV = torch.zeros(1, 2, device=device), torch.tensor([[3.0, 1.0]], device=device).log()
    expected = {
        "forward": 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5),
        "reverse": 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25),
        "js": (
            0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375)
            + 0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375)
        ) / 2,
    }  # fmt: skip
    for kind, value in expected.items():
        assert kl_divergence(policy_TV, ref_TV, kind=kind, backend=backend).item() == pytest.approx(value)
    assert kl_divergence(policy_TV, ref_TV, backend=backend).item() == pytest.approx(expected["forward"])


# --- every backend against the definition ---


# V: 37 below one block and one vector loop's tail, 512 exact, 5003 several blocks with a ragged tail (prime).
# T: 1, and 33, more rows than threads with a ragged last share. Options rotate: each meets each dtype.
@of_every_kind
@pytest.mark.parametrize(("T", "V", "rotation"), [(1, 37, 0), (33, 512, 1), (33, 5003, 2)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_backend
def test_holds(
    backend: str, device: str, dtype: torch.dtype, T: int, V: int, rotation: int, kind: str
) -> None:
    rows = min(T, 2) if backend in c.INTERPRETED else T  # the interpreter takes 10 ms a block
    both = inputs(33, V, dtype)
    option = OPTIONS[(rotation + DTYPES.index(dtype)) % len(OPTIONS)]
    conform(backend, device, both, kl_options(kind, *option), seen=tuple(x[:rows] for x in both))


@of_every_kind
@pytest.mark.parametrize("layout", c.layouts(torch.zeros(2, 2)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on_every_backend
def test_strides(backend: str, device: str, dtype: torch.dtype, layout: str, kind: str) -> None:
    """The reference in another layout than the policy."""
    both = inputs(33, 83, dtype)
    other = "transposed" if layout == "contiguous" else "contiguous"
    seen = (c.layouts(both[0][:3])[layout], c.layouts(both[1][:3])[other])
    conform(backend, device, both, kl_options(kind, *OPTIONS[0]), seen=seen)
    conform(backend, device, both[::-1], kl_options(kind, *OPTIONS[0]), seen=seen[::-1])


@of_every_kind
@on_every_backend
def test_large_logits(backend: str, device: str, kind: str) -> None:
    """1e4 apart, where exp of anything but a difference overflows."""
    logits_TV, ref_TV = inputs(9, 83)
    conform(backend, device, (3e3 * logits_TV, 3e3 * ref_TV), kl_options(kind, *OPTIONS[0]))


@of_every_kind
@on_every_backend
def test_far_from_zero(backend: str, device: str, kind: str) -> None:
    """A constant on every logit costs no digit: 64 and quarters, so that the sums are exact."""
    both = tuple((4 * x).round() / 4 for x in inputs(33, 83))
    for shifts in ((64, 0), (0, -64)):
        conform(backend, device, tuple(x + y for x, y in zip(both, shifts)), kl_options(kind, *OPTIONS[0]))


@of_every_kind
@on_every_backend
def test_out_may_be_the_logits(backend: str, device: str, kind: str) -> None:
    """linear_kl_divergence overwrites its tile of logits with their gradient."""
    logits_TV, ref_TV = (x.to(device) for x in inputs(5, 300))
    options = kl_options(kind, *OPTIONS[1])
    implementation = resolve("kl_divergence", torch.device(device), torch.float32, backend)
    stats_KT = implementation.forward(logits_TV, ref_TV, options)
    dkl_T = torch.randn(5, generator=torch.Generator().manual_seed(0)).to(device)
    apart_TV = torch.full_like(logits_TV, math.nan)
    implementation.backward(logits_TV, ref_TV, stats_KT, dkl_T, options, apart_TV)
    implementation.backward(logits_TV, ref_TV, stats_KT, dkl_T, options, logits_TV)
    assert torch.equal(logits_TV, apart_TV)
    assert apart_TV.any(1).all()


# --- the edges ---


@of_every_kind
@on_every_backend
def test_equal_rows(backend: str, device: str, kind: str) -> None:
    """No divergence and no gradient, to the bit where the arithmetic is the same for both."""
    logits_TV = inputs(5, 700)[0].to(device).requires_grad_()
    kl_T = kl_divergence(logits_TV, logits_TV.detach().clone(), kind=kind, backend=backend)
    (gradient_TV,) = torch.autograd.grad(kl_T.sum(), logits_TV)
    limit = 1e-7 if kind == "js" else 0.0  # log 2 - log1p(1) is a rounding away from 0
    assert kl_T.abs().max() <= limit
    assert gradient_TV.abs().max() <= limit


@of_every_kind
@on_every_backend
def test_a_masked_vocabulary(backend: str, device: str, kind: str) -> None:
    """Classes at -inf in both rows count for nothing: values and gradients are those of the other classes."""
    both = inputs(33, 700)
    kept_V = torch.rand(700, generator=torch.Generator().manual_seed(2)) < 0.5
    options = kl_options(kind, *OPTIONS[0])
    few = [x[:, kept_V].to(device) for x in both]

    def masked(x_TV: Tensor) -> Tensor:
        whole_TV = x_TV.new_full((len(x_TV), 700), -math.inf)
        whole_TV[:, kept_V.to(device)] = x_TV
        return whole_TV

    ours = lambda x_TV: run(masked(x_TV), masked(few[1][:5]), options, backend)  # noqa: E731
    cases = [
        c.Case(
            lambda x_TV, rows=rows: textbook(x_TV, few[1][:rows].to(x_TV.dtype), options),
            lambda x_TV, rows=rows: run(x_TV, few[1][:rows].to(x_TV.dtype), options, "torch"),
            [few[0][:rows]],
        )
        for rows in (5, 33)
    ]
    c.conform(ours, cases[0], crowd=cases[1])
    leaf_TV = masked(few[0]).requires_grad_()
    (gradient_TV,) = torch.autograd.grad(run(leaf_TV, masked(few[1]), options, backend).sum(), leaf_TV)
    assert not gradient_TV[:, ~kept_V.to(device)].any()


# Which is ruled out (a class of no small or of next to no probability in the other), and what is inf then.
@pytest.mark.parametrize("ruled_out_by", ["policy", "reference"])
@pytest.mark.parametrize("other", [1.0, -200.0])
@on_every_backend
def test_a_class_ruled_out_by_one(backend: str, device: str, other: float, ruled_out_by: str) -> None:
    plain_V, ruled_V = torch.zeros(700), torch.zeros(700)
    plain_V[650], ruled_V[650] = other, -math.inf
    rows = [ruled_V, plain_V] if ruled_out_by == "policy" else [plain_V, ruled_V]
    logits_TV, ref_TV = (row_V.to(device)[None] for row_V in rows)
    p_V, q_V = (row_V.double().softmax(0) for row_V in rows)
    infinite = {"policy": "forward", "reference": "reverse"}[ruled_out_by]
    for kind in KINDS:
        leaf_TV = logits_TV.clone().requires_grad_()
        kl_T = kl_divergence(leaf_TV, ref_TV, kind=kind, backend=backend)
        (gradient_TV,) = torch.autograd.grad(kl_T.sum(), leaf_TV)
        gold_TV = logits_TV.double().requires_grad_()
        gold_T = kl_divergence(gold_TV, ref_TV.double(), kind=kind, backend="torch")
        (gold_gradient_TV,) = torch.autograd.grad(gold_T.sum(), gold_TV)
        assert kl_T.isinf().item() == (kind == infinite) == gold_T.isinf().item()
        if kind == infinite == "reverse":
            assert gradient_TV.isnan().all()
            assert gold_gradient_TV.isnan().all()
            continue
        assert torch.allclose(gradient_TV.double(), gold_gradient_TV, rtol=1e-5, atol=1e-8)
        # in float32 it is a difference of two logs of 700, each to a unit in the last place
        assert torch.allclose(kl_T.double(), gold_T, rtol=1e-5, atol=1e-6)
        if kind == infinite:
            assert torch.allclose(gradient_TV.cpu()[0].double(), p_V - q_V, rtol=1e-5, atol=1e-8)


@on_every_backend
def test_strangers_are_log_2_apart(backend: str, device: str) -> None:
    logits_TV = torch.full((1, 700), -math.inf)
    ref_TV = logits_TV.clone()
    logits_TV[0, :300], ref_TV[0, 300:] = 0.0, 0.0
    kl_T = kl_divergence(logits_TV.to(device), ref_TV.to(device), kind="js", backend=backend)
    assert kl_T.item() == pytest.approx(math.log(2), rel=1e-6)


@of_every_kind
@pytest.mark.parametrize("side", [0, 1])
@on_every_backend
def test_rows_without_a_distribution(backend: str, device: str, side: int, kind: str) -> None:
    """NaN, inf or nothing but -inf gives NaN in its row, value and gradient; a row without upstream gradient is zeros."""
    both = inputs(6, 700)
    clean = [x.clone() for x in both]
    both[side][0, 650], both[side][2, 5], both[side][3], both[side][5] = (
        math.nan,
        math.inf,
        -math.inf,
        math.nan,
    )
    upstream_T = torch.tensor([1.0, 2, 3, 4, 5, 0], device=device)

    def values(logits_TV: Tensor, ref_TV: Tensor) -> tuple[Tensor, Tensor]:
        leaf_TV = logits_TV.to(device).requires_grad_()
        kl_T = kl_divergence(leaf_TV, ref_TV.to(device), kind=kind, backend=backend)
        return kl_T.detach(), torch.autograd.grad(kl_T, leaf_TV, upstream_T)[0]

    kl_T, gradient_TV = values(*both)
    clean_kl_T, clean_gradient_TV = values(*clean)
    assert kl_T.isnan().tolist() == [True, False, True, True, False, True]
    assert gradient_TV[[0, 2, 3]].isnan().all()
    assert not gradient_TV[5].any()
    assert torch.equal(kl_T[[1, 4]], clean_kl_T[[1, 4]])
    assert torch.equal(gradient_TV[[1, 4]], clean_gradient_TV[[1, 4]])


@pytest.mark.parametrize(("T", "V"), [(0, 5), (3, 1)])
@on_every_backend
def test_nothing_to_diverge(backend: str, device: str, T: int, V: int) -> None:
    logits_TV, ref_TV = (x.to(device) for x in inputs(T, V))
    leaf_TV = logits_TV.requires_grad_()
    kl_T = kl_divergence(leaf_TV, ref_TV, backend=backend)
    (gradient_TV,) = torch.autograd.grad(kl_T.sum(), leaf_TV)
    assert kl_T.shape == (T,)
    assert not kl_T.any()
    assert not gradient_TV.any()


# --- autograd, tracing, refusals ---


@of_every_kind
@on_every_backend
def test_backward_twice_and_no_second_derivative(backend: str, device: str, kind: str) -> None:
    logits_TV, ref_TV = (x.to(device) for x in inputs(4, 83))
    call = lambda x_TV: kl_divergence(x_TV, ref_TV, kind=kind, backend=backend)  # noqa: E731
    c.assert_backward_twice(call, [logits_TV])
    c.assert_double_backward_refused(call, [logits_TV])


@on_every_backend
def test_no_gradient_is_computed_for_nobody(backend: str, device: str) -> None:
    logits_TV, ref_TV = (x.to(device) for x in inputs(4, 83))
    assert not kl_divergence(logits_TV, ref_TV, backend=backend).requires_grad
    with torch.no_grad():
        assert not kl_divergence(logits_TV, ref_TV.requires_grad_(), backend=backend).requires_grad


@pytest.mark.parametrize(("backend", "device"), c.backends_for("kl_divergence", only=c.FAST))
def test_compiles(backend: str, device: str) -> None:
    logits_TV, ref_TV = (x.to(device) for x in inputs(4, 83))
    c.assert_compiles(lambda x_TV: kl_divergence(x_TV, ref_TV, kind="js", backend=backend), [logits_TV])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "device"), c.backends_for("kl_divergence", only=("native",)))
def test_native_ops_are_registered_right(backend: str, device: str, dtype: torch.dtype) -> None:
    both = tuple(x.to(device) for x in inputs(4, 83, dtype))
    options = kl_options("js", *OPTIONS[1])
    stats_KT = torch.ops.alignfast.kl_divergence_forward(*both, *options)
    torch.library.opcheck(torch.ops.alignfast.kl_divergence_forward, (*both, *options))
    torch.library.opcheck(
        torch.ops.alignfast.kl_divergence_backward,
        (*both, stats_KT, torch.ones_like(stats_KT[0]), *options, torch.empty_like(both[0])),
    )


@pytest.mark.parametrize(("backend", "device"), c.backends_for("kl_divergence", only=("native",)))
def test_threads_change_nothing(backend: str, device: str) -> None:
    logits_TV, ref_TV = (x.to(device) for x in inputs(20, 30000))  # past half a million numbers
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(kl_divergence(logits_TV, ref_TV, kind="js", backend=backend))
    torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "jsd"}, "kind='jsd' is not one of forward, reverse, js"),
        ({"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        ({"ref_logits_TV": torch.zeros(3, 5)}, r"alike, V >= 1, got \(4, 5\) and \(3, 5\)"),
        (
            {"ref_logits_TV": torch.zeros(4, 5).bfloat16()},
            "of one type, got torch.float32 and torch.bfloat16",
        ),
        (
            {"ref_logits_TV": torch.zeros(4, 5, requires_grad=True)},
            "ref_logits_TV requires a gradient.*detach",
        ),
        ({"backend": "cuda"}, "backend='cuda' is not one of"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    arguments = {"logits_TV": torch.zeros(4, 5), "ref_logits_TV": torch.zeros(4, 5)} | change
    with pytest.raises(ValueError, match=message):
        kl_divergence(arguments.pop("logits_TV"), arguments.pop("ref_logits_TV"), **arguments)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_compiled_backends_refuse_float64(backend: str) -> None:
    both = inputs(2, 5, torch.float64)
    with pytest.raises(RuntimeError, match=f"kl_divergence can't run with backend='{backend}'.*float64"):
        kl_divergence(*both, backend=backend)
    assert kl_divergence(*both).dtype == torch.float64


# --- properties ---


def hold_any_input(backend: str, device: str, data: st.DataObject, widest: int) -> None:
    """Any small shape, type, spread, distance and options."""
    rows, V = data.draw(st.integers(1, 5), "T"), data.draw(st.integers(1, widest), "V")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    logits_TV, ref_TV = inputs(33, V, dtype, seed=data.draw(st.integers(0, 2**20), "seed"))
    logits_TV *= data.draw(st.sampled_from([0.1, 1.0, 10.0]), "spread")
    if data.draw(st.booleans(), "near"):
        ref_TV = logits_TV + 0.01 * ref_TV
    both = (logits_TV, ref_TV.to(dtype))
    options = kl_options(
        data.draw(st.sampled_from(KINDS), "kind"),
        data.draw(st.sampled_from([0.5, 1.0, -2.0]), "scale"),
        data.draw(st.sampled_from([None, 5.0]), "softcap"),
        data.draw(st.floats(0.3, 3), "temperature"),
    )
    conform(backend, device, both, options, seen=tuple(x[:rows] for x in both))


@pytest.mark.parametrize(("backend", "device"), c.backends_for("kl_divergence", only=c.COMPILED))
@given(data=st.data())
def test_any_input(backend: str, device: str, data: st.DataObject) -> None:
    hold_any_input(backend, device, data, widest=1200)


@pytest.mark.parametrize(("backend", "device"), c.backends_for("kl_divergence", only=c.INTERPRETED))
@settings(max_examples=20)
@given(data=st.data())
def test_any_input_interpreted(backend: str, device: str, data: st.DataObject) -> None:
    hold_any_input(backend, device, data, widest=40)
