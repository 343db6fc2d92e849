"""What votes weigh before they teach: repeated words once, so many of a voter in a period, nobody above many.

    repeated    of a user's votes on the same words in one slot the last one stays
    capped      of a voter's votes of one period of P seconds the first C stay: floor(created / P)
    weight      w = f_v min(1, most / n_v)      n_v votes of voter v that stay; f_v = 1, or `flagged` of who is flagged

The first of a period stay and not the last: votes that come later take nothing away from what was learned. All anonymous
voters are one voter, whose votes are flagged by browser. Two answers are compared by their words, so that users who were
given the same words by different ids are compared too; who shares no words with others can't be flagged.

Not done here: the weights' use in a loss. That somebody is flagged says that they differ: `flagged` is 1 unless an operator
says otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from alignfast.online.feedback import ANONYMOUS, TIE, Judged, Vote, voter_of
from alignfast.online.voters import Agreement, Judgement, agreement, distinct, judgements, voter_weights

DAY = 86_400.0


@dataclass(frozen=True, kw_only=True)
class VoteLimits:
    """How much one voter may count.

    Raises:
        ValueError: one is out of range.
    """

    most: float = 20.0
    """What all votes of one voter weigh together at most, > 0; a vote alone weighs 1."""
    cap: int = 100
    """Votes of one voter in a period that count at all, >= 1."""
    period: float = DAY
    """Seconds, > 0."""
    flagged: float = 1.0
    """What votes of a flagged user weigh, by those of others, in [0, 1]; 0 leaves them out."""

    def __post_init__(self) -> None:
        if not self.most > 0 or self.cap < 1 or not self.period > 0 or not 0 <= self.flagged <= 1:
            raise ValueError(
                "vote limits: expected most > 0, cap >= 1, period > 0 and flagged in [0, 1], got "
                f"{self.most}, {self.cap}, {self.period} and {self.flagged}"
            )


class Weighed(NamedTuple):
    """A vote and what it weighs.

    Attributes:
        judged: the vote.
        weight: above 0, at most 1.
    """

    judged: Judged
    weight: float


@dataclass(frozen=True)
class Weighing:
    """What votes weigh, and what was left out.

    Attributes:
        kept: votes that count, in the order in which they were given.
        repeated: votes left out, since the user said of the same words something later.
        capped: votes left out above the cap.
        flagged: users whose judgements differ from the others' by more than chance.
    """

    kept: tuple[Weighed, ...]
    repeated: int
    capped: int
    flagged: tuple[Agreement, ...]

    @property
    def figures(self) -> dict[str, float]:
        """For a version's figures and a log; nobody's name is in them."""
        return {
            "votes": len(self.kept),
            "votes_weight": sum(one.weight for one in self.kept),
            "votes_repeated": self.repeated,
            "votes_capped": self.capped,
            "users_flagged": len(self.flagged),
        }


def weigh(judged: Sequence[Judged], limits: VoteLimits | None = None) -> Weighing:
    """What each vote weighs, of all that a model learns from together: new ones and those that are replayed.

    Args:
        judged: votes of any kind, in the order in which they came.
        limits: of one voter; None is VoteLimits().

    >>> from alignfast.online.feedback import Shown
    >>> def up(user, number):
    ...     shown = Shown(id=f"r{number}", prompt="a", text=str(number))
    ...     return Judged(Vote(response_id=shown.id, kind="thumb", value="up", user=user, created=0.0), (shown,))
    >>> found = weigh([up("ada", 0), *(up("eve", i) for i in range(9))], VoteLimits(most=2, cap=4))
    >>> [(one.judged.vote.user, one.weight) for one in found.kept], found.capped
    ([('ada', 1.0), ('eve', 0.5), ('eve', 0.5), ('eve', 0.5), ('eve', 0.5)], 5)
    """
    limits = VoteLimits() if limits is None else limits
    different = distinct(judged)
    under = list(under_cap(different, limits))
    flagged = tuple(one for one in agreement(_judgements(under)) if one.flagged)
    of_user = dict.fromkeys((one.user for one in flagged), limits.flagged)
    heard = [one for one in under if of_user.get(one.vote.user, 1.0) > 0]
    weights = voter_weights([one.vote.user for one in heard], limits.most)
    kept = tuple(
        Weighed(one, weight * of_user.get(one.vote.user, 1.0)) for one, weight in zip(heard, weights)
    )
    return Weighing(kept, len(judged) - len(different), len(different) - len(under), flagged)


def under_cap(judged: Iterable[Judged], limits: VoteLimits) -> Iterator[Judged]:
    """The first votes of each voter in each period, in the order in which they were given."""
    counts: Counter[tuple[str, float]] = Counter()
    # sorted() is stable, and distinct() leaves votes in the order in which they were said last
    for one in sorted(judged, key=lambda one: one.vote.created):
        place = (voter_of(one.vote.user), one.vote.created // limits.period)
        counts[place] += 1
        if counts[place] <= limits.cap:
            yield one


def _judgements(judged: Iterable[Judged]) -> Iterator[Judgement]:
    """Of users with a name, or at least a number."""
    for one in judged:
        if one.vote.user != ANONYMOUS:
            words = {shown.id: shown.text_hash for shown in one.answers}
            if len(set(words.values())) == len(words):  # else an answer is compared with itself
                yield from judgements(_by_words(one.vote, words), sorted(words.values()))


def _by_words(vote: Vote, words: dict[str, str]) -> Vote:
    """The same vote about words, whatever ids they were shown under."""
    if vote.response_id is None:
        return vote
    value = vote.value
    if vote.kind == "pair" and value != TIE:
        value = words[value]
    elif vote.kind == "ranking":
        value = [[words[id] for id in place] for place in value]
    return replace(vote, response_id=words[vote.response_id], value=value, among=())
