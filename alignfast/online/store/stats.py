"""What is in a store, in figures: how much, how satisfied, and who votes unlike everybody else.

    satisfaction of a version = share of thumbs that are up, Wilson's interval, users the unit, not votes

A thumb on a whole conversation is one on each version that answered in it.

Answers without a vote are counted, and count as nothing else.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import ColumnElement, func, select

from alignfast.data.intervals import Interval, proportion
from alignfast.online.feedback import ANONYMOUS, Vote, voter_of
from alignfast.online.store.tables import feedback, responses
from alignfast.online.voters import Agreement, Judgement, agreement, judgements

if TYPE_CHECKING:
    from alignfast.online.store.store import Store

_SHOWN = 10  # flagged users in the printed table
_CHUNK = 1000  # votes whose answers are in memory at once


class Satisfaction(NamedTuple):
    """What the thumbs of a version say.

    Attributes:
        rate: share that are up.
        votes: thumbs in all.
    """

    rate: Interval
    votes: int


@dataclass(frozen=True)
class StoreStats:
    """Figures of a store.

    Attributes:
        responses: answers.
        unvoted: of those, without a current vote, alone or beside others.
        votes: current ones.
        replaced: that a later vote has replaced.
        users: who have voted; those without a name count as one.
        kinds: current votes of each kind.
        satisfaction: of each policy version that has thumbs.
        flagged: users whose judgements differ from the others' by more than chance.
    """

    responses: int
    unvoted: int
    votes: int
    replaced: int
    users: int
    kinds: dict[str, int]
    satisfaction: dict[str, Interval]
    flagged: tuple[Agreement, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        found = asdict(self)
        found["satisfaction"] = {name: rate._asdict() for name, rate in self.satisfaction.items()}
        return found

    def render(self) -> str:
        """As plain lines."""
        lines = [
            f"answers       {self.responses:,}, {self.unvoted:,} without a vote",
            f"votes         {self.votes:,} of {self.users:,} users; {self.replaced:,} more were replaced",
            *(f"  {kind:<12}{number:,}" for kind, number in sorted(self.kinds.items())),
        ]
        if self.satisfaction:
            lines.append("thumbs up, a version")
            lines += [
                f"  {name or '(no name)':<12}{rate}" for name, rate in sorted(self.satisfaction.items())
            ]
        if self.flagged:
            lines.append("users who judge unlike the others")
            lines += [
                f"  {one.user}: agrees in {one.agreed} of {one.compared}; the others in {one.others:.0%}"
                for one in self.flagged[:_SHOWN]
            ]
        return "\n".join(lines)


def store_stats(store: Store) -> StoreStats:
    """Count and compare all that is current in a store."""
    votes = store.votes()
    with store.read() as connection:
        answers = connection.execute(select(func.count()).select_from(responses)).scalar_one()
        replaced = select(func.count()).select_from(feedback).where(~feedback.c.current)
        past = connection.execute(replaced).scalar_one()
    voted = {id for vote in votes for id in (vote.response_id, *vote.among) if id is not None}
    return StoreStats(
        responses=answers,
        unvoted=answers - len(voted),
        votes=len(votes),
        replaced=past,
        users=len({voter_of(vote.user) for vote in votes}),
        kinds=dict(Counter(vote.kind for vote in votes)),
        satisfaction={name: found.rate for name, found in satisfaction(store).items()},
        flagged=tuple(one for one in agreement(_all_judgements(store, votes)) if one.flagged),
    )


def satisfaction(store: Store) -> dict[str, Satisfaction]:
    """Of each policy version that has thumbs."""
    found: dict[str, list[tuple[bool, str]]] = defaultdict(list)
    for thumb in _thumbs(store, feedback.c.current):
        found[thumb.version].append((thumb.up, thumb.user))
    return {
        name: Satisfaction(proportion([up for up, _ in rows], [voter for _, voter in rows]), len(rows))
        for name, rows in found.items()
    }


class FirstThumb(NamedTuple):
    """What one voter said of a version's answers first.

    Attributes:
        user: the voter, as `feedback.voter_of` names them.
        up: whether that thumb is up.
    """

    user: str
    up: bool


def first_thumbs(store: Store, version: str) -> list[FirstThumb]:
    """The first thumb of each voter on a version's answers, in the order in which these came; later ones change none."""
    found: dict[str, FirstThumb] = {}
    for thumb in _thumbs(store, responses.c.policy_version == version):
        found.setdefault(thumb.user, FirstThumb(thumb.user, thumb.up))
    return list(found.values())


class _Thumb(NamedTuple):
    seq: int
    version: str
    user: str
    up: bool


def _thumbs(store: Store, where: ColumnElement[bool]) -> list[_Thumb]:
    """Thumbs in the order in which they came, one on a conversation with each version that answered in it."""
    columns = feedback.c.seq, responses.c.policy_version, feedback.c.user_id, feedback.c.value
    found: set[_Thumb] = set()
    with store.read() as connection:
        for about in (
            responses.c.id == feedback.c.response_id,
            responses.c.episode_id == feedback.c.episode_id,
        ):
            statement = select(*columns).join(responses, about)
            for row in connection.execute(statement.where(feedback.c.kind == "thumb", where)):
                up = row.value == "up"
                found.add(_Thumb(row.seq, row.policy_version, voter_of(row.user_id), up))
    return sorted(found)


def _all_judgements(store: Store, votes: list[Vote]) -> Iterator[Judgement]:
    """Of users with a name, or at least a number."""
    named = [vote for vote in votes if vote.user != ANONYMOUS]
    for at in range(0, len(named), _CHUNK):
        for one in store.judged(named[at : at + _CHUNK]):
            yield from judgements(one.vote, [shown.id for shown in one.answers])
