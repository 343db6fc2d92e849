"""KTO's losses through `linear_loss`, against the papers' formulas on logits in full, in float64.

Letters: N thumbs, P predictions, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from alignfast.kernels import linear_loss
from alignfast.losses import KTO_LOSSES, KTO_STATS, kto_loss, kto_metrics

D, V = 8, 41
LENGTHS = (3, 5, 4, 0, 6, 1)  # one without a prediction
LABELS = (1.0, 0.0, 1.0, 1.0, 0.0, 0.0)
GENERATOR = torch.Generator().manual_seed(0)
HIDDEN_PD = torch.randn(sum(LENGTHS), D, generator=GENERATOR, dtype=torch.float64)
WEIGHT_VD = torch.randn(V, D, generator=GENERATOR, dtype=torch.float64)
TARGETS_P = torch.randint(0, V, (sum(LENGTHS),), generator=GENERATOR)
REF_N = -12 + 2 * torch.randn(6, generator=GENERATOR, dtype=torch.float64)
UP_N = torch.tensor(LABELS).bool()
POINT = 0.7
OPTIONS = dict(beta=0.3, desirable_weight=1.5, undesirable_weight=0.6)


def step(thumbs: slice = slice(0, 6), chunk_rows: int | None = None, **options: Any) -> tuple:
    """Loss, metrics, gradients of these thumbs out of a step of six."""
    lengths = LENGTHS[thumbs]
    rows = slice(sum(LENGTHS[: thumbs.start]), sum(LENGTHS[: thumbs.stop]))
    loss_fn = kto_loss(lengths, LABELS[thumbs], REF_N[thumbs], POINT, num_thumbs=6, **OPTIONS | options)
    leaves = HIDDEN_PD[rows].clone().requires_grad_(), WEIGHT_VD.clone().requires_grad_()
    loss, metrics = linear_loss(
        *leaves, TARGETS_P[rows], loss_fn, stats=KTO_STATS, group_sizes=lengths, chunk_rows=chunk_rows
    )
    return loss, metrics, *torch.autograd.grad(loss, leaves)


def completion_logps(hidden_PD: Tensor) -> Tensor:
    logps_P = (hidden_PD @ WEIGHT_VD.T).log_softmax(1).gather(1, TARGETS_P[:, None])[:, 0]
    return torch.stack([part.sum() for part in logps_P.split(LENGTHS)])


def expected_loss(ratio_N: Tensor, loss_type: str) -> Tensor:
    """As the papers and TRL 1.16 write it."""
    beta = OPTIONS["beta"]
    if loss_type == "kto":  # lambda_y - v(x, y), arXiv 2402.01306 eq. 7
        up_N, down_N = (
            1 - torch.sigmoid(beta * (ratio_N - POINT)),
            1 - torch.sigmoid(beta * (POINT - ratio_N)),
        )
    else:
        up_N, down_N = 1 - torch.sigmoid(beta * ratio_N), torch.sigmoid(beta * ratio_N)
    return torch.where(
        UP_N, OPTIONS["desirable_weight"] * up_N, OPTIONS["undesirable_weight"] * down_N
    ).mean()


@pytest.mark.parametrize("chunk_rows", [None, 7], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("loss_type", KTO_LOSSES)
def test_is_the_papers_loss(loss_type: str, chunk_rows: int | None) -> None:
    hidden_PD = HIDDEN_PD.clone().requires_grad_()
    expected = expected_loss(completion_logps(hidden_PD) - REF_N, loss_type)
    (gradient_PD,) = torch.autograd.grad(expected, hidden_PD)
    loss, _, dhidden_PD, _ = step(chunk_rows=chunk_rows, loss_type=loss_type)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert (dhidden_PD - gradient_PD).abs().max() <= 1e-12 * gradient_PD.abs().max()


def test_the_reference_point_is_a_constant() -> None:
    """A higher one makes thumbs up count as losses: they are pushed harder where the reward is near it."""
    point = torch.tensor(POINT)
    loss_fn = kto_loss(LENGTHS, LABELS, REF_N, point, num_thumbs=6, **OPTIONS)
    loss, metrics = linear_loss(
        HIDDEN_PD, WEIGHT_VD, TARGETS_P, loss_fn, stats=KTO_STATS, group_sizes=LENGTHS
    )
    assert loss.item() == pytest.approx(step()[0].item(), rel=1e-7)  # a tensor's 0.7 is a float32 one
    assert metrics["kl"].item() == pytest.approx(6 * POINT)


def test_micro_batches_add_up() -> None:
    whole, first, rest = step(), step(slice(0, 2)), step(slice(2, 6))
    assert (first[0] + rest[0]).item() == pytest.approx(whole[0].item(), rel=1e-12)
    assert torch.allclose(torch.cat((first[2], rest[2])), whole[2], rtol=1e-12)
    assert torch.allclose(first[3] + rest[3], whole[3], rtol=1e-12)
    for name, value in whole[1].items():
        assert (first[1][name] + rest[1][name]).item() == pytest.approx(value.item())


def test_metrics_are_trls() -> None:
    tokens = torch.tensor(LENGTHS)
    counts = 3, 3, int(tokens[UP_N].sum()), int(tokens[~UP_N].sum())
    found = {name: value.item() for name, value in kto_metrics(step(chunk_rows=7)[1], *counts).items()}
    logps_N, logits_PV = completion_logps(HIDDEN_PD), HIDDEN_PD @ WEIGHT_VD.T
    up_P, p_PV = UP_N.repeat_interleave(tokens), logits_PV.softmax(1)
    rewards_N = OPTIONS["beta"] * (logps_N - REF_N)
    expected = {
        "rewards/chosen": rewards_N[UP_N].mean(),
        "rewards/rejected": rewards_N[~UP_N].mean(),
        "rewards/margins": rewards_N[UP_N].mean() - rewards_N[~UP_N].mean(),
        "logps/chosen": logps_N[UP_N].mean(),
        "logps/rejected": logps_N[~UP_N].mean(),
        "logits/chosen": logits_PV[up_P].mean(),
        "logits/rejected": logits_PV[~up_P].mean(),
        "entropy": -(p_PV * p_PV.log()).sum(1).mean(),
        "kl": torch.tensor(POINT, dtype=torch.float64),
    }
    assert found == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-9)


def test_far_rewards_stay_finite() -> None:
    """10,000 nats from the reference: no nan, and the gradient of what is lost already is 0."""
    for shift in (-1e4, 1e4):
        loss_fn = kto_loss(LENGTHS, LABELS, REF_N + shift, POINT, num_thumbs=6, **OPTIONS)
        hidden_PD = HIDDEN_PD.clone().requires_grad_()
        loss, _ = linear_loss(hidden_PD, WEIGHT_VD, TARGETS_P, loss_fn, stats=KTO_STATS, group_sizes=LENGTHS)
        loss.backward()
        assert loss.isfinite()
        assert hidden_PD.grad.isfinite().all()


def test_a_cut_completion_is_refused() -> None:
    loss_fn = kto_loss(LENGTHS, LABELS, REF_N, POINT, num_thumbs=6)
    with pytest.raises(ValueError, match="cuts a completion: pass group_sizes=lengths"):
        linear_loss(HIDDEN_PD, WEIGHT_VD, TARGETS_P, loss_fn, stats=KTO_STATS, chunk_rows=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "kot"}, "not one of kto, apo_zero_unpaired"),
        ({"beta": 0.0}, "beta must be positive, got 0.0"),
        ({"desirable_weight": -1.0}, "must be at least 0, and one of them above it, got -1.0 and 1.0"),
        ({"desirable_weight": 0.0, "undesirable_weight": 0.0}, "one of them above it"),
        ({"labels": (1.0,)}, "expected a label for each of 6 completions, got 1"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    labels = options.pop("labels", LABELS)
    with pytest.raises(ValueError, match=message):
        kto_loss(LENGTHS, labels, REF_N, num_thumbs=6, **options)
