"""What votes say: no vote is missing, never negative."""

from __future__ import annotations

from typing import Any

import pytest

from alignfast.online.feedback import TIE, Judged, Shown, Vote
from alignfast.online.learning.said import Said, find_contrary, is_mended, pairs_of, said_of
from alignfast.online.learning.votes import Weighed


def said(kind: Any, value: Any, texts: str = "b", weight: float = 1.0, **options: Any) -> list[Said]:
    shown = tuple(Shown(id=f"r{i}", prompt="a", text=text) for i, text in enumerate(texts))
    vote = Vote(response_id="r0", kind=kind, value=value, user="ada", created=3.0)
    return said_of([Weighed(Judged(vote, shown), weight)], **options)


def test_each_kind() -> None:
    assert said("thumb", "up") == [Said("thumb", "a", ("b",), (), (True,), 1.0, "ada", 3.0)]
    assert said("thumb", "down")[0].above == (False,)
    assert [said("rating", value)[0].above.count(True) for value in (1, 2, 3, 4, 5)] == [0, 1, 2, 3, 4]
    (won,) = said("pair", "r1", "xy", weight=0.25)
    assert (won.texts, won.places, won.weight, won.tied) == (("y", "x"), (1, 1), 0.25, False)
    (tie,) = said("pair", TIE, "xy")
    assert (tie.texts, tie.tied, pairs_of(tie)) == (("x", "y"), True, [(0, 1, True)])
    (ranked,) = said("ranking", ["r2", ["r0", "r1"]], "xyz")
    assert (ranked.texts, ranked.places) == (("z", "x", "y"), (1, 2))
    assert pairs_of(ranked) == [(0, 1, False), (0, 2, False), (1, 2, True)]


def test_hints_say_nothing_unless_asked_for() -> None:
    for signal in ("copy", "regenerate", "stop"):
        assert said("implicit", signal) == []
        (hint,) = said("implicit", signal, implicit_weight=0.1)
        assert (hint.above, hint.weight) == ((signal == "copy",), 0.1)


def test_an_edit_counts_where_it_mends_the_answer() -> None:
    shown = (Shown(id="r", prompt="a", text="The cat sat on a mat."),)

    def edited(text: str) -> list[Said]:
        vote = Vote(response_id="r", kind="edit", value=text)
        return said_of([Weighed(Judged(vote, shown), 1.0)])

    (mended,) = edited("The cat sat on the mat.")
    assert (mended.texts, mended.places) == (("The cat sat on the mat.", "The cat sat on a mat."), (1, 1))
    assert edited("The  cat sat on a mat. ") == edited("This is rubbish!") == []
    # it is still another text: three quarters of it are new
    assert edited("The cat sat on a mat. " * 4) == []
    assert is_mended("", "a", 0.0)


def test_a_conversation_is_its_turns() -> None:
    turns = tuple(
        Shown(id=f"r{i}", prompt=[{"role": "user", "content": f"{i}"}], text=f"t{i}", episode_id="e", turn=i)
        for i in range(4)
    )
    found = said_of([Weighed(Judged(Vote(episode_id="e", kind="thumb", value="up"), turns), 0.5)])
    assert [(one.prompt, one.texts, one.weight) for one in found] == [
        (t.prompt, (t.text,), 0.125) for t in turns
    ]


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_answer_without_a_word_is_left_out(text: str) -> None:
    shown = (Shown(id="r0", prompt="a", text=text), Shown(id="r1", prompt="a", text="b"))
    thumb = Judged(Vote(response_id="r0", kind="thumb", value="down"), shown[:1])
    pair = Judged(Vote(response_id="r0", kind="pair", value="r1"), shown)
    assert said_of([Weighed(thumb, 1.0), Weighed(pair, 1.0)]) == []


def test_what_an_anonymous_voter_says_belongs_with_its_prompt() -> None:
    assert Said("thumb", "a", ("b",), user="anonymous").whole == '"a"'
    assert Said("thumb", "a", ("b",), user="anonymous:3").whole == "anonymous"
    assert Said("thumb", "a", ("b",), user="ada").whole == "ada"


def test_users_who_contradict_the_rewards() -> None:
    """By comparisons, and by verdicts that differ: how easily somebody is pleased says nothing."""

    def people(user: str, sign: int, number: int) -> list[tuple[Said, list[float]]]:
        order = [1.0, 0.5, 0.0][::sign]
        ranked = [(Said("ranking", "a", ("x", "y", "z"), (1, 1, 1), user=user), order)] * number
        up, down = (Said("thumb", "a", ("x",), above=(above,), user=user) for above in (True, False))
        return [*ranked, (up, [sign * 1.0]), (down, [sign * -1.0])] * 2

    said, rewards = zip(
        *(one for u in range(9) for one in people(f"user {u}", 1, 10)),
        *people("eve", -1, 10),
        *people("new", -1, 1),
        *people("anonymous", -1, 10),
        *[(Said("thumb", "a", ("x",), above=(True,), user="pleased"), [-9.0])] * 30,
    )
    assert find_contrary(said, rewards) == {"eve"}
