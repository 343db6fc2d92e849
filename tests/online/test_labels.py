"""The queue of annotators on both databases: who gets what, how often, and how far they agree."""

from __future__ import annotations

import pytest

from alignfast.online.feedback import Shown, UnknownResponse, Vote
from alignfast.online.store import Store, labels

PROMPTS = ["the cat?", "the dog?", [{"role": "user", "content": "and the bird?"}]]
OVERLAP = 2


def draw(store: Store, item: labels.Item, ids: str = "abc") -> list[str]:
    """Answers to an item, of nobody."""
    group = f"group-{item.id}"
    names = [f"{item.id[:10]}-{id}" for id in ids]
    store.record_shown(*(Shown(id=n, prompt=item.prompt, text=n, group_id=group) for n in names))
    assert store.labels.drawn(item.id, group) == group
    return names


def rank(store: Store, user: str, order: list[str], among: list[str] | None = None) -> None:
    vote = Vote(response_id=order[0], kind="ranking", value=order, user=user, among=tuple(among or order))
    store.add_vote(vote, own=True)


def test_a_prompt_is_in_the_queue_once(store: Store) -> None:
    assert store.labels.add([*PROMPTS, PROMPTS[0]]) == 3
    assert store.labels.add([*PROMPTS, "new"]) == 1
    item = store.labels.next("ann", 1)
    assert item is not None
    assert (item.prompt, item.group_id) == ("the cat?", None)


def test_an_item_goes_to_as_many_annotators_as_overlap_says(store: Store) -> None:
    store.labels.add(PROMPTS)
    first = [store.labels.next(user, OVERLAP) for user in ("ann", "bob", "eve")]
    assert [item.prompt for item in first if item] == ["the cat?", "the cat?", "the dog?"]
    assert store.labels.next("ann", OVERLAP) == first[0]  # the same until it is ranked
    assert [store.labels.left(user, OVERLAP) for user in ("ann", "eve", "joe")] == [3, 2, 2]


def test_a_ranked_item_makes_place_for_the_next(store: Store) -> None:
    store.labels.add(PROMPTS)
    item = store.labels.next("ann", 1)
    assert item is not None
    rank(store, "ann", draw(store, item))
    following = store.labels.next("ann", 1)
    assert following is not None
    assert following.prompt == "the dog?"
    assert store.labels.left("ann", 1) == 2
    third = store.labels.next("bob", 1)
    assert third is not None
    assert third.prompt == PROMPTS[2]
    assert store.labels.next("eve", 1) is None
    assert store.labels.left("eve", 1) == 0


def test_a_skipped_item_is_free_for_others_alone(store: Store) -> None:
    store.labels.add(PROMPTS[:1])
    item = store.labels.next("ann", 1)
    assert item is not None
    with pytest.raises(ValueError, match="not in your hands"):
        store.labels.skip(item.id, "bob")
    store.labels.skip(item.id, "ann")
    assert store.labels.next("ann", 1) is None
    assert store.labels.next("bob", 1) == item


def test_an_item_that_is_left_open_goes_to_another(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.labels.add(PROMPTS[:1])
    item = store.labels.next("ann", 1)
    assert store.labels.next("bob", 1) is None
    monkeypatch.setattr(labels, "_OPEN_SECONDS", 0.0)
    assert store.labels.next("bob", 1) == item
    assert store.labels.next("ann", 1) == item  # nobody has ranked it yet


def test_the_answers_are_drawn_once_and_anew_when_they_are_gone(store: Store) -> None:
    store.labels.add(PROMPTS[:1])
    item = store.labels.next("ann", 1)
    assert item is not None
    draw(store, item)
    assert store.labels.drawn(item.id, "late") == f"group-{item.id}"
    store.expire(0)
    assert store.labels.drawn(item.id, "late") == "late"


def test_annotators_alone_vote_on_what_they_were_given(store: Store) -> None:
    store.labels.add(PROMPTS)
    item = store.labels.next("ann", OVERLAP)
    assert item is not None
    names = draw(store, item)
    rank(store, "ann", names)
    rank(store, "ann", names[::-1])  # and may think again
    with pytest.raises(UnknownResponse):
        rank(store, "bob", names)
    store.record_shown(Shown(id="private", prompt="the cat?", text="x", user="joe"))
    with pytest.raises(UnknownResponse):
        store.add_vote(Vote(response_id="private", kind="thumb", value="up", user="ann"), own=True)
    assert [vote.value[0] for vote in store.votes()] == [(names[-1],)]


def test_agreement_is_counted_by_pairs_of_answers(store: Store) -> None:
    store.labels.add(PROMPTS[:1])
    assert store.labels.stats(OVERLAP).agreement is None
    item = store.labels.next("ann", 3)
    assert item is not None
    a, b, c = draw(store, item)
    for user, order in {"ann": [a, b, c], "bob": [a, c, b], "eve": [c, b, a]}.items():
        assert store.labels.next(user, 3) is not None
        rank(store, user, order, [a, b, c])
    found = store.labels.stats(OVERLAP)
    # ab: yes yes no, ac: yes yes no, bc: yes no no: one of three pairs of annotators each
    assert (found.items, found.done, found.compared) == (1, 1, 9)
    assert found.agreement is not None
    assert found.agreement.estimate == pytest.approx(3 / 9)
    agreed = {one.user: one.agreement for one in found.annotators}
    assert {user: one and (one.agreed, one.compared) for user, one in agreed.items()} == {
        "ann": (0, 1), "bob": None, "eve": (0, 2)  # where the others are in halves, nobody is compared
    }  # fmt: skip


def test_who_is_deleted_makes_place(store: Store) -> None:
    store.labels.add(PROMPTS[:1])
    item = store.labels.next("ann", 1)
    assert item is not None
    rank(store, "ann", draw(store, item))
    assert store.labels.next("bob", 1) is None
    store.delete_user("ann")
    found = store.labels.next("bob", 1)
    assert found is not None
    assert found.id == item.id
    assert store.labels.stats(1).annotators == ()


def test_an_item_goes_to_somebody(store: Store) -> None:
    with pytest.raises(ValueError, match="overlap must be 1 or more, got 0"):
        store.labels.next("ann", 0)
