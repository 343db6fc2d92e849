"""The store: what was shown, what was said of it, and what has learned from it.

    store = Store.open("sqlite:///feedback.db")      or postgresql://user@host/database
    store.record_shown(shown)                        before its id is handed out
    store.add_vote(vote, caller=..., key=...)        returns once the vote is on disk
    store.use_for("reward-3")                        each vote once a version

Any thread may call it. What a call has returned survives a kill and a power failure; `database` says how.
Not done here: who a user is and what they may do (the server), and how votes are weighed (`voters`).
"""

from __future__ import annotations

import os
import secrets as random_secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, insert, select

from alignfast.online.feedback import Judged, Kind, Shown, Vote, check_id, is_storable, storable
from alignfast.online.store import tables
from alignfast.online.store.apart import Apart
from alignfast.online.store.database import connect, writing
from alignfast.online.store.deletion import Deleted, delete_user, expire
from alignfast.online.store.duels import Duels, find_duels
from alignfast.online.store.files import FileKind, write_lines
from alignfast.online.store.keys import Keys
from alignfast.online.store.labels import Labels
from alignfast.online.store.records import (
    chunks,
    counted,
    find_shown,
    insert_shown,
    join_answers,
    matching,
    present,
    to_vote,
)
from alignfast.online.store.redact import Redact, redacted_shown, redacted_vote
from alignfast.online.store.uses import Learned, publish_version, take_votes, unused_by
from alignfast.online.store.versions import Runs, Version, Versions
from alignfast.online.store.voting import Kept, Request, body_hash, insert_vote
from alignfast.online.store.writer import Result, Writer, commit


