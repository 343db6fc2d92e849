"""policy_loss on every backend: compiled code against the definition, extreme values, autograd and tracing.

Letters: T tokens.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import conformance as c
from ops.policies import COMPILED, Tokens, every_compiled_loss, every_loss, needed, on_every_backend, ragged
from torch import Tensor

from alignfast.kernels import policy_loss
from alignfast.kernels._policy import LOSSES
from alignfast.kernels.policy_loss import BLOCK

KL = {"beta": 0.2}
_CROWD = 16
CORRECTED = {"beta": 0.2, "use_bias_correction_kl": True, "epsilon_high": 0.28}


def conform(backend: str, device: str, lengths: list[int], name: str, seed: int = 0, **options: Any) -> None:
    """Losses and gradients by the common rule; metrics by `hold_metrics`.

    A loss is divided by the number of sequences, of which the crowd has `_CROWD` times as many.
    """
    tokens = Tokens(lengths, spread=options.pop("spread", 0.3), seed=seed)
    crowd = tokens.shaken(_CROWD)
    run = lambda x_T: tokens.call(x_T, name, backend, **options)[0]  # noqa: E731
    many = crowd.case(device, name, times=_CROWD, **options)
    c.conform(run, tokens.case(device, name, **options), crowd=many)
    _, metrics = tokens.call(tokens.logps_T.to(device), name, backend, **options)
    hold_metrics(metrics, tokens, name, **options)


def hold_metrics(metrics: dict[str, Tensor], tokens: Tokens, name: str, **options: Any) -> None:
    """Counts exactly, sums within what their terms' and their own rounding explains.

    Not by twice the peer's error: of one number that is luck. A term e^x carries the rounding of x, |x| units in the
    last place, and four of its own; a sum of n terms in any order n units of their absolute sum, of which sums in
    blocks were seen to use four.
    """
    exact_T = tokens.logps_T.double()
    gold = tokens.peer(exact_T, name, **options)[1:]
    kept_T = tokens.mask_T
    ratios = [(ref_T.double() - exact_T)[kept_T].abs() for ref_T in (tokens.old_T, tokens.ref_T)]
    furthest = max([0.0, *(x.item() for x_T in ratios for x in x_T)])
    assert len(gold) == len(metrics)
    for key, exact in zip(sorted(metrics), gold):
        size = ratios[0].sum() if key == "approx_kl/k1" else exact
        units = 0 if "clip" in key else 8 + 2 * furthest
        assert abs(metrics[key].item() - exact) <= units * torch.finfo(torch.float32).eps * size, key


# --- values and gradients ---


@pytest.mark.parametrize("options", [{}, KL, CORRECTED], ids=["plain", "kl", "corrected"])
@every_compiled_loss
@on_every_backend
def test_holds(backend: str, device: str, name: str, options: dict[str, Any]) -> None:
    conform(backend, device, ragged(30, 40), name, **options)


# Lengths: a token alone; below, at and past a vector of 16
@pytest.mark.parametrize("lengths", [[1], [15], [7, 9], [9, 20, 4]], ids=sum)
@on_every_backend
def test_any_length_holds(backend: str, device: str, lengths: list[int]) -> None:
    conform(backend, device, lengths, "grpo", **CORRECTED)


@pytest.mark.parametrize(("name", "option"), [("ppo", "dual_clip"), ("grpo", "delta"), ("dapo", "delta")])
@on_every_backend
def test_caps_hold(backend: str, device: str, name: str, option: str) -> None:
    conform(backend, device, [40, 60], name, spread=1.0, **{option: 1.7})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@on_every_backend
def test_16_bit_log_probs_are_read_as_float32(backend: str, device: str, dtype: torch.dtype) -> None:
    tokens = Tokens(ragged(9, 20), dtype)
    logps_T = tokens.logps_T.to(device).requires_grad_()
    loss_T, _ = tokens.call(logps_T, "dapo", backend, **KL)
    wide = Tokens(ragged(9, 20), dtype)
    for name in ("logps_T", "old_T", "ref_T", "advantages_T"):
        setattr(wide, name, getattr(wide, name).float())
    expected_T, _ = wide.call(wide.logps_T.to(device), "dapo", backend, **KL)
    assert torch.equal(loss_T, expected_T)
    assert torch.autograd.grad(loss_T.sum(), logps_T)[0].dtype == dtype


@on_every_backend
def test_strides(backend: str, device: str) -> None:
    """Every second number, one number expanded, an advantage a sequence, a mask of integers."""
    generator = torch.Generator().manual_seed(0)
    wide_TN = torch.randn(40, 2, generator=generator).to(device)
    logps_T, old_T, mask_T = wide_TN[:, 0], wide_TN[:1, 1].expand(40), (wide_TN[:, 0] > -0.5).long()
    advantages_T = wide_TN[:4, 1:].expand(4, 10).reshape(40)
    actual_T, _ = policy_loss(logps_T, old_T, advantages_T, mask_T=mask_T, backend=backend)
    plain = [x_T.contiguous() for x_T in (logps_T, old_T, advantages_T)]
    expected_T, _ = policy_loss(*plain, mask_T=mask_T.bool(), backend=backend)
    assert torch.equal(actual_T, expected_T)


@every_loss
@pytest.mark.parametrize("lengths", [[], [3]], ids=["no token", "none that counts"])
@on_every_backend
def test_nothing(backend: str, device: str, name: str, lengths: list[int]) -> None:
    if backend != "torch" and not LOSSES[name].compiled:
        return
    tokens = Tokens(lengths)
    tokens.mask_T[:] = False
    logps_T = torch.full((len(tokens.mask_T),), math.nan, device=device, requires_grad=True)
    loss_T, metrics = tokens.call(logps_T, name, backend, **KL)
    (gradient_T,) = torch.autograd.grad(loss_T.sum(), logps_T)
    assert loss_T.tolist() == gradient_T.tolist() == [0.0] * len(logps_T)
    assert all(value == 0 for value in metrics.values())


# --- extreme values ---


@every_loss
@on_every_backend
def test_masked_tokens_contribute_nothing(backend: str, device: str, name: str) -> None:
    """NaN, inf and log-ratios of 10,000 where the mask is 0: loss, gradient and metrics as with zeros there."""
    if backend != "torch" and not LOSSES[name].compiled:
        return
    for junk in ((math.nan,) * 4, (math.inf, -math.inf, math.inf, -math.inf), (1e4, -1e4, -1e30, 1e4)):
        results = []
        for filled in (junk, (0.0,) * 4):
            tokens = Tokens(ragged(9, 20))
            for name_T, value in zip(("logps_T", "old_T", "ref_T", "advantages_T"), filled):
                getattr(tokens, name_T)[~tokens.mask_T] = value
            logps_T = tokens.logps_T.to(device).requires_grad_()
            entropy_T = torch.where(tokens.mask_T, 1.0, filled[0]).to(device).requires_grad_()
            loss_T, metrics = tokens.call(
                logps_T,
                name,
                backend,
                **KL,
                use_bias_correction_kl=True,
                entropy_T=entropy_T,
                entropy_coef=0.1,
            )
            gradients = torch.autograd.grad(loss_T.sum(), (logps_T, entropy_T))
            results.append([loss_T, *gradients, *metrics.values()])
        for actual, expected in zip(*results):
            assert torch.equal(actual, expected)
        assert not results[0][1][~tokens.mask_T.to(device)].any()


CAPS = {"ppo": {"dual_clip": 3.0}} | {name: {"delta": 3.0} for name in ("grpo", "bnpo", "dr_grpo", "dapo")}


@every_loss
@on_every_backend
def test_what_the_clip_removes_is_no_nan(backend: str, device: str, name: str) -> None:
    """Log-ratios of +-10,000 under advantages of either sign, and of 0: the bound, and a gradient of exactly 0."""
    if backend != "torch" and not LOSSES[name].compiled:
        return
    x_T = torch.tensor([1e4, -1e4, 1e4, -1e4, 1e4, -1e4], device=device, requires_grad=True)
    advantages_T = torch.tensor([2.0, 2.0, -2.0, -2.0, 0.0, 0.0], device=device)
    loss_T, _ = policy_loss(
        x_T, torch.zeros_like(x_T.detach()), advantages_T, num_items=1, loss_type=name, backend=backend,
        seq_T=torch.arange(6, device=device), **needed(name) | CAPS.get(name, {}),
    )  # fmt: skip
    (gradient_T,) = torch.autograd.grad(loss_T.sum(), x_T)
    assert loss_T.isfinite().all()
    assert gradient_T.isfinite().all()
    if LOSSES[name].of is LOSSES["ppo"].of:
        factor = 1 / 50 if name == "dr_grpo" else 1
        expected = [factor * value for value in (-2.4, 0.0, 6.0, 1.6, 0.0, 0.0)]
        assert loss_T.tolist() == pytest.approx(expected, rel=1e-6)
        assert not gradient_T.any()


@every_compiled_loss
@on_every_backend
def test_without_a_cap_the_ratio_of_a_bad_token_is_infinite(backend: str, device: str, name: str) -> None:
    """The plain clip has no bound there: inf, as it is, and no NaN in its gradient. No advantage, no loss."""
    x_T = torch.tensor([1e4, 0.1, 1e4], device=device, requires_grad=True)
    advantages_T = torch.tensor([-1.0, -1.0, 0.0], device=device)
    loss_T, metrics = policy_loss(
        x_T, torch.zeros(3, device=device), advantages_T, num_items=1, loss_type=name, backend=backend,
        seq_T=torch.arange(3, device=device), **needed(name),
    )  # fmt: skip
    (gradient_T,) = torch.autograd.grad(loss_T.sum(), x_T)
    assert loss_T[0] == gradient_T[0] == metrics["max_ratio"] == math.inf
    assert loss_T[1].isfinite()
    assert loss_T[2] == gradient_T[2] == 0


@pytest.mark.parametrize("spoilt", ["logps_T", "old_T", "ref_T", "advantages_T"])
@every_loss
@on_every_backend
def test_nan_shows_in_its_token_alone(backend: str, device: str, name: str, spoilt: str) -> None:
    if backend != "torch" and not LOSSES[name].compiled:
        return
    tokens, clean = Tokens([8, 6]), Tokens([8, 6])
    tokens.mask_T[4] = clean.mask_T[4] = True
    for name_T in ("logps_T", "old_T", "ref_T", "advantages_T"):
        getattr(clean, name_T)[4] = getattr(tokens, name_T)[4] = -0.5
    getattr(tokens, spoilt)[4] = math.nan
    results = []
    for case in (tokens, clean):
        logps_T = case.logps_T.to(device).requires_grad_()
        loss_T, metrics = case.call(logps_T, name, backend, **KL)
        results.append((loss_T, torch.autograd.grad(loss_T.sum(), logps_T)[0]))
        assert metrics["max_ratio"].isnan() == (case is tokens and spoilt in ("logps_T", "old_T"))
    others_T = torch.arange(14) != 4
    for actual_T, expected_T in zip(*results):
        assert torch.equal(actual_T[others_T], expected_T[others_T])
    assert results[0][0][4].isnan()
    assert results[0][1][4].isnan()


# --- autograd, tracing ---


@on_every_backend
def test_backward_twice(backend: str, device: str) -> None:
    tokens = Tokens(ragged(5, 9))
    c.assert_backward_twice(
        lambda x_T: tokens.call(x_T, "grpo", backend, **KL)[0], [tokens.logps_T.to(device)]
    )


@pytest.mark.parametrize(("backend", "device"), c.backends_for("policy_loss", only=("native", "triton")))
def test_compiled_code_has_no_second_derivative(backend: str, device: str) -> None:
    tokens = Tokens(ragged(5, 9))
    run = lambda x_T: tokens.call(x_T, "grpo", backend, **KL)[0]  # noqa: E731
    c.assert_double_backward_refused(run, [tokens.logps_T.to(device)])


@every_loss
@on_every_backend
def test_inside_torch_func(backend: str, device: str, name: str) -> None:
    """linear_loss differentiates with torch.func, which records every backward pass."""
    if backend != "torch" and not LOSSES[name].compiled:
        return
    tokens = Tokens(ragged(5, 9))
    logps_T = tokens.logps_T.to(device)
    gradient_T, loss = torch.func.grad_and_value(lambda x_T: tokens.call(x_T, name, backend, **KL)[0].sum())(
        logps_T
    )
    leaf_T = logps_T.clone().requires_grad_()
    expected = tokens.call(leaf_T, name, backend, **KL)[0].sum()
    assert torch.equal(loss, expected)
    assert torch.equal(gradient_T, torch.autograd.grad(expected, leaf_T)[0])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dapo", {}),
        ("grpo", CORRECTED),
        ("cispo", KL),
        ("sapo", {}),
        ("grpo", {"importance_sampling_level": "sequence", **KL}),
    ],
    ids=str,
)
@pytest.mark.parametrize(("backend", "device"), c.backends_for("policy_loss", only=c.FAST))
def test_compiles(backend: str, device: str, name: str, options: dict[str, Any]) -> None:
    """In one graph with its metrics; entropy too is differentiated."""
    if backend != "torch" and (not LOSSES[name].compiled or "importance_sampling_level" in options):
        return
    tokens = Tokens(ragged(5, 9))

    def run(logps_T: Tensor, entropy_T: Tensor) -> Tensor:
        loss_T, metrics = tokens.call(
            logps_T, name, backend, **options, entropy_T=entropy_T, entropy_coef=0.1
        )
        return loss_T + sum(metrics.values())

    c.assert_compiles(run, [tokens.logps_T.to(device), torch.rand(len(tokens.logps_T), device=device)])


@pytest.mark.parametrize("given_all", [True, False], ids=["reference and mask", "neither"])
@pytest.mark.parametrize(("backend", "device"), c.backends_for("policy_loss", only=("native",)))
def test_native_op_is_registered_right(backend: str, device: str, given_all: bool) -> None:
    tokens = Tokens(ragged(5, 9))
    for x_T in (tokens.logps_T, tokens.old_T, tokens.advantages_T):
        x_T.nan_to_num_()  # opcheck compares by ==
    tensors = tokens.tensors(tokens.logps_T.to(device))
    optional = (tensors["ref_logps_T"], tensors["mask_T"]) if given_all else (None, None)
    scale_T = torch.ones((), device=device).expand(len(tokens.logps_T))
    inputs = (tokens.logps_T.to(device), tensors["old_logps_T"], tensors["advantages_T"], *optional, scale_T)
    torch.library.opcheck(
        torch.ops.alignfast.policy_loss, (*inputs, 0.8, 1.2, math.inf, 0.1 * given_all, True)
    )


@pytest.mark.parametrize(("backend", "device"), c.backends_for("policy_loss", only=("native",)))
def test_threads_change_nothing(backend: str, device: str) -> None:
    tokens = Tokens([60_001])  # past half a million numbers at ten a token, where threads begin
    before, results = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        loss_T, metrics = tokens.call(tokens.logps_T.to(device), "dapo", backend)
        results.append([loss_T, *metrics.values()])
    torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(*results))


# --- properties ---


def hold_any_batch(backend: str, device: str, data: st.DataObject) -> None:
    """Any lengths, spread and bounds, all compiled losses, with and without a KL."""
    name = data.draw(st.sampled_from(COMPILED), "name")
    lengths = data.draw(st.lists(st.integers(1, 40), max_size=12), "lengths")
    options: dict[str, Any] = data.draw(st.sampled_from([{}, KL, CORRECTED]), "kl")
    options = options | {"epsilon": data.draw(st.floats(0.01, 1), "epsilon")}
    cap = data.draw(st.sampled_from([None, 2.1, 10.0]), "cap")
    if cap is not None:
        options |= {"dual_clip" if name == "ppo" else "delta": cap}
    spread = data.draw(st.sampled_from([1e-4, 0.1, 1.0, 5.0]), "spread")
    conform(
        backend, device, lengths, name, data.draw(st.integers(0, 2**20), "seed"), spread=spread, **options
    )


@pytest.mark.parametrize(("backend", "device"), c.backends_for("policy_loss", only=c.FAST))
@given(data=st.data())
def test_any_batch(backend: str, device: str, data: st.DataObject) -> None:
    hold_any_batch(backend, device, data)


@pytest.mark.parametrize(("backend", "device"), c.backends_for("policy_loss", only=c.INTERPRETED))
@settings(max_examples=40)
@given(data=st.data())
def test_any_batch_interpreted(backend: str, device: str, data: st.DataObject) -> None:
    hold_any_batch(backend, device, data)


def test_block_is_that_of_the_compiled_code() -> None:
    """One more token than a block, so that a second partial sum must be written."""
    tokens = Tokens([BLOCK + 1])
    tokens.mask_T[:] = True
    for x_T in (tokens.logps_T, tokens.old_T, tokens.advantages_T):
        x_T[:] = 0.0
    _, metrics = tokens.call(tokens.logps_T, "dapo", "native")
    assert metrics["ratio"] == BLOCK + 1
