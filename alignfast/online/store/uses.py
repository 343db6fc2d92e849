"""Which version has learned from what, as statements: each vote once a version."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, exists, insert, select

from alignfast.online.feedback import Vote
from alignfast.online.store.records import chunks, matching, present, to_vote
from alignfast.online.store.tables import feedback, prompt_uses, responses, uses
from alignfast.online.store.versions import Version, insert_version, line_of


class Forgotten(ValueError):
    """What a version has learned from was deleted while it was made."""


@dataclass(frozen=True)
class Learned:
    """What a version has learned from, as ids.

    Attributes:
        votes: that it was trained on or measured with; all must be there still.
        responses: to whose prompts it wrote fresh answers; likewise.
        seen: votes that count as used by it, those of them that there are.
    """

    votes: Sequence[str] = ()
    responses: Sequence[str] = ()
    seen: Sequence[str] = ()


def publish_version(connection: Connection, version: Version, learned: Learned) -> None:
    """Keep a new version with what it has learned from; see `Store.publish`.

    Raises:
        Forgotten: some of that was deleted; the transaction must not be committed.
        ValueError: as `insert_version`.
    """
    for column, ids in ((feedback.c.id, learned.votes), (responses.c.id, learned.responses)):
        gone = set(ids) - present(connection, column, list(ids))
        if gone:
            raise Forgotten(
                f"{len(gone)} of the {column.table.name} that {version.name} has learned from are deleted"
            )
    insert_version(connection, version)
    anything = matching(None, None, None, None, False)  # also votes that were replaced meanwhile
    take_votes(connection, version.name, anything, None, learned.seen, False)
    take_prompts(connection, version.name, learned.responses)


def take_votes(
    connection: Connection,
    version: str,
    wanted: ColumnElement[bool],
    limit: int | None,
    ids: Sequence[str] | None,
    fresh: bool,
) -> list[Vote]:
    """Note that a version uses votes, and return them; see `Store.use_for`.

    Raises:
        ValueError: there is no such version.
    """
    where = wanted & unused_by(connection, version, fresh)
    statement = select(feedback).where(where).order_by(feedback.c.seq).limit(limit)
    if ids is None:
        rows = list(connection.execute(statement))
    else:
        rows = [
            row
            for some in chunks(dict.fromkeys(ids))  # named twice, taken once
            for row in connection.execute(statement.where(feedback.c.id.in_(some)))
        ]
        rows = sorted(rows, key=lambda row: row.seq)[:limit]
    now = time.time()
    if rows:
        taken = [{"version": version, "feedback": row.seq, "created": now} for row in rows]
        connection.execute(insert(uses), taken)
    return [to_vote(row) for row in rows]


def take_prompts(connection: Connection, version: str, response_ids: Sequence[str]) -> None:
    """Note that a version was trained on fresh answers to the prompts of these responses.

    Raises:
        ValueError: there is no such version.
    """
    line_of(connection, version)
    table = prompt_uses
    used = set(connection.execute(select(table.c.response_id).where(table.c.version == version)).scalars())
    here = present(connection, responses.c.id, sorted(set(response_ids) - used))
    if here:
        connection.execute(insert(table), [{"version": version, "response_id": id} for id in sorted(here)])


def unused_by(connection: Connection, version: str, fresh: bool) -> ColumnElement[bool]:
    """The condition that a version has not used a vote; with `fresh`, nor any that it comes from.

    Raises:
        ValueError: there is no such version.
    """
    line = line_of(connection, version)
    used = uses.c.version.in_(line if fresh else line[:1])
    return ~exists().where(used, uses.c.feedback == feedback.c.seq)
