"""`alignfast keys make USER | list | revoke ID`: API keys of the server."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from alignfast.commands.parser import UsageError, parse_options


@dataclass(frozen=True)
class MakeOptions:
    """Whose key is made."""

    user: str
    """Whose votes come with it."""
    role: str = "user"
    """`user`, `annotator` (the labelling queue too) or `admin` (everything)."""
    db: str = "sqlite:///feedback.db"
    """Database: sqlite:///FILE or postgresql://USER@HOST/NAME. A SQLite file is made where there is none."""


@dataclass(frozen=True)
class ListOptions:
    """Which database's keys are listed."""

    db: str = "sqlite:///feedback.db"
    """Database: sqlite:///FILE or postgresql://USER@HOST/NAME."""


@dataclass(frozen=True)
class RevokeOptions:
    """Which key ends."""

    id: str
    """Its id, as `list` shows it."""
    db: str = "sqlite:///feedback.db"
    """Database: sqlite:///FILE or postgresql://USER@HOST/NAME."""


def run(command: str, argv: Sequence[str]) -> None:
    """Do what the first word says."""
    actions = {"make": _make, "list": _list, "revoke": _revoke}
    if not argv or argv[0] in ("-h", "--help"):
        print(
            f"usage: alignfast {command} make USER | list | revoke ID\n\n"
            f"`alignfast {command} ACTION --help` lists an action's options."
        )
        return
    if argv[0] not in actions:
        raise UsageError(f"there is `alignfast {command} {' | '.join(actions)}`, got {argv[0]!r}")
    actions[argv[0]](f"{command} {argv[0]}", argv[1:])


def _make(command: str, argv: Sequence[str]) -> None:
    (options,) = parse_options(command, argv, MakeOptions, positional=("user",))
    from alignfast.online.store import Store

    with Store.open(options.db) as store:
        key, made = store.keys.make(options.user, options.role)
    print(f"{key}\nthe key of {made.user} ({made.role}), which nobody can show again; its id is {made.id}")


def _list(command: str, argv: Sequence[str]) -> None:
    (options,) = parse_options(command, argv, ListOptions)
    from alignfast.online.store import Store

    with Store.open(options.db, create=False) as store:
        found = store.keys.all()
    for key in found:
        state = "" if key.revoked is None else f", revoked {_day(key.revoked)}"
        print(f"{key.id}  {key.user} ({key.role}), made {_day(key.created)}{state}")
    if not found:
        print("there are no keys; `alignfast keys make USER` makes one")


def _revoke(command: str, argv: Sequence[str]) -> None:
    (options,) = parse_options(command, argv, RevokeOptions, positional=("id",))
    from alignfast.online.store import Store

    with Store.open(options.db, create=False) as store:
        store.keys.revoke(options.id)
    print(f"revoked: {options.id}")


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))
