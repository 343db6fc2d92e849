"""Rewards that are exact: a completion is right or it is not.

    numeric    the number it gives is the reference's          regex     a pattern is found in it
    exact      it says what the reference says                 format    it is made of tagged blocks

1.0 where right, else 0.0; None where a row's reference is None: the row is for another function. A reference that can't
be read is an error, which `RewardSet` reports with its row. References stand in the column `answer`, else `solution`.

Not done here: running code; equality of formulas. A regular expression that backtracks without end can't be stopped:
Python holds its lock meanwhile.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from alignfast.rewards.answers import final_number, reference_number
from alignfast.rewards.protocol import Text, completion_text

COLUMNS = ("answer", "solution")


@dataclass(frozen=True)
class _Verifier:
    """Compares each completion with a column.

    Attributes:
        column: the column of the references; None is `answer`, or `solution` where there is no `answer`.
    """

    column: str | None = None

    name = "verifier"

    def require(self, columns: Collection[str], conversational: bool) -> None:
        """Raise ValueError unless the references' column is there."""
        wanted = COLUMNS if self.column is None else (self.column,)
        if not any(name in columns for name in wanted):
            raise ValueError(
                f"reward {self.name!r} compares with the column {' or '.join(map(repr, wanted))}, and the rows have "
                f"{', '.join(sorted(columns)) or 'none'}; rename the column, or name it: column=..."
            )

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
    ) -> list[float | None]:
        """1.0 or 0.0 for each completion, None where its reference is None."""
        self.require(columns, False)
        column = self.column or next(name for name in COLUMNS if name in columns)
        return [
            None if reference is None else float(self.is_right(completion_text(completion), reference))
            for completion, reference in zip(completions, columns[column])
        ]

    def is_right(self, text: str, reference: Any) -> bool:
        """Whether a completion agrees with its reference."""
        raise NotImplementedError


@dataclass(frozen=True)
class Numeric(_Verifier):
    """Whether the number that a completion gives equals the reference's, as exact fractions: see `answers`.

    Attributes:
        column: see `_Verifier`.
        tolerance: largest difference that still counts as equal, >= 0.
        marked_only: whether a number counts only after "####" or in \\boxed{...}, so that the form is learned too.

    >>> Numeric()([""] * 3, ["It costs $1,250.00.", "#### 2500/2 apples", "1251"], answer=["1250"] * 3)
    [1.0, 1.0, 0.0]
    """

    tolerance: float = 0.0
    marked_only: bool = False

    name = "numeric"

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < float("inf"):
            raise ValueError(f"tolerance must be a number >= 0, got {self.tolerance}")

    def is_right(self, text: str, reference: Any) -> bool:
        """Whether the numbers are equal; a text without one is wrong.

        Raises:
            ValueError: the reference has no number.
        """
        wanted = reference_number(reference)
        if wanted is None:
            raise ValueError(f"the reference {reference!r} gives no number")
        found = final_number(text, marked_only=self.marked_only)
        # str: 0.01 means a hundredth, not the binary number nearest to it
        return found is not None and abs(found - wanted) <= Fraction(str(self.tolerance))


@dataclass(frozen=True)
class Exact(_Verifier):
    """Whether a completion says what the reference says.

    Attributes:
        column: see `_Verifier`.
        ignore_space: whether white space at the ends is dropped and a run of it counts as one space.
        ignore_case: whether capitals equal small letters.

    >>> Exact(ignore_case=True)([""] * 2, [" New  York\\n", "York"], answer=["new york"] * 2)
    [1.0, 0.0]
    """

    ignore_space: bool = True
    ignore_case: bool = False

    name = "exact"

    def is_right(self, text: str, reference: Any) -> bool:
        """Whether both say the same; a reference that is no text is compared as it is printed."""
        return self._normal(text) == self._normal(str(reference))

    def _normal(self, text: str) -> str:
        text = " ".join(text.split()) if self.ignore_space else text
        return text.casefold() if self.ignore_case else text


@dataclass(frozen=True)
class Regex:
    """Whether a pattern is found in a completion; needs no reference.

    Attributes:
        pattern: of Python's `re`; `.` matches line ends with (?s), \\A and \\Z tie it to the whole completion.

    >>> Regex(r"(?i)\\bparis\\b")(["", ""], ["It is Paris.", "parish"])
    [1.0, 0.0]
    """

    pattern: str

    name = "regex"

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"{self.pattern!r} is no regular expression: {error}") from error

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        """1.0 or 0.0 for each completion."""
        found = re.compile(self.pattern)
        return [float(found.search(completion_text(completion)) is not None) for completion in completions]


@dataclass(frozen=True)
class Format:
    """Whether a completion begins with tagged blocks, each tag once, in their order, with white space between.

    Attributes:
        tags: names of the blocks: <think>...</think> for "think".
        rest: whether anything else may follow the last block.

    >>> Format()([""] * 2, ["<think>2 + 2</think> 4", "4 <think>2 + 2</think>"])
    [1.0, 0.0]
    >>> Format(("think", "answer"), rest=False)([""], ["<think>2 + 2</think>\\n<answer>4</answer>"])
    [1.0]
    """

    tags: tuple[str, ...] = ("think",)
    rest: bool = True

    name = "format"

    def __post_init__(self) -> None:
        if isinstance(self.tags, str) or not self.tags or len(set(self.tags)) < len(self.tags):
            raise ValueError(f"tags must be different names, at least one, got {self.tags!r}")

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        """1.0 or 0.0 for each completion."""
        return [float(self._holds(completion_text(completion))) for completion in completions]

    def _holds(self, text: str) -> bool:
        marks = [f"<{slash}{tag}>" for tag in self.tags for slash in ("", "/")]
        if any(text.count(mark) != 1 for mark in marks):
            return False
        end = 0
        for opening, closing in zip(marks[::2], marks[1::2]):
            start, stop = text.find(opening), text.find(closing)
            if text[end:start].strip() or start < end or stop < start:
                return False
            end = stop + len(closing)
        return self.rest or not text[end:].strip()


# What `load_reward` knows by name
BUILT_IN = {"numeric": Numeric, "exact": Exact, "format": Format}
