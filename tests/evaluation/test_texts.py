"""Variety and length of texts, against counts by hand."""

from __future__ import annotations

import math

import pytest

from alignfast.evaluation import distinct_n, length_figures


@pytest.mark.parametrize(
    ("texts", "n", "share"),
    [
        (["a b c"], 1, 1.0),
        (["a a a a"], 1, 0.25),
        (["a b", "a b"], 2, 0.5),  # the same in both
        (["a b", "c d"], 2, 1.0),  # b c is none: it would reach from text to text
        (["a", "a b c"], 3, 1.0),  # the short one has no trigram
        ([[7, 7, 7], (7, 8)], 2, 2 / 3),
    ],
)
def test_distinct_n_by_hand(texts, n, share):
    assert distinct_n(texts, n) == pytest.approx(share)


def test_without_an_n_gram_there_is_no_share():
    assert math.isnan(distinct_n(["a", ""], 2))
    assert math.isnan(distinct_n([], 1))


def test_n_below_1_is_refused():
    with pytest.raises(ValueError, match="n must be >= 1, got 0"):
        distinct_n(["a"], 0)


def test_lengths_by_hand():
    figures = length_figures([2, 9, 4, 9], [True, False, True, False])
    assert figures == {
        "mean_length": 6.0, "min_length": 2.0, "max_length": 9.0, "clipped_ratio": 0.5,
        "mean_terminated_length": 3.0, "min_terminated_length": 2.0, "max_terminated_length": 4.0,
    }  # fmt: skip
    assert length_figures([5], [False])["mean_terminated_length"] == 0


def test_lists_that_do_not_fit_are_refused():
    for lengths, ended in (([], []), ([1, 2], [True])):
        with pytest.raises(ValueError, match="two equally long lists"):
            length_figures(lengths, ended)
