"""DPO's losses through `linear_loss`, against logits in full and `preference_loss` on the sums.

Letters: N pairs, P predictions, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from alignfast.kernels import Stats, linear_loss, preference_loss
from alignfast.kernels._pairwise import LOSSES
from alignfast.losses import couples_batch, dpo_counts, dpo_groups, dpo_loss, dpo_stats, ld_weights

D, V = 8, 41
LENGTHS = (3, 5, 4, 2, 6, 1, 2, 2)  # the chosen longer, shorter and as long as the rejected
GENERATOR = torch.Generator().manual_seed(0)
HIDDEN_PD = torch.randn(sum(LENGTHS), D, generator=GENERATOR, dtype=torch.float64)
WEIGHT_VD = torch.randn(V, D, generator=GENERATOR, dtype=torch.float64)
TARGETS_P = torch.randint(0, V, (sum(LENGTHS),), generator=GENERATOR)
REFS = tuple(-12 + torch.randn(2, 4, generator=GENERATOR, dtype=torch.float64))
REFERENCE_FREE = [name for name in LOSSES if not LOSSES[name].reference]


class Step:
    """A step of four pairs, computed whole or in part: loss, metrics, gradients."""

    def __init__(self, loss_type: Any = "sigmoid", **options: Any) -> None:
        self.loss_type, self.options = loss_type, options
        names = [loss_type] if isinstance(loss_type, str) else loss_type
        self.refs = (None, None) if names[0] in REFERENCE_FREE else REFS
        if any(name in LOSSES and LOSSES[name].smooths for name in names):
            self.options = {"label_smoothing": 0.1} | options

    def run(self, pairs: slice = slice(0, 4), chunk_rows: int | None = None) -> tuple:
        lengths = LENGTHS[2 * pairs.start : 2 * pairs.stop]
        rows = slice(sum(LENGTHS[: 2 * pairs.start]), sum(LENGTHS[: 2 * pairs.stop]))
        refs = [None if ref_N is None else ref_N[pairs] for ref_N in self.refs]
        loss_fn = dpo_loss(lengths, *refs, num_pairs=4, loss_type=self.loss_type, **self.options)
        leaves = HIDDEN_PD[rows].clone().requires_grad_(), WEIGHT_VD.clone().requires_grad_()
        loss, metrics = linear_loss(
            *leaves, TARGETS_P[rows], loss_fn, stats=dpo_stats(self.options.get("use_weighting", False)),
            group_sizes=dpo_groups(lengths, self.loss_type), chunk_rows=chunk_rows,
        )  # fmt: skip
        return loss, metrics, *torch.autograd.grad(loss, leaves)


def logits(hidden_PD: Tensor) -> Tensor:
    return hidden_PD @ WEIGHT_VD.T


def token_logps(hidden_PD: Tensor) -> Tensor:
    return logits(hidden_PD).log_softmax(1).gather(1, TARGETS_P[:, None])[:, 0]


def sums(x_P: Tensor) -> tuple[Tensor, Tensor]:
    """Over each completion: of the chosen, of the rejected."""
    each = [part.sum() for part in x_P.split(LENGTHS)]
    return torch.stack(each[::2]), torch.stack(each[1::2])


def assert_same(ours: tuple, expected: Tensor, hidden_PD: Tensor) -> None:
    assert ours[0].item() == pytest.approx(expected.item(), rel=1e-12)
    (gradient_PD,) = torch.autograd.grad(expected, hidden_PD)
    assert (ours[2] - gradient_PD).abs().max() <= 1e-12 * gradient_PD.abs().max()


@pytest.mark.parametrize("chunk_rows", [None, 9], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("name", LOSSES)
def test_is_the_mean_preference_loss(name: str, chunk_rows: int | None) -> None:
    step = Step(name, beta=0.3)
    hidden_PD = HIDDEN_PD.clone().requires_grad_()
    tokens = torch.tensor(LENGTHS)
    refs = () if name in REFERENCE_FREE else REFS
    loss_N, *_ = preference_loss(
        *sums(token_logps(hidden_PD)), *refs, chosen_len_N=tokens[::2], rejected_len_N=tokens[1::2],
        loss_type=name, **step.options,
    )  # fmt: skip
    assert_same(step.run(chunk_rows=chunk_rows), loss_N.mean(), hidden_PD)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "orpo", ["sigmoid", "sft"]])
def test_micro_batches_add_up(loss_type: Any) -> None:
    """The normalisers are the step's: one pair and three sum to four."""
    step = Step(loss_type, num_chosen_tokens=15)
    whole, first, rest = step.run(), step.run(slice(0, 1)), step.run(slice(1, 4))
    assert (first[0] + rest[0]).item() == pytest.approx(whole[0].item(), rel=1e-12)
    assert torch.allclose(torch.cat((first[2], rest[2])), whole[2], rtol=1e-12)
    assert torch.allclose(first[3] + rest[3], whole[3], rtol=1e-12)
    for name, value in whole[1].items():
        assert (first[1][name] + rest[1][name]).item() == pytest.approx(value.item())


