"""What is wrong with a file of data, before any training: `alignfast data check FILE`.

Bad rows are listed, not raised. Votes (pairs, rankings, thumbs) are looked at for copies, for contradictions, for
answers that are blank or identical, for a liking of length, and for how many labels can be wrong. Two estimates of
that: how often the same comparison was judged both ways, where it was judged more than once; and `noise`.

    share of two votes on one comparison that differ:  d = 2 e (1 - e)      e = (1 - sqrt(1 - 2 d)) / 2

for voters who err at random and alike, with probability e.
Not done here: tokenising, so lengths are in characters.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from alignfast.data.formats import FORMATS, Rows, content_text, scan
from alignfast.data.intervals import Interval, proportion
from alignfast.data.noise import MIN_PAIRS, Comparison, NoiseEstimate, estimate_noise
from alignfast.data.sources import Row

if TYPE_CHECKING:
    from alignfast.data.sources import Source

_SHOWN = 10  # bad rows in the printed report


@dataclass(frozen=True)
class DataReport:
    """What `check_file` found. A field is None where the format has no such thing, or the data do not suffice.

    Attributes:
        name: file, dataset or list.
        format: a key of `FORMATS`; empty where no row could be read.
        conversational: whether rows hold messages, not strings.
        rows: rows that can be used.
        bad_rows: (place, reason) of each row that can't.
        duplicates: rows that repeat an earlier one in all columns of the format.
        blank: rows with an answer, a turn of the assistant, or a text of white space alone.
        identical: rows whose answers are the same, so that nothing is preferred.
        contradictions: comparisons that were judged both ways: the same prompt and answers, or answer and thumb.
        longer_chosen: share of pairs of unequal length where the longer answer was preferred.
        thumbs_up: share of thumbs that are up.
        repeated: comparisons that were judged more than once.
        repeated_noise: share of wrong labels by those, 0.5 at most.
        model_noise: what an n-gram model that has not seen them says of the labels.
    """

    name: str
    format: str
    conversational: bool
    rows: int
    bad_rows: tuple[tuple[str, str], ...]
    duplicates: int
    blank: int
    identical: int | None = None
    contradictions: int | None = None
    longer_chosen: Interval | None = None
    thumbs_up: Interval | None = None
    repeated: int | None = None
    repeated_noise: float | None = None
    model_noise: NoiseEstimate | None = None

    def render(self) -> str:
        """The report as plain lines."""
        kind = f"{self.format}, {'conversations' if self.conversational else 'plain text'}"
        lines = [f"{self.name}: {self.rows:,} rows ({kind if self.format else 'no format known'})"]
        lines.append(f"bad rows          {len(self.bad_rows):,}")
        lines += [f"  {where}: {reason}" for where, reason in self.bad_rows[:_SHOWN]]
        if len(self.bad_rows) > _SHOWN:
            lines.append(f"  and {len(self.bad_rows) - _SHOWN:,} more")
        lines.append(f"duplicates        {self.duplicates:,}")
        lines.append(f"blank answers     {self.blank:,}")
        if self.identical is not None:
            lines.append(f"identical answers {self.identical:,}")
        if self.contradictions is not None:
            lines.append(f"contradictions    {self.contradictions:,} comparisons judged both ways")
        if self.thumbs_up is not None:
            lines.append(f"thumbs up         {self.thumbs_up}")
        if self.longer_chosen is not None:
            lines.append(f"longer is chosen  {self.longer_chosen} of pairs of unequal length; 0.5 is no bias")
        return "\n".join(lines + self._noise_lines())

    def _noise_lines(self) -> list[str]:
        lines = []
        if self.repeated_noise is not None:
            lines.append(
                f"label noise       {self.repeated_noise:.3f} by how often a repeated comparison is reversed"
            )
        if self.model_noise is not None:
            found = self.model_noise
            lines.append(
                f"label noise       at most about {found.disagreement}: of the tenth of pairs that an n-gram"
            )
            lines.append(
                "                  model is surest of, unseen, the share that is labelled the other way"
            )
            lines.append(f"n-gram accuracy   {found.accuracy} on {found.num_pairs:,} unseen pairs")
        elif self.format in ("preference", "ranking"):
            lines.append(
                f"label noise       not estimated from the texts: fewer than {MIN_PAIRS} pairs that differ"
            )
        return lines


def check_file(source: Source) -> DataReport:
    """Read all of a source and say what is wrong with it.

    Args:
        source: whatever `load_rows` takes.

    Raises:
        DataError: the file can't be opened, or there is not one row.
        TypeError: the source is of no known kind.

    >>> report = check_file([("2 + 2 =", " 4", " 5"), ("2 + 2 =", " 5", " 4")])
    >>> report.contradictions, report.duplicates
    (1, 0)
    """
    rows, bad = scan(source)
    columns = _columns(rows)
    keys = [tuple(_flat(row.get(column)) for column in columns) for row in rows]
    report = DataReport(
        name=rows.name,
        format=rows.format,
        conversational=rows.conversational,
        rows=len(rows),
        bad_rows=tuple(bad),
        duplicates=len(keys) - len(set(keys)),
        blank=sum(any(not text.strip() for text in _spoken(row, rows.format)) for row in rows),
    )
    if rows.format == "thumbs":
        return replace(report, **_thumbs(rows))
    if rows.format in ("preference", "ranking"):
        return replace(report, **_comparisons(rows))
    return report


def _columns(rows: Rows) -> tuple[str, ...]:
    if not rows.format:
        return ()
    columns = FORMATS[rows.format]
    return ("prompt", *columns) if rows.format == "preference" else columns


def _flat(value: Any) -> str:
    """A column as one string that is the same for the same content."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _text(value: Any) -> str:
    """What is said in a column; of messages, their contents."""
    if isinstance(value, str):
        return value
    return "\n".join(map(_said, value))


