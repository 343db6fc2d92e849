"""Where rows come from: a JSONL or Parquet file, a `datasets.Dataset`, a list, a name on the hub.

A source is read into `(number, row)`, where the row is a dict, or a string that says why it could not be read:
so one bad line can be named without losing the rest of the file. What the columns must hold is `formats`' part.

Not done here: compressed files, CSV, streamed datasets.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import RecordBatch

Row: TypeAlias = dict[str, Any]


class DataError(ValueError):
    """Data that can't be used; the message names the file, the row and the reason."""


@dataclass(frozen=True)
class HubDataset:
    """A dataset by its name on the hub, or a folder that `load_dataset` can read.

    Attributes:
        name: `name`, `owner/name`, or the folder.
        config: which of its configs, e.g. `main` of gsm8k; None where it has but one.
        split: which part of it.
    """

    name: str
    config: str | None = None
    split: str = "train"

    def __str__(self) -> str:
        return f"{self.name} ({f'{self.config}, ' if self.config else ''}{self.split})"


if TYPE_CHECKING:
    Source: TypeAlias = (
        str | Path | HubDataset | Dataset | Sequence[dict[str, Any]] | Sequence[tuple[Any, Any, Any]]
    )


class Opened(NamedTuple):
    """A source ready to be read.

    Attributes:
        name: file, dataset or list, as errors call it.
        unit: what a row's number counts: `line` and `row` from 1, `index` from 0.
        items: number of each row with the row, or with the reason why it can't be read.
    """

    name: str
    unit: str
    items: Iterator[tuple[int, Row | str]]

    def where(self, number: int) -> str:
        """Place of a row in words, e.g. `pairs.jsonl, line 3`."""
        return f"{self.name}, {self.unit} {number}"


def open_source(source: Source, split: str = "train") -> Opened:
    """Open whatever a user calls data.

    Args:
        source: path of a `.jsonl`, `.json` (an object a line, or one array) or `.parquet` file; a `datasets.Dataset`;
            a list of dicts or of `(prompt, preferred, dispreferred)` tuples; the name of a dataset on the hub, or a
            `HubDataset`, which names its config too.
        split: which part of a dataset that is given by its name alone.

    Raises:
        DataError: there is no such file, its type is unknown, or the hub can't give the dataset.
        TypeError: the source is none of the above.
    """
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        return _open_path(path) if means_file(source) else _open_hub(HubDataset(str(source), split=split))
    if isinstance(source, HubDataset):
        return _open_hub(source)
    if isinstance(source, (list, tuple)):
        return Opened(f"list of {len(source)} rows", "index", enumerate(map(_item, source)))
    import datasets

    if isinstance(source, datasets.Dataset):
        return _open_dataset(source, "dataset")
    hint = ""
    if isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        hint = f"; pass one of its splits: {', '.join(map(str, source))}"
    if isinstance(source, datasets.IterableDataset):
        hint = "; a streamed dataset has no known end: load it without streaming=True"
    raise TypeError(
        "expected a .jsonl, .json or .parquet file, a datasets.Dataset, a list of dicts or of (prompt, preferred, "
        f"dispreferred) tuples, or a dataset's name, got {type(source).__name__}{hint}"
    )


_READERS = {".jsonl": "line", ".json": "line", ".parquet": "row"}


def means_file(name: str | Path) -> bool:
    """Whether a name means a file, there or not; the hub's are `name` or `owner/name`.

    A folder may hold a dataset: `load_dataset` reads it as it reads the hub.

    >>> means_file("rows.jsonl"), means_file("openai/gsm8k")
    (True, False)
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return False
    return path.is_file() or path.suffix in (*_READERS, ".csv", ".gz", ".txt") or len(path.parts) > 2


def _open_path(path: Path) -> Opened:
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    if path.suffix not in _READERS:
        raise DataError(
            f"{path}: can't read {path.suffix or 'a file without a suffix'}; expected .jsonl, .json or .parquet. "
            "datasets.load_dataset reads more: give what it returns to a trainer, or its to_json('rows.jsonl')"
        )
    if path.suffix == ".json" and _holds_array(path):
        return Opened(str(path), "index", enumerate(_json_array(path)))
    read = _parquet_rows if path.suffix == ".parquet" else _json_lines
    return Opened(str(path), _READERS[path.suffix], read(path))


def _holds_array(path: Path) -> bool:
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
    return first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _json_array(path: Path) -> Iterator[Row | str]:
    rows = _parsed(path.read_bytes())
    if isinstance(rows, str):
        raise DataError(f"{path}: {rows}")
    for row in rows:
        yield row if isinstance(row, dict) else f"expected a JSON object, got {type(row).__name__}"


def _json_lines(path: Path) -> Iterator[tuple[int, Row | str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():  # a file may end in empty lines; they are no rows, but they count as lines
                yield number, _json_line(line)


def _json_line(line: bytes) -> Row | str:
    row = _parsed(line)
    if isinstance(row, (dict, str)):
        return row
    return f"expected one JSON object a line, got {type(row).__name__}"


def _parsed(text: bytes) -> Any:
    """What a JSON text says; a string is the reason why it says nothing."""
    try:
        found = json.loads(text.decode("utf-8-sig"))  # some editors write a byte-order mark first
    except UnicodeDecodeError as error:
        return f"invalid UTF-8: byte 0x{text[error.start]:02x} at {error.start}"
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        return f"bad JSON: {error.msg} at {place}; expected one object a line"
    except ValueError as error:  # a number of more digits than Python reads
        return f"bad JSON: {error}"
    except RecursionError:
        return "bad JSON: it is nested too deeply to be read"
    return "expected a JSON object, got str" if isinstance(found, str) else found


def _parquet_rows(path: Path) -> Iterator[tuple[int, Row | str]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in _batch_rows(batch):
                number += 1
                yield number, row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: can't be read as Parquet after row {number}: {error}") from error


def _batch_rows(batch: RecordBatch) -> Iterator[Row | str]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # raised before the first row comes; ten times slower, so only now
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield f"invalid UTF-8: byte 0x{error.object[error.start]:02x} at {error.start} of a string"


def _open_dataset(dataset: Dataset, name: str) -> Opened:
    return Opened(name, "index", enumerate(dataset))


def _item(item: Any) -> Row | str:
    if isinstance(item, dict):
        return item
    if isinstance(item, (tuple, list)) and len(item) == 3:
        return dict(zip(("prompt", "chosen", "rejected"), item))
    found = f"{len(item)} items" if isinstance(item, (tuple, list)) else type(item).__name__
    return f"expected a dict or a (prompt, preferred, dispreferred) tuple, got {found}"


def _open_hub(wanted: HubDataset) -> Opened:
    import datasets

    try:
        dataset = datasets.load_dataset(wanted.name, wanted.config, split=wanted.split)
    # No network, no such dataset, no such split, a config is missing, a file of it can't be read.
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        config = f"config {wanted.config!r}, " if wanted.config else ""
        raise DataError(
            f"{wanted.name!r} is no file here, and loading it as a dataset's name "
            f"({config}split {wanted.split!r}) failed: {error}"
        ) from error
    return _open_dataset(dataset, str(wanted))
