"""The number that a text gives: each way of writing that the header names, and each that must not be misread."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignfast.data import load_rows
from alignfast.rewards.answers import final_number, reference_number

FOLDER = os.environ.get("ALIGNFAST_DATA")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", 42),
        ("-7", -7),
        ("+7", 7),
        ("\u22127", -7),
        ("3.14", "3.14"),
        (".5", "0.5"),
        ("It is 5.", 5),
        ("007", 7),
        ("1,234,567", 1234567),
        ("1,234.50", "1234.5"),
        ("1{,}234", 1234),
        ("12\\,345", 12345),
        ("12\u202f345", 12345),
        ("1'000", 1000),
        ("$5", 5),
        ("-$5", -5),
        ("$-5", -5),
        ("\\$ 5", 5),
        ("\u20ac1,000", 1000),
        ("5 dollars", 5),
        ("16L", 16),
        ("50%", 50),
        ("50\\%", 50),
        ("3/4", "3/4"),
        ("-3/4", "-3/4"),
        ("1 3/4", "7/4"),
        ("-1 1/2 cups", "-3/2"),
        ("12 10/2", 5),
        ("\\frac{3}{4}", "3/4"),
        ("-\\dfrac{1,000}{3}", "-1000/3"),
        ("\\frac34", "3/4"),
        ("\\frac{-3}{4}", "-3/4"),
        ("1e3", 1000),
        ("2.5E-2", "0.025"),
        ("**12**", 12),
    ],
)
def test_ways_of_writing(text: str, number: int | str) -> None:
    for shown in (text, f"So the answer is {text}", f"1 + 1 = 2\n#### {text}", f"2, so \\boxed{{{text}}}"):
        assert final_number(shown) == Fraction(number), shown


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("10-3", 3),  # an operator, as is the next
        ("5 - 3", 3),
        ("covid-19", 19),
        ("2-3 apples", 3),
        ("10\u201320", 20),  # an en dash between numbers
        ("- 5 apples", 5),  # a bullet
        ("2020,100", 100),  # no thousands: the first group has four digits
        ("1, 2, 3", 3),
        ("3:30", 30),
        ("60 km/h", 60),
        ("x_1 = 5", 5),
        ("1\u0660", 1),  # an Arabic-Indic 0 is no digit here
    ],
)
def test_what_must_not_be_misread(text: str, number: int) -> None:
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 5 of the 20", 5),
        ("#### 3 * 4 = 12 km", 12),
        ("#### 5 = five", 5),
        ("####\n8\n9", 8),
        ("#### 5\n#### 6", 6),
        ("#### Final answer\n\\boxed{x = 10 \\text{ m}^2} since 99", 10),
        ("\\boxed{3} #### 4", 4),
        ("\\boxed{\\text{about } 5}", 5),
        (
            "#### none of the above\n 7",
            None,
        ),  # marked, and no number: what stands elsewhere is not the answer
        ("so 5, \\boxed{12", None),  # cut short: it may have been 123
        ("no number", None),
        ("", None),
        ("1/0", None),
        ("\\frac{1}{0}", None),
        ("\\boxed{\\frac{a}{2}}", None),
        ("\\boxed{\\frac{\\sqrt{3}}{2}}", None),
        ("\\boxed{2\\sqrt{3}}", None),
        ("\\boxed{2^3}", None),
        ("\\boxed{90^\\circ}", 90),
        ("#### 2\\pi", None),
        ("\\boxed{2\\pi r = 5}", 5),  # what comes before the last = is the way there
    ],
)
def test_where_the_answer_stands(text: str, number: int | None) -> None:
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        (5, 5),
        (0.1, "1/10"),
        ("5 of 20", 5),
        ("1 + 1 = 2\n#### 2", 2),
        ("-3/4", "-3/4"),
        (Fraction(1, 3), "1/3"),
    ],
)
def test_references(answer: object, number: int | str) -> None:
    assert reference_number(answer) == Fraction(number)


@pytest.mark.parametrize("answer", ["", "none", True, float("nan"), float("inf"), "2\\sqrt{3}", None])
def test_references_without_a_number(answer: object) -> None:
    assert reference_number(answer) is None


def test_marked_only() -> None:
    assert final_number("the answer is 5", marked_only=True) is None
    assert final_number("the answer is 4 #### 5", marked_only=True) == 5


@pytest.mark.parametrize("text", ["1e999999999", "9" * 5000, "1e" + "9" * 5000, "3." + "1" * 100_000])
def test_numbers_that_would_fill_the_memory_are_none(text: str) -> None:
    assert final_number(text) is None


def test_long_texts_take_linear_time() -> None:
    """Each would take hours if the pattern went back over what it has read."""
    for text in ("1," * 200_000, "-$ " * 200_000, "\\frac{" * 50_000, "\\boxed{" * 50_000, "1 " * 200_000):
        final_number(text)


@given(st.fractions(min_value=-(10**6), max_value=10**6))
def test_a_fraction_is_read_back(number: Fraction) -> None:
    assert final_number(f"so {number}") == number


@given(st.integers(), st.integers(0, 6))
def test_a_decimal_is_read_back(number: int, places: int) -> None:
    value = Fraction(number, 10**places)
    sign = "-" if value < 0 else ""
    whole, rest = divmod(abs(number), 10**places)
    decimals = f".{rest:0{places}d}" if places else ""
    assert final_number(f"{sign}${whole:,}{decimals} left") == value


@given(st.text())
def test_no_text_raises(text: str) -> None:
    final_number(text)
    final_number("####" + text)
    final_number("\\boxed{" + text + "}")


@pytest.mark.skipif(FOLDER is None, reason="ALIGNFAST_DATA does not name the folder of real data")
@pytest.mark.parametrize("file", ["train", "eval"])
def test_worked_answers_of_gsm8k_give_their_own_answer(file: str) -> None:
    rows = load_rows(Path(FOLDER or "") / "gsm8k" / f"{file}.jsonl")
    wrong = [row for row in rows if final_number(row["completion"]) != reference_number(row["answer"])]
    assert not wrong
    assert all(reference_number(row["answer"]) is not None for row in rows)
    # the last number too is the answer, as of a model that forgets the mark
    unmarked = [final_number(row["completion"].replace("####", "The answer is")) for row in rows]
    assert unmarked == [reference_number(row["answer"]) for row in rows]
