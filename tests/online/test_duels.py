"""Canaries and their duels, on both databases: who is one, and what people said of it, a voter a row."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from online.learning.test_sequential import capitals

from alignfast.online.feedback import Shown, Vote
from alignfast.online.store import Store
from alignfast.online.store.duels import find_duels


def policies(store: Store, *names: str) -> None:
    for name in names:
        store.versions.add(name, "policy", f"/runs/{name}", name * 8)


def duel(store: Store, group: str, canary: str = "p2", user: str = "ada") -> tuple[str, str]:
    """Ids of the two answers, the canary's first."""
    ids = (f"{group}-{canary}", f"{group}-p1")
    store.record_shown(
        *(
            Shown(
                id=id, prompt="2 + 2 =", text=" 4", group_id=group, user=user, sampling={"duel": canary},
                policy_version=id.removeprefix(f"{group}-"),
            )
            for id in ids
        )
    )  # fmt: skip
    return ids


def prefer(store: Store, ids: tuple[str, str], value: str, user: str, **fields: Any) -> None:
    store.add_vote(Vote(response_id=ids[1], kind="pair", value=value, user=user, **fields))


def test_a_voters_first_vote_settles_their_value(store: Store) -> None:
    policies(store, "p1", "p2", "p3")
    ours = [duel(store, f"g{i}") for i in range(4)]
    prefer(store, ours[0], "tie", "ada")
    prefer(store, ours[2], ours[2][0], "bob")
    settled = store.duels("p2")
    assert [(one.user, one.wins) for one in settled] == [("ada", 0.5), ("bob", 1.0)]
    prefer(store, ours[1], ours[1][1], "ada")  # another duel
    prefer(store, ours[2], ours[2][1], "bob")  # the vote itself is replaced
    for i in range(4):
        prefer(store, ours[i], ours[i][i > 0], f"anonymous:{i}", created=50.0 + i)
    found = store.duels("p2")
    assert found[:2] == settled
    assert [(one.user, one.wins, one.created) for one in found[2:]] == [("anonymous", 1.0, 50.0)]
    assert store.duels("p3") == store.duels("nobody") == []


def test_whoever_looks_after_every_vote_is_seldom_wrong_whatever_brings_voters_back() -> None:
    """People with tastes of their own, 1/2 in the mean, who come back until a vote of theirs goes to the canary.

    Values stay, so that looking after every vote is looking after every voter's first one. By the means of votes so far it is
    wrong in two runs of three.
    """
    draw, enough, voters, runs = np.random.default_rng(0), math.log(2 / 0.05), 300, 200
    wins_RN, mean_RN = np.empty((runs, voters)), np.empty((runs, voters))
    for run in range(runs):
        rows, said = [], [list[bool]() for _ in range(voters)]
        taste_N = draw.beta(0.5, 0.5, voters)
        for arrived in range(1, voters + 1):
            unpleased = [v for v in range(arrived - 1) if not any(said[v]) and len(said[v]) < 4]
            for voter in (arrived - 1, *draw.permutation(unpleased)[:1].tolist()):
                said[voter].append(bool(draw.random() < taste_N[voter]))
                value = "ours" if said[voter][-1] else "theirs"
                rows.append(
                    SimpleNamespace(
                        user_id=f"u{voter}", value=value, id="ours", created=0.0, sampling={"duel": "p2"}
                    )
                )
        connection: Any = SimpleNamespace(execute=lambda statement, rows=rows: rows)
        wins_RN[run] = [one.wins for one in find_duels(connection, "p2")]
        mean_RN[run] = [np.mean(of) for of in said]
    wrong_R = (np.maximum(capitals(wins_RN, 0.5), capitals(1 - wins_RN, 0.5)) >= enough).any(1)
    assert wrong_R.mean() <= 0.05
    assert (capitals(mean_RN, 0.5) >= enough).any(1).mean() > 0.5


def test_other_comparisons_are_no_duels(store: Store) -> None:
    policies(store, "p1", "p2", "p3")
    ids, other = duel(store, "g1"), duel(store, "g2", "p3")
    store.add_vote(Vote(response_id=ids[0], kind="thumb", value="up", user="ada"))
    # with an answer of another group, where nobody drew lots for the sides
    store.add_vote(Vote(response_id=ids[0], kind="pair", value=ids[0], among=(ids[0], other[1]), user="ada"))
    # two answers of one version, after the canary was promoted
    for id in ("a", "b"):
        store.record_shown(Shown(id=id, prompt="?", text=id, group_id="g3", policy_version="p2"))
    store.add_vote(Vote(response_id="a", kind="pair", value="a", user="ada"))
    assert store.duels("p2") == []
    prefer(store, other, other[0], "ada")
    assert [(one.user, one.wins) for one in store.duels("p3")] == [("ada", 1.0)]


def test_naming_a_whole_group_is_voting_on_it(store: Store) -> None:
    policies(store, "p1", "p2")
    ids = duel(store, "g1")
    prefer(store, ids, ids[0], "ada")
    prefer(store, ids, ids[1], "ada", among=ids)
    (vote,) = store.votes()
    assert (vote.value, vote.among) == (ids[1], tuple(sorted(ids)))
    assert [one.wins for one in store.duels("p2")] == [1.0]  # the first vote, and one voter


def test_one_canary_at_a_time(store: Store) -> None:
    policies(store, "p1", "p2", "p3")
    store.versions.promote("p1")
    assert store.versions.canary() is None
    store.versions.set_canary("p2", 0.25)
    store.versions.set_canary("p2", 0.5)
    found = store.versions.canary()
    assert found is not None
    assert (found.name, found.status, found.share) == ("p2", "canary", 0.5)
    with pytest.raises(ValueError, match="'p2' is the canary: set its status"):
        store.versions.set_canary("p3", 0.5)
    store.versions.promote("p2")
    assert store.versions.canary() is None
    store.versions.set_canary("p3", 0.5)
    store.versions.set_status("p3", "refused", ["people liked it less"])
    assert store.versions.canary() is None


def test_what_can_be_no_canary(store: Store) -> None:
    policies(store, "p1")
    store.versions.promote("p1")
    store.versions.add("r1", "reward", "/runs/r1", "r" * 8)
    with pytest.raises(ValueError, match="'p1' serves"):
        store.versions.set_canary("p1", 0.5)
    with pytest.raises(ValueError, match="'r1' is a reward model"):
        store.versions.set_canary("r1", 0.5)
    with pytest.raises(ValueError, match="no version 'p9'"):
        store.versions.set_canary("p9", 0.5)
    for share in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="share must be above 0 and at most 1"):
            store.versions.set_canary("p1", share)
    with pytest.raises(ValueError, match=r"call set_canary\(name, share\)"):
        store.versions.set_status("p1", "canary")


def test_figures_of_a_version(store: Store) -> None:
    policies(store, "p1")
    assert store.versions.get("p1").figures == {}
    store.versions.set_figures("p1", {"kl": 1.5, "win_rate": [0.6, 0.55, 0.65]})
    store.versions.set_figures("p1", {"kl": 2.5})
    assert store.versions.get("p1").figures == {"kl": 2.5}
    with pytest.raises(ValueError, match="no version 'p9'"):
        store.versions.set_figures("p9", {})