def test_metrics_are_trls() -> None:
    """Each of TRL's names, each the mean that TRL logs."""
    step = Step(beta=0.3, label_smoothing=0.0)
    _, metrics, *_ = step.run(chunk_rows=9)
    counts = dpo_counts(len(LENGTHS) // 2, sum(LENGTHS[::2]), sum(LENGTHS[1::2]))
    means = {name: (value / counts[name]).item() for name, value in metrics.items()}
    logps_P, logits_PV = token_logps(HIDDEN_PD), logits(HIDDEN_PD)
    p_PV = logits_PV.softmax(1)
    chosen_P = torch.tensor([True, False] * 4).repeat_interleave(torch.tensor(LENGTHS))
    chosen_N, rejected_N = sums(logps_P)
    rewards = 0.3 * (chosen_N - REFS[0]), 0.3 * (rejected_N - REFS[1])
    expected = {
        "rewards/chosen": rewards[0].mean(),
        "rewards/rejected": rewards[1].mean(),
        "rewards/accuracies": (rewards[0] > rewards[1]).double().mean(),
        "rewards/margins": (rewards[0] - rewards[1]).mean(),
        "logps/chosen": chosen_N.mean(),
        "logps/rejected": rejected_N.mean(),
        "logits/chosen": logits_PV[chosen_P].mean(),
        "logits/rejected": logits_PV[~chosen_P].mean(),
        "entropy": -(p_PV * p_PV.log()).sum(1).mean(),
        "mean_token_accuracy": (p_PV.argmax(1) == TARGETS_P)[chosen_P].double().mean(),
    }
    assert means == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-9)
    assert 0 < means["rewards/accuracies"] < 1  # else a constant would pass


def test_sft_term() -> None:
    """The chosen's mean negative log-likelihood per token, times its weight."""
    step = Step(
        ["sigmoid", "sft"], loss_weights=[0.8, 2.0], num_chosen_tokens=15, beta=0.3, label_smoothing=0.0
    )
    hidden_PD = HIDDEN_PD.clone().requires_grad_()
    chosen_N, rejected_N = sums(token_logps(hidden_PD))
    loss_N, *_ = preference_loss(chosen_N, rejected_N, *REFS, beta=0.3)
    assert_same(step.run(chunk_rows=9), 0.8 * loss_N.mean() - 2 * chosen_N.sum() / 15, hidden_PD)


def test_wpo_weights() -> None:
    """exp of the mean of log p - log sum p^2 of both completions, without a gradient."""
    hidden_PD = HIDDEN_PD.clone().requires_grad_()
    logps_P = token_logps(hidden_PD)
    aligned_P = logps_P.detach() - logits(HIDDEN_PD).softmax(1).square().sum(1).log()
    tokens = torch.tensor(LENGTHS)
    weight_N = (
        torch.stack([x_N / n_N for x_N, n_N in zip(sums(aligned_P), (tokens[::2], tokens[1::2]))])
        .exp()
        .prod(0)
    )
    loss_N, *_ = preference_loss(*sums(logps_P), *REFS)
    step = Step(use_weighting=True, label_smoothing=0.0)
    assert_same(step.run(chunk_rows=9), (weight_N * loss_N).mean(), hidden_PD)


def test_ld_alpha() -> None:
    """Tokens beyond the shorter completion count by alpha; at 1 it is DPO."""
    hidden_PD = HIDDEN_PD.clone().requires_grad_()
    weights_P = ld_weights(LENGTHS, 0.25)
    assert weights_P.tolist() == [1, 1, 1, 1, 1, 1, .25, .25, 1, 1, .25, .25, 1, 1, 1, .25, .25, .25, .25, .25, 1,
                                  1, 1, 1, 1]  # fmt: skip
    loss_N, *_ = preference_loss(*sums(weights_P * token_logps(hidden_PD)), *REFS)
    assert_same(Step(ld_alpha=0.25, label_smoothing=0.0).run(chunk_rows=9), loss_N.mean(), hidden_PD)
    assert torch.equal(Step(ld_alpha=1.0).run()[2], Step().run()[2])


