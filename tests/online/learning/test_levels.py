"""Levels, offsets and ties are where their objective is least."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from alignfast.losses import verdict_loss
from alignfast.online.learning.levels import fit_levels, fit_ties
from alignfast.online.learning.said import Said
from alignfast.online.learning.trainer import FeedbackConfig, _Shared


def test_levels_and_offsets_are_where_the_objective_is_least() -> None:
    draw = np.random.default_rng(0)
    level_M, voter_M = np.tile(np.arange(4), 300), np.repeat(draw.integers(0, 25, 300), 4)
    reward_M, weight_M = np.repeat(draw.normal(0, 1, 300), 4), np.repeat(draw.uniform(0.1, 1, 300), 4)
    ease_V = draw.normal(0, 1.5, 25)
    above_M = draw.random(1200) < 1 / (1 + np.exp(-(reward_M - level_M + 1.5 - ease_V[voter_M])))
    found = fit_levels(reward_M, above_M, level_M, voter_M, weight_M, prior=1.5)
    levels = [torch.tensor(values, requires_grad=True) for values in found]
    cut_M = levels[0][level_M] + levels[1][voter_M]
    side_M = torch.tensor(np.where(above_M, 1.0, -1.0))
    loss_M = torch.nn.functional.softplus(-side_M * (torch.tensor(reward_M) - cut_M))
    loss = (torch.tensor(weight_M) * loss_M).sum() + levels[1].square().sum() / (2 * 1.5**2)
    (loss + levels[0].square().sum() / 200).backward()
    for values in levels:
        assert values.grad is not None
        assert values.grad.abs().max() < 0.02  # of 300 votes
    assert (np.diff(found.level_K) > 0).all()
    assert np.corrcoef(found.offset_V, ease_V)[0, 1] > 0.8


def test_who_is_pleased_by_all_is_taken_to_be_like_the_others_at_first() -> None:
    def offset(votes: int) -> float:
        voter_M = np.r_[np.repeat(np.arange(20), 10), np.full(votes, 20)]
        above_M = np.r_[np.arange(200) % 2 == 0, np.ones(votes, bool)]
        number = len(voter_M)
        level_M = np.zeros(number, int)
        found = fit_levels(np.zeros(number), above_M, level_M, voter_M, np.ones(number))
        return float(found.offset_V[20])

    assert 0 > offset(1) > offset(5) > offset(100) > -6
    assert offset(1) > -0.5


def test_levels_are_where_the_loss_of_training_is_least() -> None:
    """Each vote at its weight there: a rating of four levels is one vote, as a thumb is, and a contrary user's weighs less."""
    draw = random.Random(0)
    said: dict[int, Said] = {}
    for number in range(400):
        thumb, user = draw.random() < 0.5, f"user-{number % 8}"
        above = (draw.random() < 0.7,) if thumb else tuple(draw.randint(1, 5) > k for k in range(1, 5))
        said[number] = Said("thumb" if thumb else "rating", "a", ("b",), above=above, user=user)
    seen = {number: [draw.gauss(0, 1)] for number in said}
    weights = {number: 0.25 if one.user == "user-3" else 1.0 for number, one in said.items()}
    found = _Shared.fit(said, weights, seen, FeedbackConfig(output_dir="unused", voter_prior=0.7))
    rewards = [torch.tensor([seen[number]], dtype=torch.float64) for number in said]
    weight_N = torch.tensor(list(weights.values()), dtype=torch.float64)
    moved = torch.zeros(8, dtype=torch.float64, requires_grad=True)  # every user's offset
    cuts = {number: torch.tensor(cut, dtype=torch.float64) for number, cut in found.cuts.items()}
    loss = torch.zeros((), dtype=torch.float64)
    for number, one in said.items():
        cut_NK = (cuts[number] + moved[number % 8])[None]
        above_NK = torch.tensor([one.above])
        loss = loss + weight_N[number] * verdict_loss(rewards[number], above_NK, cut_NK)[0, 0]
    loss.backward()
    assert moved.grad is not None
    # At the least of the whole this is -b / prior^2, of offsets b that sum to nothing.
    offset_V = -moved.grad * 0.7**2
    assert abs(offset_V.sum()) < 0.01
    once = [
        next(n for n, of in said.items() if of.user == f"user-{v}" and of.kind == "thumb") for v in range(8)
    ]
    apart_V = torch.stack([cuts[number][0] for number in once])
    assert torch.allclose(apart_V - apart_V.mean(), offset_V - offset_V.mean(), atol=0.01)


def test_as_many_ties_are_expected_as_there_are() -> None:
    draw = np.random.default_rng(1)
    lead_Q, tied_Q, weight_Q = draw.normal(0, 2, 500), draw.random(500) < 0.3, draw.uniform(0, 1, 500)
    log_nu = fit_ties(lead_Q, tied_Q, weight_Q)
    nu = math.exp(log_nu)
    expected = weight_Q @ (nu / (nu + np.exp(lead_Q / 2) + np.exp(-lead_Q / 2)))
    assert expected == pytest.approx(weight_Q @ tied_Q, rel=1e-6)
    assert fit_ties(lead_Q, np.zeros(500, bool), weight_Q) == -math.inf
    assert fit_ties(lead_Q, np.ones(500, bool), weight_Q) == pytest.approx(8)
