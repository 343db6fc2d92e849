"""Votes on rewards against their definitions, term by term."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from alignfast.losses import comparison_loss, ranking_loss, verdict_loss


def rewards(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def test_a_rating_is_a_thumb_at_each_level() -> None:
    reward_NH, cut_NK = rewards(6, 2), rewards(6, 4, seed=1)
    above_NK = rewards(6, 4, seed=2) > 0
    found_NH = verdict_loss(reward_NH, above_NK, cut_NK)
    for n in range(6):
        for h in range(2):
            terms = []
            for k in range(4):
                chance = 1 / (1 + math.exp(-(reward_NH[n, h] - cut_NK[n, k])))
                terms.append(-math.log(chance if above_NK[n, k] else 1 - chance))
            assert found_NH[n, h].item() == pytest.approx(sum(terms) / 4, rel=1e-12)


def davidson(lead: float, nu: float) -> tuple[float, float]:
    """P(the first wins), P(tie)."""
    one, other = math.exp(lead), 1.0
    total = one + other + nu * math.sqrt(one * other)
    return one / total, nu * math.sqrt(one * other) / total


@pytest.mark.parametrize("nu", [1e-3, 0.7, 20.0])
def test_wins_and_ties_are_davidsons(nu: float) -> None:
    lead_NH = rewards(8, 3)
    tied_N = torch.arange(8) % 3 == 0
    found_NH = comparison_loss(lead_NH, tied_N, math.log(nu))
    expected = [
        [-math.log(davidson(lead, nu)[int(tied)]) for lead in row]
        for row, tied in zip(lead_NH.tolist(), tied_N)
    ]
    torch.testing.assert_close(found_NH, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_the_chances_of_a_comparison_add_up_to_one() -> None:
    lead_NH, won_N = rewards(50, 1), torch.zeros(50, dtype=torch.bool)
    ways = [
        comparison_loss(lead, tied_N, 0.3)
        for lead, tied_N in ((lead_NH, won_N), (-lead_NH, won_N), (lead_NH, ~won_N))
    ]
    torch.testing.assert_close(sum(way.neg().exp() for way in ways), torch.ones(50, 1, dtype=torch.float64))


def test_without_ties_it_is_bradley_and_terry() -> None:
    reward_NKH, won_N = rewards(9, 2, 2), torch.zeros(9, dtype=torch.bool)
    found_NH = comparison_loss(reward_NKH[:, 0] - reward_NKH[:, 1], won_N, -math.inf)
    torch.testing.assert_close(found_NH, ranking_loss(reward_NKH, torch.zeros(9, dtype=torch.float64)))
    with pytest.raises(ValueError, match="under which no tie has a chance, and there is a tie"):
        comparison_loss(reward_NKH[:, 0], ~won_N, -math.inf)


@pytest.mark.parametrize("log_nu", [-math.inf, -1.0, 2.0])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients(log_nu: float, tied: bool) -> None:
    if tied and log_nu == -math.inf:
        return
    lead_NH, tied_N = rewards(5, 2).requires_grad_(), torch.full((5,), tied)
    assert torch.autograd.gradcheck(lambda lead: comparison_loss(lead, tied_N, log_nu), (lead_NH,))
    far_NH = torch.tensor([[-1e4], [0.0], [1e4]], requires_grad=True)
    comparison_loss(far_NH, tied_N[:3], log_nu).sum().backward()
    assert far_NH.grad is not None
    assert far_NH.grad.isfinite().all()
    # a tie draws the two together, a win apart
    assert far_NH.grad.sign().flatten().tolist() == ([-1, 0, 1] if tied else [-1, -1, 0])


def test_a_sure_and_right_reward_has_a_small_loss_and_not_none() -> None:
    won = comparison_loss(torch.tensor([[36.0]]), torch.tensor([False]), -math.inf)
    assert won.item() == pytest.approx(math.exp(-36), rel=1e-5)
    up = verdict_loss(torch.tensor([[36.0]]), torch.tensor([[True]]), torch.tensor([[0.0]]))
    assert up.item() == pytest.approx(math.exp(-36), rel=1e-5)
