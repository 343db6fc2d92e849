"""policy_loss: each loss against a plain loop; relations, refusals.

Letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ops.policies import Tokens, every_loss, needed, ragged
from torch import Tensor

from alignfast.kernels import kl_penalty, policy_loss
from alignfast.kernels._policy import LEVELS, LOSSES

LENGTHS = [3, 7, 1, 5, 2]
KLS = [{}, {"beta": 0.3}, {"beta": 0.3, "use_bias_correction_kl": True}, {"beta": 0.3, "kl_kind": "k1"}]
# ppo's ratio is that of a token
every_level = pytest.mark.parametrize(
    ("name", "level"),
    [(name, level) for name in LOSSES for level in LEVELS if (name, level) != ("ppo", "sequence")],
)


def at_level(name: str, level: str) -> dict[str, Any]:
    return {**needed(name), "importance_sampling_level": level}


# --- the definitions, by hand ---


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def of_ratio(name: str, ratio: float, advantage: float, logp: float, cap: float) -> float:
    """Loss of a token, as the papers write it: epsilon 0.2 and 0.3, cispo's largest ratio 1.5."""
    if name == "cispo":
        return -min(ratio, 1.5) * advantage * logp
    if name == "sapo":
        tau = 1.0 if advantage > 0 else 1.05
        return -4 / tau * sigmoid(tau * (ratio - 1)) * advantage
    loss = max(-ratio * advantage, -min(max(ratio, 0.8), 1.3) * advantage)
    return min(loss, -cap * advantage) if advantage < 0 else loss


def of_reference(kind: str, d: float) -> float:
    return {"k1": -d, "abs": abs(d), "k2": d * d / 2, "k3": math.exp(d) - 1 - d}[kind]


def by_hand(tokens: Tokens, name: str, level: str, cap: float = math.inf, **kl: Any) -> list[float]:
    """One token after the other; normalisers of the call."""
    out, start, kept = [0.0] * sum(tokens.lengths), 0, int(tokens.mask_T.sum())
    for length in tokens.lengths:
        at = [i for i in range(start, start + length) if tokens.mask_T[i]]
        start += length
        log_ratios = {i: (tokens.logps_T[i] - tokens.old_T[i]).item() for i in at}
        for i in at:
            log_ratio = sum(log_ratios.values()) / len(at) if level == "sequence" else log_ratios[i]
            ratio, logp = math.exp(log_ratio), tokens.logps_T[i].item()
            loss = of_ratio(name, ratio, tokens.advantages_T[i].item(), logp, cap)
            if kl:
                estimate = of_reference(kl.get("kl_kind", "k3"), tokens.ref_T[i].item() - logp)
                loss += kl["beta"] * estimate * (ratio if kl.get("use_bias_correction_kl") else 1)
            sequences = len(tokens.lengths)
            out[i] = loss / {
                "grpo": len(at) * sequences, "sapo": len(at) * sequences, "dr_grpo": 50 * sequences,
            }.get(name, kept)  # fmt: skip
    return out


