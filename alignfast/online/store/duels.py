"""Blind duels of a canary and the version that serves, as votes of people.

    wins of voter v  =  1 (the canary's answer is better) | 1/2 (tie) | 0      by the first vote of v on any of its duels

A duel is a group of two answers to one prompt, one of each version, sides at random, neither of which says its version;
`sampling["duel"]` of both names the canary. Voters are the unit, not votes, and all anonymous ones are one voter. A voter's
first vote settles their value for good, since a bound that holds at all times is of values that stay: a mean of votes so far,
or a vote that is replaced, would rewrite what the bound has already counted.

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
        wins: 1, 1/2 or 0, of the voter's first vote.
        created: of that vote, in seconds since 1970.
    """

    user: str
    wins: float
    created: float


def find_duels(connection: Connection, version: str) -> list[Duels]:
    """The first vote of each voter on a canary's duels, in the order in which these came; later votes change none.

    Args:
        connection: to read from.
        version: the canary's name.
    """
    canary, named = responses.alias("canary"), responses.alias("named")
    statement = (
        select(feedback.c.user_id, feedback.c.value, feedback.c.created, canary.c.id, canary.c.sampling)
        .join(named, named.c.id == feedback.c.response_id)
        .join(canary, canary.c.group_id == named.c.group_id)
        .where(canary.c.policy_version == version, feedback.c.kind == "pair")
        # not a comparison of the canary's answer with one that it did not stand beside
        .where(feedback.c.target == "group:" + canary.c.group_id)
        .order_by(feedback.c.seq)
    )
    found: dict[str, Duels] = {}
    for row in connection.execute(statement):
        voter = voter_of(row.user_id)
        if row.sampling.get(DUEL) == version and voter not in found:
            wins = 0.5 if row.value == TIE else float(row.value == row.id)
            found[voter] = Duels(voter, wins, row.created)
    return list(found.values())
