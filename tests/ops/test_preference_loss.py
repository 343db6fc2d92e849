"""preference_loss: each loss against its formula by hand, every backend against the definition, packed against summed.

Letters: N pairs, P tokens of all completions, M = 2N + 1 offsets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops import conformance as c
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignfast.kernels import packed_preference_loss, preference_loss
from alignfast.kernels._pairwise import LOSSES

BACKENDS = c.backends_for("preference_loss")
COMPILED = [name for name, loss in LOSSES.items() if loss.code is not None]
on_every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)
every_loss = pytest.mark.parametrize("name", LOSSES)
every_compiled_loss = pytest.mark.parametrize("name", COMPILED)


def smoothing_of(name: str) -> float:
    return 0.1 if LOSSES[name].smooths else 0.0


class Pairs:
    """N pairs of summed log-probs, as the arguments of preference_loss."""

    def __init__(self, N: int = 7, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal() -> Tensor:
            return (
                (-6 + 3 * torch.randn(N, generator=generator, dtype=torch.float64)).clamp(max=-0.1).to(dtype)
            )

        self.policy = (normal(), normal())
        self.refs = (normal(), normal())
        lengths_2N = torch.randint(1, 9, (2, N), generator=generator)
        self.lengths = {"chosen_len_N": lengths_2N[0], "rejected_len_N": lengths_2N[1]}

    def loss(self, name: str, *policy: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        options = {"loss_type": name, "label_smoothing": smoothing_of(name), "beta": 0.3} | options
        refs = self.refs if LOSSES[name].reference else ()
        return preference_loss(*(policy or self.policy), *refs, **self.lengths, **options, backend="torch")


# --- the definitions, by hand -----------------------------------------------------------------------------------


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def odds(p: float) -> float:
    return p / (1 - p)


# From the papers, in plain probabilities. c and r are the log-ratios (simpo, orpo: log-probs), nc and nr the lengths,
# b beta, e label smoothing; simpo's gamma is 0.5, discopop's tau 0.05.
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
    """Sorted margins meet sorted margins: of the policy 1 and 4, of the reference -1 and 2."""
    chosen_N, rejected_N = torch.tensor([-1.0, -2.0]), torch.tensor([-5.0, -3.0])
    refs = torch.tensor([-4.0, -3.0]), torch.tensor([-3.0, -5.0])
    loss_N, *_ = preference_loss(chosen_N, rejected_N, *refs, beta=1.0, loss_type="aot", backend="torch")
    assert loss_N.tolist() == pytest.approx([-math.log(sigmoid(1 - -1)), -math.log(sigmoid(4 - 2))])
    loss_N, *_ = preference_loss(
        chosen_N, rejected_N, *refs, beta=1.0, loss_type="aot_unpaired", backend="torch"
    )
    assert loss_N.tolist() == pytest.approx([-math.log(sigmoid(1 - -2)), -math.log(sigmoid(3 - 2))])


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


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].by_margin])
def test_common_shift(name: str) -> None:
    """What policy and reference have in common, and what a pair's two log-ratios have in common, is no preference."""
    pairs, shifted = Pairs(), Pairs()
    shifted.policy = tuple(x_N + 2 for x_N in shifted.policy)
    shifted.refs = tuple(x_N + 2 for x_N in shifted.refs)
    assert torch.allclose(pairs.loss(name)[0], shifted.loss(name)[0], rtol=1e-12)
    if not LOSSES[name].lengths:
        shifted.refs = pairs.refs
        assert torch.allclose(pairs.loss(name)[0], shifted.loss(name)[0], rtol=1e-12)


# --- packed -----------------------------------------------------------------------------------------------------


