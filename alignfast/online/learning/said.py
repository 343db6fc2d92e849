"""Votes as what a reward model can be asked: is an answer above a level, or in which order do answers stand.

    thumb       above its one level or not                    rating    above each of its four levels or not
    pair        two places, or one with both: a tie           ranking   places, best first, ties among them
    edit        the edited text over the original             implicit  copied: above; regenerated or stopped: not
    a vote on a conversation                                  the same of each turn, at 1 / turns of its weight

An edit counts where it mends the answer and is not another text: the two differ in more than spaces, and at least
`edit_kept` of their runs of three characters are the same (Dice, 2 |A and B| / (|A| + |B|), as bags). An answer without a
word is left out: it has no token that could be scored. Hints weigh `implicit_weight`, and none at 0.

Not done here: tokens; what a vote weighs beside others of its voter (votes.py).
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from alignfast.online.feedback import ANONYMOUS, TIE, Judged, Kind, Prompt
from alignfast.online.learning.votes import Weighed
from alignfast.online.voters import contrary, unit_of

RATINGS = 5


@dataclass(frozen=True)
class Said:
    """A vote on one answer, or on the order of several.

    Attributes:
        kind: of the vote.
        prompt: a text, or messages.
        texts: the answers, best first; of a vote on one answer that one.
        places: answers of each place; () where it is about one answer.
        above: whether that answer is above each level of its kind; () where several are compared.
        weight: of the vote, > 0.
        user: who voted.
        created: when, in seconds since 1970.
    """

    kind: Kind
    prompt: Prompt
    texts: tuple[str, ...]
    places: tuple[int, ...] = ()
    above: tuple[bool, ...] = ()
    weight: float = 1.0
    user: str = ANONYMOUS
    created: float = 0.0

    @property
    def tied(self) -> bool:
        """Whether answers share a place."""
        return any(number > 1 for number in self.places)

    @property
    def whole(self) -> str:
        """What it belongs with in an interval."""
        return unit_of(self.user, self.prompt)


def said_of(
    weighed: Iterable[Weighed], *, edit_kept: float = 0.5, implicit_weight: float = 0.0
) -> list[Said]:
    """What votes say, less those that say nothing of their answers.

    Args:
        weighed: votes with their weights.
        edit_kept: share of an edit's characters that must be the original's, by runs of three, in [0, 1].
        implicit_weight: of a hint, by that of a vote, in [0, 1].

    >>> from alignfast.online.feedback import Shown, Vote
    >>> answer = Shown(id="r", prompt="a", text="b")
    >>> [one.above for one in said_of([Weighed(Judged(Vote(response_id="r", kind="rating", value=4), (answer,)), 1.0)])]
    [(True, True, True, False)]
    """
    found = (said for one in weighed for said in _said(one, edit_kept, implicit_weight))
    return [said for said in found if all(text.strip() for text in said.texts)]


def pairs_of(said: Said) -> list[tuple[int, int, bool]]:
    """(better, worse, whether they are tied) of each two answers of a comparison."""
    place = [i for i, number in enumerate(said.places) for _ in range(number)]
    return [(i, j, place[i] == place[j]) for i, j in itertools.combinations(range(len(place)), 2)]


def judged_leads(said: Sequence[Said], rewards: Sequence[Any]) -> Iterator[tuple[float, str]]:
    """(reward of what somebody found better less that of the worse, who) of each judgement.

    Args:
        said: votes.
        rewards: of each vote's answers.

    >>> votes = [Said("thumb", "a", ("x",), above=(True,), user="ada"), Said("thumb", "b", ("y",), above=(False,), user="ada")]
    >>> list(judged_leads(votes, [[2.0], [0.5]]))
    [(1.5, 'ada')]
    """
    verdicts: dict[tuple[str, str, str], list[tuple[int, float]]] = defaultdict(list)
    for one, reward_K in zip(said, rewards):
        if one.above:
            verdicts[one.kind, one.user, one.whole].append((sum(one.above), float(reward_K[0])))
        for better, worse, tied in pairs_of(one):
            if not tied:
                yield float(reward_K[better] - reward_K[worse]), one.whole
    for (_, _, whole), of in verdicts.items():
        for (first, reward), (second, other) in itertools.pairwise(of):
            if first != second:
                yield (reward - other if first > second else other - reward), whole


def find_contrary(said: Sequence[Said], rewards: Sequence[Any]) -> frozenset[str]:
    """Users whose votes contradict the rewards; a comparison of more than two answers is one judgement, by its sum."""
    verdicts: dict[str, list[tuple[Said, Any]]] = defaultdict(list)
    leads: dict[str, list[float]] = defaultdict(list)
    for one, reward_K in zip(said, rewards):
        if one.user == ANONYMOUS:
            continue
        if one.above:
            verdicts[one.user].append((one, reward_K))
        else:
            leads[one.user].append(sum(lead for lead, _ in judged_leads([one], [reward_K])))
    for user, of in verdicts.items():
        leads[user] += [lead for lead, _ in judged_leads(*zip(*of))]
    agreed = {user: sum(lead > 0 for lead in of) for user, of in leads.items()}
    return contrary(agreed, {user: sum(lead != 0 for lead in of) for user, of in leads.items()})


def _said(weighed: Weighed, edit_kept: float, implicit_weight: float) -> Iterator[Said]:
    (vote, answers), weight = (weighed.judged.vote, weighed.judged.answers), weighed.weight
    if vote.kind in ("pair", "ranking", "edit"):
        texts, places = _order(weighed.judged)
        if vote.kind != "edit" or is_mended(texts[1], texts[0], edit_kept):
            prompt = weighed.judged.answer.prompt
            yield Said(vote.kind, prompt, texts, places, (), weight, vote.user, vote.created)
        return
    if vote.kind == "implicit":
        weight *= implicit_weight
    if weight > 0:
        above = (
            tuple(vote.value > level for level in range(1, RATINGS))
            if vote.kind == "rating"
            else (vote.value in ("up", "copy"),)
        )
        for shown in answers:
            share = weight / len(answers)
            yield Said(vote.kind, shown.prompt, (shown.text,), (), above, share, vote.user, vote.created)


def _order(judged: Judged) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(texts, best first; how many of them stand in each place)."""
    vote, texts = judged.vote, {shown.id: shown.text for shown in judged.answers}
    if vote.kind == "edit":
        return (vote.value, judged.answer.text), (1, 1)
    if vote.kind == "pair":
        if vote.value == TIE:
            return tuple(texts.values()), (len(texts),)
        return (texts.pop(vote.value), *texts.values()), (1, 1)
    return tuple(texts[id] for place in vote.value for id in place), tuple(map(len, vote.value))


def is_mended(original: str, edited: str, kept: float) -> bool:
    """Whether an edit mends an answer: it changes it, and it is not another text.

    >>> is_mended("The cat sat on a mat", "The cat sat on the mat", 0.5)
    True
    >>> is_mended("The cat sat", "the  cat sat ", 0.5), is_mended("The cat sat", "Nobody knows", 0.5)
    (True, False)
    >>> is_mended("The cat sat", "The  cat sat ", 0.5)
    False
    """
    before, after = " ".join(original.split()), " ".join(edited.split())
    if before == after:
        return False
    ours, theirs = _runs(before), _runs(after)
    return 2 * (ours & theirs).total() >= kept * (ours.total() + theirs.total())


def _runs(text: str) -> Counter[str]:
    """Runs of three characters, borders of words among them."""
    padded = f"  {text}  "
    return Counter(padded[i : i + 3] for i in range(len(padded) - 2))