@pytest.mark.parametrize("kl", KLS, ids=str)
@every_level
def test_definition_by_hand(name: str, level: str, kl: dict[str, Any]) -> None:
    tokens = Tokens(LENGTHS, torch.float64)
    options = at_level(name, level) | kl
    if name not in ("cispo", "sapo"):
        options["epsilon_high"] = 0.3
    loss_T, _ = tokens.call(tokens.logps_T, name, "torch", **options)
    assert loss_T.tolist() == pytest.approx(by_hand(tokens, name, level, **kl), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(("name", "option"), [("ppo", "dual_clip"), ("grpo", "delta"), ("dapo", "delta")])
def test_caps_by_hand(name: str, option: str) -> None:
    """The dual clip of verl (clip_ratio_c) and the delta of TRL: one bound, where the advantage is negative."""
    tokens = Tokens([9, 30], torch.float64, spread=1.0)
    loss_T, metrics = tokens.call(
        tokens.logps_T, name, "torch", epsilon_high=0.3, num_items=None, **{option: 2.0}
    )
    expected = by_hand(tokens, name, "token", cap=2.0)
    assert loss_T.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert metrics["clip_ratio/cap_mean"] >= 2
    assert expected != pytest.approx(by_hand(tokens, name, "token"))


@every_level
def test_gradcheck(name: str, level: str) -> None:
    """With a corrected KL and entropy; tokens lie on both sides of each bound."""
    tokens = Tokens(LENGTHS, torch.float64)
    tokens.logps_T[~tokens.mask_T] = -1.0  # finite differences of NaN are NaN
    entropy_T = torch.rand(18, dtype=torch.float64)
    options = at_level(name, level) | {"beta": 0.3, "use_bias_correction_kl": True, "entropy_coef": 0.1}

    def run(logps_T: Tensor, entropy_T: Tensor) -> Tensor:
        return tokens.call(logps_T, name, "torch", entropy_T=entropy_T, **options)[0]

    if name == "cispo":  # its weight is a constant by definition: differences would see it move
        tokens.old_T = tokens.logps_T + 0.0
        logps_T = tokens.logps_T.requires_grad_()
        (gradient_T,) = torch.autograd.grad(tokens.call(logps_T, name, "torch")[0].sum(), logps_T)
        kept_T = torch.where(tokens.mask_T, tokens.advantages_T, 0)
        assert torch.allclose(gradient_T, -kept_T / tokens.mask_T.sum(), rtol=1e-12)
        return
    leaves = (tokens.logps_T.requires_grad_(), entropy_T.requires_grad_())
    assert torch.autograd.gradcheck(run, leaves)


def test_normalisers_of_the_step() -> None:
    """`num_items` takes the place of the call's own count, as a number and as a tensor."""
    tokens = Tokens(LENGTHS, torch.float64)
    for name, loss in LOSSES.items():
        own = int(tokens.mask_T.sum()) if loss.counts == "tokens" else len(LENGTHS)
        expected_T, _ = tokens.call(tokens.logps_T, name, "torch")
        for num_items in (2 * own, torch.tensor(2 * own)):
            loss_T, _ = tokens.call(tokens.logps_T, name, "torch", num_items=num_items)
            assert torch.allclose(2 * loss_T, expected_T, rtol=1e-14)


def test_metrics_by_hand() -> None:
    x = [0.0, 0.5, -0.5, 0.5, -0.5, 2.0, 7.0]  # low bound -0.22, high 0.18, cap 1.1
    advantages = [1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 1.0]
    mask_T = torch.tensor([True] * 6 + [False])
    logps_T, zeros_T = torch.tensor(x), torch.zeros(7)
    _, metrics = policy_loss(
        logps_T, zeros_T, torch.tensor(advantages), mask_T=mask_T, loss_type="ppo", dual_clip=3.0, backend="torch",
        ref_logps_T=zeros_T + 0.1, beta=0.5, entropy_T=torch.tensor([1.0] * 6 + [math.nan]),
    )  # fmt: skip
    expected = {
        "clip_ratio/low_mean": 1, "clip_ratio/high_mean": 1, "clip_ratio/region_mean": 2, "clip_ratio/cap_mean": 1,
        "ratio": sum(map(math.exp, x[:6])), "max_ratio": math.exp(2), "approx_kl/k1": -2.0,
        "approx_kl/k3": sum(math.exp(v) - 1 - v for v in x[:6]), "entropy": 6.0,
        "kl": sum(math.exp(0.1 - v) - 1 - (0.1 - v) for v in x[:6]),
    }  # fmt: skip
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected, rel=1e-5)
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())
    # of the old policy from the new, over the old one's tokens
    k3 = kl_penalty(zeros_T, logps_T, kind="k3")[:6].sum()
    assert metrics["approx_kl/k3"].item() == pytest.approx(k3.item(), rel=1e-6)


def test_at_sequence_level_a_sequence_is_clipped_once() -> None:
    """A sequence of 4 tokens above the bound, one of 1 within it."""
    logps_T = torch.tensor([0.5] * 4 + [0.1])
    _, metrics = policy_loss(
        logps_T, torch.zeros(5), torch.ones(5), seq_T=torch.tensor([3, 3, 3, 3, 0]), loss_type="grpo",
        importance_sampling_level="sequence",
    )  # fmt: skip
    assert metrics["clip_ratio/high_mean"].item() == pytest.approx(1)
    assert metrics["ratio"].item() == pytest.approx(math.exp(0.5) + math.exp(0.1))
    assert metrics["max_ratio"].item() == pytest.approx(math.exp(0.5))


# --- relations ---


