"""Answers and votes as rows: statements on a connection, each a part of somebody's transaction.

How a vote is kept is `voting`'s.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Connection, and_, func, insert, select
from sqlalchemy.exc import IntegrityError

from alignfast.online.feedback import Judged, Shown, Vote, storable
from alignfast.online.store.tables import feedback, responses

Item = TypeVar("Item")

_CHUNK = 500  # ids in one statement; databases limit how many
_KEEP_SHOWN = insert(responses)  # built once: to build a statement takes longer than to run it


def chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    """The items in lists that one statement takes."""
    found = list(items)
    return (found[at : at + _CHUNK] for at in range(0, len(found), _CHUNK))


def insert_shown(connection: Connection, shown: Sequence[Shown]) -> None:
    """Keep answers.

    Raises:
        ValueError: one with that id is kept already.
    """
    rows = [_shown_row(one) for one in shown]
    try:
        connection.execute(_KEEP_SHOWN, rows)
    except IntegrityError as error:
        names = ", ".join(one.id for one in shown[:5])
        raise ValueError(f"a response with one of these ids is stored already: {names}") from error


def _shown_row(shown: Shown) -> dict[str, Any]:
    return {
        "id": shown.id,
        "created": shown.created,
        "episode_id": shown.episode_id,
        "turn": shown.turn,
        "group_id": shown.group_id,
        "user_id": shown.user,
        "prompt": storable(shown.prompt),
        "text": storable(shown.text),
        "text_hash": shown.text_hash,
        "prompt_ids": shown.prompt_ids,
        "completion_ids": shown.completion_ids,
        "logps": shown.logps,
        "sampled_logps": shown.sampled_logps,
        "finish_reason": shown.finish_reason,
        "sampling": storable(shown.sampling),
        "policy_version": shown.policy_version,
        "weights_hash": shown.weights_hash,
    }


def to_shown(row: Any) -> Shown:
    """The answer in a row of `responses`."""
    fields = dict(row._mapping)
    del fields["text_hash"]
    return Shown(user=fields.pop("user_id"), **fields)


def to_vote(row: Any) -> Vote:
    """The vote in a row of `feedback`."""
    return Vote(
        kind=row.kind,
        value=row.value,
        response_id=row.response_id,
        episode_id=row.episode_id,
        among=row.among,
        comment=row.comment,
        user=row.user_id,
        id=row.id,
        created=row.created,
    )


def find_shown(connection: Connection, where: ColumnElement[bool]) -> list[Shown]:
    """Answers in the order in which they were shown."""
    statement = select(responses).where(where).order_by(responses.c.turn, responses.c.created, responses.c.id)
    return [to_shown(row) for row in connection.execute(statement)]


def matching(
    kinds: Sequence[str] | None,
    since: float | None,
    until: float | None,
    users: Sequence[str] | None,
    current: bool,
) -> ColumnElement[bool]:
    """The condition on rows of `feedback` that several questions share."""
    wanted = [feedback.c.seq > 0]
    if kinds is not None:
        wanted.append(feedback.c.kind.in_(kinds))
    if since is not None:
        wanted.append(feedback.c.created >= since)
    if until is not None:
        wanted.append(feedback.c.created < until)
    if users is not None:
        wanted.append(feedback.c.user_id.in_(users))
    if current:
        wanted.append(feedback.c.current)
    return and_(*wanted)


def join_answers(connection: Connection, votes: Sequence[Vote]) -> list[Judged]:
    """Votes with what they are about; those whose answers are gone are left out."""
    ids = {id for vote in votes for id in (vote.response_id, *vote.among) if id is not None}
    named = {one.id: one for some in chunks(ids) for one in find_shown(connection, responses.c.id.in_(some))}
    episodes: dict[str, list[Shown]] = defaultdict(list)
    for some in chunks({vote.episode_id for vote in votes if vote.episode_id is not None}):
        for shown in find_shown(connection, responses.c.episode_id.in_(some)):
            episodes[shown.episode_id or ""].append(shown)
    judged = []
    for vote in votes:
        if vote.episode_id is not None:
            answers = episodes[vote.episode_id]
        else:
            wanted = vote.among or (vote.response_id,)
            answers = [named[id] for id in wanted if id in named]
            answers = answers if len(answers) == len(wanted) else []
        if answers:
            judged.append(Judged(vote, tuple(answers)))
    return judged


def counted(connection: Connection, where: ColumnElement[bool]) -> int:
    """How many rows of `feedback` fulfil a condition."""
    return connection.execute(select(func.count()).select_from(feedback).where(where)).scalar_one()


def present(connection: Connection, column: ColumnElement[Any], values: Iterable[Any]) -> set[Any]:
    """Those of the values that a column holds."""
    return {
        found
        for some in chunks(values)
        for found in connection.execute(select(column).where(column.in_(some))).scalars()
    }