class Store:
    """A database of answers and votes; `Store.open` makes one.

    Args:
        engine: of `database.connect`.
        redact, max_votes, period: see `open`.

    Attributes:
        redact: as given.
        keys: API keys.
        versions: of policies and reward models, and which of them serve.
        runs: of the learner.
        labels: the queue of annotators.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, Store.open(f"sqlite:///{folder}/feedback.db") as store:
    ...     store.record_shown(Shown(id="r1", prompt="2 + 2 =", text=" 4"))
    ...     for value in ("down", "up"):
    ...         _ = store.add_vote(Vote(response_id="r1", kind="thumb", value=value, user="ada"))
    ...     [vote.value for vote in store.votes()], [vote.value for vote in store.votes(current=False)]
    (['up'], ['down', 'up'])
    """

    def __init__(
        self,
        engine: Engine,
        *,
        redact: Redact | None = None,
        max_votes: int | None = None,
        period: float = 3600,
    ) -> None:
        if max_votes is not None and (max_votes < 1 or period <= 0):
            raise ValueError(f"expected max_votes >= 1 and period > 0, got {max_votes} and {period}")
        self.engine, self.redact = engine, redact
        self._limit = None if max_votes is None else (max_votes, period)
        self._writer = Writer(partial(commit, engine))
        self.keys, self.versions, self.runs = Keys(self), Versions(self), Runs(self)
        self.labels = Labels(self)

    @classmethod
    def open(
        cls,
        url: str,
        *,
        redact: Redact | None = None,
        max_votes: int | None = None,
        period: float = 3600,
        create: bool = True,
    ) -> Store:
        """Open a database, make its tables or bring them up to date.

        Args:
            url: `sqlite:///feedback.db` (an absolute path has four slashes) or `postgresql://user@host/database`.
            redact: called with each text before it is stored (prompts, answers, comments, edits); what it returns is
                stored instead, and of an answer that it changes, tokens and log-probs are left out. If it raises,
                nothing is stored.
            max_votes: votes that one user may give in a period; None: any number.
            period: of that, in seconds.
            create: make SQLite's file where there is none.

        Raises:
            StoreError: the database can't be used, is not there, or is of a later alignfast.
            ValueError: a limit is out of range.
        """
        return cls(connect(url, create), redact=redact, max_votes=max_votes, period=period)

    def close(self) -> None:
        """Finish what is being written, and let the database go."""
        self._writer.close()
        self.engine.dispose()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""
        return self.engine.dialect.name

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction to read in."""
        with self.engine.connect() as connection, connection.begin():
            yield connection

    def write(self, work: Callable[[Connection], Result]) -> Result:
        """Run statements as one, and return what they gave once it is on disk; see `Writer.write`."""
        return self._writer.write(work)

    async def write_from_loop(self, work: Callable[[Connection], Result]) -> Result:
        """`write` for a coroutine; to cancel it takes nothing back."""
        return await self._writer.write_from_loop(work)

    async def apart(self) -> Apart:
        """A writer to this database that is a process of its own, for a server that takes many votes.

        Raises:
            StoreError: it can't start.
        """
        return await Apart.start(self.engine.url.render_as_string(hide_password=False))

    def exclusively(self) -> Any:
        """A transaction of this thread's own, beside which nobody writes: for what takes long."""
        return writing(self.engine)

    # What was shown

    def record_shown(self, *shown: Shown) -> None:
        """Keep answers, all or none; those of a group in one call.

        Raises:
            ValueError: one with that id is kept already.
        """
        kept = [redacted_shown(one, self.redact) for one in shown]
        self.write(lambda connection: insert_shown(connection, kept))

    def shown(self, id: str) -> Shown | None:
        """The answer with an id."""
        return self.shown_among([id]).get(id)

    def shown_among(self, ids: Sequence[str]) -> dict[str, Shown]:
        """Those of these answers that there are, by id."""
        known = filter(is_storable, ids)  # no database is asked for what it can't hold
        return {one.id: one for some in chunks(known) for one in self._find(tables.responses.c.id.in_(some))}

    def group(self, group_id: str) -> list[Shown]:
        """Answers that were shown side by side."""
        return self._find(tables.responses.c.group_id == storable(group_id))

    def episode(self, episode_id: str) -> list[Shown]:
        """Turns of a conversation, in order."""
        return self._find(tables.responses.c.episode_id == storable(episode_id))

    def _find(self, where: ColumnElement[bool]) -> list[Shown]:
        with self.read() as connection:
            return find_shown(connection, where)

    # What was said

    def add_vote(self, vote: Vote, **request: Any) -> Kept:
        """Keep a vote, and wait until it is on disk; see `voting`."""
        return self.write(self.voting(vote, **request))

    def voting(
        self,
        vote: Vote,
        *,
        caller: str | None = None,
        key: str | None = None,
        own: bool = False,
        token_of: str | None = None,
    ) -> Callable[[Connection], Kept]:
        """What keeps a vote, to be given to `write`; it replaces the user's last one on the same answer, and that stays
        as history.

        Args:
            vote: its user is as the server knows them.
            caller: whose idempotency keys these are; None: the user.
            key: the request's `Idempotency-Key`: the same key with the same vote is answered with the vote that came
                first, and counts once.
            own: refuse answers that were shown to somebody else, unless the user is an annotator who was given them.
            token_of: but not this response, whose token came with the request.

        Returns:
            Statements that tell what became of it, or raise one of these:
            UnknownResponse: there is no such response or conversation, or not for this user.
            IdempotencyConflict: the key came before with another vote.
            TooManyVotes: the user has reached the limit.
            ValueError: answers are compared that were not shown side by side, or the vote's id is taken.
        """
        if key is not None:
            check_id(key, "Idempotency-Key", "a request")
        whose = vote.user if caller is None else caller
        request = Request(body_hash(vote), whose, key, own, token_of, self._limit)
        kept = redacted_vote(vote, self.redact)
        return partial(insert_vote, vote=kept, request=request)

    def add_all(self, shown: Sequence[Shown], votes: Sequence[Vote]) -> int:
        """Keep answers and votes from elsewhere, in one transaction and without a limit, less those that are there.

        Returns:
            How many of the votes were not there before.

        Raises:
            UnknownResponse, ValueError: as in `add_vote`; then nothing is kept.
        """
        answers = [redacted_shown(one, self.redact) for one in shown]
        said = [(redacted_vote(vote, self.redact), body_hash(vote)) for vote in votes]

        def work(connection: Connection) -> int:
            here = present(connection, tables.responses.c.id, [one.id for one in answers])
            fresh = {one.id: one for one in answers if one.id not in here}
            if fresh:
                insert_shown(connection, list(fresh.values()))
            known = present(connection, tables.feedback.c.id, [vote.id for vote, _ in said])
            new = [(vote, hash) for vote, hash in said if vote.id not in known]
            for vote, hash in new:
                insert_vote(connection, vote, Request(hash, vote.user))
            return len(new)

        return self.write(work)

    def votes(
        self,
        *,
        kinds: Sequence[Kind] | None = None,
        since: float | None = None,
        until: float | None = None,
        users: Sequence[str] | None = None,
        current: bool = True,
    ) -> list[Vote]:
        """Votes in the order in which they came.

        Args:
            kinds: of these kinds alone.
            since: given then or later, in seconds since 1970.
            until: given before.
            users: of these alone.
            current: leave out those that a later vote has replaced.
        """
        statement = select(tables.feedback).where(matching(kinds, since, until, users, current))
        with self.read() as connection:
            return [to_vote(row) for row in connection.execute(statement.order_by(tables.feedback.c.seq))]

    def judged(self, votes: Sequence[Vote]) -> list[Judged]:
        """Votes with the answers that they are about; those whose answers were deleted since are left out."""
        with self.read() as connection:
            return join_answers(connection, votes)

    def duels(self, version: str) -> list[Duels]:
        """How a canary did against the version that served, a voter a row; see `duels.find_duels`."""
        with self.read() as connection:
            return find_duels(connection, version)

    # What has learned from it

    def use_for(
        self,
        version: str,
        *,
        kinds: Sequence[Kind] | None = None,
        since: float | None = None,
        until: float | None = None,
        limit: int | None = None,
        ids: Sequence[str] | None = None,
        fresh: bool = True,
        replaced: bool = False,
    ) -> list[Vote]:
        """Take votes for a version, each once: of several callers one gets it, and none a second time.

        After a kill `used_by` tells what was taken.

        Args:
            version: of a reward model, or of a policy that is trained on votes themselves.
            kinds: of these kinds alone.
            since: given then or later, in seconds since 1970.
            until: given before.
            limit: so many at most, the oldest first.
            ids: these votes alone, for replay of a chosen few.
            fresh: leave out what the versions that this one comes from have used.
            replaced: also votes that a later one has replaced: of those that were trained on meanwhile.

        Raises:
            ValueError: there is no such version.
        """

        wanted = matching(kinds, since, until, None, not replaced)
        return self.write(lambda connection: take_votes(connection, version, wanted, limit, ids, fresh))

    def used_by(self, version: str) -> list[Vote]:
        """What a version has taken, in the order in which it came."""
        statement = (
            select(tables.feedback)
            .join(tables.uses, tables.uses.c.feedback == tables.feedback.c.seq)
            .where(tables.uses.c.version == version)
            .order_by(tables.feedback.c.seq)
        )
        with self.read() as connection:
            return [to_vote(row) for row in connection.execute(statement)]

    def unused(self, version: str | None = None, kinds: Sequence[Kind] | None = None) -> int:
        """How many votes `use_for` would find for a version that comes from this one; None: for a first version."""
        with self.read() as connection:
            where = matching(kinds, None, None, None, True)
            if version is not None:
                where = where & unused_by(connection, version, True)
            return counted(connection, where)

    def publish(self, version: Version, learned: Learned) -> None:
        """Add a version that the learner has made, with what it has learned from: all of that or nothing.

        Raises:
            Forgotten: some of what it has learned from was deleted meanwhile, by somebody who was told of the versions
                that there were; so this one must not be.
            ValueError: the name is taken, or a parent is unknown.
        """
        self.write(lambda connection: publish_version(connection, version, learned))

    # Files, deletion, secrets

    def write_lines(
        self, path: str | os.PathLike[str], kind: FileKind, rows: Callable[[], Iterable[dict[str, Any]]]
    ) -> int:
        """See `files.write_lines`: a file with rows of this store, which follows its deletions."""
        return write_lines(self, path, kind, rows)

    def delete_user(self, user: str) -> Deleted:
        """Delete all that a user asked and said, here and in the files of this machine; see `deletion.delete_user`."""
        return delete_user(self, user)

    def expire(self, days: float) -> Deleted:
        """Delete what was shown more than so many days ago, with the votes on it; see `deletion.expire`."""
        return expire(self, days)

    def secret(self, name: str) -> bytes:
        """32 random bytes of this installation, made when they are first asked for: what cookies are signed with."""

        def work(connection: Connection) -> bytes:
            statement = select(tables.secrets.c.value).where(tables.secrets.c.name == name)
            found = connection.execute(statement).scalar()
            if found is None:
                found = random_secrets.token_bytes(32)
                connection.execute(insert(tables.secrets).values(name=name, value=found))
            return bytes(found)

        return self.write(work)
