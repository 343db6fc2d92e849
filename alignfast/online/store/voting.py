"""How a vote is kept: what it is about, what it replaces, what it is refused for, in few statements.

one question (_BEFORE)  ->  the vote's row  ->  its idempotency key's row         a comparison asks of its answers too
"""

from __future__ import annotations

import hashlib
import json
from collections import namedtuple
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from sqlalchemy import Connection, and_, bindparam, insert, literal_column, select, text, update

from alignfast.online.feedback import TIE, IdempotencyConflict, TooManyVotes, UnknownResponse, Vote
from alignfast.online.store.prepared import Prepared, refused
from alignfast.online.store.records import to_vote
from alignfast.online.store.tables import feedback, idempotency, label_assignments, label_items, responses

_sorted_json = json.JSONEncoder(sort_keys=True).encode  # json.dumps would make a new encoder each time

# What every vote runs is built once: to build and hash its statements took SQLAlchemy twice as long as to run them.
_VOTE_COLUMNS = [column.name for column in feedback.c if column.name != "seq"]
_KEEP_VOTE = Prepared(insert(feedback).returning(feedback.c.seq), _VOTE_COLUMNS)
_KEEP_KEY = Prepared(insert(idempotency), [column.name for column in idempotency.c])
_ANSWERED = (
    select(feedback, idempotency.c.body_hash)
    .join(idempotency, idempotency.c.feedback == feedback.c.seq)
    .where(idempotency.c.caller == bindparam("caller"), idempotency.c.key == bindparam("key"))
)
_IS_CURRENT = and_(
    feedback.c.user_id == bindparam("whose"),
    feedback.c.target == bindparam("what"),
    feedback.c.slot == bindparam("which"),
    # as the index one_current_vote says it: by `current = 1` SQLite walks through all votes of the user
    text("current"),
)
_REPLACE = Prepared(
    update(feedback).where(_IS_CURRENT).values(current=text("false")).returning(feedback.c.id)
)
_NAMED = select(responses.c.id, responses.c.group_id, responses.c.user_id)
_SOME = _NAMED.add_columns(responses.c.prompt).where(responses.c.id.in_(bindparam("some", expanding=True)))
_GROUP = _NAMED.where(responses.c.group_id == bindparam("group"))
# All that is asked before a vote is kept, in one statement: to run one costs more than what SQLite does for it.
_CAME = select(idempotency.c.feedback).where(
    idempotency.c.caller == bindparam("caller"), idempotency.c.key == bindparam("key")
)
_OLDEST = (
    select(feedback.c.created)
    .where(feedback.c.user_id == bindparam("whose"))
    .order_by(feedback.c.created.desc())
    .offset(bindparam("place"))
    .limit(bindparam("rows"))
)
_STANDING = select(feedback.c.id).where(_IS_CURRENT)
_BEFORE = Prepared(
    _NAMED.add_columns(*(asked.scalar_subquery() for asked in (_CAME, _OLDEST, _STANDING))).select_from(
        select(literal_column("1")).subquery("vote").outerjoin(responses, responses.c.id == bindparam("one"))
    )
)
_Before = namedtuple("_Before", ("id", "group_id", "user_id", "came", "oldest", "standing"))  # its one row


@dataclass(frozen=True)
class Request:
    """How a vote came.

    Attributes:
        said: `body_hash` of what the user sent.
        caller: whose idempotency keys count.
        key: by which a request that is sent again is known; None for none.
        own: refuse answers that were shown to somebody else, and that the user was not given to rank.
        token_of: but not this one, whose token came with the vote.
        limit: most votes of a user, and the seconds in which; None for no limit.
    """

    said: str
    caller: str
    key: str | None = None
    own: bool = False
    token_of: str | None = None
    limit: tuple[int, float] | None = None


class Kept(NamedTuple):
    """What became of a vote.

    Attributes:
        vote: that is kept.
        replayed: whether it was, before this request.
        replaces: id of the vote that it took the place of.
    """

    vote: Vote
    replayed: bool
    replaces: str | None


