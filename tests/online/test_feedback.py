"""What a vote and a shown answer may be, and what is said of those that may not."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from alignfast.online.feedback import Shown, Vote, new_id, storable, voter_of


@pytest.mark.parametrize(
    ("kind", "value", "kept"),
    [
        ("thumb", "down", "down"),
        ("thumb", True, "up"),
        ("rating", 5, 5),
        ("pair", "r2", "r2"),
        ("pair", "tie", "tie"),
        ("ranking", ["r2", "r1"], (("r2",), ("r1",))),
        ("ranking", [["r2", "r3"], "r1"], (("r2", "r3"), ("r1",))),
        ("edit", " 4", " 4"),
        ("implicit", "copy", "copy"),
    ],
)
def test_values_of_each_kind(kind: Any, value: Any, kept: Any) -> None:
    vote = Vote(response_id="r1", kind=kind, value=value)
    assert vote.value == kept
    again = Vote(**{**json.loads(json.dumps(vote.body)), "id": vote.id, "created": vote.created})
    assert again == vote  # what is stored comes back
    assert again.body == vote.body


# one wrong value a rule: another type, out of range, an unknown word, nothing
@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        ("thumb", 1, "a thumb's value must be 'up' or 'down', got 1"),
        ("thumb", "sideways", "got 'sideways'"),
        ("rating", 0, "a whole number from 1 to 5, got 0"),
        ("rating", True, "got True"),
        ("rating", 4.0, "got 4.0"),
        ("pair", "", "the id of the better response"),
        ("pair", ["r1"], "got ['r1']"),
        ("ranking", ["r1"], "two or more response ids"),
        ("ranking", "r1r2", "got 'r1r2'"),
        ("ranking", ["r1", []], "two or more"),
        ("ranking", ["r1", 2], "got ['r1', 2]"),
        ("ranking", ["r1", ["r2", "r1"]], "name each response once"),
        ("edit", "  ", "the better answer's text"),
        ("edit", "a\0b", "NUL"),
        ("edit", "a" * 100_001, "100001 characters"),
        ("implicit", "like", "regenerate, copy, stop"),
        ("star", 1, "kind must be one of thumb, rating"),
    ],
)
def test_other_values_are_refused(kind: Any, value: Any, said: str) -> None:
    with pytest.raises(ValueError) as error:
        Vote(response_id="r1", kind=kind, value=value)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "give response_id or episode_id"),
        ({"response_id": "r1", "episode_id": "e1"}, "give response_id or episode_id"),
        ({"response_id": ""}, "response_id must be a string of 1 to 256 characters"),
        ({"response_id": "a\0"}, "response_id must be"),
        ({"response_id": "r1", "user": "\ud800"}, "user must be"),
        ({"response_id": "r1", "user": None}, "user must be"),
        ({"response_id": "r1", "comment": 3}, "comment must be a text"),
        ({"response_id": "r1", "comment": "half \udc00"}, "half a character"),
        ({"response_id": "r1", "created": float("nan")}, "seconds since 1970"),
        ({"response_id": "r1", "among": ("r1", "r2")}, "among is for a pair or a ranking"),
    ],
)
def test_other_fields_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Vote(kind="thumb", value="up", **fields)


def test_a_conversation_gets_a_thumb_or_a_rating() -> None:
    assert Vote(episode_id="e1", kind="rating", value=4).slot == "verdict"
    with pytest.raises(ValueError, match="on a whole conversation is a thumb or a rating, got 'edit'"):
        Vote(episode_id="e1", kind="edit", value="better")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"id": ""}, "id must be"),
        ({"text": None}, "text must be a string"),
        ({"prompt": []}, "a list of messages"),
        ({"prompt": [{"content": "hi"}]}, "a list of messages"),
        ({"turn": -1}, "turn >= 0"),
        ({"completion_ids": (1, 2), "logps": (-0.1,)}, "2 completion_ids and 1 logps"),
        ({"completion_ids": (1,), "sampled_logps": (-0.1, 0.0)}, "2 sampled_logps"),
        ({"completion_ids": (1,), "logps": (float("-inf"),)}, "logps must be finite"),
    ],
)
def test_other_answers_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Shown(**{"id": "r1", "prompt": "2 + 2 =", "text": " 4", **fields})


def test_what_databases_refuse_is_replaced_in_answers() -> None:
    value = {"a\0": ["\ud800b", 3, None]}
    assert storable(value) == {"a\ufffd": ["\ufffdb", 3, None]}
    assert value == {"a\0": ["\ud800b", 3, None]}
    text = "schön 北京 🙂"
    assert storable(text) is text


def test_ids_differ_and_voters_share() -> None:
    assert len({new_id("vote") for _ in range(1000)}) == 1000
    assert {voter_of("anonymous"), voter_of("anonymous:1")} == {"anonymous"}
    assert voter_of("anonymously") == "anonymously"


def test_votes_are_frozen() -> None:
    vote = Vote(response_id="r1", kind="thumb", value="up")
    with pytest.raises(dataclasses.FrozenInstanceError):
        vote.user = "eve"  # type: ignore[misc]
