"""Tasks: sums of our own are right, different and repeatable; reasoning-gym's are passed on with their own score."""

from __future__ import annotations

import re
import sys
from types import ModuleType
from typing import Any

import pytest

from alignfast.rewards import ReasoningGym, RewardSet, arithmetic, reasoning_gym_rows


# 1 digit with 0s; the defaults; more than are shuffled, and more than an index of 64 bits
@pytest.mark.parametrize(("digits", "terms"), [(1, 2), (2, 2), (3, 4), (9, 5)])
def test_sums_are_right_and_different(digits: int, terms: int) -> None:
    rows = arithmetic(60, digits=digits, terms=terms)
    assert len({row["prompt"] for row in rows}) == 60
    for row in rows:
        assert row["prompt"].endswith(" =")
        terms_found = re.findall(r"\d+", row["prompt"])
        assert len(terms_found) == terms
        assert all(len(term) == digits for term in terms_found)
        assert str(eval(row["prompt"][:-2])) == row["answer"]
    assert arithmetic(60, digits=digits, terms=terms) == rows
    assert arithmetic(60, 1, digits=digits, terms=terms) != rows


def test_sums_verify() -> None:
    rows = arithmetic(50, digits=3, terms=3)
    columns = {"answer": [row["answer"] for row in rows]}
    for shift in (0, 1):
        completions = [f" {int(row['answer']) + shift}" for row in rows]
        scores = RewardSet("numeric").score([row["prompt"] for row in rows], completions, columns)
        assert scores.rewards_N.tolist() == [1.0 - shift] * 50


def test_excluded_sums_do_not_come() -> None:
    train = [row["prompt"] for row in arithmetic(150, digits=1)]
    test = [row["prompt"] for row in arithmetic(50, 1, digits=1, exclude=train)]
    assert len({*train, *test}) == 200  # all there are
    with pytest.raises(
        ValueError, match="there are only 50 sums of 2 numbers of 1 digits that are not excluded, and 51"
    ):
        arithmetic(51, digits=1, exclude=train)


def test_terms_and_signs_are_drawn_evenly() -> None:
    rows = arithmetic(4000, digits=2)
    plus = sum("+" in row["prompt"] for row in rows)
    assert 1850 < plus < 2150  # 2000 +- 4.7 standard deviations
    first = [int(row["prompt"][:2]) for row in rows]
    assert 53 < sum(first) / len(first) < 56  # 54.5 +- 3.6 standard deviations


def test_bad_options_are_refused() -> None:
    for options in ({"num_items": -1}, {"num_items": 1, "digits": 0}, {"num_items": 1, "terms": 1}):
        with pytest.raises(ValueError, match="expected num_items >= 0, digits >= 1 and terms >= 2"):
            arithmetic(**options)


@pytest.fixture
def gym(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the calls of reasoning-gym 0.1.25 that are made."""

    def create_dataset(name: str, size: int, seed: int, **options: Any) -> list[dict[str, Any]]:
        if options:
            raise AssertionError(f"what is {options}?")
        return [
            {"question": f"{i} + {seed} =", "answer": str(i + seed), "metadata": {"i": i}}
            for i in range(size)
        ]

    module, factory = ModuleType("reasoning_gym"), ModuleType("reasoning_gym.factory")
    module.create_dataset = create_dataset  # type: ignore[attr-defined]
    module.get_score_answer_fn = lambda name: (
        lambda answer, entry: (  # type: ignore[attr-defined]
            1.0 if answer == entry["answer"] else 0.01
        )
    )
    factory.DATASETS = {"chain_sum": None}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "reasoning_gym", module)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)


def score_all(rows: list[dict[str, Any]], completions: list[str]) -> list[float]:
    rewards = RewardSet(ReasoningGym())
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    rewards.check(columns)
    scores = rewards.score([row["prompt"] for row in rows], completions, columns)
    assert not scores.failures
    return scores.rewards_N.tolist()


@pytest.mark.usefixtures("gym")
def test_reasoning_gym_scores_its_own_tasks() -> None:
    rows = reasoning_gym_rows("chain_sum", 4, seed=3)
    assert rows[1]["prompt"] == "1 + 3 ="
    completions = ["3", " 4 ", "so <answer>6</answer> <answer> 5\n</answer> yes", "7"]
    assert score_all(rows, completions) == pytest.approx([1, 1, 1, 0.01])
    with pytest.raises(ValueError, match="no task 'chain_some'; did you mean 'chain_sum'"):
        reasoning_gym_rows("chain_some", 1)
    with pytest.raises(ValueError, match=r"task 'chain_sum' refuses \{'colour': 1\}: what is"):
        reasoning_gym_rows("chain_sum", 1, colour=1)
    with pytest.raises(ValueError, match="rows lack the column 'reasoning_gym'"):
        RewardSet(ReasoningGym()).check(["answer"])


def test_without_reasoning_gym_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    for call in (ReasoningGym, lambda: reasoning_gym_rows("chain_sum", 1)):
        with pytest.raises(RuntimeError, match="pip install reasoning-gym"):
            call()


def test_the_real_reasoning_gym() -> None:
    pytest.importorskip("reasoning_gym")
    rows = reasoning_gym_rows("chain_sum", 5, seed=1)
    assert score_all(rows, [row["answer"] for row in rows]) == [1.0] * 5
    assert max(score_all(rows, ["no idea"] * 5)) < 1
    with pytest.raises(ValueError, match="refuses"):
        reasoning_gym_rows("chain_sum", 1, no_such_option=1)
