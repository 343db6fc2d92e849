"""The labelling queue over HTTP: who may ask, what they get, and whose votes count."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from online.server.serving import ADMIN_KEY, ANNOTATOR_KEY, KEY, Live, listening, make_service

from alignfast.online.server.labelling import QUEUE, request_of
from alignfast.online.server.service import Limits

PROMPTS: list[Any] = [
    "the cat",
    [{"role": "system", "content": "the mat"}, {"role": "user", "content": "the dog"}],
]


@pytest.fixture
def live() -> Iterator[Live]:
    with listening(make_service(label_answers=3)) as live:
        yield live


def following(live: Live, key: str = ANNOTATOR_KEY) -> Any:
    with live.http(key) as http:
        return http.get("/v1/label/next")


def test_there_is_no_queue_before_there_is_one(live: Live) -> None:
    answer = following(live)
    assert answer.status_code == 404
    assert "alignfast serve --label" in answer.json()["error"]["message"]


def test_annotators_get_prompts_in_turn_and_nobody_else_does(live: Live) -> None:
    live.store.labels.add(PROMPTS)
    assert following(live, KEY).status_code == 403
    first = following(live).json()
    assert (first["prompt"], len(first["answers"]), first["left"]) == ("the cat", 3, 2)
    assert following(live).json() == first  # until it is ranked
    ids = [one["id"] for one in first["answers"]]
    shown = [live.shown(id) for id in ids]
    assert [one.text for one in shown] == [one["text"] for one in first["answers"]]
    assert {(one.user, one.group_id) for one in shown} == {(QUEUE, shown[0].group_id)}
    vote = {"response_id": ids[0], "kind": "ranking", "value": [ids[2], [ids[0], ids[1]]]}
    with live.http(KEY) as http:
        assert http.post("/v1/feedback", json=vote).status_code == 404  # it was given to somebody else
    with live.http(ANNOTATOR_KEY) as http:
        assert http.post("/v1/feedback", json=vote).status_code == 200
    second = following(live).json()
    assert (second["prompt"], second["left"]) == (PROMPTS[1], 1)
    with live.http(ANNOTATOR_KEY) as http:
        assert http.post("/v1/label/skip", json={"item": first["item"] + "x"}).status_code == 404
        assert http.post("/v1/label/skip", json={"item": second["item"]}).status_code == 200
        assert http.get("/v1/label/next").status_code == 204
        assert http.get("/v1/label/agreement").status_code == 403
    with live.http(ADMIN_KEY) as http:
        told = http.get("/v1/label/agreement").json()
    assert (told["items"], told["done"], told["agreement"]) == (2, 0, None)
    assert [one["user"] for one in told["annotators"]] == ["cleo"]


def test_annotators_who_ask_at_once_get_the_same_answers(live: Live) -> None:
    live.store.labels.add(PROMPTS[:1])
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda key: following(live, key).json(), (ANNOTATOR_KEY, ADMIN_KEY)))
    one, other = ({answer["id"] for answer in each["answers"]} for each in found)
    assert one == other


def test_answers_that_were_deleted_are_drawn_anew(live: Live) -> None:
    live.store.labels.add(PROMPTS[:1])
    before = {one["id"] for one in following(live).json()["answers"]}
    live.store.delete_user(QUEUE)
    after = {one["id"] for one in following(live).json()["answers"]}
    assert len(after) == 3
    assert not before & after


def test_a_queue_that_can_not_be_ranked_is_refused() -> None:
    with pytest.raises(ValueError, match="label_answers must be 2 to 8"):
        Limits(label_answers=1)
    with pytest.raises(ValueError, match="above max_answers=2: raise that too"):
        Limits(max_answers=2)
    with pytest.raises(ValueError, match="role"):
        request_of([{"role": "tool", "content": "x"}], "tiny", 2)
