"""What must go, goes: all of a user, or what is older than it may be kept.

With an answer go all votes on it, their history, the note of who has used them, and the lines of exports, replays and
samples that hold them. Weights can't forget: the versions that were trained on any of it are named, with those that come
from them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, Connection, delete, insert, select

from alignfast.online.store.database import forget
from alignfast.online.store.files import Cleared, clear_files
from alignfast.online.store.records import chunks
from alignfast.online.store.tables import (
    deletions,
    feedback,
    keys,
    label_assignments,
    prompt_uses,
    responses,
    uses,
)
from alignfast.online.store.versions import with_descendants

if TYPE_CHECKING:
    from alignfast.online.store.store import Store

_SECONDS_OF_A_DAY = 86_400


@dataclass(frozen=True)
class Deleted:
    """What a deletion took.

    Attributes:
        responses: answers, with their prompts.
        votes: with those that were replaced before.
        keys: API keys.
        versions: that were trained on any of it, and those that come from them.
        files: what was cleared of it, and what could not be.
    """

    responses: int
    votes: int
    keys: int
    versions: tuple[str, ...]
    files: Cleared


def delete_user(store: Store, user: str) -> Deleted:
    """Delete what a user asked, the answers and all votes on them, the user's votes on others' answers, and their keys.

    Args:
        store: to delete from.
        user: whose it is; nothing is deleted for one that is unknown.
    """
    return _delete(store, responses.c.user_id == user, user)


def expire(store: Store, days: float) -> Deleted:
    """Delete what was shown more than so many days ago.

    Raises:
        ValueError: the number is negative.
    """
    if not days >= 0:
        raise ValueError(f"days must be a number >= 0, got {days}")
    return _delete(store, responses.c.created < time.time() - days * _SECONDS_OF_A_DAY, None)


def _delete(store: Store, where: ColumnElement[bool], user: str | None) -> Deleted:
    def work(connection: Connection) -> tuple[int, int, int, list[str]]:
        shown = list(connection.execute(select(responses.c.id).where(where)).scalars())
        votes = _votes(connection, where, shown, user)
        trained = _users_of(connection, shown, list(votes))
        number = (
            0 if user is None else connection.execute(delete(keys).where(keys.c.user_id == user)).rowcount
        )
        if user is not None:
            connection.execute(delete(label_assignments).where(label_assignments.c.user_id == user))
        if not shown and not votes:
            return 0, 0, number, []
        # those of other users on these answers go by cascade, and are counted here
        for some in chunks(votes):
            connection.execute(delete(feedback).where(feedback.c.seq.in_(some)))
        for some in chunks(shown):
            connection.execute(delete(responses).where(responses.c.id.in_(some)))
        row: dict[str, Any] = {"created": time.time(), "reason": "age" if user is None else "user"}
        row.update(response_ids=shown, feedback_ids=list(votes.values()), versions=trained)
        connection.execute(insert(deletions).values(**row))
        return len(shown), len(votes), number, trained

    shown, votes, number, trained = store.write(work)
    cleared = clear_files(store)
    forget(store.engine)
    return Deleted(shown, votes, number, tuple(trained), cleared)


def _votes(
    connection: Connection, where: ColumnElement[bool], shown: list[str], user: str | None
) -> dict[int, str]:
    """Number and id of the votes that go: on these answers, on conversations none of which stays, and the user's."""
    columns = select(feedback.c.seq, feedback.c.id)
    found = list(connection.execute(columns.where(feedback.c.user_id == user))) if user is not None else []
    for some in chunks(shown):
        found += connection.execute(columns.where(feedback.c.response_id.in_(some)))
    going = select(responses.c.episode_id).where(where, responses.c.episode_id.is_not(None))
    staying = select(responses.c.episode_id).where(where.is_not(True), responses.c.episode_id.is_not(None))
    of_episodes = columns.where(feedback.c.episode_id.in_(going), feedback.c.episode_id.not_in(staying))
    found += connection.execute(of_episodes)
    return {row.seq: row.id for row in found}


def _users_of(connection: Connection, shown: list[str], votes: list[int]) -> list[str]:
    """Versions that were trained on these, and those that come from them."""
    names: set[str] = set()
    for some in chunks(votes):
        names |= set(connection.execute(select(uses.c.version).where(uses.c.feedback.in_(some))).scalars())
    for ids in chunks(shown):
        used = select(prompt_uses.c.version).where(prompt_uses.c.response_id.in_(ids))
        names |= set(connection.execute(used).scalars())
    return with_descendants(connection, names)
