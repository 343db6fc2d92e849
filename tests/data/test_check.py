"""`check_file` finds what was put wrong into data on purpose, and its intervals hold what they promise."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignfast.data import DataError, check_file
from alignfast.data.intervals import paired_difference, proportion
from alignfast.data.noise import MIN_PAIRS, Comparison, estimate_noise

WORDS = [f"word{n}" for n in range(200)]
FRIENDLY, HOSTILE = ["gladly", "thanks", "please"], ["never", "stupid", "shut"]


def votes(num: int, flipped: float, seed: int = 0) -> list[Comparison]:
    """Pairs in which a friendly word wins over a hostile one, a share of them flipped; two to a prompt."""
    draw = random.Random(seed)
    found = []
    for index in range(num):
        good, bad = (
            " ".join([*draw.choices(WORDS, k=12), draw.choice(kind)]) for kind in (FRIENDLY, HOSTILE)
        )
        if draw.random() < flipped:
            good, bad = bad, good
        found.append(Comparison(f"prompt {index // 2}", good, bad))
    return found


@pytest.mark.parametrize("flipped", [0.0, 0.15, 0.3])
def test_flipped_labels_are_estimated(flipped: float) -> None:
    found = estimate_noise(votes(2000, flipped))
    assert found is not None
    assert found.num_pairs == 2000
    # The model sees through these texts, so that all its disagreement is noise.
    assert found.disagreement.low <= flipped <= found.disagreement.high
    assert found.accuracy.low <= 1 - flipped <= found.accuracy.high + 0.02  # it errs a little on unsure pairs


def test_labels_without_a_rule_are_a_coins_throw() -> None:
    found = estimate_noise(votes(1000, 0.5))
    assert found is not None
    assert found.accuracy.low < 0.5 < found.accuracy.high


def test_prompts_are_never_split_between_fitting_and_asking() -> None:
    """A model that had seen a prompt's other vote would know the answer here: each is given twice, both ways."""
    once = [vote for vote in votes(600, 0.5)]
    twice = [vote._replace(prompt=str(n)) for n, vote in enumerate(once) for _ in range(2)]
    found = estimate_noise(twice)
    assert found is not None
    assert found.accuracy.low < 0.5 < found.accuracy.high


def test_too_few_pairs_or_prompts_give_no_estimate() -> None:
    enough = votes(MIN_PAIRS, 0.0)
    assert estimate_noise(enough) is not None
    assert estimate_noise(enough[1:]) is None
    assert estimate_noise([vote._replace(prompt="one") for vote in enough]) is None
    assert (
        estimate_noise(
            [Comparison(str(n), "same words", "words same"[:0] + "same words") for n in range(200)]
        )
        is None
    )
    assert estimate_noise([]) is None


PAIR = {"prompt": "p", "chosen": "longer answer", "rejected": "short"}
REVERSED = {"prompt": "p", "chosen": "short", "rejected": "longer answer"}


def test_preferences_are_looked_through() -> None:
    same = {"prompt": "q", "chosen": "a", "rejected": "a"}
    blank = {"prompt": "r", "chosen": " \n", "rejected": "word"}
    report = check_file([PAIR, PAIR, PAIR, REVERSED, same, blank])
    assert (report.format, report.rows, report.bad_rows) == ("preference", 6, ())
    assert (report.duplicates, report.contradictions, report.identical, report.blank) == (2, 1, 1, 1)
    assert report.longer_chosen is not None
    assert report.longer_chosen.estimate == 3 / 5  # the pair of equal length is left out
    # Six couples of votes on PAIR, three of which differ: d = 1/2, so that e = 1/2.
    assert (report.repeated, report.repeated_noise) == (1, 0.5)
    assert report.model_noise is None


def test_repeated_votes_tell_their_noise() -> None:
    draw = random.Random(0)
    rows = [
        PAIR | {"prompt": str(n)} if draw.random() > 0.1 else REVERSED | {"prompt": str(n)}
        for n in range(1000)
        for _ in (1, 2)
    ]
    report = check_file(rows)
    assert report.repeated == 1000
    assert report.repeated_noise == pytest.approx(0.1, abs=0.03)  # three standard errors of 1000 couples


def test_the_same_turned_round_in_another_prompt_is_no_contradiction() -> None:
    report = check_file([PAIR, REVERSED | {"prompt": "another"}])
    assert (report.contradictions, report.repeated, report.repeated_noise) == (0, 0, None)


