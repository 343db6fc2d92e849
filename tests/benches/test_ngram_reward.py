"""The n-gram baseline of benches/ngram_reward.py: it learns what words tell, and no more."""

from __future__ import annotations

import doctest
import json
import sys
from pathlib import Path

import ngram_reward
import numpy as np
import pytest
from ngram_reward import Settings, choose, leads, pairs_of, right


def rows_of(num_pairs: int, kind: str, seed: int = 0) -> list[dict[str, str]]:
    """Pairs told apart by one word, by the order of two words, or by nothing."""
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(num_pairs):
        fill = " ".join(draw.choice(list("abcdefgh"), 5))
        good, bad = {
            "word": (f"{fill} yes", f"{fill} no"),
            "order": (f"{fill} not bad", f"{fill} bad not"),
            "nothing": (fill, " ".join(draw.choice(list("abcdefgh"), 5))),
        }[kind]
        rows.append({"prompt": f"question {number // 2}", "chosen": good, "rejected": bad})
    return rows


def test_docstrings() -> None:
    assert doctest.testmod(ngram_reward).failed == 0


@pytest.mark.parametrize(
    ("kind", "longest", "expected"), [("word", 1, 1.0), ("order", 1, 0.5), ("order", 2, 1.0)]
)
def test_it_learns_what_its_ngrams_can_tell(kind: str, longest: int, expected: float) -> None:
    train, held_out = rows_of(60, kind), rows_of(20, kind, seed=1)
    assert right(leads(train, held_out, Settings(longest, False, 0.1))).mean() == expected


def test_the_loss_is_at_its_least() -> None:
    pairs = pairs_of(rows_of(40, "nothing"), 1, True)
    difference_NF = pairs.matrix(pairs.columns()).to_dense()
    weight_F = ngram_reward.fit(pairs.matrix(pairs.columns()), 0.1)
    slope_F = -difference_NF.T @ (-difference_NF @ weight_F).sigmoid() / len(difference_NF) + 0.1 * weight_F
    assert slope_F.abs().max() < 1e-5


def test_settings_are_chosen_by_what_generalises() -> None:
    assert choose(rows_of(40, "order")).longest > 1


@pytest.mark.parametrize("num_folds", [1, 2])
def test_the_command(
    num_folds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reward models that are always right beside n-grams that can tell nothing; only the rows that they scored count."""
    arguments = ["ngram_reward.py"]
    for fold in range(num_folds):
        for seed, name in enumerate(("train", "held_out")):
            rows = rows_of(40, "nothing", seed=2 * fold + seed)
            rows = [{**row, "prompt": f"{fold} {row['prompt']}"} for row in rows]
            (tmp_path / f"{name}_{fold}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        eval_json = {"model": "perfect", "rows": list(range(30)), "leads": [1.0] * 30}
        (tmp_path / f"eval_{fold}.json").write_text(json.dumps(eval_json))
        arguments += ["--fold", f"train_{fold}.jsonl", f"held_out_{fold}.jsonl", f"eval_{fold}.json"]
    monkeypatch.setattr(ngram_reward, "L2S", (0.1,))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", arguments)
    ngram_reward.main()
    *folds, counts, words, model, difference = capsys.readouterr().out.splitlines()
    assert len(folds) == num_folds
    assert all(line.startswith("40 pairs to train on, 30 held out; n-grams up to ") for line in folds)
    assert counts.split(maxsplit=2)[2] == f"{30 * num_folds} pairs of {15 * num_folds} prompts"
    assert "1.000 (95 %" in model
    gain = 1 - float(words.split()[1])
    assert difference.startswith(f"their difference {gain:.3f} (95 %")


@pytest.mark.parametrize("folds", [["a"], ["a", "b", "c", "--fold", "a", "b"]])
def test_folds_with_and_without_a_reward_model_are_refused(
    folds: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ngram_reward.py", "--fold", *folds])
    with pytest.raises(SystemExit):
        ngram_reward.main()
    assert "each --fold takes as many files: TRAIN HELD_OUT [EVAL ...]" in capsys.readouterr().err


def test_rewards_of_other_rows_have_no_mean() -> None:
    against = [{"model": name, "rows": [row], "leads": [1.0]} for row, name in enumerate(("one", "two"))]
    with pytest.raises(SystemExit, match="one and two scored other rows"):
        ngram_reward.mean_leads(against)
