"""Rows of TRL's formats, recognised by their columns and checked one by one.

    text · messages · prompt + completion · prompt + chosen + rejected · prompt + completion + label · prompt + ranking
    prompt (for what is sampled: other columns go to the reward functions)

Each is plain (strings) or conversational (lists of messages). Chosen and rejected without a prompt have it
extracted from what they start with alike. Other columns are kept as they are; images are refused. Columns may make
several formats: the first is taken until a trainer asks for those that it can use (`Rows.one_of`).

Not done here: tokenising, and the chat template.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from alignfast.data.sources import DataError, HubDataset, Row, means_file, open_source

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
    "prompt": ("prompt",),
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
        columns: of the first row, as it was read.
    """

    name: str
    format: str
    conversational: bool
    items: list[Row]
    unit: str
    numbers: list[int]
    columns: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Row:
        return self.items[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.items)

    def where(self, index: int) -> str:
        """Place of a row in words, for messages."""
        return f"{self.name}, {self.unit} {self.numbers[index]}"

    def one_of(self, formats: Sequence[str], taker: str) -> Rows:
        """These rows in a format that someone takes: their own, or else the first that their columns make too.

        Args:
            formats: keys of `FORMATS`.
            taker: who takes them, for messages.

        Raises:
            DataError: the columns make none of the formats, or a row lacks what its format needs.

        >>> rows = load_rows([{"text": "yes no", "chosen": "yes", "rejected": "no"}])
        >>> rows.format, rows.one_of(["messages", "text"], "SFT").format
        ('preference', 'text')
        """
        if self.format in formats:
            return self
        format = next((f for f in _made_by(self.columns) if f in formats), None)
        if format is None:
            raise DataError(
                f"{self.name}: {taker} takes {_spelled(formats)}, got the columns {', '.join(self.columns)}; "
                "rename or add columns"
            )
        items = []
        try:
            conversational = _is_conversational(self[0], format)
            for row in self:
                items.append(_checked(row, format, conversational))
        except _BadRow as error:
            raise DataError(f"{self.where(len(items))}: {error}") from error
        return replace(self, format=format, conversational=conversational, items=items)


def load_rows(
    source: Source,
    *,
    formats: Sequence[str] = tuple(FORMATS),
    split: str = "train",
    config: str | None = None,
) -> Rows:
    """Read and check all rows of a source.

    Args:
        source: see `sources.open_source`.
        formats: keys of `FORMATS` that may be made of the columns; other columns are not looked at.
        split: which part of a dataset from the hub; files and lists have no parts.
        config: which of its configs, where it has several.

    Raises:
        DataError: nothing is there, or a row can't be read; the message names file, row and reason.
        ValueError: a config is given for what is no dataset's name.
        TypeError: the source is of no known kind.

    >>> rows = load_rows([("2 + 2 =", " 4", " 5")])
    >>> rows.format, rows.conversational, rows[0]["chosen"]
    ('preference', False, ' 4')
    >>> load_rows([{"text": "yes", "chosen": "yes", "rejected": ""}], formats=["text"])[0]["text"]
    'yes'
    >>> load_rows([{"prompt": "2 + 2 =", "completion": ""}])
    Traceback (most recent call last):
    alignfast.data.sources.DataError: list of 1 rows, index 0: column 'completion' is empty
    """
    if config is not None:
        if not isinstance(source, str) or means_file(source):
            raise ValueError(f"config={config!r} is for a dataset's name on the hub, got {_briefly(source)}")
        source = HubDataset(source, config, split)
    rows, bad = scan(source, formats=formats, split=split, stop=True)
    if bad:
        raise DataError(": ".join(bad[0]))
    return rows


def unpaired(rows: Rows) -> Rows:
    """Pairs as thumbs, as TRL does it: first all chosen answers with a thumb up, then all rejected ones with one down.

    >>> rows = unpaired(load_rows([("2 + 2 =", " 4", " 5")]))
    >>> [(row["completion"], row["label"]) for row in rows], rows.format
    ([(' 4', True), (' 5', False)], 'thumbs')
    """
    items = [
        {**row, "completion": row[column], "label": column == "chosen"}
        for column in ("chosen", "rejected")
        for row in rows
    ]
    return replace(rows, format="thumbs", items=items, numbers=rows.numbers * 2)


