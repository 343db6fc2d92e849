"""token_logps: the definition against the textbook, every backend against the definition; refusals.

Letters: T rows, V vocabulary, K the six statistics.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import conformance as c
from ops.rows import (
    DTYPES,
    OPTIONS,
    conform,
    inputs,
    on_every_backend,
    options_of,
    statistics,
    textbook,
)

from alignfast.kernels import token_logps
from alignfast.kernels._backend import resolve
from alignfast.kernels.token_logps import IS_TOP1, STATS, _Torch, row_options, row_stats

# --- the definition ---


@pytest.mark.parametrize("option", OPTIONS)
def test_definition_is_the_textbook(option: tuple) -> None:
    logits_TV, targets_T = inputs(7, 37, torch.float64)
    options = options_of(*option)
    leaf_TV = logits_TV.requires_grad_()
    ours, theirs = (
        statistics(row_stats(leaf_TV, targets_T, options, "torch")),
        textbook(leaf_TV, targets_T, options),
    )
    upstream = [g.double() for g in c.random_like(theirs, seed=1)]
    (our_gradient,) = torch.autograd.grad(ours, leaf_TV, upstream)
    (their_gradient,) = torch.autograd.grad(theirs, leaf_TV, upstream)
    for mine, theirs_T in zip([*ours, our_gradient], [*theirs, their_gradient]):
        assert (mine - theirs_T).abs().max() <= 1e-13 * theirs_T.abs().max().clamp(min=1)


@pytest.mark.parametrize("option", OPTIONS)
def test_gradcheck(option: tuple) -> None:
    logits_TV, targets_T = inputs(4, 6, torch.float64)
    options = options_of(*option)
    run = lambda x_TV: statistics(row_stats(x_TV, targets_T, options, "torch"))  # noqa: E731
    assert torch.autograd.gradcheck(run, (logits_TV.requires_grad_(),))


@pytest.mark.parametrize("wanted", [("logps",), ("entropy",), ("mean_logit", "sum_sq_probs")])
def test_backward_is_autograd_of_the_definition(wanted: tuple[str, ...]) -> None:
    """Also where only some statistics are wanted: the others are 0 and have no gradient."""
    logits_TV, targets_T = inputs(5, 11, torch.float64)
    options = row_options(0.5, 4.0, 0.7, -100, wanted)
    leaf_TV = logits_TV.requires_grad_()
    stats_KT = _Torch.forward(leaf_TV, targets_T, options)
    dstats_KT = torch.randn(stats_KT.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dstats_KT[IS_TOP1] = 0
    (by_autograd,) = torch.autograd.grad(stats_KT, leaf_TV, dstats_KT)
    by_hand = torch.empty_like(logits_TV)
    _Torch.backward(logits_TV.detach(), targets_T, stats_KT.detach(), dstats_KT, options, by_hand)
    assert (by_hand - by_autograd).abs().max() <= 1e-14
    for k, name in enumerate(STATS):
        assert bool(stats_KT[k].any()) == (name in (*wanted, "logps", "lse"))


def test_values_by_hand() -> None:
    logps_T, entropy_T = token_logps(
        torch.tensor([[0.0, 0.0, -math.inf], [math.log(3.0), 0.0, -math.inf]]),
        torch.tensor([1, 0]), entropy=True, backend="torch",
    )  # fmt: skip
    assert logps_T.tolist() == pytest.approx([-math.log(2), math.log(0.75)])
    assert entropy_T.tolist() == pytest.approx([math.log(2), math.log(4) - 0.75 * math.log(3)])


# --- every backend against the definition ---


# V: 37 below one block and one vector loop's tail, 512 exact, 5003 several blocks with a ragged tail (prime).
# T: 1, and 33, more rows than threads with a ragged last share. Options rotate: each meets each dtype.
@pytest.mark.parametrize(("T", "V", "rotation"), [(1, 37, 0), (33, 512, 1), (33, 5003, 2)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_backend
def test_holds(backend: str, device: str, dtype: torch.dtype, T: int, V: int, rotation: int) -> None:
    rows = min(T, 3) if backend in c.INTERPRETED else T  # the interpreter takes 10 ms a block
    logits_TV, targets_T = inputs(max(T, 33), V, dtype)
    option = OPTIONS[(rotation + DTYPES.index(dtype)) % len(OPTIONS)]
    conform(backend, device, logits_TV, targets_T, options_of(*option), seen_TV=logits_TV[:rows])


@pytest.mark.parametrize("layout", c.layouts(torch.zeros(2, 2)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on_every_backend
def test_strides(backend: str, device: str, dtype: torch.dtype, layout: str) -> None:
    logits_TV, targets_T = inputs(33, 83, dtype, ignored=0)
    conform(backend, device, logits_TV, targets_T, options_of(), seen_TV=c.layouts(logits_TV[:4])[layout])


@on_every_backend
def test_strided_targets(backend: str, device: str) -> None:
    logits_TV, targets_T = inputs(6, 37, ignored=0.3)
    spread_T = torch.stack((targets_T, torch.full_like(targets_T, 36)), 1).to(device)[:, 0]
    strided = token_logps(logits_TV.to(device), spread_T, backend=backend)
    assert torch.equal(strided, token_logps(logits_TV.to(device), targets_T.to(device), backend=backend))


@pytest.mark.parametrize(("T", "ignored"), [(0, 0.0), (1, 1.0), (5, 1.0)])
@on_every_backend
def test_nothing_to_do(backend: str, device: str, T: int, ignored: float) -> None:
    logits_TV, targets_T = inputs(T, 37, ignored=ignored)
    leaf_TV = logits_TV.to(device).requires_grad_()
    logps_T, entropy_T = token_logps(leaf_TV, targets_T.to(device), entropy=True, backend=backend)
    (gradient_TV,) = torch.autograd.grad((logps_T + entropy_T).sum(), leaf_TV)
    assert logps_T.shape == entropy_T.shape == (T,)
    assert not logps_T.any()
    assert not entropy_T.any()
    assert not gradient_TV.any()


@on_every_backend
def test_one_word(backend: str, device: str) -> None:
    """A vocabulary of one: log-prob and entropy are 0, and so is every gradient but lse's and the mean's."""
    conform(backend, device, torch.tensor([[2.5], [-7.0]]), torch.tensor([0, 0]), options_of())


@on_every_backend
def test_out_may_be_the_logits(backend: str, device: str) -> None:
    """linear_loss overwrites its tile of logits with their gradient."""
    logits_TV, targets_T = (x.to(device) for x in inputs(5, 300))
    options, implementation = (
        options_of(*OPTIONS[1]),
        resolve("token_logps", torch.device(device), torch.float32, backend),
    )
    stats_KT = implementation.forward(logits_TV, targets_T, options)
    dstats_KT = torch.randn(stats_KT.shape, generator=torch.Generator().manual_seed(0)).to(device)
    apart_TV = torch.full_like(logits_TV, math.nan)
    implementation.backward(logits_TV, targets_T, stats_KT, dstats_KT, options, apart_TV)
    implementation.backward(logits_TV, targets_T, stats_KT, dstats_KT, options, logits_TV)
    assert torch.equal(logits_TV, apart_TV)


# --- autograd, tracing, refusals ---


@on_every_backend
def test_backward_twice_and_no_second_derivative(backend: str, device: str) -> None:
    logits_TV, targets_T = (x.to(device) for x in inputs(4, 83))
    run = lambda x_TV: token_logps(x_TV, targets_T, entropy=True, backend=backend)  # noqa: E731
    c.assert_backward_twice(run, [logits_TV])
    c.assert_double_backward_refused(run, [logits_TV])


@on_every_backend
def test_no_gradient_is_computed_for_nobody(backend: str, device: str) -> None:
    logits_TV, targets_T = (x.to(device) for x in inputs(4, 83))
    assert not token_logps(logits_TV, targets_T, backend=backend).requires_grad
    with torch.no_grad():
        assert not token_logps(logits_TV.requires_grad_(), targets_T, backend=backend).requires_grad


@pytest.mark.parametrize(("backend", "device"), c.backends_for("token_logps", only=c.FAST))
def test_compiles(backend: str, device: str) -> None:
    logits_TV, targets_T = (x.to(device) for x in inputs(4, 83))
    c.assert_compiles(lambda x_TV: token_logps(x_TV, targets_T, entropy=True, backend=backend), [logits_TV])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "device"), c.backends_for("token_logps", only=("native",)))
def test_native_ops_are_registered_right(backend: str, device: str, dtype: torch.dtype) -> None:
    logits_TV, targets_T = (x.to(device) for x in inputs(4, 83, dtype))
    options = options_of(*OPTIONS[1])
    stats_KT = torch.ops.alignfast.token_logps_forward(logits_TV, targets_T, *options)
    torch.library.opcheck(torch.ops.alignfast.token_logps_forward, (logits_TV, targets_T, *options))
    torch.library.opcheck(
        torch.ops.alignfast.token_logps_backward,
        (logits_TV, targets_T, stats_KT, torch.ones_like(stats_KT), *options, torch.empty_like(logits_TV)),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        ({"temperature": math.inf}, "temperature must be a positive number, got inf"),
        ({"targets_T": torch.zeros(3, dtype=torch.int64)}, r"got \(4, 5\) and \(3,\)"),
        (
            {"targets_T": torch.zeros(4, dtype=torch.int32)},
            "int64 targets, got torch.float32 and torch.int32",
        ),
        ({"logits_TV": torch.zeros(4, 5, dtype=torch.int64)}, "expected floating-point logits"),
        ({"backend": "cuda"}, "backend='cuda' is not one of auto, torch, native, triton"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    arguments = {"logits_TV": torch.zeros(4, 5), "targets_T": torch.zeros(4, dtype=torch.int64)} | change
    logits_TV, targets_T = arguments.pop("logits_TV"), arguments.pop("targets_T")
    with pytest.raises(ValueError, match=message):
        token_logps(logits_TV, targets_T, **arguments)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_compiled_backends_refuse_float64(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By argument and by environment alike; `auto` without the environment takes torch."""
    logits_TV, targets_T = inputs(2, 5, torch.float64)
    message = f"token_logps can't run with backend='{backend}'.*float64.*backend='torch'"
    with pytest.raises(RuntimeError, match=message):
        token_logps(logits_TV, targets_T, backend=backend)
    assert token_logps(logits_TV, targets_T).dtype == torch.float64
    monkeypatch.setenv("ALIGNFAST_BACKEND", backend)
    with pytest.raises(RuntimeError, match=message):
        token_logps(logits_TV, targets_T)


