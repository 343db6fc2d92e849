"""token_logps and the row statistics under it: every backend against the definition, the definition against the textbook.

Letters: T rows, V vocabulary, K the six statistics.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops import conformance as c
from torch import Tensor

from alignfast.kernels import _targets, token_logps
from alignfast.kernels._backend import resolve
from alignfast.kernels.token_logps import IS_TOP1, STATS, RowOptions, _Torch, row_options, row_stats

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = c.backends_for("token_logps")
# scale, softcap and temperature: none; as Gemma 2 and a sampler have them; a divisor below 1 under a tight cap
OPTIONS = [(1.0, None, 1.0), (1.0, 30.0, 0.7), (0.25, 2.0, 1.3)]
on_every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)


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


# --- the definition ---------------------------------------------------------------------------------------------


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


# --- every backend against the definition -----------------------------------------------------------------------


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


# --- relations --------------------------------------------------------------------------------------------------


@on_every_backend
def test_is_top1(backend: str, device: str) -> None:
    """Ties count as top; so does the only entry that is not -inf."""
    logits_TV = torch.tensor([[1.0, 5, 5, 0], [1, 5, 6, 0], [-1, -math.inf, -math.inf, -1e4], [0, 0, 0, 0]])
    targets_T = torch.tensor([2, 1, 0, -100])
    stats_KT = row_stats(logits_TV.to(device), targets_T.to(device), options_of(), backend)
    assert stats_KT[IS_TOP1].tolist() == [1, 0, 1, 0]


@on_every_backend
def test_shift(backend: str, device: str) -> None:
    """Adding a constant to a row costs no digit of its log-prob and gradient, as it costs log_softmax none.

    64 and quarters: the sum is exact in float32.
    """
    logits_TV, targets_T = inputs(33, 83)
    logits_TV = (logits_TV * 4).round() / 4 + 64
    conform(backend, device, logits_TV, targets_T, options_of(), seen_TV=logits_TV[:9], logps_alone=True)


@on_every_backend
def test_temperature_divides(backend: str, device: str) -> None:
    """A power of two divides exactly, so the two ways agree bit for bit."""
    logits_TV, targets_T = (x.to(device) for x in inputs(4, 83))
    cooled = token_logps(logits_TV, targets_T, temperature=0.5, entropy=True, backend=backend)
    divided = token_logps(logits_TV / 0.5, targets_T, entropy=True, backend=backend)
    assert torch.equal(torch.stack(cooled), torch.stack(divided))


@on_every_backend
def test_rows_do_not_meet(backend: str, device: str) -> None:
    """Rows may come in any order, and an ignored row's content, NaN too, is never looked at."""
    logits_TV, targets_T = (x.to(device) for x in inputs(9, 83, ignored=0.4))
    order_T = torch.randperm(9, generator=torch.Generator().manual_seed(3)).to(device)
    logits_TV[targets_T == -100] = math.nan
    leaf_TV, shuffled_TV = logits_TV.requires_grad_(), logits_TV.detach()[order_T].requires_grad_()
    stats_KT = row_stats(leaf_TV, targets_T, options_of(), backend)
    shuffled_KT = row_stats(shuffled_TV, targets_T[order_T], options_of(), backend)
    assert torch.equal(stats_KT[:, order_T], shuffled_KT)
    assert not stats_KT[:, targets_T == -100].any()
    (gradient_TV,) = torch.autograd.grad(stats_KT.sum(), leaf_TV)
    (shuffled_gradient_TV,) = torch.autograd.grad(shuffled_KT.sum(), shuffled_TV)
    assert torch.equal(gradient_TV[order_T], shuffled_gradient_TV)
    assert not gradient_TV[targets_T == -100].any()


# --- the edges of the numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_backend
def test_large_logits(backend: str, device: str, dtype: torch.dtype) -> None:
    """Up to +-1e4, where exp of anything but a difference overflows."""
    logits_TV, targets_T = inputs(6, 83, dtype, ignored=0)
    logits_TV[0], logits_TV[1] = 1e4, -1e4
    logits_TV[2, 5], logits_TV[3, 6] = 1e4, -1e4
    logits_TV[4] *= 3000
    logits_TV[5, :2], logits_TV[5, 2:] = 1e4, 0
    targets_T[2:] = torch.tensor([5, 6, 7, 8])
    conform(backend, device, logits_TV, targets_T, options_of())
    conform(backend, device, logits_TV, targets_T, options_of(), logps_alone=True)


@on_every_backend
def test_a_sure_token_keeps_its_digits(backend: str, device: str) -> None:
    """At a margin of 30 nats x - lse rounds to 0 in float32; the log-prob is -36 e^-30, and its gradient too."""
    logits_TV = torch.zeros(1, 37)
    logits_TV[0, 4] = 30.0
    leaf_TV = logits_TV.to(device).requires_grad_()
    logps_T = token_logps(leaf_TV, torch.tensor([4], device=device), backend=backend)
    (gradient_TV,) = torch.autograd.grad(logps_T.sum(), leaf_TV)
    assert logps_T.item() == pytest.approx(-36 * math.exp(-30), rel=1e-6)
    assert gradient_TV[0, 4].item() == pytest.approx(36 * math.exp(-30), rel=1e-6)