def test_empty_completions() -> None:
    """A pair without predictions, also between two chunks and at the end, is a pair with log-probs of 0."""
    lengths = (0, 0, 3, 2, 0, 0, 0, 4, 0, 0)
    refs = tuple(torch.linspace(-2, 1, 10, dtype=torch.float64).view(2, 5))
    loss_fn = dpo_loss(lengths, *refs, num_pairs=5)
    for chunk_rows in (4, 100):
        _, metrics = linear_loss(
            HIDDEN_PD[:9], WEIGHT_VD, TARGETS_P[:9], loss_fn, stats=dpo_stats(),
            group_sizes=dpo_groups(lengths, "sigmoid"), chunk_rows=chunk_rows,
        )  # fmt: skip
        chosen_N = torch.stack([part.sum() for part in token_logps(HIDDEN_PD)[:9].split(lengths)])[::2]
        assert metrics["rewards/chosen"].item() == pytest.approx(0.1 * (chosen_N - refs[0]).sum().item())


def test_reference_in_float32_and_a_compiled_graph() -> None:
    """References come from disk in float32; the whole forward is one graph."""
    step = Step(label_smoothing=0.0)
    step.refs = tuple(ref_N.float() for ref_N in REFS)
    lengths, loss_fn = LENGTHS, dpo_loss(LENGTHS, *step.refs, num_pairs=4)

    def forward(hidden_PD: Tensor) -> Tensor:
        groups = dpo_groups(lengths, "sigmoid")
        return linear_loss(
            hidden_PD,
            WEIGHT_VD.float(),
            TARGETS_P,
            loss_fn,
            stats=dpo_stats(),
            group_sizes=groups,
            chunk_rows=9,
        )[0]

    hidden_PD = HIDDEN_PD.float().requires_grad_()
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")(hidden_PD)
    assert compiled.item() == pytest.approx(step.run()[0].item(), rel=1e-5)


# --- refusals ---


def test_a_cut_group_is_refused() -> None:
    """Without group_sizes a chunk could end inside a pair, or inside a batch that aot sorts."""
    leaves = HIDDEN_PD, WEIGHT_VD, TARGETS_P
    for loss_type, groups in (("sigmoid", None), ("aot", dpo_groups(LENGTHS, "sigmoid"))):
        loss_fn = dpo_loss(LENGTHS, *REFS, num_pairs=4, loss_type=loss_type)
        with pytest.raises(ValueError, match="cuts what the loss couples: pass group_sizes=dpo_groups"):
            linear_loss(*leaves, loss_fn, stats=dpo_stats(), group_sizes=groups, chunk_rows=9)


def test_couples_batch() -> None:
    assert [name for name in LOSSES if couples_batch(name)] == ["aot", "aot_unpaired"]
    assert couples_batch(["sigmoid", "aot"])
    assert not couples_batch(["sigmoid", "sft"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "sft"}, "sft alone.*SFTTrainer"),
        ({"loss_type": ["sigmoid", "sft"]}, "give num_chosen_tokens"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "1 numbers for 2 loss types"),
        ({"loss_type": ["sigmoid", "stf"]}, "known are sigmoid"),
        ({"loss_type": "aot", "use_weighting": True}, "use_weighting weighs pairs, but aot"),
        ({"loss_type": ["sigmoid", "sft"], "num_chosen_tokens": 5, "use_weighting": True}, "not of one pair"),
        ({"ld_alpha": 1.5}, r"ld_alpha must lie in \[0, 1\], got 1.5"),
        ({"beta": -1.0}, "beta and discopop_tau must be positive"),
        ({"lengths": (3, 5, 4)}, "lengths come in pairs, chosen and rejected, got 3"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    """When the loss is made, before any batch."""
    lengths = options.pop("lengths", LENGTHS)
    with pytest.raises(ValueError, match=message):
        dpo_loss(lengths, *REFS, num_pairs=4, **options)


def test_an_unknown_option_is_an_error() -> None:
    with pytest.raises(TypeError, match="betta"):
        dpo_loss(LENGTHS, *REFS, num_pairs=4, betta=0.1)


def test_reference_is_asked_for_and_refused() -> None:
    stats = Stats(logps=torch.zeros(2))
    with pytest.raises(ValueError, match="sigmoid needs ref_chosen_N"):
        dpo_loss((1, 1), None, None, num_pairs=1)(stats, slice(0, 2))
    with pytest.raises(ValueError, match="simpo is reference-free"):
        dpo_loss((1, 1), torch.zeros(1), torch.zeros(1), num_pairs=1, loss_type="simpo")(stats, slice(0, 2))