# --- properties and sizes ---


def hold_any_input(backend: str, device: str, data: st.DataObject) -> None:
    """Any small shape, dtype, layout and options, with large numbers among the logits."""
    rows, V = data.draw(st.integers(0, 5), "T"), data.draw(st.integers(1, 40), "V")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    ignored = data.draw(st.sampled_from([0, 0.3, 1]), "ignored")
    seed = data.draw(st.integers(0, 2**20), "seed")
    logits_TV, targets_T = inputs(33, V, dtype, ignored=ignored, seed=seed)
    logits_TV *= data.draw(st.sampled_from([0.0, 0.1, 1.0, 1000.0]), "spread")
    layouts = c.layouts(logits_TV[:rows])
    layout = data.draw(st.sampled_from([*layouts]) if rows else st.just("contiguous"), "layout")
    scale = data.draw(st.sampled_from([0.5, 1.0, -2.0]), "scale")
    softcap = data.draw(st.sampled_from([None, 5.0]), "softcap")
    temperature = data.draw(st.floats(0.1, 10), "temperature")
    options = options_of(scale, softcap, temperature)
    conform(backend, device, logits_TV, targets_T, options, seen_TV=layouts[layout])


@pytest.mark.parametrize(("backend", "device"), c.backends_for("token_logps", only=c.FAST))
@given(data=st.data())
def test_any_input(backend: str, device: str, data: st.DataObject) -> None:
    hold_any_input(backend, device, data)


@pytest.mark.parametrize(("backend", "device"), c.backends_for("token_logps", only=c.INTERPRETED))
@settings(max_examples=40)
@given(data=st.data())
def test_any_input_interpreted(backend: str, device: str, data: st.DataObject) -> None:
    hold_any_input(backend, device, data)


# The strides: the third row is past 2^31 elements though the stride is not; the stride itself is.
@pytest.mark.parametrize("stride", [2**30 + 64, 2**31 + 64])
@pytest.mark.parametrize(("backend", "device"), c.backends_for("token_logps", only=("native", "triton")))
def test_rows_beyond_32_bits(backend: str, device: str, stride: int, tmp_path: Path) -> None:
    """In a sparse file: 8 GiB of addresses, a few pages of memory."""
    if device != "cpu":
        pytest.skip("on a GPU the addresses would be memory")
    logits_TV, targets_T = inputs(3, 83, torch.bfloat16, ignored=0)
    file = torch.from_file(str(tmp_path / "logits"), shared=True, size=2 * stride + 83, dtype=torch.bfloat16)
    far_TV = file.as_strided((3, 83), (stride, 1))
    far_TV.copy_(logits_TV)
    conform(backend, device, far_TV, targets_T, options_of())
