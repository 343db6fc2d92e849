"""Voters against each other: weights that let nobody outweigh many, and whose votes differ from everybody else's.

    weight of a vote      w = min(1, most / n_v)         n_v votes of voter v; all anonymous voters are one
    agreement of v        k_v of n_v judgements are those of the majority of the others on the same
    flagged               P(Binomial(n_v, p) <= k_v) < 0.05 / V      p the rate of all others, V voters compared
    contrary              the same, with p = min(1/2, the rate of all others)

Ties, edits and hints judge nothing here. That somebody is flagged says that they differ, not that they are wrong.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from alignfast.online.feedback import ANONYMOUS, TIE, Judged, Prompt, Vote, voter_of

_LEVEL = 0.05  # chance that somebody is flagged where all are alike


class Judgement(NamedTuple):
    """One yes or no of a vote: an answer is good, or the first of two is the better."""

    user: str
    item: Hashable
    yes: bool


@dataclass(frozen=True)
class Agreement:
    """How often a user judged as the majority of the others did.

    Attributes:
        user: whose.
        agreed: judgements that the majority of the others shared.
        compared: judgements on what others judged too, and not in halves.
        others: share of the other users' judgements that agree with theirs.
        flagged: whether chance explains the difference in less than 1 of 20 such tables.
    """

    user: str
    agreed: int
    compared: int
    others: float
    flagged: bool


def voter_weights(users: Sequence[str], most: float) -> list[float]:
    """The weight of each vote.

    Args:
        users: who gave it.
        most: what all votes of one voter weigh together at most, > 0.

    Raises:
        ValueError: `most` is not above 0.

    >>> voter_weights(["ada", "bob", "bob", "bob", "bob"], most=2)
    [1.0, 0.5, 0.5, 0.5, 0.5]
    >>> voter_weights(["anonymous:1", "anonymous:2"], most=1)
    [0.5, 0.5]
    """
    if not most > 0:
        raise ValueError(f"most must be above 0, got {most}")
    counts = Counter(map(voter_of, users))
    return [min(1.0, most / counts[voter_of(user)]) for user in users]


def unit_of(user: str, prompt: Prompt) -> str:
    """What a vote is taken together with in an interval: the voter's others; of a voter of whom nothing is known the prompt's.

    >>> unit_of("ada", "2 + 2"), unit_of("anonymous:17", "2 + 2"), unit_of("anonymous", "2 + 2")
    ('ada', 'anonymous', '"2 + 2"')
    """
    return json.dumps(prompt, sort_keys=True) if user == ANONYMOUS else voter_of(user)


def distinct(judged: Iterable[Judged]) -> list[Judged]:
    """Less repeated votes: of those of one user on the same words, in one slot, the last one stays."""
    last: dict[Hashable, Judged] = {}
    for one in judged:
        words = tuple(sorted(shown.text_hash for shown in one.answers))
        key = (one.vote.user, one.vote.slot, words)
        last.pop(key, None)
        last[key] = one
    return list(last.values())


def judgements(vote: Vote, answers: Sequence[str]) -> Iterator[Judgement]:
    """What a vote says, as yes and no.

    Args:
        vote: of any kind.
        answers: ids of what was compared.

    >>> [one.yes for one in judgements(Vote(response_id="a", kind="rating", value=2), ["a"])]
    [False]
    >>> ranking = Vote(response_id="a", kind="ranking", value=["c", ["a", "b"]])
    >>> [(one.item, one.yes) for one in judgements(ranking, ["a", "b", "c"])]
    [(('a', 'c'), False), (('b', 'c'), False)]
    """
    if vote.slot == "verdict" and vote.value != 3:
        yes = vote.value == "up" if vote.kind == "thumb" else vote.value > 3
        yield Judgement(vote.user, (vote.response_id, vote.episode_id), yes)
    elif vote.kind == "pair" and vote.value != TIE:
        yield Judgement(vote.user, tuple(sorted(answers)), vote.value == min(answers))
    elif vote.kind == "ranking":
        for better, worse in combinations(vote.value, 2):
            for one in better:
                for other in worse:
                    yield Judgement(vote.user, tuple(sorted((one, other))), one < other)


def agreement(found: Iterable[Judgement]) -> list[Agreement]:
    """How far each user agrees with the others, those who agree least first; users who can't be compared are left out.

    >>> crowd = [Judgement(f"user {u}", i, True) for u in range(4) for i in range(9)]
    >>> contrary = [Judgement("eve", i, False) for i in range(9)]
    >>> [(one.user, one.agreed, one.compared, one.flagged) for one in agreement(crowd + contrary)][:2]
    [('eve', 0, 9, True), ('user 0', 9, 9, False)]
    """
    of_item: dict[Hashable, dict[str, bool]] = defaultdict(dict)
    for one in found:
        of_item[one.item][one.user] = one.yes
    agreed: Counter[str] = Counter()
    compared: Counter[str] = Counter()
    for said in of_item.values():
        ayes = sum(said.values())
        for user, yes in said.items():
            for_it = ayes - yes  # of the others
            against = len(said) - 1 - for_it
            if for_it != against:
                compared[user] += 1
                agreed[user] += yes == (for_it > against)
    rows = [_agreement(user, agreed, compared) for user in compared]
    return sorted(rows, key=lambda row: (row.agreed / row.compared, row.user))


def contrary(agreed: Mapping[str, int], compared: Mapping[str, int]) -> frozenset[str]:
    """Users who disagree more often than they agree, and than the others do, by more than chance.

    Who agrees less than the others is no contrarian yet, and where everybody disagrees nobody is.

    Args:
        agreed: judgements of each user that agree.
        compared: judgements of each user.

    >>> sorted(contrary({"ada": 18, "bob": 11, "eve": 2, "new": 0}, {"ada": 20, "bob": 20, "eve": 20, "new": 3}))
    ['eve']
    """
    found, k_all, n_all = [], sum(agreed.values()), sum(compared.values())
    for user, n in compared.items():
        k, rest = agreed[user], n_all - n
        chance = min(0.5, (k_all - agreed[user]) / rest) if rest else 0.5
        if k < chance * n and _tail(k, n, chance) < _LEVEL / len(compared):
            found.append(user)
    return frozenset(found)


def _agreement(user: str, agreed: Counter[str], compared: Counter[str]) -> Agreement:
    k, n = agreed[user], compared[user]
    rest = compared.total() - n
    others = (agreed.total() - k) / rest if rest else 1.0
    flagged = bool(rest) and _tail(k, n, others) < _LEVEL / len(compared)
    return Agreement(user, k, n, others, flagged)


def _tail(k: int, n: int, p: float) -> float:
    """P(Binomial(n, p) <= k)."""
    if p in (0.0, 1.0):
        return 1.0 if p == 0 or k == n else 0.0
    logs = [
        math.lgamma(n + 1)
        - math.lgamma(i + 1)
        - math.lgamma(n - i + 1)
        + i * math.log(p)
        + (n - i) * math.log1p(-p)
        for i in range(k + 1)
    ]
    return min(1.0, math.fsum(map(math.exp, logs)))
