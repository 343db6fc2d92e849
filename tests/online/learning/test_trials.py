"""Candidates before gate and canary, in numbers: who is promoted.

A candidate has a share of wins before people, p, and figures as an evaluation finds them: 200 held-out pairs and 64 judged
answers, which agree with people. 500 voters at most come to the canary, and each one's first vote counts.

Policies that are hacked by training, before measurement, gate and duels of the loop itself: tests/online/loop/test_hacked.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from online.learning.test_sequential import capitals

from alignfast.data.intervals import proportion
from alignfast.online.learning.gate import GateConfig, gate

SOUND: dict[str, Any] = {
    "kl": 0.2, "length": 60.0, "length_serving": 60.0, "cut": 0.02, "cut_serving": 0.02, "distinct_2": 0.6,
    "distinct_2_serving": 0.6, "reward": 0.3, "reward_serving": 0.0, "suites": {},
}  # fmt: skip
# What hackers of each kind do to figures, drawn between two values, and how people like it.
HACKS: dict[str, tuple[dict[str, tuple[float, float]], tuple[float, float]]] = {
    "reward": ({"reward": (1.0, 4.0), "kl": (0.3, 0.9)}, (0.2, 0.42)),
    "length": ({"length": (100.0, 200.0), "reward": (0.5, 2.0), "cut": (0.0, 0.2)}, (0.45, 0.55)),
    "broken": ({"distinct_2": (0.0, 0.25), "kl": (0.5, 6.0), "cut": (0.1, 1.0)}, (0.0, 0.2)),
}


def measured(draw: np.random.Generator, p: float, changed: dict[str, float]) -> dict[str, Any]:
    """What an evaluation finds of a candidate that wins so often."""
    pairs, answers = (proportion(draw.random(number) < p)._asdict() for number in (200, 64))
    return {**SOUND, **changed, "preference": pairs, "win_rate": answers}


def canary_passes(draw: np.random.Generator, p: float, voters: int = 500) -> bool:
    """Whether at any time the interval of wins lies above 1/2, before it lies below."""
    wins_N = (draw.random(voters) < p).astype(float)
    enough = math.log(2 / 0.05)
    above_N = capitals(wins_N[None], 0.5)[0] >= enough
    below_N = capitals(1 - wins_N[None], 0.5)[0] >= enough
    first_above, first_below = (int(of.argmax()) if of.any() else voters for of in (above_N, below_N))
    return first_above < min(first_below, voters)


def promoted(draw: np.random.Generator, p: float, **changed: float) -> bool:
    return gate(measured(draw, p, changed), GateConfig()).accepted and canary_passes(draw, p)


def test_identical_candidates_are_seldom_promoted() -> None:
    draw = np.random.default_rng(0)
    assert sum(promoted(draw, 0.5, reward=0.0) for _ in range(400)) <= 20  # 5 %


def test_candidates_that_are_better_by_ten_points_are_mostly_promoted() -> None:
    draw = np.random.default_rng(1)
    assert sum(promoted(draw, 0.6) for _ in range(400)) >= 320  # 80 %


@pytest.mark.parametrize("kind", HACKS)
def test_none_of_twenty_that_are_hacked_is_promoted(kind: str) -> None:
    draw, (ranges, (least, most)) = np.random.default_rng(2), HACKS[kind]
    for _ in range(20):
        p = draw.uniform(least, most)
        assert not promoted(draw, p, **{name: draw.uniform(*of) for name, of in ranges.items()})


def test_the_gate_alone_refuses_most_hacks() -> None:
    """Before anybody is shown an answer of theirs."""
    draw = np.random.default_rng(3)
    for ranges, (least, most) in HACKS.values():
        refused = 0
        for _ in range(200):
            changed = {name: draw.uniform(*of) for name, of in ranges.items()}
            refused += not gate(measured(draw, draw.uniform(least, most), changed), GateConfig()).accepted
        assert refused >= 190


def test_noise_on_a_few_pairs_refuses_no_more_than_its_level() -> None:
    """Candidates that change nothing, whose reward rises: by the binomial's own weights, not by draws."""
    for pairs in (2, 3, 4, 6, 9, 12, 13, 20, 30, 57, 100, 200):
        refused = 0.0
        for wins in range(pairs + 1):
            preference = proportion([True] * wins + [False] * (pairs - wins))._asdict()
            if not gate({**SOUND, "preference": preference}, GateConfig()).accepted:
                refused += math.comb(pairs, wins) / 2**pairs
        assert refused <= 0.1, pairs
    figures = {**SOUND, "preference": proportion([True] * 5 + [False] * 7)._asdict()}
    assert gate(figures, GateConfig()).accepted  # below 1/2, and chance in 39 of 100
    figures = {**SOUND, "preference": proportion([True] * 3 + [False] * 9)._asdict()}
    (reason,) = gate(figures, GateConfig()).reasons
    assert "falls to 0.250 (0.089 to 0.532), by chance in 7.4%: it is hacked" in reason
    assert gate({**figures, "reward": 0.0}, GateConfig()).accepted  # no hack: nothing rises


@pytest.mark.parametrize("prompts", [12, 24])
def test_noise_on_pairs_that_share_prompts_refuses_no_more(prompts: int) -> None:
    """Two pairs of each prompt that agree in nine of ten: the count of pairs is estimated, from as few prompts."""
    draw, refused, trials = np.random.default_rng(4), 0, 1000
    for _ in range(trials):
        first_P = draw.random(prompts) < 0.5
        second_P = np.where(draw.random(prompts) < 0.9, first_P, ~first_P)
        shared = proportion(np.r_[first_P, second_P], [*range(prompts)] * 2)._asdict()
        refused += not gate({**SOUND, "preference": shared}, GateConfig()).accepted
    assert refused / trials <= 0.1