def test_conversations_and_implicit_prompts() -> None:
    def chat(text: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": "p"}, {"role": "assistant", "content": text}]

    rows = [{"chosen": chat("a b"), "rejected": chat("c")}, {"chosen": chat("c"), "rejected": chat("a b")}]
    report = check_file(rows)
    assert (report.conversational, report.contradictions, report.duplicates) == (True, 1, 0)
    assert report.longer_chosen is not None
    assert report.longer_chosen.estimate == 0.5


def test_a_blank_turn_of_the_assistant_is_seen_among_others() -> None:
    def chat(*texts: str) -> dict[str, Any]:
        return {"messages": [{"role": r, "content": t} for r, t in zip(["user", "assistant"] * 2, texts)]}

    assert check_file([chat("p", " \n"), chat("p", "a")]).blank == 1
    assert check_file([chat("p", "", "q", "a"), chat(" ", "a")]).blank == 1  # a user may say nothing
    called = {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}]}
    assert check_file([called]).blank == 0


def test_rankings_count_as_all_their_pairs() -> None:
    report = check_file(
        [{"prompt": "p", "ranking": ["aaa", "bb", "c"]}, {"prompt": "p", "ranking": ["c", "aaa"]}]
    )
    assert report.contradictions == 1
    assert report.longer_chosen is not None
    assert report.longer_chosen.estimate == 3 / 4


def test_thumbs() -> None:
    up = {"prompt": "p", "completion": "c", "label": True}
    report = check_file([up, up, up, {**up, "label": False}])
    assert (report.contradictions, report.repeated, report.duplicates) == (1, 1, 2)
    assert report.thumbs_up is not None
    assert report.thumbs_up.estimate == 0.75
    assert report.longer_chosen is None


def test_bad_rows_are_listed_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\nnot json\n{"text": "a"}\n{"text": ""}\n')
    report = check_file(path)
    assert (report.rows, report.duplicates) == (2, 1)
    assert [where for where, _ in report.bad_rows] == [f"{path}, line 2", f"{path}, line 4"]
    printed = report.render()
    assert printed.startswith(f"{path}: 2 rows (text, plain text)\nbad rows          2\n")
    assert f"{path}, line 4: column 'text' is empty" in printed


def test_a_file_of_bad_rows_alone_is_still_reported(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a"}\n' * 12)
    printed = check_file(path).render()
    assert "0 rows (no format known)" in printed
    assert "and 2 more" in printed


def test_no_rows_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(DataError, match="there are no rows"):
        check_file(tmp_path / "rows.jsonl")


def test_the_printed_report_holds_what_was_found() -> None:
    rows = [dict(vote._asdict()) for vote in votes(200, 0.1)]
    report = check_file(rows)
    printed = report.render()
    assert report.model_noise is not None
    assert str(report.model_noise.disagreement) in printed
    assert str(report.longer_chosen) in printed
    assert "contradictions    0" in printed


def test_intervals_of_clustered_rows_cover_as_often_as_they_say() -> None:
    """Rows of a cluster all alike: rows taken as independent would cover far too seldom."""
    random = np.random.default_rng(0)
    clusters = np.repeat(np.arange(60), 10).tolist()
    covered = naive = 0
    for _ in range(400):
        hits = np.repeat(random.random(60) < 0.6, 10)
        covered += proportion(hits, clusters).low <= 0.6 <= proportion(hits, clusters).high
        naive += proportion(hits).low <= 0.6 <= proportion(hits).high
    assert 0.92 <= covered / 400 <= 0.98
    assert naive / 400 < 0.6


def test_intervals_at_the_ends() -> None:
    assert proportion([True] * 20).high == 1
    assert proportion([True] * 20, [1] * 20).low < 0.25  # one cluster is one row
    with pytest.raises(ValueError, match="at least one value"):
        proportion([])


def test_intervals_of_a_paired_difference_cover_as_often_as_they_say() -> None:
    """Clusters that are all alike; the bootstrap of rows as if independent covers far too seldom."""
    random, clusters = np.random.default_rng(0), np.repeat(np.arange(60), 5).tolist()
    covered = naive = 0
    for _ in range(100):
        hits, others = (np.repeat(random.random(60) < share, 5) for share in (0.7, 0.6))
        low, high = paired_difference(hits, others, clusters, num_draws=200)[1:]
        covered += low <= 0.1 <= high
        low, high = paired_difference(hits, others, num_draws=200)[1:]
        naive += low <= 0.1 <= high
    assert 0.88 <= covered / 100 <= 0.99
    assert naive / 100 < 0.75


def test_a_paired_difference_is_of_the_same_rows() -> None:
    """What is common to both drops out: equal answers differ by 0 in every draw."""
    hits = np.random.default_rng(0).random(50) < 0.5
    assert paired_difference(hits, hits) == (0, 0, 0)
    assert paired_difference(hits, ~hits).estimate == pytest.approx(2 * hits.mean() - 1)
    for values, others, clusters in ((hits, hits[1:], None), ([], [], None), (hits, hits, [1])):
        with pytest.raises(ValueError, match=r"expected two equally long|a cluster for each"):
            paired_difference(values, others, clusters)
