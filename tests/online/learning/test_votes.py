"""What votes weigh: who floods, repeats or contradicts against everybody else."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from alignfast.online.feedback import TIE, Judged, Shown, Vote
from alignfast.online.learning.votes import DAY, VoteLimits, Weighing, weigh


def thumb(user: str, text: str, up: bool = True, created: float = 0.0, id: str = "") -> Judged:
    shown = Shown(id=id or f"{user}-{text}-{created}", prompt="a", text=text)
    said = Vote(response_id=shown.id, kind="thumb", value=up, user=user, created=created)
    return Judged(said, (shown,))


def compare(user: str, value: int | str, number: int, flip: bool = False, kind: Any = "pair") -> Judged:
    """A vote between the same two texts, whose ids are the user's own, and in either order."""
    ids = [f"{user}-{number}-{'ba'[i] if flip else 'ab'[i]}" for i in range(2)]
    answers = tuple(Shown(id=id, prompt=f"q{number}", text=text) for id, text in zip(ids, ("one", "two")))
    said = value if isinstance(value, str) else ids[value] if kind == "pair" else [ids[value], ids[1 - value]]
    return Judged(Vote(response_id=ids[0], kind=kind, value=said, user=user, created=number), answers)


def total(found: Weighing, user: str) -> float:
    return math.fsum(one.weight for one in found.kept if one.judged.vote.user.startswith(user))


def test_a_flood_weighs_no_more_than_one_voter_may() -> None:
    votes = [thumb("eve", f"{i}", created=i) for i in range(1000)]
    votes += [thumb(f"user {i}", "x") for i in range(50)] + [thumb(f"anonymous:{i}", "y") for i in range(300)]
    found = weigh(votes, VoteLimits(most=5, cap=100))
    assert found.capped == 900 + 200
    assert [round(total(found, name), 9) for name in ("eve", "user", "anonymous")] == [5, 50, 5]
    assert found.figures["votes"] == 100 + 50 + 100


def test_a_period_begins_anew_and_its_first_votes_stay() -> None:
    votes = [thumb("eve", f"{i}", created=i * DAY / 4) for i in range(12)]
    found = weigh(votes[::-1], VoteLimits(cap=2))  # in whatever order they are given
    assert [one.judged.vote.created / DAY for one in found.kept] == [0, 0.25, 1, 1.25, 2, 2.25]
    assert weigh(votes[:9], VoteLimits(cap=2)).kept == found.kept[:5]  # later votes take none away


def test_the_same_words_count_once() -> None:
    votes = [thumb("eve", "same", created=i, id=f"r{i}") for i in range(5)] + [thumb("ada", "same")]
    found = weigh(votes)
    assert found.repeated == 4
    assert {one.judged.vote.id for one in found.kept} == {votes[4].vote.id, votes[5].vote.id}


@pytest.mark.parametrize("kind", ["pair", "ranking"])
def test_who_contradicts_is_flagged_by_words_whatever_their_ids(kind: str) -> None:
    draw = random.Random(0)
    crowd = [
        compare(f"user {u}", draw.random() < 0.1, i, draw.random() < 0.5, kind)
        for u in range(6)
        for i in range(30)
    ]
    found = weigh([*crowd, *(compare("eve", 1, i, i % 2 == 0, kind) for i in range(30))])
    assert [one.user for one in found.flagged] == ["eve"]
    assert total(found, "eve") == total(found, "user 0") == pytest.approx(20)  # told, and no more
    assert found.figures["users_flagged"] == 1


def test_what_a_flagged_user_weighs_is_the_operators_choice() -> None:
    votes = [thumb(f"user {u}", f"{i}", u > 0, created=i) for u in range(6) for i in range(20)]
    for weight in (0.25, 0.0):
        found = weigh(votes, VoteLimits(flagged=weight))
        assert [one.user for one in found.flagged] == ["user 0"]
        assert total(found, "user 0") == pytest.approx(20 * weight)
        assert total(found, "user 1") == pytest.approx(20)
    assert len(found.kept) == 100


def test_votes_that_judge_nothing_are_kept() -> None:
    answers = tuple(Shown(id=id, prompt="a", text="same") for id in "rs")
    same = Judged(Vote(response_id="r", kind="ranking", value=["s", "r"], user="ada"), answers)
    whole = Judged(Vote(episode_id="e", kind="thumb", value="up", user="ada"), answers)
    edit = Judged(Vote(response_id="r", kind="edit", value="x", user="ada"), answers[:1])
    votes = [compare("ada", TIE, 0), same, whole, edit]
    assert len(weigh(votes).kept) == 4
    assert weigh([]) == Weighing((), 0, 0, ())


@pytest.mark.parametrize("wrong", [{"most": 0}, {"cap": 0}, {"period": 0.0}, {"flagged": 1.5}])
def test_limits_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected most > 0, cap >= 1, period > 0 and flagged in"):
        VoteLimits(**wrong)