class Packed:
    """Token log-probs of N pairs, as the arguments of packed_preference_loss."""

    def __init__(
        self, lengths: list[int], dtype: torch.dtype = torch.float32, *, spread: float = 1.0, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.offsets_M = torch.tensor([0, *lengths]).cumsum(0)
        P, N = sum(lengths), len(lengths) // 2
        self.logps_P = (-spread * torch.rand(P, generator=generator, dtype=torch.float64)).to(dtype)
        sums_2N = self.sums(self.logps_P.double())
        noise_2N = spread * torch.randn(2, N, generator=generator, dtype=torch.float64)
        self.refs = tuple((sums_2N.mT.reshape(2, N) + 2 * noise_2N).to(dtype))

    def sums(self, logps_P: Tensor) -> Tensor:
        """By the textbook: (N, 2)."""
        completion_P = torch.arange(len(self.offsets_M) - 1).repeat_interleave(self.offsets_M.diff())
        sums = logps_P.new_zeros(len(self.offsets_M) - 1)
        return sums.index_add(0, completion_P.to(logps_P.device), logps_P).view(-1, 2)

    def run(self, logps_P: Tensor, name: str, backend: str, **options: Any) -> list[Tensor]:
        refs = [ref_N.to(logps_P.device, logps_P.dtype) for ref_N in self.refs]
        offsets_M = self.offsets_M.to(logps_P.device)
        options = {"label_smoothing": smoothing_of(name), "beta": 0.3} | options
        return list(
            packed_preference_loss(logps_P, offsets_M, *refs, loss_type=name, backend=backend, **options)
        )

    def peer(self, logps_P: Tensor, name: str, beta: float = 0.3) -> list[Tensor]:
        """The four compiled losses as one writes them in PyTorch."""
        logps_P = logps_P if logps_P.dtype == torch.float64 else logps_P.float()
        chosen_N, rejected_N = self.sums(logps_P).unbind(1)
        ref_chosen_N, ref_rejected_N = (ref_N.to(logps_P.device, logps_P.dtype) for ref_N in self.refs)
        ratios = chosen_N - ref_chosen_N, rejected_N - ref_rejected_N
        tokens_2N = self.offsets_M.diff().clamp(min=1).view(-1, 2).to(logps_P.device).T
        margin_N, eps = beta * (ratios[0] - ratios[1]), smoothing_of(name)
        loss_N = {
            "sigmoid": lambda: -(1 - eps) * logsigmoid(margin_N) - eps * logsigmoid(-margin_N),
            "hinge": lambda: torch.relu(1 - margin_N),
            "ipo": lambda: (ratios[0] / tokens_2N[0] - ratios[1] / tokens_2N[1] - 1 / (2 * beta)) ** 2,
            "robust": lambda: (
                (-(1 - eps) * logsigmoid(margin_N) + eps * logsigmoid(-margin_N)) / (1 - 2 * eps)
            ),
        }[name]()
        metrics = (beta * ratios[0], beta * ratios[1], chosen_N, rejected_N)
        return [loss_N, *(metric_N.detach() for metric_N in metrics)]

    def case(self, device: str, name: str, logps_P: Tensor | None = None, **options: Any) -> c.Case:
        return c.Case(
            lambda x_P: self.peer(x_P, name, **options),
            lambda x_P: self.run(x_P, name, "torch", **options),
            [(self.logps_P if logps_P is None else logps_P).to(device)],
        )


def ragged(N: int, longest: int, seed: int = 0) -> list[int]:
    """Lengths of 2N completions, up to the longest; those of every eighth pair are 0."""
    lengths = torch.randint(1, longest + 1, (N, 2), generator=torch.Generator().manual_seed(seed))
    lengths[7::8] = 0
    return lengths.flatten().tolist()


@every_loss
def test_packed_is_summed(name: str) -> None:
    """Values and gradients equal those of preference_loss on sums; lengths are the differences of the offsets."""
    packed = Packed([3, 5, 1, 1, 4, 2, 7, 3], torch.float64)
    tokens_N2 = packed.offsets_M.diff().view(-1, 2)
    options = {"beta": 0.3, "label_smoothing": smoothing_of(name), "loss_type": name, "backend": "torch"}
    refs = packed.refs if LOSSES[name].reference else ()
    logps_P = packed.logps_P.requires_grad_()
    out = packed_preference_loss(logps_P, packed.offsets_M, *refs, **options)
    sums_N2 = packed.sums(logps_P.detach()).requires_grad_()
    loss_N, *rewards = preference_loss(
        *sums_N2.unbind(1), *refs, chosen_len_N=tokens_N2[:, 0], rejected_len_N=tokens_N2[:, 1], **options
    )
    assert torch.allclose(out.loss_N, loss_N, rtol=1e-13)
    assert torch.allclose(torch.stack(out[1:3]), torch.stack(rewards), rtol=1e-13)
    assert torch.allclose(torch.stack(out[3:]), sums_N2.T, rtol=1e-13)
    upstream_N = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (tokens_gradient_P,) = torch.autograd.grad(out.loss_N, logps_P, upstream_N)
    (sums_gradient_N2,) = torch.autograd.grad(loss_N, sums_N2, upstream_N)
    expected_P = sums_gradient_N2.flatten().repeat_interleave(packed.offsets_M.diff())
    assert torch.allclose(tokens_gradient_P, expected_P, rtol=1e-13)
    assert not any(metric_N.requires_grad for metric_N in out[1:])


# N: 1 alone, 33 more pairs than threads with a ragged last share. Lengths: a token each, short, past a block of 1024.
@pytest.mark.parametrize(("N", "longest"), [(1, 5), (33, 1), (33, 40), (9, 1500)])
@every_compiled_loss
@on_every_backend
def test_holds(backend: str, device: str, name: str, N: int, longest: int) -> None:
    packed, crowd = Packed(ragged(N, longest)), Packed(ragged(33, longest), seed=1)
    run = lambda x_P: packed.run(x_P, name, backend)  # noqa: E731
    c.conform(run, packed.case(device, name), crowd=crowd.case(device, name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@on_every_backend
def test_16_bit_log_probs_are_read_as_float32(backend: str, device: str, dtype: torch.dtype) -> None:
    packed = Packed(ragged(33, 40), dtype)
    c.conform(lambda x_P: packed.run(x_P, "sigmoid", backend), packed.case(device, "sigmoid"))
    assert packed.run(packed.logps_P.to(device), "sigmoid", backend)[0].dtype == torch.float32


@pytest.mark.parametrize("layout", ["every second", "one token expanded", "not aligned"])
@on_every_backend
def test_strides(backend: str, device: str, layout: str) -> None:
    packed = Packed(ragged(33, 40))
    P = len(packed.logps_P)
    logps_P = {
        "every second": torch.stack((packed.logps_P, torch.full((P,), math.nan)), 1)[:, 0],
        "one token expanded": packed.logps_P[:1].expand(P),
        "not aligned": torch.cat((torch.zeros(1), packed.logps_P))[1:],
    }[layout]
    case = packed.case(device, "sigmoid", logps_P)
    c.conform(lambda x_P: packed.run(x_P, "sigmoid", backend), case)


@every_compiled_loss
@on_every_backend
def test_no_pairs(backend: str, device: str, name: str) -> None:
    packed = Packed([])
    logps_P = packed.logps_P.to(device).requires_grad_()
    out = packed.run(logps_P, name, backend)
    (gradient_P,) = torch.autograd.grad(out[0].sum(), logps_P)
    assert [len(x_N) for x_N in out] == [0] * 5
    assert len(gradient_P) == 0


@every_compiled_loss
@on_every_backend
def test_large_log_probs(backend: str, device: str, name: str) -> None:
    """Tokens down to -1e4: margins of 1e5 on either side."""
    packed = Packed(ragged(33, 9), spread=1e4)
    c.conform(lambda x_P: packed.run(x_P, name, backend), packed.case(device, name))


@every_compiled_loss
@on_every_backend
def test_infinite_and_nan_tokens_stay_in_their_pair(backend: str, device: str, name: str) -> None:
    """The chosen impossible, the rejected impossible, a NaN; every other pair is as it was."""
    packed = Packed([3] * 12)
    clean = packed.run(packed.logps_P.to(device), name, backend)
    logps_P = packed.logps_P.clone()
    logps_P[1] = logps_P[9] = -math.inf  # chosen 0, rejected 1
    logps_P[14] = math.nan  # chosen 2
    leaf_P, gold_P = logps_P.to(device).requires_grad_(), logps_P.double().requires_grad_()
    ours, gold = packed.run(leaf_P, name, backend), packed.run(gold_P, name, "torch")
    for actual_N, gold_N, clean_N in zip(ours, gold, clean):
        c.hold("value", actual_N, gold_N.float(), gold_N)
        assert torch.equal(actual_N[3:], clean_N[3:])
    (gradient_P,) = torch.autograd.grad(ours[0].sum(), leaf_P)
    assert ours[0][2].isnan()
    assert name == "hinge" or gradient_P[12:18].isnan().all()  # PyTorch's relu gives NaN the slope 1
    assert not gradient_P[18:].isnan().any()
    (gold_gradient_P,) = torch.autograd.grad(gold[0].sum(), gold_P)
    c.hold("gradient", gradient_P[:12], gold_gradient_P[:12].float(), gold_gradient_P[:12])


@on_every_backend
def test_pairs_do_not_meet(backend: str, device: str) -> None:
    """In another order the pairs give the same numbers, bit for bit."""
    packed = Packed([4, 4] * 5)
    order_N = torch.tensor([3, 0, 4, 1, 2])
    shuffled = Packed([4, 4] * 5)
    shuffled.logps_P = packed.logps_P.view(5, 8)[order_N].flatten()
    shuffled.refs = tuple(ref_N[order_N] for ref_N in packed.refs)
    one = packed.run(packed.logps_P.to(device), "sigmoid", backend)
    other = shuffled.run(shuffled.logps_P.to(device), "sigmoid", backend)
    for x_N, y_N in zip(one, other):
        assert torch.equal(x_N[order_N.to(device)], y_N)


# --- one number a completion, on every backend ------------------------------------------------------------------


@every_compiled_loss
@on_every_backend
def test_summed_holds(backend: str, device: str, name: str) -> None:
    """preference_loss itself, with the lengths that ipo needs, on float32."""
    pairs = Pairs(33, torch.float32)

    def run(backend: str) -> Callable[..., list[Tensor]]:
        def call(chosen_N: Tensor, rejected_N: Tensor) -> list[Tensor]:
            refs = (ref_N.to(chosen_N.device, chosen_N.dtype) for ref_N in pairs.refs)
            lengths = {side: length_N.to(chosen_N.device) for side, length_N in pairs.lengths.items()}
            options = {"label_smoothing": smoothing_of(name), "loss_type": name, "beta": 0.3}
            return [*preference_loss(chosen_N, rejected_N, *refs, **lengths, **options, backend=backend)]

        return call

    c.conform(run(backend), c.Case(run("torch"), run("torch"), [x_N.to(device) for x_N in pairs.policy]))


# --- autograd, tracing ------------------------------------------------------------------------------------------


@on_every_backend
def test_backward_twice(backend: str, device: str) -> None:
    packed = Packed(ragged(5, 9))
    c.assert_backward_twice(lambda x_P: packed.run(x_P, "sigmoid", backend), [packed.logps_P.to(device)])


@pytest.mark.parametrize(("backend", "device"), c.backends_for("preference_loss", without=("torch",)))
def test_compiled_code_has_no_second_derivative(backend: str, device: str) -> None:
    packed = Packed(ragged(5, 9))
    run = lambda x_P: packed.run(x_P, "sigmoid", backend)  # noqa: E731
    c.assert_double_backward_refused(run, [packed.logps_P.to(device)])


@every_compiled_loss
@on_every_backend
def test_inside_torch_func(backend: str, device: str, name: str) -> None:
    """linear_loss differentiates with torch.func, which records every backward pass."""
    packed = Packed(ragged(5, 9))
    logps_P = packed.logps_P.to(device)
    gradient_P, loss = torch.func.grad_and_value(lambda x_P: packed.run(x_P, name, backend)[0].sum())(logps_P)
    leaf_P = logps_P.clone().requires_grad_()
    expected = packed.run(leaf_P, name, backend)[0].sum()
    (expected_P,) = torch.autograd.grad(expected, leaf_P)
    assert torch.equal(loss, expected)
    assert torch.equal(gradient_P, expected_P)


@pytest.mark.parametrize(("backend", "device"), c.backends_for("preference_loss", without=c.INTERPRETED))
def test_compiles(backend: str, device: str) -> None:
    packed = Packed(ragged(5, 9))
    run = lambda x_P: packed.run(x_P, "sigmoid", backend)[0]  # noqa: E731
    c.assert_compiles(run, [packed.logps_P.to(device)])


# --- refusals ---------------------------------------------------------------------------------------------------


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
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    names = ("chosen_N", "rejected_N", "ref_chosen_N", "ref_rejected_N")
    with pytest.raises(ValueError, match=message):
        preference_loss(**({name: torch.zeros(2) for name in names} | options), backend="torch")


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


# --- properties -------------------------------------------------------------------------------------------------


@given(data=st.data())
@on_every_backend
def test_any_batch(backend: str, device: str, data: st.DataObject) -> None:
    """Any lengths, empty ones too, any beta and spread, all compiled losses."""
    pairs = data.draw(st.lists(st.tuples(*[st.integers(0, 12)] * 2), max_size=6), "lengths")
    name = data.draw(st.sampled_from(COMPILED), "name")
    spread = data.draw(st.sampled_from([0.01, 1.0, 100.0]), "spread")
    seed, beta = data.draw(st.integers(0, 2**20), "seed"), data.draw(st.floats(0.01, 2), "beta")
    packed = Packed([length for pair in pairs for length in pair], spread=spread, seed=seed)
    crowd = Packed(ragged(33, 12), spread=spread, seed=seed)
    c.conform(
        lambda x_P: packed.run(x_P, name, backend, beta=beta),
        packed.case(device, name, beta=beta),
        crowd=crowd.case(device, name, beta=beta),
    )