@on_every_backend
def test_forbidden_words(backend: str, device: str) -> None:
    """Entries of -inf have no probability: they add nothing, and as a target they give -inf."""
    logits_TV, targets_T = inputs(4, 83, ignored=0)
    logits_TV[:, ::3] = -math.inf
    targets_T[:] = torch.tensor([1, 2, 4, 5])
    logits_TV[3] = -math.inf
    logits_TV[3, 5] = 1.0  # the only word left
    leaf_TV = logits_TV.to(device).requires_grad_()
    logps_T, entropy_T = token_logps(leaf_TV, targets_T.to(device), entropy=True, backend=backend)
    gold_TV = logits_TV.double().requires_grad_()
    gold = token_logps(gold_TV, targets_T, entropy=True, backend="torch")
    for name, mine, expected in zip(("logps", "entropy"), (logps_T, entropy_T), gold):
        c.hold(name, mine, expected.float(), expected)
    (gradient_TV,) = torch.autograd.grad((logps_T + entropy_T).sum(), leaf_TV)
    (gold_gradient_TV,) = torch.autograd.grad((gold[0] + gold[1]).sum(), gold_TV)
    c.hold("gradient", gradient_TV, gold_gradient_TV.float(), gold_gradient_TV)
    assert (logps_T[3], entropy_T[3]) == (0, 0)
    assert not gradient_TV[:, ::3].any()
    impossible = token_logps(logits_TV.to(device), torch.zeros_like(targets_T).to(device), backend=backend)
    assert impossible.tolist() == [-math.inf] * 4


@on_every_backend
def test_nan_stays_in_its_row(backend: str, device: str) -> None:
    logits_TV, targets_T = inputs(4, 300, ignored=0)
    logits_TV[2, 270] = math.nan
    leaf_TV = logits_TV.to(device).requires_grad_()
    logps_T, entropy_T = token_logps(leaf_TV, targets_T.to(device), entropy=True, backend=backend)
    (gradient_TV,) = torch.autograd.grad((logps_T + entropy_T).sum(), leaf_TV)
    bad_T = torch.tensor([False, False, True, False])
    for tensor in (logps_T, entropy_T, gradient_TV.sum(1)):
        assert torch.equal(tensor.isnan().cpu(), bad_T)
    assert gradient_TV[2].isnan().all()


@pytest.mark.parametrize("target", [-1, 37, -101, 2**40])
@on_every_backend
def test_target_outside_the_vocabulary(backend: str, device: str, target: int) -> None:
    """Refused on a CPU; on a GPU the row is NaN and a flag tells, once."""
    logits_TV, targets_T = inputs(3, 37, ignored=0)
    targets_T[1] = target
    if device == "cpu":
        with pytest.raises(ValueError, match=rf"\[0, 37\).*got {target} at row 1"):
            token_logps(logits_TV, targets_T, backend=backend)
        return
    _targets.bad_targets_seen(torch.device(device))
    logps_T = token_logps(logits_TV.to(device), targets_T.to(device), backend=backend)
    assert logps_T.isnan().tolist() == [False, True, False]
    assert _targets.bad_targets_seen(logps_T.device)
    assert not _targets.bad_targets_seen(logps_T.device)


def test_another_ignore_index() -> None:
    """A class of the vocabulary may be the one to ignore, as pad tokens are."""
    logits_TV, targets_T = inputs(6, 37, ignored=0)
    targets_T[:2] = 7
    plain = token_logps(logits_TV, targets_T, backend="torch")
    assert torch.equal(token_logps(logits_TV, targets_T, ignore_index=7, backend="torch")[2:], plain[2:])
    assert not token_logps(logits_TV, targets_T, ignore_index=7, backend="torch")[:2].any()


# --- autograd, tracing, refusals --------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("backend", "device"), c.backends_for("token_logps", without=c.INTERPRETED))
def test_compiles(backend: str, device: str) -> None:
    logits_TV, targets_T = (x.to(device) for x in inputs(4, 83))
    c.assert_compiles(lambda x_TV: token_logps(x_TV, targets_T, entropy=True, backend=backend), [logits_TV])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "device"), c.backends_for("token_logps", without=("torch", "triton")))
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


# --- properties and sizes ---------------------------------------------------------------------------------------


@given(data=st.data())
@on_every_backend
def test_any_input(backend: str, device: str, data: st.DataObject) -> None:
    """Any small shape, dtype, layout and options, with infinities and large numbers among the logits."""
    rows, V = data.draw(st.integers(0, 5), "T"), data.draw(st.integers(1, 40), "V")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    ignored, seed = (
        data.draw(st.sampled_from([0, 0.3, 1]), "ignored"),
        data.draw(st.integers(0, 2**20), "seed"),
    )
    logits_TV, targets_T = inputs(33, V, dtype, ignored=ignored, seed=seed)
    logits_TV *= data.draw(st.sampled_from([0.0, 0.1, 1.0, 1000.0]), "spread")
    layouts = c.layouts(logits_TV[:rows])
    layout = data.draw(st.sampled_from([*layouts]) if rows else st.just("contiguous"), "layout")
    scale = data.draw(st.sampled_from([0.5, 1.0, -2.0]), "scale")
    softcap = data.draw(st.sampled_from([None, 5.0]), "softcap")
    temperature = data.draw(st.floats(0.1, 10), "temperature")
    options = options_of(scale, softcap, temperature)
    conform(backend, device, logits_TV, targets_T, options, seen_TV=layouts[layout])


@pytest.mark.parametrize(("backend", "device"), c.backends_for("token_logps", without=("torch", "triton")))
def test_rows_beyond_32_bits(backend: str, device: str, tmp_path: Path) -> None:
    """Rows 2^31 elements apart, in a sparse file: 8 GiB of addresses, a few pages of memory."""
    if device != "cpu":
        pytest.skip("on a GPU the addresses would be memory")
    logits_TV, targets_T = inputs(3, 83, torch.bfloat16, ignored=0)
    stride = 2**31 + 64
    file = torch.from_file(str(tmp_path / "logits"), shared=True, size=2 * stride + 83, dtype=torch.bfloat16)
    far_TV = file.as_strided((3, 83), (stride, 1))
    far_TV.copy_(logits_TV)
    conform(backend, device, far_TV, targets_T, options_of())