@every_loss
def test_at_step_0_the_gradient_is_minus_the_advantage(name: str) -> None:
    """The ratio is exactly 1 under a policy that has not moved, and nothing is clipped, whatever epsilon is."""
    tokens = Tokens(LENGTHS)
    logps_T = tokens.logps_T.requires_grad_()
    tokens.old_T = logps_T.detach()
    epsilon = {"epsilon": 0.0} if name not in ("cispo", "sapo") else {}
    loss_T, metrics = tokens.call(logps_T, name, "torch", num_items=4, **epsilon)
    (gradient_T,) = torch.autograd.grad(loss_T.sum(), logps_T)
    normaliser_T = {
        "grpo": 4 * tokens.kept_lengths[tokens.seq_T], "sapo": 4 * tokens.kept_lengths[tokens.seq_T],
        "dr_grpo": 4 * 50,
    }.get(name, 4)  # fmt: skip
    kept_T = torch.where(tokens.mask_T, tokens.advantages_T, 0)
    assert torch.allclose(gradient_T, -kept_T / normaliser_T, rtol=1e-6)
    assert metrics["max_ratio"] == 1
    assert metrics["ratio"] == tokens.mask_T.sum()
    assert metrics["approx_kl/k3"] == 0


@every_level
def test_chunks_of_whole_sequences_add_up(name: str, level: str) -> None:
    """Loss, gradient and metrics, in any order of the sequences, if the step's normaliser is given."""
    tokens = Tokens(LENGTHS, torch.float64)
    options = at_level(name, level) | {"beta": 0.2, "num_items": 7}
    whole_T, expected = tokens.call(tokens.logps_T, name, "torch", **options)
    found: dict[str, Tensor] = {}
    for part in ([4, 0], [2], [3, 1]):  # sequences of a chunk, in the order in which they lie
        rows = torch.cat([(tokens.seq_T == s).nonzero()[:, 0] for s in part])
        tensors = {key: x_T[rows] for key, x_T in tokens.tensors(tokens.logps_T).items()}
        loss_T, metrics = policy_loss(tokens.logps_T[rows], **tensors, **options, loss_type=name)
        assert torch.allclose(loss_T, whole_T[rows], rtol=1e-13)
        for key, value in metrics.items():
            before = found.get(key, torch.zeros(()))
            found[key] = torch.maximum(before, value) if key.startswith("max") else before + value
    assert {k: v.item() for k, v in found.items()} == pytest.approx(
        {k: v.item() for k, v in expected.items()}
    )


def test_losses_that_are_one_here() -> None:
    """ppo, bnpo and dapo under a normaliser of the step; grpo at both levels on sequences of one token."""
    tokens = Tokens(LENGTHS, torch.float64)
    losses = [tokens.call(tokens.logps_T, name, "torch")[0] for name in ("ppo", "bnpo", "dapo")]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])
    single = Tokens([1] * 20, torch.float64)
    by_level = [single.call(single.logps_T, "grpo", "torch", importance_sampling_level=x)[0] for x in LEVELS]
    assert torch.allclose(*by_level, rtol=1e-14)


def test_importance_weights_weigh_the_policy_term_alone() -> None:
    tokens = Tokens(LENGTHS, torch.float64)
    weights_T = torch.linspace(0, 2, 18, dtype=torch.float64)
    policy_T, _ = tokens.call(tokens.logps_T, "dapo", "torch")
    both_T, _ = tokens.call(tokens.logps_T, "dapo", "torch", beta=0.2)
    weighted_T, _ = tokens.call(tokens.logps_T, "dapo", "torch", beta=0.2, importance_weights_T=weights_T)
    assert torch.allclose(weighted_T, policy_T * weights_T + (both_T - policy_T), rtol=1e-12, atol=1e-16)