def insert_vote(connection: Connection, vote: Vote, request: Request) -> Kept:
    """Keep a vote, and make it the current one of its user, target and slot.

    Args:
        connection: in a transaction that nobody writes beside, at a savepoint that is returned to where this raises.
        vote: as it shall be kept.
        request: how it came.

    Raises:
        UnknownResponse, IdempotencyConflict, TooManyVotes, ValueError: see `Store.add_vote`.
    """
    before = _before(connection, vote, request)
    if before.came is not None:
        return _answered(connection, request)
    target, among = _target(connection, vote, request, before)
    vote = vote if among == vote.among else replace(vote, among=among)
    if request.limit is not None:
        _check_limit(vote, before.oldest, *request.limit)
    replaces = before.standing
    if replaces is not None or vote.slot == "comparison":  # whose target is known since `_target`
        found = _REPLACE.rows(connection, {"whose": vote.user, "what": target, "which": vote.slot})
        replaces = found[0][0] if found else None
    row = {name: value for name, value in vote.body.items() if name != "user"}
    row.update(id=vote.id, user_id=vote.user, slot=vote.slot, target=target, current=True, replaces=replaces)
    row.update(value=json.dumps(row["value"]), among=json.dumps(row["among"]), created=vote.created)
    try:
        ((seq,),) = _KEEP_VOTE.rows(connection, row)
    except refused(connection) as error:
        raise ValueError(f"a vote with the id {vote.id!r} is stored already") from error
    if request.key is not None:
        answered = {"caller": request.caller, "key": request.key, "body_hash": request.said}
        _KEEP_KEY.rows(connection, {**answered, "feedback": seq})
    return Kept(vote, False, replaces)


def body_hash(vote: Vote) -> str:
    """The same for a vote that is sent again, whatever its id and time."""
    return hashlib.sha256(_sorted_json(vote.body).encode()).hexdigest()


def _before(connection: Connection, vote: Vote, request: Request) -> _Before:
    """What there is before a vote is kept: the answer that it is about, the vote that came with its key, the oldest of
    those that fill the user's period, and the one that it replaces, where its target is known without looking.
    """
    most = 0 if request.limit is None else request.limit[0]
    ((*found,),) = _BEFORE.rows(
        connection,
        {
            "one": vote.response_id,
            "caller": request.caller,
            "key": request.key,
            "whose": vote.user,
            "place": max(most - 1, 0),
            "rows": min(most, 1),
            "what": _target_of(vote),
            "which": vote.slot,
        },
    )
    return _Before(*found)


def _answered(connection: Connection, request: Request) -> Kept:
    """What a request with a key that came before is answered.

    Raises:
        IdempotencyConflict: it was another vote.
    """
    row = connection.execute(_ANSWERED, {"caller": request.caller, "key": request.key}).one()
    if row.body_hash != request.said:
        raise IdempotencyConflict(
            f"the idempotency key {request.key!r} came before with another vote ({row.id}); a new vote needs a new key"
        )
    return Kept(to_vote(row), True, row.replaces)


def _target_of(vote: Vote) -> str:
    """What a vote is about, as a text by which another vote on the same is known; empty: its group or `among` says it."""
    if vote.episode_id is not None:
        return f"episode:{vote.episode_id}"
    return "" if vote.slot == "comparison" else f"response:{vote.response_id}"


