"""Versions of policies and reward models, which of them serves, and the runs of the learner that makes them.

A version is an immutable folder; the store knows its name, hash, parent and fate. What serves is the newest promotion's
version; rolling back promotes the one that served before it, so that history is only ever added to.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from sqlalchemy import Connection, insert, select, update
from sqlalchemy.exc import IntegrityError

from alignfast.online.feedback import check_id, new_id
from alignfast.online.store.tables import promotions, runs, versions

if TYPE_CHECKING:
    from alignfast.online.store.store import Store

VersionKind: TypeAlias = Literal["policy", "reward"]
Status: TypeAlias = Literal["candidate", "canary", "promoted", "refused", "rolled_back"]


@dataclass(frozen=True)
class Version:
    """An immutable folder of weights.

    Attributes:
        name: of the version, unlike all others.
        kind: what the folder holds.
        path: the folder.
        hash: of its weights.
        parents: versions that it comes from: the one it was trained from, the reward model it was trained with.
        created: seconds since 1970.
        status: what became of it.
        reasons: for that, in words.
        share: of the users who meet it as the canary; None: it never was.
        figures: what its making measured, as JSON can hold it.
    """

    name: str
    kind: VersionKind
    path: str
    hash: str
    parents: tuple[str, ...]
    created: float
    status: Status
    reasons: tuple[str, ...] = ()
    share: float | None = None
    figures: dict[str, Any] = field(default_factory=dict)


class ServesAnother(ValueError):
    """Another version serves than the one that a change was meant for."""


@dataclass(frozen=True)
class Run:
    """One round of the learner, so that it can go on after a kill.

    Attributes:
        id: of the run.
        created: seconds since 1970.
        updated: when its stage was last written.
        status: running, done or failed.
        stage: that it is in, or that comes next.
        state: what the stage needs, as JSON can hold it.
    """

    id: str
    created: float
    updated: float
    status: Literal["running", "done", "failed"]
    stage: str
    state: dict[str, Any]


class Versions:
    """The versions of a store: `store.versions`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def add(
        self, name: str, kind: VersionKind, path: str, hash: str, *, parents: Sequence[str] = ()
    ) -> Version:
        """A new candidate.

        Raises:
            ValueError: the name is taken, a parent is unknown, or the kind is.
        """
        made = Version(name, kind, path, hash, tuple(parents), time.time(), "candidate")
        self._store.write(lambda connection: insert_version(connection, made))
        return made

    def get(self, name: str) -> Version:
        """One version.

        Raises:
            ValueError: there is no such version.
        """
        with self._store.read() as connection:
            return _get(connection, name)

    def all(self, kind: VersionKind | None = None) -> list[Version]:
        """Versions in the order in which they were made."""
        with self._store.read() as connection:
            return [one for one in _all(connection).values() if kind in (None, one.kind)]

    def set_status(self, name: str, status: Status, reasons: Sequence[str] = ()) -> None:
        """Say what became of a version, and why; `set_canary`, `promote` and `roll_back` say it themselves.

        Raises:
            ValueError: there is no such version or status, or it is the canary's.
        """
        if status not in get_args(Status):
            raise ValueError(
                f"a version's status must be one of {', '.join(get_args(Status))}, got {status!r}"
            )
        if status == "canary":
            raise ValueError("a canary needs its share of the users: call set_canary(name, share)")

        def work(connection: Connection) -> None:
            _get(connection, name)
            _set(connection, name, status, reasons)

        self._store.write(work)

    def refuse(self, name: str, reasons: Sequence[str]) -> None:
        """Say that a policy shall not serve; a canary's duels end.

        Raises:
            ValueError: there is no such policy, or it serves.
        """

        def work(connection: Connection) -> None:
            kind = _get(connection, name).kind
            if kind != "policy":
                raise ValueError(f"{name!r} is a {kind} model: only a policy serves")
            if _served(connection, kind)[-1:] == [name]:
                raise ValueError(f"{name!r} serves: roll it back (`alignfast online rollback`)")
            _set(connection, name, "refused", reasons)

        self._store.write(work)

    def set_figures(self, name: str, figures: Mapping[str, Any]) -> None:
        """Keep what the making of a version measured, in place of what was kept before.

        Raises:
            ValueError: there is no such version.
        """

        def work(connection: Connection) -> None:
            _get(connection, name)
            changed = update(versions).where(versions.c.name == name)
            connection.execute(changed.values(figures=dict(figures)))

        self._store.write(work)

    def set_canary(self, name: str, share: float) -> None:
        """Have a policy duel with the version that serves, before a share of the users, until its status changes.

        Args:
            name: of the version.
            share: of the users, above 0 and at most 1; a user is in it or not by their name and the version's.

        Raises:
            ValueError: there is no such policy, another one is the canary, it serves, or the share is out of range.
        """
        if not 0 < share <= 1:
            raise ValueError(f"a canary's share must be above 0 and at most 1, got {share}")

        def work(connection: Connection) -> None:
            found, before = _get(connection, name), _canary(connection)
            if found.kind != "policy":
                raise ValueError(f"{name!r} is a {found.kind} model: only a policy answers users")
            if before is not None and before.name != name:
                raise ValueError(f"{before.name!r} is the canary: set its status before {name!r} becomes it")
            if _served(connection, "policy")[-1:] == [name]:
                raise ValueError(f"{name!r} serves: it can't duel with itself")
            _set(connection, name, "canary", found.reasons)
            connection.execute(update(versions).where(versions.c.name == name).values(share=share))

        self._store.write(work)

    def canary(self) -> Version | None:
        """The version that duels with the one that serves; None: there is none."""
        with self._store.read() as connection:
            return _canary(connection)

    def promote(self, name: str, *, over: str | None = None) -> Version:
        """Make a version the one that serves, among those of its kind.

        Args:
            name: of the version.
            over: what must serve until then; None: whatever does.

        Raises:
            ServesAnother: something else serves; nothing is changed.
            ValueError: there is no such version.
        """

        def work(connection: Connection) -> Version:
            found = _get(connection, name)
            _expect(_served(connection, found.kind), over)
            _set(connection, name, "promoted", found.reasons)
            _promotion(connection, found, "promote")
            return _get(connection, name)

        return self._store.write(work)

    def roll_back(
        self, kind: VersionKind = "policy", reasons: Sequence[str] = (), *, of: str | None = None
    ) -> Version:
        """Serve again what served before the version that serves now.

        Args:
            kind: of the version.
            reasons: in words.
            of: what must serve until then; None: whatever does.

        Raises:
            ServesAnother: something else serves; nothing is changed.
            ValueError: no version served before.
        """

        def work(connection: Connection) -> Version:
            served = _served(connection, kind)
            _expect(served, of)
            if len(served) < 2:
                raise ValueError(
                    f"no {kind} served before {served[-1] if served else 'this'}: there is none to go back to"
                )
            _set(connection, served[-1], "rolled_back", reasons)
            found = _get(connection, served[-2])
            _promotion(connection, found, "roll_back")
            return found

        return self._store.write(work)

    def serving(self, kind: VersionKind = "policy") -> Version | None:
        """The version that serves; None before the first promotion."""
        with self._store.read() as connection:
            served = _served(connection, kind)
            return _get(connection, served[-1]) if served else None


