"""Blind duels of a canary and the version that serves, as votes of people.

    wins of voter v  =  mean over their duels of  1 (the canary's answer is better) | 1/2 (tie) | 0

A duel is a group of two answers to one prompt, one of each version, sides at random, neither of which says its version;
`sampling["duel"]` of both names the canary. Voters are the unit, not votes, and all anonymous ones are one voter.

Not done here: whether the wins are enough (the learner's sequential interval).
"""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import Connection, select

from alignfast.online.feedback import TIE, voter_of
from alignfast.online.store.tables import feedback, responses

DUEL = "duel"  # the key in `Shown.sampling`


class Duels(NamedTuple):
    """What one voter said of a canary.

    Attributes:
        user: the voter, as `feedback.voter_of` names them.
        wins: of the canary, from 0 to 1.
        created: of the voter's first duel, in seconds since 1970.
    """

    user: str
    wins: float
    created: float


def find_duels(connection: Connection, version: str) -> list[Duels]:
    """The current votes on a canary's duels, a voter a row, in the order in which the voters came.

    Args:
        connection: to read from.
        version: the canary's name.
    """
    canary, named = responses.alias("canary"), responses.alias("named")
    statement = (
        select(feedback.c.user_id, feedback.c.value, feedback.c.created, canary.c.id, canary.c.sampling)
        .join(named, named.c.id == feedback.c.response_id)
        .join(canary, canary.c.group_id == named.c.group_id)
        .where(canary.c.policy_version == version, feedback.c.kind == "pair", feedback.c.current)
        # not a comparison of the canary's answer with one that it did not stand beside
        .where(feedback.c.target == "group:" + canary.c.group_id)
        .order_by(feedback.c.seq)
    )
    wins: dict[str, list[float]] = {}
    first: dict[str, float] = {}
    for row in connection.execute(statement):
        if row.sampling.get(DUEL) == version:
            voter = voter_of(row.user_id)
            wins.setdefault(voter, []).append(0.5 if row.value == TIE else float(row.value == row.id))
            first.setdefault(voter, row.created)
    return [Duels(voter, sum(found) / len(found), first[voter]) for voter, found in wins.items()]
