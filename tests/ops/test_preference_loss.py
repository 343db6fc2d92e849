"""preference_loss: each loss against its formula by hand, in plain probabilities; relations and refusals.

Letters: N pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.pairs import (
    Pairs,
    every_loss,
    smoothing_of,
)

from alignfast.kernels import packed_preference_loss, preference_loss
from alignfast.kernels._pairwise import LOSSES

# --- the definitions, by hand ---


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def odds(p: float) -> float:
    return p / (1 - p)


# From the papers, in plain probabilities. c and r are the log-ratios (simpo, orpo: log-probs), nc and nr the
# lengths, b beta, e label smoothing; simpo's gamma is 0.5, discopop's tau 0.05.
BY_HAND: dict[str, Callable[[float, float, int, int, float, float], float]] = {
    "sigmoid": lambda c, r, nc, nr, b, e: (
        -(1 - e) * math.log(sigmoid(b * (c - r))) - e * math.log(sigmoid(b * (r - c)))
    ),
    "hinge": lambda c, r, nc, nr, b, e: max(0, 1 - b * (c - r)),
    "ipo": lambda c, r, nc, nr, b, e: (c / nc - r / nr - 1 / (2 * b)) ** 2,
    "robust": lambda c, r, nc, nr, b, e: (
        (-(1 - e) * math.log(sigmoid(b * (c - r))) + e * math.log(sigmoid(b * (r - c)))) / (1 - 2 * e)
    ),
    "exo_pair": lambda c, r, nc, nr, b, e: (
        sigmoid(b * (c - r)) * math.log(sigmoid(b * (c - r)) / (1 - e))
        + sigmoid(b * (r - c)) * math.log(sigmoid(b * (r - c)) / e)
    ),
    "nca_pair": lambda c, r, nc, nr, b, e: (
        -math.log(sigmoid(b * c)) - math.log(sigmoid(-b * c)) / 2 - math.log(sigmoid(-b * r)) / 2
    ),
    "bco_pair": lambda c, r, nc, nr, b, e: -math.log(sigmoid(b * c)) - math.log(1 - sigmoid(b * r)),
    "sppo_hard": lambda c, r, nc, nr, b, e: (c - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2,
    "apo_zero": lambda c, r, nc, nr, b, e: 1 - sigmoid(b * c) + sigmoid(b * r),
    "apo_down": lambda c, r, nc, nr, b, e: sigmoid(b * c) + 1 - sigmoid(b * (c - r)),
    "discopop": lambda c, r, nc, nr, b, e: (
        (1 - sigmoid(b * (c - r) / 0.05)) * -math.log(sigmoid(b * (c - r)))
        + sigmoid(b * (c - r) / 0.05) * math.exp(-b * (c - r))
    ),
    "sigmoid_norm": lambda c, r, nc, nr, b, e: -math.log(sigmoid(b * (c / nc - r / nr))),
    "simpo": lambda c, r, nc, nr, b, e: (
        -(1 - e) * math.log(sigmoid(b * (c / nc - r / nr) - 0.5))
        - e * math.log(sigmoid(0.5 - b * (c / nc - r / nr)))
    ),
    "orpo": lambda c, r, nc, nr, b, e: (
        -b * math.log(sigmoid(math.log(odds(math.exp(c / nc)) / odds(math.exp(r / nr)))))
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_definition_by_hand(name: str) -> None:
    pairs = Pairs()
    loss_N, chosen_rewards_N, rejected_rewards_N = pairs.loss(name)
    lengths = [pairs.lengths[side].tolist() for side in ("chosen_len_N", "rejected_len_N")]
    refs = pairs.refs if LOSSES[name].reference else (torch.zeros(7), torch.zeros(7))
    logs = [(policy_N - ref_N).tolist() for policy_N, ref_N in zip(pairs.policy, refs)]
    for i, (chosen, rejected, chosen_len, rejected_len) in enumerate(zip(*logs, *lengths)):
        expected = BY_HAND[name](chosen, rejected, chosen_len, rejected_len, 0.3, smoothing_of(name))
        assert loss_N[i].item() == pytest.approx(expected, rel=1e-12)
        if not LOSSES[name].reference:
            chosen, rejected = chosen / chosen_len, rejected / rejected_len
        assert chosen_rewards_N[i].item() == pytest.approx(0.3 * chosen)
        assert rejected_rewards_N[i].item() == pytest.approx(0.3 * rejected)


def test_aot_by_hand() -> None:
    """Sorted margins meet sorted margins: of the policy 4, 1, 2, of the reference 2, 3, -1."""
    chosen_N, rejected_N = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-5.0, -3.0, -5.0])
    refs = torch.tensor([-4.0, -3.0, -5.0]), torch.tensor([-6.0, -6.0, -4.0])
    loss_N, *_ = preference_loss(chosen_N, rejected_N, *refs, beta=1.0, loss_type="aot", backend="torch")
    assert loss_N.tolist() == pytest.approx([-math.log(sigmoid(m)) for m in (1 - -1, 2 - 2, 4 - 3)])
    # log-ratios 3, 1, 2 of the chosen, 1, 3, -1 of the rejected
    loss_N, *_ = preference_loss(
        chosen_N, rejected_N, *refs, beta=1.0, loss_type="aot_unpaired", backend="torch"
    )
    assert loss_N.tolist() == pytest.approx([-math.log(sigmoid(m)) for m in (1 - -1, 2 - 1, 3 - 3)])


def test_every_loss_is_by_hand_somewhere() -> None:
    assert set(BY_HAND) | {"aot", "aot_unpaired"} == set(LOSSES)


@every_loss
def test_gradcheck(name: str) -> None:
    pairs = Pairs()
    policy = [x_N.requires_grad_() for x_N in pairs.policy]
    assert torch.autograd.gradcheck(lambda *x: pairs.loss(name, *x)[0], policy)
    assert torch.autograd.gradgradcheck(lambda *x: pairs.loss(name, *x)[0], policy)
    assert not any(reward_N.requires_grad for reward_N in pairs.loss(name)[1:])


@pytest.mark.parametrize(
    ("kind", "alpha", "score"),
    [
        ("forward_kl", 0.5, lambda t: 1 - 1 / t),
        ("js_divergence", 0.5, lambda t: math.log(2 * t / (t + 1))),
        ("alpha_divergence", 0.5, lambda t: (t**-0.5 - 1) / -0.5),
        ("alpha_divergence", 0.0, lambda t: 1 - 1 / t),
        ("alpha_divergence", 1.0, math.log),
    ],
)
def test_f_divergences_by_hand(kind: str, alpha: float, score: Callable[[float], float]) -> None:
    pairs = Pairs()
    loss_N, rewards_N, _ = pairs.loss(
        "sigmoid", label_smoothing=0, f_divergence_type=kind, f_alpha_divergence_coef=alpha
    )
    ratios = [(x_N - ref_N).exp().tolist() for x_N, ref_N in zip(pairs.policy, pairs.refs)]
    expected = [
        -math.log(sigmoid(0.3 * (score(chosen) - score(rejected)))) for chosen, rejected in zip(*ratios)
    ]
    assert loss_N.tolist() == pytest.approx(expected, rel=1e-9)
    assert torch.equal(rewards_N, 0.3 * (pairs.policy[0] - pairs.refs[0]))  # TRL logs the plain log-ratio


@pytest.mark.parametrize("kind", ["forward_kl", "alpha_divergence"])
def test_f_divergences_do_not_overflow(kind: str) -> None:
    chosen_N = torch.tensor([-1000.0, -5.0]).requires_grad_()
    loss_N, *_ = preference_loss(
        chosen_N,
        torch.tensor([-5.0, -1000.0]),
        torch.zeros(2),
        torch.zeros(2),
        f_divergence_type=kind,
        backend="torch",
    )
    (gradient_N,) = torch.autograd.grad(loss_N.sum(), chosen_N)
    assert loss_N.isfinite().all()
    assert gradient_N.isfinite().all()


def test_robust_is_unbiased() -> None:
    """Averaged over flips of that probability, it is the loss of clean labels."""
    pairs = Pairs()
    flipped = Pairs()
    flipped.policy, flipped.refs = flipped.policy[::-1], flipped.refs[::-1]
    mean_N = 0.9 * pairs.loss("robust")[0] + 0.1 * flipped.loss("robust")[0]
    assert torch.allclose(mean_N, pairs.loss("sigmoid", label_smoothing=0)[0], rtol=1e-12)


def test_several_losses_add_up() -> None:
    pairs = Pairs()
    names = ["sigmoid", "bco_pair"]
    mixed_N, *rewards = pairs.loss("sigmoid", loss_type=names, loss_weights=[0.8, 0.2])
    assert torch.allclose(
        mixed_N, 0.8 * pairs.loss("sigmoid")[0] + 0.2 * pairs.loss("bco_pair")[0], rtol=1e-15
    )
    assert torch.equal(torch.stack(rewards), torch.stack(pairs.loss("sigmoid")[1:]))
    unweighted_N, *_ = pairs.loss("sigmoid", loss_type=names)
    assert torch.allclose(unweighted_N, pairs.loss("sigmoid")[0] + pairs.loss("bco_pair")[0], rtol=1e-15)


@every_loss
@pytest.mark.parametrize("size", [1e3, 1e4])
def test_large_margins_stay_finite(name: str, size: float) -> None:
    """In float32, both ways, loss and gradient."""
    chosen_N = torch.tensor([-size, -0.5, -size]).requires_grad_()
    rejected_N = torch.tensor([-0.5, -size, -size]).requires_grad_()
    pairs = Pairs(3, torch.float32)
    pairs.lengths = {"chosen_len_N": torch.ones(3), "rejected_len_N": torch.ones(3)}
    loss_N, *_ = pairs.loss(name, chosen_N, rejected_N, beta=1.0)
    gradients = torch.autograd.grad(loss_N.sum(), (chosen_N, rejected_N))
    assert loss_N.isfinite().all()
    assert all(gradient_N.isfinite().all() for gradient_N in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("chosen", "rejected"), [(0.0, 0.0), (0.0, -5.0), (-5.0, 0.0), (-1e-30, -5.0)])
def test_orpo_of_a_certain_completion(chosen: float, rejected: float, dtype: torch.dtype) -> None:
    """A log-prob of 0, which float32 reaches, counts as odds of 2^23 to 1 and has no gradient; the other one has."""
    sums = [torch.tensor([2 * x], dtype=dtype).requires_grad_() for x in (chosen, rejected)]
    two_N = torch.tensor([2])
    loss_N, *_ = preference_loss(
        *sums, chosen_len_N=two_N, rejected_len_N=two_N, loss_type="orpo", beta=0.3, backend="torch"
    )
    gradients = [gradient_N.item() for gradient_N in torch.autograd.grad(loss_N, sums)]
    log_odds = [math.log(p / -math.expm1(x)) for x in (min(chosen, -(2**-23)), min(rejected, -(2**-23)))
                for p in (math.exp(x),)]  # fmt: skip
    lose = 1 / (1 + math.exp(log_odds[0] - log_odds[1]))
    assert loss_N.item() == pytest.approx(-0.3 * math.log1p(-lose), rel=1e-5)
    for x, sign, gradient in zip((chosen, rejected), (-1, 1), gradients):
        slope = 0.0 if x > -(2**-23) else 1 / -math.expm1(x)  # of the log-odds
        assert gradient == pytest.approx(sign * 0.3 * lose * slope / 2, rel=1e-5)


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].by_margin])
def test_common_shift(name: str) -> None:
    """What policy and reference share, and what a pair's two log-ratios share, is no preference."""
    pairs, shifted = Pairs(), Pairs()
    shifted.policy = tuple(x_N + 2 for x_N in shifted.policy)
    shifted.refs = tuple(x_N + 2 for x_N in shifted.refs)
    assert torch.allclose(pairs.loss(name)[0], shifted.loss(name)[0], rtol=1e-12)
    if not LOSSES[name].lengths:
        shifted.refs = pairs.refs
        assert torch.allclose(pairs.loss(name)[0], shifted.loss(name)[0], rtol=1e-12)