class Runs:
    """The learner's runs in a store: `store.runs`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def start(self, stage: str, state: dict[str, Any] | None = None) -> Run:
        """A new run, in its first stage."""
        now = time.time()
        made = Run(new_id("run"), now, now, "running", stage, state or {})
        self._store.write(lambda connection: connection.execute(insert(runs).values(**vars(made))))
        return made

    def to_stage(self, id: str, stage: str, state: dict[str, Any]) -> None:
        """Write that a run goes on to a stage, with what this needs: after a kill it begins there.

        Raises:
            ValueError: no such run is under way.
        """
        self._change(id, stage=stage, state=state)

    def end(self, id: str, status: Literal["done", "failed"] = "done") -> None:
        """Write that a run is over.

        Raises:
            ValueError: no such run is under way.
        """
        self._change(id, status=status)

    def unfinished(self) -> list[Run]:
        """Runs that were started and not ended, the oldest first."""
        return [run for run in self.all() if run.status == "running"]

    def all(self) -> list[Run]:
        """All runs, the oldest first."""
        with self._store.read() as connection:
            found = connection.execute(select(runs).order_by(runs.c.created))
            return [Run(**row._mapping) for row in found]

    def _change(self, id: str, **values: Any) -> None:
        statement = update(runs).where(runs.c.id == id, runs.c.status == "running")

        def work(connection: Connection) -> None:
            if not connection.execute(statement.values(updated=time.time(), **values)).rowcount:
                raise ValueError(f"there is no run {id!r} under way")

        self._store.write(work)


def insert_version(connection: Connection, version: Version) -> None:
    """Keep a new version.

    Raises:
        ValueError: the name is taken, a parent is unknown, or the kind is.
    """
    if version.kind not in get_args(VersionKind):
        raise ValueError(
            f"a version's kind must be {' or '.join(get_args(VersionKind))}, got {version.kind!r}"
        )
    check_id(version.name, "name", "a version")
    for parent in version.parents:
        _get(connection, parent)
    try:
        with connection.begin_nested():
            row = {**vars(version), "parents": list(version.parents), "reasons": list(version.reasons)}
            connection.execute(insert(versions).values(**row))
    except IntegrityError as error:
        raise ValueError(f"there is a version {version.name!r} already; versions never change") from error


def line_of(connection: Connection, name: str) -> list[str]:
    """A version and those of its kind that it comes from.

    Raises:
        ValueError: there is no such version.
    """
    kind, known = _get(connection, name).kind, _all(connection)
    line, waiting = [], [name]
    while waiting:
        one = known[waiting.pop()]
        if one.kind == kind and one.name not in line:
            line.append(one.name)
            waiting += one.parents
    return line


def with_descendants(connection: Connection, names: Iterable[str]) -> list[str]:
    """These versions and all that come from them, in the order in which they were made."""
    found, known = set(names), _all(connection)
    while more := {one.name for one in known.values() if found & set(one.parents)} - found:
        found |= more
    return [name for name in known if name in found]


def _all(connection: Connection) -> dict[str, Version]:
    statement = select(versions).order_by(versions.c.created, versions.c.name)
    return {row.name: _version(row) for row in connection.execute(statement)}


def _canary(connection: Connection) -> Version | None:
    row = connection.execute(select(versions).where(versions.c.status == "canary")).one_or_none()
    return None if row is None else _version(row)


def _get(connection: Connection, name: str) -> Version:
    row = connection.execute(select(versions).where(versions.c.name == name)).one_or_none()
    if row is None:
        raise ValueError(
            f"there is no version {name!r} in this database: `alignfast online status` lists those that there are"
        )
    return _version(row)


def _version(row: Any) -> Version:
    return Version(**{**row._mapping, "parents": tuple(row.parents), "reasons": tuple(row.reasons)})


def _set(connection: Connection, name: str, status: Status, reasons: Sequence[str]) -> None:
    values = {"status": status, "reasons": list(reasons)}
    connection.execute(update(versions).where(versions.c.name == name).values(**values))


def _promotion(connection: Connection, version: Version, action: str) -> None:
    row = {"kind": version.kind, "version": version.name, "action": action, "created": time.time()}
    connection.execute(insert(promotions).values(**row))


def _expect(served: Sequence[str], name: str | None) -> None:
    if name is not None and list(served[-1:]) != [name]:
        raise ServesAnother(f"{served[-1] if served else 'nothing'} serves, and not {name}")


def _served(connection: Connection, kind: VersionKind) -> list[str]:
    """Versions in the order in which they came to serve; one that was rolled back has left."""
    served: list[str] = []
    statement = select(promotions).where(promotions.c.kind == kind).order_by(promotions.c.seq)
    for row in connection.execute(statement):
        if row.action == "roll_back":
            served.pop()
        elif served[-1:] != [row.version]:
            served.append(row.version)
    return served
