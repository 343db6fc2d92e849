"""Where rows come from: a JSONL or Parquet file, a `datasets.Dataset`, a list, a name on the hub.

A source is read into `(number, row)`, where the row is a dict, or a string that says why it could not be read:
so one bad line can be named without losing the rest of the file. What the columns must hold is `formats`' part.

Not done here: compressed files, CSV, streamed datasets.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import RecordBatch

    Source: TypeAlias = str | Path | Dataset | Sequence[dict[str, Any]] | Sequence[tuple[Any, Any, Any]]

Row: TypeAlias = dict[str, Any]


class DataError(ValueError):
    """Data that can't be used; the message names the file, the row and the reason."""


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
        source: path of a `.jsonl`, `.json` (an object a line) or `.parquet` file; a `datasets.Dataset`; a list of
            dicts or of `(prompt, preferred, dispreferred)` tuples; or the name of a dataset on the hub.
        split: which part of a hub dataset.

    Raises:
        DataError: there is no such file, its type is unknown, or the hub can't give the dataset.
        TypeError: the source is none of the above.
    """
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        return _open_path(path) if _means_file(path) else _open_hub(str(source), split)
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
        "expected a .jsonl or .parquet file, a datasets.Dataset, a list of dicts or of (prompt, preferred, "
        f"dispreferred) tuples, or a dataset's name, got {type(source).__name__}{hint}"
    )


_READERS = {".jsonl": "line", ".json": "line", ".parquet": "row"}


def _means_file(path: Path) -> bool:
    """Whether a name means a file, there or not; the hub's are `name` or `owner/name`.

    A folder may hold a dataset: `load_dataset` reads it as it reads the hub.
    """
    if path.is_dir():
        return False
    return path.is_file() or path.suffix in (*_READERS, ".csv", ".gz", ".txt") or len(path.parts) > 2


def _open_path(path: Path) -> Opened:
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    if path.suffix not in _READERS:
        raise DataError(
            f"{path}: can't read {path.suffix or 'a file without a suffix'}; expected .jsonl or .parquet"
        )
    read = _parquet_rows if path.suffix == ".parquet" else _json_lines
    return Opened(str(path), _READERS[path.suffix], read(path))


def _json_lines(path: Path) -> Iterator[tuple[int, Row | str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():  # a file may end in empty lines; they are no rows, but they count as lines
                yield number, _json_line(line)


def _json_line(line: bytes) -> Row | str:
    try:
        row = json.loads(line.decode("utf-8-sig"))  # some editors write a byte-order mark first
    except UnicodeDecodeError as error:
        return f"invalid UTF-8: byte 0x{line[error.start]:02x} at {error.start} of the line"
    except json.JSONDecodeError as error:
        return f"bad JSON: {error.msg} at column {error.colno}"
    return row if isinstance(row, dict) else f"expected one JSON object a line, got {type(row).__name__}"


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


def _open_hub(name: str, split: str) -> Opened:
    import datasets

    try:
        dataset = datasets.load_dataset(name, split=split)
    # No network, no such dataset, no such split, a config is missing, a file of it can't be read.
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name!r} is no file here, and loading it as a dataset's name (split {split!r}) failed: {error}"
        ) from error
    return _open_dataset(dataset, f"{name} ({split})")