# --- refusals ---


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "apo_zero"},
        {"loss_type": ["sigmoid", "hinge"]},
        {"loss_type": ["sigmoid"], "loss_weights": [0.5]},
        {"f_divergence_type": "forward_kl"},
    ],
)
def test_compiled_backends_refuse_what_they_do_not_know(
    backend: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named by argument or environment they refuse; `auto` computes it in torch."""
    inputs = [torch.zeros(2)] * 4
    expected_N, *_ = preference_loss(*inputs, **options, backend="torch")
    assert torch.equal(preference_loss(*inputs, **options)[0], expected_N)
    with pytest.raises(
        RuntimeError, match=f"no {backend} code for .*compiled code knows sigmoid.*backend='torch'"
    ):
        preference_loss(*inputs, **options, backend=backend)
    monkeypatch.setenv("ALIGNFAST_BACKEND", backend)
    with pytest.raises(RuntimeError, match=f"no {backend} code for"):
        packed_preference_loss(torch.zeros(4), torch.arange(5), *inputs[:2], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "sigmiod"}, "loss_type is 'sigmiod'; known are sigmoid, hinge"),
        ({"loss_type": []}, "loss_type is \\[\\]; known are"),
        ({"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0]}, "has 1 numbers for 2 loss types"),
        ({"beta": 0.0}, "beta and discopop_tau must be positive, got 0.0"),
        ({"discopop_tau": -1.0}, "must be positive, got 0.1 and -1.0"),
        ({"label_smoothing": 0.5}, r"must lie in \[0, 0.5\), got 0.5"),
        ({"label_smoothing": 0.1, "loss_type": "hinge"}, "label_smoothing=0.1 has no meaning for hinge"),
        ({"simpo_gamma": 1.0}, "simpo_gamma has no meaning for sigmoid, only for simpo"),
        ({"discopop_tau": 0.1, "loss_type": "hinge"}, "discopop_tau has no meaning for hinge, only for disc"),
        ({"f_alpha_divergence_coef": 0.7}, "has no meaning for sigmoid, only for alpha_divergence"),
        ({"loss_type": "exo_pair"}, "exo_pair needs label_smoothing > 0"),
        ({"f_divergence_type": "kl"}, "f_divergence_type='kl' is not one of reverse_kl"),
        ({"f_divergence_type": "forward_kl", "loss_type": "nca_pair"}, "nca_pair is no loss of the margin"),
        ({"loss_type": "ipo"}, "ipo averages over tokens; give chosen_len_N and rejected_len_N"),
        ({"loss_type": "simpo"}, "simpo is reference-free, but got reference log-probs; leave them out"),
        ({"ref_rejected_N": None}, "sigmoid needs ref_chosen_N and ref_rejected_N"),
        ({"ref_chosen_N": torch.zeros(3)}, r"one number a pair.*got \(2,\) on cpu and \(3,\) on cpu"),
        ({"ref_chosen_N": torch.zeros(2, requires_grad=True)}, "reference log-probs are constants"),
        ({"rejected_N": torch.zeros(2, 1)}, r"in one dimension, got torch.float32 of shape \(2, 1\)"),
        ({"chosen_N": torch.zeros(2, dtype=torch.int64)}, "floating-point log-probs.*got torch.int64"),
        ({"rejected_N": torch.zeros(2).double()}, "chosen is torch.float32 and rejected torch.float64; cast"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_refusals(backend: str, options: dict[str, Any], message: str) -> None:
    names = ("chosen_N", "rejected_N", "ref_chosen_N", "ref_rejected_N")
    with pytest.raises(ValueError, match=message):
        preference_loss(**({name: torch.zeros(2) for name in names} | options), backend=backend)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 2, 3, 4], "2 \\* pairs \\+ 1 of them, got torch.int64 \\(4,\\)"),
        ([0.0, 2.0, 4.0], "offsets must be int64"),
        ([1, 2, 4], "offsets must rise from 0 to 4"),
        ([0, 2, 3], "offsets must rise from 0 to 4"),
        ([0, 5, 4], "offsets must rise from 0 to 4"),
    ],
)
def test_offsets_that_do_not_fit(offsets: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        packed_preference_loss(torch.zeros(4), torch.tensor(offsets), torch.zeros(1), torch.zeros(1))
