"""Files with rows of a store (exports, the learner's replay, samples), which follow what is deleted from it.

A line is a JSON object that names what it holds: `response_ids`, `feedback_ids`. A file is replaced whole, never
appended to. The store remembers on which machine it lies and which deletions it has followed, so that a crash, or a
learner elsewhere, leaves nothing behind for good: `clear_files` goes on where it stopped, on each machine for its own.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from sqlalchemy import Connection, delete, func, insert, select, update

from alignfast.online.store.tables import deletions, files

if TYPE_CHECKING:
    from alignfast.online.store.store import Store

FileKind: TypeAlias = Literal["export", "replay", "samples"]


@dataclass
class Cleared:
    """What `clear_files` did.

    Attributes:
        lines: deleted from each file that had any.
        missing: files that are no longer there.
        elsewhere: files of other machines, as host:path, that have not followed yet.
    """

    lines: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)


def write_lines(
    store: Store, path: str | os.PathLike[str], kind: FileKind, rows: Callable[[], Iterable[dict[str, Any]]]
) -> int:
    """Write a file, whole or not at all, and remember it.

    Args:
        store: that the rows come from.
        path: of the file; one that is there is replaced.
        kind: export, replay or samples.
        rows: called once to read them; each names its `response_ids` or `feedback_ids`.

    Returns:
        How many lines it has.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in get_args(FileKind):
        raise ValueError(f"a file's kind must be one of {', '.join(get_args(FileKind))}, got {kind!r}")
    file = Path(path).resolve()
    with store.read() as connection:  # what is deleted after this, the file has yet to follow
        cleared = _newest(connection)
    number = 0

    def counted() -> Iterator[str]:
        nonlocal number
        for row in rows():
            number += 1
            yield json.dumps(row, ensure_ascii=False)

    temporary = _write(file, counted())
    with store.exclusively() as connection:
        where = (files.c.host == socket.gethostname()) & (files.c.path == str(file))
        connection.execute(delete(files).where(where))
        row = {"kind": kind, "created": time.time(), "cleared": cleared}
        connection.execute(insert(files).values(host=socket.gethostname(), path=str(file), **row))
        os.replace(temporary, file)
    _sync_folder(file.parent)
    clear_files(store)
    return number


def clear_files(store: Store) -> Cleared:
    """Take what was deleted out of the files of this machine; to be called when a process of it starts."""
    found, host = Cleared(), socket.gethostname()
    with store.exclusively() as connection:
        newest = _newest(connection)
        for row in list(connection.execute(select(files).where(files.c.cleared < newest))):
            if row.host != host:
                found.elsewhere.append(f"{row.host}:{row.path}")
                continue
            this = (files.c.host == row.host) & (files.c.path == row.path)
            if not Path(row.path).is_file():
                found.missing.append(row.path)
                connection.execute(delete(files).where(this))
                continue
            if number := _clear(Path(row.path), *_deleted_since(connection, row.cleared)):
                found.lines[row.path] = number
            connection.execute(update(files).where(this).values(cleared=newest))
    return found


def _newest(connection: Connection) -> int:
    return connection.execute(select(func.max(deletions.c.seq))).scalar() or 0


def _deleted_since(connection: Connection, seq: int) -> tuple[set[str], set[str]]:
    rows = list(connection.execute(select(deletions).where(deletions.c.seq > seq)))
    return (
        {id for row in rows for id in row.response_ids},
        {id for row in rows for id in row.feedback_ids},
    )


def _clear(file: Path, response_ids: set[str], feedback_ids: set[str]) -> int:
    """Replace a file by its lines that name none of these; one that can't be read goes too, since it may."""
    kept, gone = [], 0
    for line in filter(None, file.read_text("utf-8").split("\n")):
        try:
            row = json.loads(line)
            stays = response_ids.isdisjoint(row.get("response_ids", ())) and feedback_ids.isdisjoint(
                row.get("feedback_ids", ())
            )
        except (ValueError, TypeError, AttributeError):
            stays = False
        if stays:
            kept.append(line)
        else:
            gone += 1
    if gone:
        os.replace(_write(file, kept), file)
        _sync_folder(file.parent)
    return gone


def _write(file: Path, lines: Iterable[str]) -> Path:
    """The lines in a file beside it, on disk."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as out:
            for line in lines:
                out.write(line + "\n")
            out.flush()
            os.fsync(out.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