@every_loss
def test_entropy_is_averaged_as_the_loss(name: str) -> None:
    """The bonus of each token over the normaliser that its policy term has, and so its gradient."""
    tokens = Tokens(LENGTHS, torch.float64)
    entropy_T = torch.rand(
        18, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    plain_T, before = tokens.call(tokens.logps_T, name, "torch")
    loss_T, metrics = tokens.call(tokens.logps_T, name, "torch", entropy_T=entropy_T, entropy_coef=0.3)
    kept = int(tokens.mask_T.sum())
    per_sequence_T = 5 * tokens.kept_lengths[tokens.seq_T]
    normaliser_T = {"grpo": per_sequence_T, "sapo": per_sequence_T, "dr_grpo": 5 * 50}.get(name, kept)
    weight_T = 0.3 * tokens.mask_T.double() / normaliser_T
    assert torch.allclose(plain_T - loss_T, weight_T * entropy_T, rtol=1e-12, atol=1e-16)
    assert torch.allclose(torch.autograd.grad(loss_T.sum(), entropy_T)[0], -weight_T, rtol=1e-12)
    assert metrics.keys() - before.keys() == {"entropy"}


def test_masked_tokens_of_a_sequence_with_an_infinite_ratio() -> None:
    """Their KL of 0 is not multiplied by the sequence's ratio of inf."""
    logps_T, mask_T = torch.tensor([1e4, 0.0, -1.0], requires_grad=True), torch.tensor([True, False, True])
    zeros_T, seq_T = torch.zeros(3), torch.tensor([0, 0, 1])
    loss_T, metrics = policy_loss(
        logps_T, zeros_T, torch.ones(3), ref_logps_T=zeros_T, mask_T=mask_T, seq_T=seq_T, beta=0.1,
        use_bias_correction_kl=True, importance_sampling_level="sequence", backend="torch",
    )  # fmt: skip
    (gradient_T,) = torch.autograd.grad(loss_T.sum(), logps_T)
    assert loss_T[0] == metrics["max_ratio"] == math.inf
    assert (loss_T[1], gradient_T[1]) == (0, 0)
    assert loss_T[2].isfinite()
    assert gradient_T[2].isfinite()


def test_the_corrected_kl_follows_the_kl() -> None:
    """Expected over the old policy's tokens its gradient is that of KL(pi || ref); without the ratio it is not."""
    generator = torch.Generator().manual_seed(0)
    logits_V, old_V, ref_V = torch.randn(3, 40, generator=generator, dtype=torch.float64).log_softmax(1)
    logits_V = logits_V.requires_grad_()
    logps_V = logits_V.log_softmax(0)
    kl = (logps_V.exp() * (logps_V - ref_V)).sum()
    (wanted_V,) = torch.autograd.grad(kl, logits_V, retain_graph=True)
    follows = []
    for corrected in (True, False):
        loss_V, _ = policy_loss(
            logps_V, old_V, torch.zeros(40), ref_logps_T=ref_V, beta=1.0, num_items=1, backend="torch",
            use_bias_correction_kl=corrected,
        )  # fmt: skip
        follows.append(torch.autograd.grad((old_V.exp() * loss_V).sum(), logits_V, retain_graph=True)[0])
    assert torch.allclose(follows[0], wanted_V, atol=1e-14)
    assert not torch.allclose(follows[1], wanted_V, atol=1e-3)


# --- refusals ---


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "bnpo"},
        {"loss_type": "cispo", "epsilon_high": 2.0},
        {"loss_type": "sapo"},
        {"importance_sampling_level": "sequence"},
        {"kl_kind": "k2", "beta": 0.1, "ref_logps_T": torch.zeros(2)},
    ],
    ids=str,
)
def test_compiled_backends_refuse_what_they_do_not_know(
    backend: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named by argument or environment they refuse; `auto` computes it in torch."""
    inputs, seq_T = [torch.zeros(2), torch.zeros(2), torch.ones(2)], torch.tensor([0, 1])
    expected_T, _ = policy_loss(*inputs, seq_T=seq_T, **options, backend="torch")
    assert torch.equal(policy_loss(*inputs, seq_T=seq_T, **options)[0], expected_T)
    with pytest.raises(RuntimeError, match=f"no {backend} code for .*knows ppo, grpo, dapo.*backend='torch'"):
        policy_loss(*inputs, seq_T=seq_T, **options, backend=backend)
    monkeypatch.setenv("ALIGNFAST_BACKEND", backend)
    with pytest.raises(RuntimeError, match=f"no {backend} code for"):
        policy_loss(*inputs, seq_T=seq_T, **options)


TWO = torch.zeros(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "gpro"}, "loss_type is 'gpro'; known are ppo, grpo"),
        ({"importance_sampling_level": "group"}, "level='group' is not one of token, sequence"),
        ({"kl_kind": "k4"}, "kl_kind='k4' is not one of k1"),
        ({"loss_type": "sapo", "epsilon": 0.1}, "epsilon has no meaning for sapo, only for grpo, bnpo"),
        ({"loss_type": "cispo", "epsilon_high": 2.0, "epsilon": 0.1}, "epsilon has no meaning for cispo"),
        ({"loss_type": "ppo", "delta": 2.0}, "delta has no meaning for ppo, only for grpo, bnpo, dr_grpo, dapo"),
        ({"loss_type": "grpo", "dual_clip": 3.0}, "dual_clip has no meaning for grpo, only for ppo"),
        ({"max_completion_length": 9}, "max_completion_length has no meaning for dapo, only for dr_grpo"),
        ({"loss_type": "ppo", "importance_sampling_level": "sequence"}, "level has no meaning for ppo"),
        ({"sapo_temperature_pos": 2.0}, "sapo_temperature_pos has no meaning for dapo, only for sapo"),
        ({"loss_type": "sapo", "sapo_temperature_neg": 0.0}, "temperatures must be > 0, got 1.0 and 0.0"),
        ({"use_bias_correction_kl": True}, "beta is 0: there is no KL term for kl_kind or use_bias_correction_kl"),
        ({"kl_kind": "k1"}, "beta is 0: there is no KL term"),
        ({"beta": 0.1}, "beta=0.1 needs ref_logps_T"),
        ({"beta": -0.1, "ref_logps_T": TWO}, "beta must be >= 0 and entropy_coef finite, got -0.1"),
        ({"ref_logps_T": TWO}, "beta is 0, so that nothing would use ref_logps_T; leave it out"),
        ({"entropy_coef": 0.1}, "entropy_coef=0.1 needs entropy_T"),
        ({"loss_type": "cispo"}, r"cispo needs epsilon_high > 0, the largest ratio itself .*got None"),
        ({"epsilon": 1.5}, r"epsilon must lie in \[0, 1\] and epsilon_high be >= 0, got 1.5, 1.5"),
        ({"delta": 1.1}, r"delta, .*must be > 1 \+ epsilon_high = 1.2, got 1.1"),
        ({"loss_type": "ppo", "dual_clip": 1.0}, "dual_clip, the largest ratio .*must be > 1, got 1.0"),
        ({"loss_type": "dr_grpo"}, "dr_grpo divides by max_completion_length, which must be >= 1, got None"),
        ({"loss_type": "dr_grpo", "max_completion_length": 5}, "dr_grpo averages over sequences; give num_items, or"),
        ({"loss_type": "grpo", "num_items": 2}, "grpo averages over sequences; give seq_T"),
        ({"loss_type": "sapo"}, "sapo averages over sequences; give seq_T"),
        ({"importance_sampling_level": "sequence"}, "dapo averages over sequences; give seq_T"),
        ({"seq_T": torch.tensor([0, 1], dtype=torch.int32)}, "seq_T must be int64, got torch.int32"),
        ({"num_items": 0}, "num_items counts the tokens of the whole step, so it is > 0, got 0"),
        ({"num_items": torch.ones(1)}, r"num_items must be a number or a 0-d tensor, got shape \(1,\)"),
        ({"logps_T": torch.zeros(2, 1)}, r"in one dimension, got torch.float32 \(2, 1\)"),
        ({"logps_T": torch.zeros(2, dtype=torch.int64)}, "floating-point log-probs"),
        ({"mask_T": torch.ones(3)}, r"mask_T must be like logps_T, \(2,\) on cpu, got \(3,\) on cpu"),
        ({"old_logps_T": torch.zeros(2, requires_grad=True)}, "old_logps_T is a constant, but requires a gradient"),
        ({"advantages_T": torch.zeros(2, requires_grad=True)}, "advantages_T is a constant, but requires"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_refusals(backend: str, options: dict[str, Any], message: str) -> None:
    tensors = {"logps_T": TWO, "old_logps_T": TWO, "advantages_T": TWO}
    with pytest.raises(ValueError, match=message):
        policy_loss(**tensors | options, backend=backend)


def test_scattered_sequences_are_refused() -> None:
    three_T = torch.zeros(3)
    with pytest.raises(ValueError, match="tokens of a sequence must lie end to end, got seq_T = "):
        policy_loss(three_T, three_T, three_T, seq_T=torch.tensor([0, 1, 0]), loss_type="grpo")
    policy_loss(three_T, three_T, three_T, seq_T=torch.tensor([5, 5, -1]), loss_type="grpo")


def test_shapes_of_ragged_batches() -> None:
    """A case of many sequences, as a step has them: the sum over sequences of their means."""
    tokens = Tokens(ragged(50, 30), torch.float64)
    loss_T, _ = tokens.call(tokens.logps_T, "grpo", "torch")
    per_token_T, _ = tokens.call(tokens.logps_T, "dapo", "torch", num_items=1)
    means = [part_T.sum() / max(int(kept), 1) for part_T, kept in
             zip(per_token_T.split(tokens.lengths), tokens.kept_lengths)]  # fmt: skip
    assert loss_T.sum().item() == pytest.approx((sum(means) / 50).item(), rel=1e-12)
