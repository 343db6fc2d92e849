"""`alignfast feedback export | import | stats | expire | delete-user`: what people said of answers, and what is kept."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignfast.commands.parser import UsageError, parse_options

if TYPE_CHECKING:
    from alignfast.online.store import Store
    from alignfast.online.store.deletion import Deleted

_DAY = 86_400
_SHOWN = 5  # rows that were left out


@dataclass(frozen=True)
class ExportOptions:
    """What is written where."""

    output: str
    """A .jsonl file; one that is there is replaced. It follows later deletions while it stays at this path."""
    db: str = "sqlite:///feedback.db"
    """Database: sqlite:///FILE or postgresql://USER@HOST/NAME."""
    format: str = "pairs"
    """`pairs` (TRL: prompt, chosen, rejected), `kto` (TRL: prompt, completion, label), `ranking` (prompt, ranking), or
    `openinference` (spans with annotations)."""
    days: float | None = None
    """Votes of the last so many days; unless given, all."""
    with_users: bool = False
    """Name in each row who voted."""
    repeats: bool = False
    """Keep all of a user's votes on the same words, not the last alone."""


@dataclass(frozen=True)
class ImportOptions:
    """What is read, and how."""

    file: str
    """A .jsonl, .json or .parquet file."""
    db: str = "sqlite:///feedback.db"
    """Database: sqlite:///FILE or postgresql://USER@HOST/NAME. A SQLite file is made where there is none."""
    format: str = "trl"
    """`trl` (pairs, rankings, or prompt, completion and label), `openwebui` (its export of feedback), or `argilla`
    (records as its `to_json`, `to_list` or `to_datasets` gives them)."""
    user: str = "import"
    """Who voted, in TRL's rows without a column `user`."""
    rating_max: int = 5
    """Best of Argilla's ratings, which begin at 1; they are put on 1 to 5."""
    prompt_field: str | None = None
    """Argilla's field with the prompt; unless given, the one that is called prompt, instruction, question or input."""
    answer_fields: list[str] | None = None
    """Argilla's fields with the answers; unless given, those whose names begin with response, completion or answer."""
    redact: str | None = None
    """package.module:function that is called with each text, and returns what may be stored."""
    skip_bad: bool = False
    """Leave out rows that can't be used, and say which; otherwise they end the import before it stores anything."""


@dataclass(frozen=True)
class StatsOptions:
    """What is counted."""

    db: str = "sqlite:///feedback.db"
    """Database: sqlite:///FILE or postgresql://USER@HOST/NAME."""
    as_json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class ExpireOptions:
    """What is too old."""

    days: float
    """Answers that were shown earlier than so many days ago go, with the votes on them."""
    db: str = "sqlite:///feedback.db"
    """Database: sqlite:///FILE or postgresql://USER@HOST/NAME."""


@dataclass(frozen=True)
class DeleteUserOptions:
    """Who is forgotten."""

    user: str
    """The user's name, as the keys or `export --with_users` have it."""
    db: str = "sqlite:///feedback.db"
    """Database: sqlite:///FILE or postgresql://USER@HOST/NAME."""


def run(command: str, argv: Sequence[str]) -> None:
    """Do what the first word says."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return
    if argv[0] not in _ACTIONS:
        raise UsageError(f"there is `alignfast {command} {' | '.join(_ACTIONS)}`, got {argv[0]!r}")
    _ACTIONS[argv[0]][0](f"{command} {argv[0]}", argv[1:])


def _export(command: str, argv: Sequence[str]) -> None:
    (options,) = parse_options(command, argv, ExportOptions)
    from alignfast.online.store.export import export_rows

    since = None if options.days is None else time.time() - options.days * _DAY
    with _open(options.db, create=False) as store:
        number = store.write_lines(
            options.output,
            "export",
            lambda: export_rows(
                store, options.format, since=since, with_users=options.with_users, repeats=options.repeats
            ),
        )
    print(f"{number:,} rows: {options.output}")


def _import(command: str, argv: Sequence[str]) -> None:
    (options,) = parse_options(command, argv, ImportOptions, positional=("file",))
    from alignfast.online.store.import_ import import_file
    from alignfast.online.store.redact import load_redact

    redact = None if options.redact is None else load_redact(options.redact)
    with _open(options.db, redact=redact) as store:
        found = import_file(
            store,
            options.file,
            options.format,
            user=options.user,
            rating_max=options.rating_max,
            prompt_field=options.prompt_field,
            answer_fields=tuple(options.answer_fields or ()),
            skip_bad=options.skip_bad,
        )
    print(
        f"{found.rows:,} rows: {found.votes:,} new votes, {found.known:,} known, {found.unvoted:,} without a vote"
    )
    for where, reason in found.skipped[:_SHOWN]:
        print(f"left out: {where}: {reason}")
    if len(found.skipped) > _SHOWN:
        print(f"left out: {len(found.skipped) - _SHOWN:,} more")


def _stats(command: str, argv: Sequence[str]) -> None:
    (options,) = parse_options(command, argv, StatsOptions)
    from alignfast.online.store.stats import store_stats

    with _open(options.db, create=False) as store:
        found = store_stats(store)
    print(json.dumps(found.to_dict(), indent=2) if options.as_json else found.render())


def _expire(command: str, argv: Sequence[str]) -> None:
    (options,) = parse_options(command, argv, ExpireOptions)
    with _open(options.db, create=False) as store:
        print(_told(store.expire(options.days)))


def _delete_user(command: str, argv: Sequence[str]) -> None:
    (options,) = parse_options(command, argv, DeleteUserOptions, positional=("user",))
    with _open(options.db, create=False) as store:
        found = store.delete_user(options.user)
    if not (found.responses or found.votes or found.keys):
        raise ValueError(
            f"{options.user!r} is unknown here; `alignfast feedback export --with_users` names users"
        )
    print(_told(found))


def _told(deleted: Deleted) -> str:
    lines = [f"deleted: {deleted.responses:,} answers, {deleted.votes:,} votes, {deleted.keys:,} keys"]
    lines += [f"cleared: {path}: {number:,} lines" for path, number in deleted.files.lines.items()]
    lines += [f"not there any more: {path}" for path in deleted.files.missing]
    lines += [f"cleared when alignfast next runs there: {place}" for place in deleted.files.elsewhere]
    if deleted.versions:
        lines.append(f"trained on it, and not changed: {', '.join(deleted.versions)}")
    return "\n".join(lines)


def _open(db: str, **options: object) -> Store:
    from alignfast.online.store import Store

    return Store.open(db, **options)  # type: ignore[arg-type]


_ACTIONS: dict[str, tuple[Callable[[str, Sequence[str]], None], str]] = {
    "export": (_export, "write votes in TRL's formats, or with OpenInference's names"),
    "import": (_import, "read TRL's formats, and exports of Open WebUI and Argilla"),
    "stats": (_stats, "how many votes of what kind, satisfaction a version, voters unlike the others"),
    "expire": (_expire, "delete what is older than so many days"),
    "delete-user": (_delete_user, "delete a user's answers and votes, here and in exports"),
}


def _help() -> str:
    lines = [f"  {name:<12}{text}" for name, (_, text) in _ACTIONS.items()]
    return "\n".join(
        [
            "usage: alignfast feedback ACTION [options]",
            "",
            *lines,
            "",
            "`alignfast feedback ACTION --help` lists an action's options.",
        ]
    )
