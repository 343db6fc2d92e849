"""Weights that let nobody outweigh many, and the users who judge unlike the others."""

from __future__ import annotations

import math
import random

import pytest

from alignfast.online.feedback import Judged, Shown, Vote
from alignfast.online.store import Store
from alignfast.online.store.stats import store_stats
from alignfast.online.voters import Judgement, agreement, contrary, distinct, judgements, voter_weights
from alignfast.online.voters import _tail as tail


def test_nobody_outweighs_many() -> None:
    users = ["eve"] * 1000 + [f"user {i}" for i in range(50)] + [f"anonymous:{i}" for i in range(300)]
    weights = voter_weights(users, most=5)
    total = {
        "eve": math.fsum(weights[:1000]),
        "named": math.fsum(weights[1000:1050]),
        "anonymous": math.fsum(weights[1050:]),
    }
    assert total == pytest.approx({"eve": 5, "named": 50, "anonymous": 5})
    with pytest.raises(ValueError, match="most must be above 0"):
        voter_weights(users, most=0)


def test_tail_is_the_binomial_distribution() -> None:
    for n, p in ((1, 0.5), (7, 0.9), (40, 0.31)):
        masses = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
        for k in range(n + 1):
            assert tail(k, n, p) == pytest.approx(math.fsum(masses[: k + 1]), rel=1e-12)
    assert (tail(3, 3, 1.0), tail(2, 3, 1.0), tail(0, 3, 0.0)) == (1.0, 0.0, 1.0)


def crowd(draw: random.Random, users: int, items: int, contrarians: int) -> list[Judgement]:
    """Users who see what is so nine times in ten; contrarians say the opposite of what they see."""
    found = []
    for item in range(items):
        for user in draw.sample(range(users), 5):
            right = draw.random() < 0.9
            found.append(Judgement(f"user {user}", item, right != (user < contrarians)))
    return found


def test_contrarians_are_flagged_and_others_are_not() -> None:
    caught = missed = wrongly = 0
    for seed in range(20):
        flagged = {one.user for one in agreement(crowd(random.Random(seed), 40, 300, 3)) if one.flagged}
        contrary = {f"user {u}" for u in range(3)}
        caught += len(flagged & contrary)
        missed += len(contrary - flagged)
        wrongly += bool(flagged - contrary)
    assert (caught, missed) == (60, 0)
    assert wrongly <= 2  # one table in 20, on average, where all others are alike


def test_where_all_are_alike_nobody_is_flagged() -> None:
    tables = [agreement(crowd(random.Random(seed), 20, 100, 0)) for seed in range(100)]
    assert sum(any(one.flagged for one in table) for table in tables) <= 10  # expected: 5 of 100


def test_agreement_is_with_the_majority_of_the_others() -> None:
    found = [Judgement(u, "x", y) for u, y in (("a", True), ("b", True), ("c", False))]
    # a: the others are halved; b too; c: both others say yes
    assert [(one.user, one.agreed, one.compared) for one in agreement(found)] == [("c", 0, 1)]
    assert agreement([Judgement("a", "x", True)]) == []


def test_judgements_of_each_kind() -> None:
    def said(kind: str, value: object, answers: str = "r") -> list[bool]:
        vote = Vote(response_id="r", kind=kind, value=value)  # type: ignore[arg-type]
        return [one.yes for one in judgements(vote, list(answers))]

    assert said("thumb", "up") == said("rating", 4) == [True]
    assert said("thumb", "down") == said("rating", 1) == [False]
    assert said("pair", "r", "rs") == [True]
    assert said("pair", "s", "rs") == [False]
    assert said("ranking", ["s", "r", "t"]) == [False, True, True]
    assert (
        said("rating", 3) == said("pair", "tie", "rs") == said("edit", "x") == said("implicit", "copy") == []
    )


def test_repeated_words_count_once() -> None:
    def judged(id: str, text: str, user: str, value: str) -> Judged:
        shown = Shown(id=id, prompt="a", text=text)
        return Judged(Vote(response_id=id, kind="thumb", value=value, user=user), (shown,))

    votes = [
        judged("r1", "same", "eve", "up"),
        judged("r2", "other", "eve", "up"),
        judged("r3", "same", "ada", "up"),
        judged("r4", "same", "eve", "down"),
    ]
    assert distinct(votes) == votes[1:]


def test_stats(store: Store) -> None:
    store.record_shown(*(Shown(id=f"r{i}", prompt="a", text=f"{i}", policy_version="p1") for i in range(12)))
    for i in range(10):
        for user in ("ada", "bob", "cleo", "dan"):
            store.add_vote(Vote(response_id=f"r{i}", kind="thumb", value="up", user=user))
        store.add_vote(Vote(response_id=f"r{i}", kind="thumb", value="down", user="eve"))
    store.add_vote(Vote(response_id="r0", kind="rating", value=5, user="ada"))
    for number in range(2):
        store.add_vote(Vote(response_id="r0", kind="thumb", value="up", user=f"anonymous:{number}"))
    found = store_stats(store)
    assert (found.responses, found.unvoted, found.votes, found.replaced, found.users) == (12, 2, 52, 1, 6)
    assert found.kinds == {"thumb": 51, "rating": 1}
    rate = found.satisfaction["p1"]
    assert rate.estimate == pytest.approx(41 / 51)
    assert rate.high - rate.low > 0.3  # of six voters, not of 51 votes
    assert [one.user for one in found.flagged] == ["eve"]
    text = found.render()
    assert "eve: agrees in 0 of 10" in text
    assert "12, 2 without a vote" in text
    assert found.to_dict()["satisfaction"]["p1"]["estimate"] == rate.estimate


def rated(draw: random.Random, rates: list[float], judged: int) -> tuple[dict[str, int], dict[str, int]]:
    """Who agrees how often, and of how many."""
    agreed = {f"{i}": sum(draw.random() < rate for _ in range(judged)) for i, rate in enumerate(rates)}
    return agreed, dict.fromkeys(agreed, judged)


def test_who_is_contrary_and_who_is_only_different() -> None:
    draw = random.Random(0)
    assert contrary(*rated(draw, [0.9] * 38 + [0.1] * 2, 60)) == {"38", "39"}
    # of 200 tables of people who press any key, one in twenty has somebody who is taken for a contrarian
    assert sum(bool(contrary(*rated(draw, [0.9] * 19 + [0.5], 60))) for _ in range(200)) <= 10
    assert not contrary(*rated(draw, [0.95] * 39 + [0.6], 400))  # unlike the others, and mostly of their mind
    assert not contrary(*rated(draw, [0.0] * 2 + [0.9] * 38, 5))  # too new to tell
    assert not contrary(*rated(draw, [0.1] * 40, 60))  # tastes have changed, or the model is wrong
    assert contrary({}, {}) == frozenset()