def _target(
    connection: Connection, vote: Vote, request: Request, before: _Before
) -> tuple[str, tuple[str, ...]]:
    """`_target_of`, with the group or what is named instead of an empty one; and what the vote compares.

    Raises:
        UnknownResponse: it is not in the store, or not the user's to vote on: the two are not told apart.
        ValueError: answers are compared that can't be.
    """
    if vote.episode_id is not None:
        statement = select(responses.c.id).where(responses.c.episode_id == vote.episode_id)
        if request.own:
            statement = statement.where(responses.c.user_id == vote.user)
        if connection.execute(statement.limit(1)).first() is None:
            raise UnknownResponse(f"there is no conversation {vote.episode_id!r} to vote on")
        return _target_of(vote), ()
    assert vote.response_id is not None
    ids = {vote.response_id, *vote.among} | _named_by(vote)
    rows: Iterable[Any] = [before] if before.id is not None else []
    if len(ids) > 1:
        rows = connection.execute(_SOME, {"some": sorted(ids)})
    named = _to_vote_on(connection, rows, vote, request)
    for id in sorted(ids - named.keys()):
        raise UnknownResponse(f"there is no response {id!r} to vote on")
    if vote.slot != "comparison":
        return _target_of(vote), ()
    if vote.among:
        prompts = {json.dumps(row.prompt, sort_keys=True) for row in named.values()}
        if len(prompts) > 1:
            raise ValueError(f"a {vote.kind} is of answers to one prompt; these answer {len(prompts)}")
        target, among = _named_target(connection, vote, named), vote.among
    else:
        group_id = named[vote.response_id].group_id
        if group_id is None:
            raise ValueError(
                f"response {vote.response_id!r} was shown alone; a {vote.kind} needs answers side by side, or `among`"
            )
        rows = connection.execute(_GROUP, {"group": group_id})
        group = _to_vote_on(connection, rows, vote, request)
        target, among = f"group:{group_id}", tuple(sorted(group))
    _check_comparison(vote, among)
    return target, among


def _named_target(connection: Connection, vote: Vote, named: dict[str, Any]) -> str:
    """Who names all of a group means the group, so that this vote and one that names none replace each other."""
    groups = {named[id].group_id for id in vote.among}
    if len(groups) == 1 and None not in groups:
        (group_id,) = groups
        if {row.id for row in connection.execute(_GROUP, {"group": group_id})} == {*vote.among}:
            return f"group:{group_id}"
    return "among:" + " ".join(vote.among)


def _to_vote_on(connection: Connection, rows: Iterable[Any], vote: Vote, request: Request) -> dict[str, Any]:
    """Rows of answers by id, less those that are not the user's where they must be."""
    found = {row.id: row for row in rows}
    if not request.own:
        return found
    foreign = {
        id: row.group_id for id, row in found.items() if row.user_id != vote.user and id != request.token_of
    }
    groups = sorted({group for group in foreign.values() if group is not None})
    given = in_hands_of(connection, vote.user, groups) if groups else ()
    return {id: row for id, row in found.items() if id not in foreign or foreign[id] in given}


def in_hands_of(connection: Connection, user: str, groups: Sequence[str]) -> set[str]:
    """Those of some groups whose answers an annotator was given to rank, whoever they were drawn for."""
    statement = (
        select(label_items.c.group_id)
        .join(label_assignments, label_assignments.c.item == label_items.c.id)
        .where(label_items.c.group_id.in_(groups), label_assignments.c.user_id == user)
    )
    return set(connection.execute(statement).scalars())


def _named_by(vote: Vote) -> set[str]:
    if vote.kind == "pair":
        return {vote.value} - {TIE}
    return {id for place in vote.value for id in place} if vote.kind == "ranking" else set()


def _check_comparison(vote: Vote, among: tuple[str, ...]) -> None:
    shown = ", ".join(among)
    if vote.kind == "pair" and len(among) != 2:
        raise ValueError(f"a pair is of two answers, and these are {len(among)} ({shown}): rank them")
    if stray := {vote.response_id, *_named_by(vote)} - {*among}:
        raise ValueError(
            f"{', '.join(sorted(map(str, stray)))} is not among what was compared; this {vote.kind} is of {shown}"
        )


def _check_limit(vote: Vote, oldest: float | None, most: int, seconds: float) -> None:
    if oldest is not None and oldest > vote.created - seconds:
        wait = oldest + seconds - vote.created
        raise TooManyVotes(
            f"{vote.user!r} has given {most} votes in {seconds:g} seconds, the most that are taken; "
            f"the next one in {wait:.0f} seconds",
            wait,
        )
