"""Rows of TRL's formats, recognised by their columns and checked one by one.

    text · messages · prompt + completion · prompt + chosen + rejected · prompt + completion + label · prompt + ranking

Each is plain (strings) or conversational (lists of messages). Chosen and rejected without a prompt have it
extracted from what they start with alike. Other columns are kept as they are; images are refused.

Not done here: tokenising, and the chat template.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alignfast.data.sources import DataError, Row, open_source

if TYPE_CHECKING:
    from alignfast.data.sources import Source

# In the order in which they are looked for: the first whose columns are all there names the format.
FORMATS = {
    "preference": ("chosen", "rejected"),
    "ranking": ("prompt", "ranking"),
    "thumbs": ("prompt", "completion", "label"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}
IMAGE_COLUMNS = ("images", "image")


@dataclass(frozen=True)
class Rows:
    """Checked rows of one format.

    Attributes:
        name: file, dataset or list that they come from.
        format: a key of `FORMATS`; rows of `preference` always have a prompt here.
        conversational: whether the columns hold messages, not strings.
        items: the rows, each a dict with all its columns.
        unit: what `numbers` count: `line` and `row` from 1, `index` from 0.
        numbers: place of each row in its source.
    """

    name: str
    format: str
    conversational: bool
    items: list[Row]
    unit: str
    numbers: list[int]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Row:
        return self.items[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.items)

    def where(self, index: int) -> str:
        """Place of a row in words, for messages."""
        return f"{self.name}, {self.unit} {self.numbers[index]}"


def load_rows(source: Source, *, split: str = "train") -> Rows:
    """Read and check all rows of a source.

    Args:
        source: see `sources.open_source`.
        split: which part of a dataset from the hub; files and lists have no parts.

    Raises:
        DataError: nothing is there, or a row can't be read; the message names file, row and reason.
        TypeError: the source is of no known kind.

    >>> rows = load_rows([("2 + 2 =", " 4", " 5")])
    >>> rows.format, rows.conversational, rows[0]["chosen"]
    ('preference', False, ' 4')
    >>> load_rows([{"prompt": "2 + 2 =", "completion": ""}])
    Traceback (most recent call last):
    alignfast.data.sources.DataError: list of 1 rows, index 0: column 'completion' is empty
    """
    rows, bad = scan(source, split=split, stop=True)
    if bad:
        raise DataError(": ".join(bad[0]))
    return rows


def scan(source: Source, *, split: str = "train", stop: bool = False) -> tuple[Rows, list[tuple[str, str]]]:
    """Read all rows that can be read, and (place, reason) of each that can't.

    Args:
        source: see `sources.open_source`.
        split: which part of a dataset from the hub.
        stop: end at the first bad row.

    Raises:
        DataError: there is not one row, good or bad.
        TypeError: the source is of no known kind.
    """
    opened = open_source(source, split)
    format, conversational = "", False
    items: list[Row] = []
    numbers: list[int] = []
    bad: list[tuple[str, str]] = []
    for number, row in opened.items:
        try:
            if isinstance(row, str):
                raise _BadRow(row)
            if not items:  # the first row that can be read decides for all
                format = _detect(row)
                conversational = not isinstance(row[FORMATS[format][0]], str)
            items.append(_checked(row, format, conversational))
            numbers.append(number)
        except _BadRow as error:
            bad.append((opened.where(number), str(error)))
            if stop:
                break
    if not items and not bad:
        raise DataError(f"{opened.name}: there are no rows")
    return Rows(opened.name, format, conversational, items, opened.unit, numbers), bad


class _BadRow(Exception):
    """Why a row can't be used; the caller knows its place."""


def _detect(row: Row) -> str:
    for format, columns in FORMATS.items():
        if all(column in row for column in columns):
            return format
    raise _BadRow(f"its columns ({', '.join(row)}) are no known format; known are {_known_formats()}")


def _known_formats() -> str:
    return ", ".join("+".join(columns) for columns in FORMATS.values())