def scan(
    source: Source, *, formats: Sequence[str] = tuple(FORMATS), split: str = "train", stop: bool = False
) -> tuple[Rows, list[tuple[str, str]]]:
    """Read all rows that can be read, and (place, reason) of each that can't.

    Args:
        source: see `sources.open_source`.
        formats: as in `load_rows`.
        split: which part of a dataset from the hub.
        stop: end at the first bad row.

    Raises:
        DataError: there is not one row, good or bad.
        TypeError: the source is of no known kind.
    """
    opened = open_source(source, split)
    format, conversational = "", False
    columns: tuple[str, ...] = ()
    items: list[Row] = []
    numbers: list[int] = []
    bad: list[tuple[str, str]] = []
    for number, row in opened.items:
        try:
            if isinstance(row, str):
                raise _BadRow(row)
            if not items:  # the first row that can be read decides for all
                format, columns = _detect(row, formats, plain_labels=stop), tuple(row)
                conversational = _is_conversational(row, format)
            items.append(_checked(row, format, conversational))
            numbers.append(number)
        except _BadRow as error:
            bad.append((opened.where(number), str(error)))
            if stop:
                break
    if not items and not bad:
        raise DataError(f"{opened.name}: there are no rows")
    return Rows(opened.name, format, conversational, items, opened.unit, numbers, columns), bad


class _BadRow(Exception):
    """Why a row can't be used; the caller knows its place."""


def _detect(row: Row, formats: Sequence[str], plain_labels: bool) -> str:
    made = [format for format in _made_by(row) if format in formats]
    if not made:
        known = (
            "are no known format; known are"
            if set(formats) == set(FORMATS)
            else "make no format that is taken here:"
        )
        raise _BadRow(f"its columns ({', '.join(row)}) {known} {_spelled(formats)}")
    # Who trains may have a label that is a class; who checks a file hears that it is no thumb.
    if made[0] == "thumbs" and plain_labels and len(made) > 1 and not _is_bool(row["label"]):
        return made[1]
    return made[0]


def _made_by(columns: Collection[str]) -> Iterator[str]:
    return (format for format, needed in FORMATS.items() if all(column in columns for column in needed))


def _spelled(formats: Iterable[str]) -> str:
    return ", ".join("+".join(FORMATS[format]) for format in formats)


def _is_conversational(row: Row, format: str) -> bool:
    """Whether a format's columns hold messages, told by the first of them.

    Raises:
        _BadRow: they hold neither messages nor a string, or what the format can't be made of.
    """
    column = FORMATS[format][0]
    value = row[column]
    if value is None:
        raise _BadRow(f"column {column!r} is missing a value (null)")
    expected = {"text": "a string", "messages": "a list of messages"}.get(
        format, "a string or a list of messages"
    )
    if not isinstance(value, (str, list)) or isinstance(
        value, {"text": list, "messages": str}.get(format, ())
    ):
        raise _BadRow(f"column {column!r} must be {expected}, got {_briefly(value)}")
    return isinstance(value, list)


def _checked(row: Row, format: str, conversational: bool) -> Row:
    """The row, with its prompt extracted where that is implicit.

    Raises:
        _BadRow: a column is missing, empty, of the wrong type, or holds images.
    """
    for column in IMAGE_COLUMNS:
        if _holds_images(row.get(column)):
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
        # An empty plain prompt is a completion from nothing; no template renders an empty conversation, and nothing can
        # be sampled from no token.
        may_be_empty = not conversational and format != "prompt"
        _check_value(row["prompt"], "prompt", conversational, may_be_empty)
    if format == "thumbs":
        if not _is_bool(row["label"]):
            raise _BadRow(
                f"column 'label' must be true or false, got {row['label']!r}; rename it if it means another thing"
            )
        if not isinstance(row["label"], bool):
            row = {**row, "label": bool(row["label"])}
    return row


def _holds_images(value: Any) -> bool:
    """Datasets with images in some splits alone have the column everywhere, null or empty."""
    values = value if isinstance(value, list) else [value]
    return any(value is not None and value != "" for value in values)


def _is_bool(value: Any) -> bool:
    return isinstance(value, (bool, np.bool_))


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
        if not value or not (content_text(value[-1]) or value[-1].get("tool_calls")):
            raise _BadRow(f"column {column!r} is empty")
        return
    if not isinstance(value, str):
        raise _BadRow(f"column {column!r} must be a string like the first row's, got {_briefly(value)}")
    if not value and not may_be_empty:
        raise _BadRow(f"column {column!r} is empty")
    _check_text(value, column)


def content_text(message: dict[str, Any]) -> str:
    """What a checked message says: its content, or the texts of its blocks; nothing for tool calls alone.

    >>> content_text({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]})
    'ab'
    """
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(block["text"] for block in content)


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
