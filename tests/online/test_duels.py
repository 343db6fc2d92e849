"""Canaries and their duels, on both databases: who is one, and what people said of it, a voter a row."""

from __future__ import annotations

from typing import Any

import pytest

from alignfast.online.feedback import Shown, Vote
from alignfast.online.store import Store


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


def test_a_voters_wins_are_the_mean_of_what_counts(store: Store) -> None:
    policies(store, "p1", "p2", "p3")
    ours = [duel(store, f"g{i}") for i in range(4)]
    prefer(store, ours[0], ours[0][0], "ada")
    prefer(store, ours[1], "tie", "ada")
    prefer(store, ours[2], ours[2][0], "bob")
    prefer(store, ours[2], ours[2][1], "bob")  # this one counts
    for i in range(4):
        prefer(store, ours[i], ours[i][0], f"anonymous:{i}", created=50.0 + i)
    found = store.duels("p2")
    assert [(one.user, one.wins) for one in found] == [("ada", 0.75), ("bob", 0.0), ("anonymous", 1.0)]
    assert found[2].created == 50.0
    assert store.duels("p3") == store.duels("nobody") == []


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
    assert [one.wins for one in store.duels("p2")] == [0.0]


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
