"""Accuracy, calibration error and reliability of reward models."""

from __future__ import annotations

import numpy as np
import pytest
from trainers.tiny import make_llama, make_pairs, make_tokenizer

from alignfast.data import load_rows
from alignfast.data.intervals import proportion
from alignfast.evaluation import calibration, reward_accuracy
from alignfast.models import load_reward_model


def test_bins_by_hand() -> None:
    """Two bins: sigmoid(0.4) and sigmoid(-0.4) lie in the first, sigmoid(3) and sigmoid(2) in the second."""
    found = calibration([0.4, -0.4, 3.0, 2.0], num_bins=2)
    low, high = 1 / (1 + np.exp(-0.4)), (1 / (1 + np.exp(-3)) + 1 / (1 + np.exp(-2))) / 2
    assert [tuple(entry) for entry in found.bins] == [
        (pytest.approx(low), 0.5, 2),
        (pytest.approx(high), 1.0, 2),
    ]
    assert found.ece == pytest.approx((abs(0.5 - low) + abs(1 - high)) / 2)
    assert found.accuracy == proportion([1, 0, 1, 1])


def test_a_model_that_is_right_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    true_N = draw.normal(0, 2, 100_000)
    lead_N = np.where(draw.random(100_000) < 1 / (1 + np.exp(-true_N)), true_N, -true_N)
    assert calibration(lead_N).ece < 0.005
    assert calibration(3 * lead_N).ece > 0.1  # three times as sure as it should be


def test_pairs_of_one_prompt_widen_the_interval() -> None:
    hits = [1.0] * 40 + [-1.0] * 20
    alone, together = calibration(hits), calibration(hits, [i // 20 for i in range(60)])
    assert together.accuracy.estimate == alone.accuracy.estimate
    assert together.accuracy.high - together.accuracy.low > 1.5 * (alone.accuracy.high - alone.accuracy.low)


def test_extremes_and_ties() -> None:
    found = calibration([1e6, -1e6, 0.0])
    assert [entry.pairs for entry in found.bins] == [1, 2]
    assert found.accuracy.estimate == 0.5
    with pytest.raises(ValueError, match="at least one value"):
        calibration([])


def test_of_a_model_on_rows(tmp_path) -> None:
    """Accuracy and margin are those of its rewards; rankings count as their pairs."""
    make_llama().save_pretrained(tmp_path)
    model, tokenizer = load_reward_model(str(tmp_path), num_heads=2), make_tokenizer()
    pairs = load_rows(make_pairs(12))
    report = reward_accuracy(model, tokenizer, pairs)
    rankings = [{"prompt": row["prompt"], "ranking": [row["chosen"], row["rejected"]]} for row in pairs]
    same = reward_accuracy(model, tokenizer, load_rows(rankings))
    assert {**report.to_dict(), "name": ""} == {**same.to_dict(), "name": ""}
    assert report.pairs == 12
    assert report.disagreement is not None
    assert "reward accuracy on" in str(report.table().title)
    assert report.rows == list(range(12))
    assert report.calibration == calibration(report.leads, [row["prompt"] for row in pairs])
    longer = [{"prompt": "the cat", "ranking": [" sat", " ran", " sang"]}]
    ranked = reward_accuracy(model, tokenizer, load_rows(longer))
    assert (ranked.pairs, ranked.rows, len(ranked.leads)) == (3, [0, 0, 0], 3)
    long = {"prompt": "the cat", "chosen": " sat" * 99, "rejected": " ran"}
    left = reward_accuracy(model, tokenizer, load_rows([pairs[0], long, pairs[1]]), max_length=50)
    assert (left.dropped_rows, left.rows) == (1, [0, 2])