def _checked(row: Row, format: str, conversational: bool) -> Row:
    """The row, with its prompt extracted where that is implicit.

    Raises:
        _BadRow: a column is missing, empty, of the wrong type, or holds images.
    """
    for column in IMAGE_COLUMNS:
        if column in row:
            raise _BadRow(
                f"column {column!r} holds images, which are not supported; remove it to train on the text"
            )
    for column in FORMATS[format]:
        if row.get(column) is None:
            raise _BadRow(f"column {column!r} is missing" + (" a value (null)" if column in row else ""))
    if format == "preference" and not _has_own_prompt(row, conversational):
        row = _extract_prompt(row, conversational)
    if format == "ranking":
        _check_ranking(row["ranking"], conversational)
    else:
        for column in FORMATS[format]:
            if column not in ("prompt", "label"):
                _check_value(row[column], column, conversational)
    if "prompt" in row and format not in ("messages", "text"):
        # An empty plain prompt is a completion from nothing; no template renders an empty conversation.
        _check_value(row["prompt"], "prompt", conversational, may_be_empty=not conversational)
    if format == "thumbs" and not isinstance(row["label"], bool):
        raise _BadRow(
            f"column 'label' must be true or false, got {row['label']!r}; rename it if it means another thing"
        )
    return row


def _check_ranking(ranking: Any, conversational: bool) -> None:
    if not isinstance(ranking, list) or len(ranking) < 2:
        raise _BadRow(
            f"column 'ranking' must list 2 or more completions, best first, got {_briefly(ranking)}"
        )
    for place, completion in enumerate(ranking):
        _check_value(completion, f"ranking[{place}]", conversational)


def _check_value(value: Any, column: str, conversational: bool, may_be_empty: bool = False) -> None:
    if conversational:
        if not isinstance(value, list):
            raise _BadRow(
                f"column {column!r} must be a list of messages like the first row's, got {_briefly(value)}"
            )
        for place, message in enumerate(value):
            _check_message(message, f"{column}[{place}]")
        if not value or not (value[-1].get("content") or value[-1].get("tool_calls")):
            raise _BadRow(f"column {column!r} is empty")
        return
    if not isinstance(value, str):
        raise _BadRow(f"column {column!r} must be a string like the first row's, got {_briefly(value)}")
    if not value and not may_be_empty:
        raise _BadRow(f"column {column!r} is empty")
    _check_text(value, column)


def _check_message(message: Any, place: str) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise _BadRow(f"{place} must be a message with 'role' and 'content', got {_briefly(message)}")
    content = message.get("content")
    if isinstance(content, str):
        _check_text(content, place)
    elif isinstance(content, list):
        for block in content:
            if not isinstance(block, dict) or not isinstance(block.get("text"), str):
                raise _BadRow(
                    f"{place} holds a block that is no text, which is not supported: {_briefly(block)}"
                )
            _check_text(block["text"], place)
    elif content is not None or not message.get("tool_calls"):
        raise _BadRow(f"{place} has content {_briefly(content)}; expected a string")


def _check_text(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character, which no tokenizer takes
        raise _BadRow(
            f"invalid UTF-8: {place} has the lone surrogate U+{ord(text[error.start]):04X}"
        ) from error


def _has_own_prompt(row: Row, conversational: bool) -> bool:
    """A string beside conversational answers is a label of theirs (as in UltraFeedback): they hold the prompt."""
    return row.get("prompt") is not None and not (conversational and isinstance(row["prompt"], str))


def _extract_prompt(row: Row, conversational: bool) -> Row:
    """Split off what chosen and rejected begin with alike, where TRL's `extract_prompt` does.

    For strings that is the last character or, before a space, the space; where one answer is the beginning of the
    other, the last character they share stays with the answers, so that neither is empty.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    for column in ("chosen", "rejected"):
        _check_value(row[column], column, conversational)
    shortest = min(len(chosen), len(rejected))
    split = next((i for i in range(shortest) if chosen[i] != rejected[i]), shortest - 1)
    if not conversational and split and chosen[split] != rejected[split] and chosen[split - 1] == " ":
        split -= 1
    if conversational and not split:
        raise _BadRow("chosen and rejected have no prompt column and do not start with the same message")
    return {**row, "prompt": chosen[:split], "chosen": chosen[split:], "rejected": rejected[split:]}


def _briefly(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"
