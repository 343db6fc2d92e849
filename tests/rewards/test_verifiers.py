"""Verifiers on texts and messages; on GSM8K every reference verifies against itself, and no other does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from alignfast.data import load_rows
from alignfast.rewards import Exact, Format, Numeric, Regex, RewardSet

FOLDER = os.environ.get("ALIGNFAST_DATA")


def judged(reward: Any, texts: list[str], **columns: list[Any]) -> list[float | None]:
    """As texts and as messages, which must agree."""
    messages = [
        [
            {"role": "assistant", "tool_calls": []},
            {"role": "tool", "content": "9"},
            {"role": "assistant", "content": t},
        ]
        for t in texts
    ]
    plain = reward([""] * len(texts), texts, **columns)
    assert reward([[]] * len(texts), messages, **columns) == plain
    return plain


def test_numeric() -> None:
    texts = ["so 12.50 dollars", "\\boxed{\\frac{25}{2}}", "$12.5 each\n#### 12", "none", ""]
    assert judged(Numeric(), texts, answer=["12.5"] * 5) == [1, 1, 0, 0, 0]
    assert judged(Numeric(marked_only=True), texts, answer=[12.5] * 5) == [0, 1, 0, 0, 0]


def test_numeric_is_exact_and_its_tolerance_too() -> None:
    third = ["1/3", "0.333333333333333333333"]
    assert judged(Numeric(), third, answer=["2/6"] * 2) == [1, 0]
    near = ["3.3", "2.7", "3.3000001"]  # as a binary number 0.3 is a little less
    assert judged(Numeric(tolerance=0.3), near, answer=["3"] * 3) == [1, 1, 0]


def test_columns_of_references() -> None:
    both = {"answer": ["1"], "solution": ["2"], "gold": ["3"]}
    assert judged(Numeric(), ["1"], **both) == [1]
    assert judged(Numeric(), ["2"], solution=["2"]) == [1]
    assert judged(Numeric(column="gold"), ["3"], **both) == [1]
    # the first row is another function's
    assert judged(Numeric(), ["1", "1"], answer=[None, "1"]) == [None, 1]
    with pytest.raises(ValueError, match="compares with the column 'gold', and the rows have answer; rename"):
        Numeric(column="gold").require(["answer"], False)


def test_a_reference_without_a_number_is_named_with_its_row() -> None:
    scores = RewardSet("numeric").score([""] * 3, ["1", "2", "3"], {"answer": ["1", "two", "3"]})
    assert scores.rewards_N[[0, 2]].tolist() == [1, 1]
    assert scores.summary() == "reward 'numeric', row 1: ValueError: the reference 'two' gives no number"


def test_exact() -> None:
    texts = ["New York", "  New\n York ", "new york", "New York."]
    assert judged(Exact(), texts, answer=["New York"] * 4) == [1, 1, 0, 0]
    assert judged(Exact(ignore_case=True), texts, answer=["New York"] * 4) == [1, 1, 1, 0]
    assert judged(Exact(ignore_space=False), texts, answer=["New York"] * 4) == [1, 0, 0, 0]
    assert judged(Exact(), ["5"], answer=[5]) == [1]


def test_regex() -> None:
    assert judged(Regex(r"^\d+$"), ["12", "a\n12", ""]) == [1, 0, 0]
    assert judged(Regex(r"(?m)^\d+$"), ["12", "a\n12", ""]) == [1, 1, 0]
    with pytest.raises(ValueError, match="is no regular expression: "):
        Regex("(")


@pytest.mark.parametrize(
    ("text", "open_end", "closed_end"),
    [
        ("<think>a</think><answer>b</answer>", 1, 1),
        (" <think>a</think>\n\n<answer>b</answer>\n", 1, 1),
        ("<think></think><answer></answer>", 1, 1),
        ("<think>a</think><answer>b</answer> c", 1, 0),
        ("x <think>a</think><answer>b</answer>", 0, 0),
        ("<think>a</think> x <answer>b</answer>", 0, 0),
        ("<answer>b</answer><think>a</think>", 0, 0),
        ("<think>a<answer>b</think></answer>", 0, 0),
        ("<think>a</think><answer>b", 0, 0),
        ("<think><think>a</think><answer>b</answer>", 0, 0),
        ("</think>a<think><answer>b</answer>", 0, 0),
        ("", 0, 0),
    ],
)
def test_format(text: str, open_end: int, closed_end: int) -> None:
    tags = ("think", "answer")
    assert judged(Format(tags), [text]) == [open_end]
    assert judged(Format(tags, rest=False), [text]) == [closed_end]


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="tolerance must be a number >= 0, got -1"):
        Numeric(tolerance=-1)
    for tags in ("think", (), ("think", "think")):
        with pytest.raises(ValueError, match="tags must be different names"):
            Format(tags)  # type: ignore[arg-type]


@pytest.mark.skipif(FOLDER is None, reason="ALIGNFAST_DATA does not name the folder of real data")
@pytest.mark.parametrize("file", ["train", "eval"])
def test_gsm8k_verifies_against_itself(file: str) -> None:
    rows = list(load_rows(Path(FOLDER or "") / "gsm8k" / f"{file}.jsonl"))
    prompts, worked = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    answers = [row["answer"] for row in rows]
    for completions in (worked, answers):
        scores = RewardSet("numeric").score(prompts, completions, {"answer": answers})
        assert not scores.failures
        assert scores.rewards_N.tolist() == [1.0] * len(rows)
    # each against the next row's: right only where the two answers are the same number
    shifted = RewardSet("numeric").score(prompts, worked, {"answer": answers[1:] + answers[:1]})
    same = [
        float(a.replace(",", "")) == float(b.replace(",", ""))
        for a, b in zip(answers, answers[1:] + answers[:1])
    ]
    assert shifted.rewards_N.bool().tolist() == same