def _said(message: dict[str, Any]) -> str:
    return content_text(message) or (_flat(message["tool_calls"]) if message.get("tool_calls") else "")


def _spoken(row: Row, format: str) -> Iterator[str]:
    """Texts and answers; of conversations, each turn of the assistant by itself."""
    for column in FORMATS[format]:
        if column in ("prompt", "label"):
            continue
        for value in row[column] if format == "ranking" else (row[column],):
            if isinstance(value, str):
                yield value
            else:
                yield from (_said(message) for message in value if message["role"] == "assistant")


def _answers(row: Row, format: str) -> Iterator[str]:
    columns = [column for column in FORMATS[format] if column not in ("prompt", "label")]
    for column in columns:
        yield from map(_text, row[column]) if format == "ranking" else (_text(row[column]),)


def _thumbs(rows: Rows) -> dict[str, Any]:
    votes = [(_flat([row["prompt"], row["completion"]]), row["label"]) for row in rows]
    return {
        "thumbs_up": proportion([up for _, up in votes], [_flat(row["prompt"]) for row in rows]),
        **_reversals(votes),
    }


def _comparisons(rows: Rows) -> dict[str, Any]:
    found = [comparison for row in rows for comparison in _pairs(row, rows.format)]
    unequal = [c for c in found if len(c.chosen) != len(c.rejected)]
    longer = [len(c.chosen) > len(c.rejected) for c in unequal]
    votes = [
        (_flat([c.prompt, *sorted(c[1:])]), c.chosen < c.rejected) for c in found if c.chosen != c.rejected
    ]
    return {
        "identical": sum(
            len(set(answers)) < len(answers) for answers in (tuple(_answers(r, rows.format)) for r in rows)
        ),
        "longer_chosen": proportion(longer, [c.prompt for c in unequal]) if unequal else None,
        "model_noise": estimate_noise(found),
        **_reversals(votes),
    }


def _pairs(row: Row, format: str) -> Iterator[Comparison]:
    """Each answer of a row against each that was liked less; `_answers` has the best first."""
    texts, prompt = list(_answers(row, format)), _flat(row["prompt"])
    for place, better in enumerate(texts):
        for worse in texts[place + 1 :]:
            yield Comparison(prompt, better, worse)


def _reversals(votes: Iterable[tuple[str, bool]]) -> dict[str, Any]:
    """Votes (what was judged, which way) as contradictions, and the noise that repeated votes tell of."""
    counts: Counter[tuple[str, bool]] = Counter(votes)
    both = [(counts[judged, True], counts[judged, False]) for judged in {judged for judged, _ in counts}]
    couples = sum(math.comb(one + other, 2) for one, other in both)
    apart = sum(one * other for one, other in both) / couples if couples else None
    return {
        "contradictions": sum(one > 0 and other > 0 for one, other in both),
        "repeated": sum(one + other > 1 for one, other in both),
        "repeated_noise": None if apart is None else (1 - math.sqrt(max(0.0, 1 - 2 * apart))) / 2,
    }
