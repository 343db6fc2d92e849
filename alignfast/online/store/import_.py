"""Votes from elsewhere: TRL's formats, Open WebUI's and Argilla's exports.

Each row becomes the answers it shows and the votes on them. Their ids are made of the row's own ids or, where it has
none, of its content: a file that is imported twice adds nothing the second time. Rows without a vote are counted, not
guessed at; rows that can't be read are an error before anything is stored, or left out where that is asked for.

Not done here: the readers of the two tools (`foreign`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

from alignfast.data import DataError
from alignfast.data.formats import content_text, scan
from alignfast.data.sources import open_source
from alignfast.online.feedback import TIE, Kind, Shown, Vote

if TYPE_CHECKING:
    from alignfast.online.store.store import Store

ImportFormat: TypeAlias = Literal["trl", "openwebui", "argilla"]

_CHUNK = 500  # rows of one transaction


class Read(NamedTuple):
    """What a row holds: nothing, where nobody has voted on it."""

    shown: list[Shown]
    votes: list[Vote]


class BadRow(ValueError):
    """Why a row can't be used; the caller knows its place."""


@dataclass(frozen=True)
class Imported:
    """What an import did.

    Attributes:
        rows: that were read.
        votes: that are new.
        known: that were there before.
        unvoted: rows without a vote.
        skipped: (place, reason) of rows that could not be used.
    """

    rows: int
    votes: int
    known: int
    unvoted: int
    skipped: tuple[tuple[str, str], ...] = ()


def import_file(
    store: Store,
    file: str | Path,
    format: ImportFormat,
    *,
    user: str = "import",
    rating_max: int = 5,
    prompt_field: str | None = None,
    answer_fields: tuple[str, ...] = (),
    skip_bad: bool = False,
) -> Imported:
    """Store the answers and votes of a file.

    Args:
        store: to put them into; its redaction hook is obeyed, its limit on votes is not.
        file: .jsonl, .json or .parquet.
        format: whose it is.
        user: who voted, in TRL's rows without a column `user`.
        rating_max: best of Argilla's ratings, which begin at 1; they are put on 1 to 5.
        prompt_field: Argilla's field with the prompt; None: the one that is called so.
        answer_fields: Argilla's fields with the answers; none: those that are called so.
        skip_bad: leave out rows that can't be used, and say which.

    Raises:
        DataError: the file, or a row of it, can't be read; then nothing is stored.
        ValueError: an option is not as said.
    """
    if format not in get_args(ImportFormat):
        raise ValueError(f"format must be one of {', '.join(get_args(ImportFormat))}, got {format!r}")
    if rating_max < 2:
        raise ValueError(f"rating_max must be at least 2, got {rating_max}")
    skipped: list[tuple[str, str]] = []
    found: list[Read] = []
    for where, read in (
        _trl(file, user)
        if format == "trl"
        else _foreign(
            file, format, rating_max=rating_max, prompt_field=prompt_field, answer_fields=answer_fields
        )
    ):
        if isinstance(read, Read):
            found.append(read)
            continue
        if not skip_bad:
            raise DataError(f"{where}: {read}")
        skipped.append((where, read))
    # the last vote counts
    found.sort(key=lambda read: max((vote.created for vote in read.votes), default=0.0))
    new = 0
    for at in range(0, len(found), _CHUNK):
        some = found[at : at + _CHUNK]
        new += store.add_all(
            [s for read in some for s in read.shown], [v for read in some for v in read.votes]
        )
    total = sum(len(read.votes) for read in found)
    unvoted = sum(not read.votes for read in found)
    return Imported(len(found) + len(skipped), new, total - new, unvoted, tuple(skipped))


def _foreign(file: str | Path, format: str, **options: Any) -> Iterator[tuple[str, Read | str]]:
    from alignfast.online.store import foreign

    make: Callable[[dict[str, Any]], Read] = (
        foreign.openwebui if format == "openwebui" else partial(foreign.argilla, **options)
    )
    opened = open_source(Path(file))
    for number, row in opened.items:
        try:
            yield opened.where(number), row if isinstance(row, str) else make(row)
        except BadRow as error:
            yield opened.where(number), str(error)
        except ValueError as error:  # of Shown and Vote
            yield opened.where(number), str(error)
        except (KeyError, TypeError, AttributeError) as error:
            yield (
                opened.where(number),
                f"it is not shaped as {format} exports it: {type(error).__name__}: {error}",
            )


# TRL


def _trl(file: str | Path, user: str) -> Iterator[tuple[str, Read | str]]:
    rows, bad = scan(Path(file), formats=("preference", "ranking", "thumbs"))
    yield from bad
    make = {"preference": _pair, "ranking": _ranking, "thumbs": _thumb}
    for index, row in enumerate(rows):
        try:
            voter = row.get("user", user)
            yield rows.where(index), make[rows.format](row, voter, _key(row, voter))
        except ValueError as error:
            yield rows.where(index), str(error)


def _key(row: dict[str, Any], user: str) -> str:
    """The same for the same words of the same user, and for nothing else."""
    columns = ("prompt", "chosen", "rejected", "ranking", "completion", "label")
    content = [user, *(row.get(column) for column in columns)]
    return "trl-" + hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _pair(row: dict[str, Any], user: str, key: str) -> Read:
    texts = [_words(row["chosen"], "chosen"), _words(row["rejected"], "rejected")]
    if texts[0] == texts[1]:
        raise BadRow("chosen and rejected are the same: nothing is preferred")
    return compared(key, row["prompt"], texts, [[0], [1]], user)


def _ranking(row: dict[str, Any], user: str, key: str) -> Read:
    texts = [_words(answer, f"ranking[{i}]") for i, answer in enumerate(row["ranking"])]
    return compared(key, row["prompt"], texts, [[i] for i in range(len(texts))], user)


def _thumb(row: dict[str, Any], user: str, key: str) -> Read:
    shown = Shown(
        id=f"{key}-0", prompt=row["prompt"], text=_words(row["completion"], "completion"), user=user
    )
    value = "up" if row["label"] else "down"
    return Read([shown], [Vote(id=key, response_id=shown.id, kind="thumb", value=value, user=user)])


def _words(answer: Any, column: str) -> str:
    """The text of an answer."""
    if isinstance(answer, str):
        return answer
    if len(answer) != 1 or not content_text(answer[0]):
        raise BadRow(f"column {column!r} holds {len(answer)} messages; a vote is on one message with a text")
    return content_text(answer[0])


def compared(
    key: str,
    prompt: Any,
    texts: Iterable[str],
    places: list[list[int]],
    user: str,
    **more: Any,
) -> Read:
    """Answers that were shown side by side, and their order: a pair where there are two, else a ranking.

    Args:
        key: that all ids begin with; also the vote's.
        prompt: of all of them.
        texts: of the answers.
        places: numbers of the answers, best first; those in one place are tied.
        user: who compared them; the answers are theirs too, so that they go where the vote goes.
        more: fields of the vote.
    """
    shown = [
        Shown(id=f"{key}-{i}", prompt=prompt, text=text, group_id=key, user=user)
        for i, text in enumerate(texts)
    ]
    ids = [[shown[i].id for i in place] for place in places]
    kind: Kind = "pair" if len(shown) == 2 else "ranking"
    value = ids if kind == "ranking" else ids[0][0] if len(ids) == 2 else TIE
    vote = Vote(id=key, response_id=shown[0].id, kind=kind, value=value, user=user, **more)
    return Read(shown, [vote])
