"""The loop seen from the server: versions that the store promotes, takes back and lets duel, and the routes that say so."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from online.server.serving import (
    ADMIN_KEY,
    KEY,
    OTHER_KEY,
    Live,
    listening,
    make_chat_tokenizer,
    make_model,
    make_service,
    make_store,
    until,
)

from alignfast.online.feedback import Shown, Vote
from alignfast.online.server.versions import weights_hash
from alignfast.online.store import Store

CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "the cat"}],
    "max_tokens": 4,
}
PAIR: dict[str, Any] = {**CHAT, "n": 2, "alignfast": {"pair": True}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for seed, name in enumerate(("p1", "p2", "p3"), 11):
        found[name] = tmp_path_factory.mktemp("versions") / name
        make_model(seed).save_pretrained(found[name])
        make_chat_tokenizer().save_pretrained(found[name])
    return found


@pytest.fixture
def live(folders: dict[str, Path]) -> Iterator[Live]:
    """A server whose store knows p1, which serves, p2 and p3."""
    service = make_service()
    for name, folder in folders.items():
        service.store.versions.add(name, "policy", str(folder), weights_hash(folder))
    service.store.versions.promote("p1")
    with listening(service) as live:
        live.watch.look()
        yield live


def chat(live: Live, key: str = KEY, **fields: Any) -> httpx.Response:
    with live.http(key) as http:
        answer = http.post("/v1/chat/completions", json={**CHAT, **fields})
    assert answer.status_code == 200, answer.text
    return answer


def serving(live: Live) -> str:
    return str(chat(live).json()["alignfast"]["version"])


def state(live: Live) -> dict[str, Any]:
    with live.http() as http:
        found: dict[str, Any] = http.get("/v1/loop").json()
    return found


def post(live: Live, path: str, key: str = ADMIN_KEY, **body: Any) -> httpx.Response:
    with live.http(key) as http:
        return http.post(f"/v1/loop/{path}", json=body)


# --- what serves ---


def test_what_the_store_promotes_and_takes_back_serves(live: Live) -> None:
    assert serving(live) == "p1"
    live.store.versions.promote("p2")
    until(lambda: serving(live) == "p2", 5)  # nobody told the server
    live.store.versions.roll_back()
    until(lambda: serving(live) == "p1", 5)
    until(lambda: live.service.runner.num_engines == 1)


def test_the_buttons_promote_and_roll_back_at_once(live: Live) -> None:
    for path, body in (("promote", {"version": "p2"}), ("rollback", {})):
        assert post(live, path, KEY, **body).status_code == 403
    assert serving(live) == "p1"
    answer = post(live, "promote", version="p2")
    assert (answer.status_code, answer.json()) == (200, {"object": "loop.version", "serving": "p2"})
    assert serving(live) == "p2"
    answer = post(live, "rollback")
    assert answer.json()["serving"] == serving(live) == "p1"
    (taken_back,) = [one for one in state(live)["versions"] if one["name"] == "p2"]
    assert (taken_back["status"], taken_back["reasons"]) == ("rolled_back", ["rolled back by hand"])
    assert post(live, "rollback").status_code == 409  # nothing served before
    assert post(live, "promote", version="p9").status_code == 404
    live.store.versions.add("r1", "reward", "/runs/r1", "0" * 64)
    assert post(live, "promote", version="r1").status_code == 422
    assert post(live, "rollback", version="p2").status_code == 422


def test_a_version_that_is_not_what_it_was_is_not_served(live: Live, folders: dict[str, Path]) -> None:
    live.store.versions.add("changed", "policy", str(folders["p2"]), "0" * 64)
    live.store.versions.add("gone", "policy", "/nowhere", "0" * 64)
    for name, said in (("changed", "versions never change"), ("gone", "no such folder")):
        answer = post(live, "promote", version=name)
        assert answer.status_code == 409, answer.text
        assert said in answer.json()["error"]["message"]
        found = live.store.versions.get(name)
        assert found.status == "rolled_back"
        assert said in found.reasons[0]
        assert serving(live) == state(live)["serving"] == "p1"
    live.store.versions.promote("gone")  # by another machine, where the folder may be
    live.watch.look()
    assert serving(live) == state(live)["serving"] == "p1"
    assert "no such folder" in state(live)["faults"]["gone"]


def test_the_state_of_the_loop(live: Live) -> None:
    store = live.store
    store.versions.set_figures("p2", {"kl": 0.5})
    store.versions.set_status("p3", "refused", ["its length ran away"])
    run = store.runs.start("collect")
    for i, thumb in enumerate((True, True, True, False)):
        store.record_shown(Shown(id=f"r{i}", prompt="?", text="!", policy_version="p1"))
        store.add_vote(Vote(response_id=f"r{i}", kind="thumb", value=thumb, user=f"user {i}"))
    found = state(live)
    assert [one["name"] for one in found["versions"]] == ["p1", "p2", "p3"]
    first, second, third = found["versions"]
    assert (first["status"], first["kind"], first["parents"]) == ("promoted", "policy", [])
    assert first["satisfaction"]["estimate"] == 0.75
    assert first["satisfaction"]["votes"] == 4
    assert first["satisfaction"]["low"] < 0.75 < first["satisfaction"]["high"]
    assert (second["satisfaction"], second["figures"]) == (None, {"kl": 0.5})
    assert (third["status"], third["reasons"]) == ("refused", ["its length ran away"])
    assert (found["serving"], found["canary"], found["votes"], found["unused"]) == ("p1", None, 4, 4)
    assert found["run"] == {
        "stage": "collect", "status": "running", "created": run.created, "updated": run.updated,
    }  # fmt: skip


# --- canaries ---


def canary(live: Live, share: float) -> None:
    live.store.versions.set_canary("p2", share)
    live.watch.look()


def test_a_duel_is_of_both_blind_and_on_sides_by_lot(live: Live) -> None:
    canary(live, 1.0)
    sides: Counter[str] = Counter()
    for _ in range(24):
        answer = chat(live, **PAIR)
        told = answer.json()
        assert not re.search(r"p[12]\b|weights", answer.text + str(answer.headers))
        assert told["system_fingerprint"] is None
        shown = [live.shown(one["response_id"]) for one in told["alignfast"]["answers"]]
        assert {one.policy_version for one in shown} == {"p1", "p2"}
        assert {one.group_id for one in shown} == {told["id"]}
        assert [one.sampling["duel"] for one in shown] == ["p2", "p2"]
        assert [one.text for one in shown] == [c["message"]["content"] for c in told["choices"]]
        assert told["usage"]["prompt_tokens"] == len(shown[0].prompt_ids)
        sides[shown[0].policy_version] += 1
    assert min(sides["p1"], sides["p2"]) >= 3  # one in 28,000 fair lots has fewer
    until(lambda: live.service.runner.in_flight == 0)


def test_a_duels_answers_are_those_of_their_versions(live: Live) -> None:
    canary(live, 1.0)
    asked = {**PAIR, "temperature": 0, "max_tokens": 12}
    alone = chat(live, temperature=0, max_tokens=12).json()["choices"][0]["message"]["content"]
    with (
        live.http() as http,
        http.stream("POST", "/v1/chat/completions", json={**asked, "stream": True}) as stream,
    ):
        read = "".join(stream.iter_lines())
    assert not re.search(r"p[12]\b|weights", read)
    found = {one.policy_version: one.text for one in live.store.group(re.findall(r"chatcmpl-\w+", read)[0])}
    assert found["p1"] == alone
    live.store.versions.promote("p2")
    live.watch.look()
    assert found["p2"] == chat(live, temperature=0, max_tokens=12).json()["choices"][0]["message"]["content"]
    assert found["p1"] != found["p2"]


def test_wins_of_the_canary_are_counted(live: Live) -> None:
    canary(live, 1.0)
    for key, wins in ((KEY, True), (OTHER_KEY, False)):
        answers = [a["response_id"] for a in chat(live, key, **PAIR).json()["alignfast"]["answers"]]
        of = {live.shown(id).policy_version: id for id in answers}
        verdict = "better" if wins == (of["p2"] == answers[0]) else "worse"
        vote = {"response_id": answers[0], "kind": "pair", "value": {"than": answers[1], "verdict": verdict}}
        with live.http(key) as http:
            assert http.post("/v1/feedback", json=vote).status_code == 200
    assert {one.user: one.wins for one in live.store.duels("p2")} == {"ann": 1.0, "bob": 0.0}
    assert state(live)["canary"] == {"version": "p2", "share": 1.0, "voters": 2, "wins": 0.5, "loaded": True}


def test_whoever_is_not_in_a_duel_gets_what_serves(live: Live) -> None:
    canary(live, 1.0)
    for fields in ({}, {"n": 2}, {**PAIR, "alignfast": {"pair": True, "store": False}}):
        told = chat(live, **fields).json()["alignfast"]
        assert told["version"] == "p1"
        for one in told["answers"]:
            assert "duel" not in live.shown(one["response_id"]).sampling
    live.store.versions.set_status("p2", "refused", ["nobody liked it"])
    live.watch.look()
    told = chat(live, **PAIR).json()["alignfast"]
    assert told["version"] == "p1"
    shown = [live.shown(one["response_id"]) for one in told["answers"]]
    assert len({one.group_id for one in shown}) == 1  # a pair of one version can be voted on all the same
    until(lambda: live.service.runner.num_engines == 1)


def test_the_share_is_of_users_and_stays(live: Live) -> None:
    canary(live, 0.25)
    users = [f"user {i}" for i in range(2000)]
    inside = {user for user in users if live.service.side_of(user) is not None}
    assert 420 < len(inside) < 580  # 500, four standard deviations
    assert inside == {user for user in users if live.service.side_of(user) is not None}
    canary(live, 0.5)
    assert inside < {user for user in users if live.service.side_of(user) is not None}


def test_a_promoted_canary_is_there_already(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    canary(live, 1.0)
    loaded: list[str] = []
    monkeypatch.setattr(live.service, "load", lambda version, **_: loaded.append(version.name))
    live.store.versions.promote("p2")
    live.watch.look()
    assert (serving(live), live.service.runner.canary, loaded) == ("p2", None, [])
    until(lambda: live.service.runner.num_engines == 1)


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("chat/completions", {"alignfast": {"pair": True}}, "'n' must be 2, got None"),
        ("chat/completions", {"alignfast": {"pair": True}, "n": 3}, "'n' must be 2, got 3"),
        ("chat/completions", {"alignfast": {"pears": True}}, "no field 'alignfast.pears'"),
        ("completions", {"messages": None, "prompt": "a", "alignfast": {"pair": True}}, "pairs are of chats"),
    ],
)
def test_pairs_are_of_two_chats(live: Live, path: str, fields: dict[str, Any], message: str) -> None:
    body = {name: value for name, value in {**CHAT, **fields}.items() if value is not None}
    with live.http() as http:
        answer = http.post(f"/v1/{path}", json=body)
    assert (answer.status_code, message in answer.text) == (422, True), answer.text


# --- what else the store says ---


def test_a_server_without_keys_asks_for_one_as_soon_as_there_is_one() -> None:
    with listening(make_service(keys=None)) as live, live.http(None) as http:
        assert http.get("/v1/models").status_code == 200
        key, made = live.store.keys.make("ann")
        live.watch.look()
        assert http.get("/v1/models").status_code == 401
        header = {"Authorization": f"Bearer {key}"}
        assert http.get("/v1/models", headers=header).status_code == 200
        live.store.keys.revoke(made.id)
        live.watch.look()
        # nobody gets in, rather than everybody
        until(lambda: http.get("/v1/models", headers=header).status_code == 401, 3)
        assert http.get("/v1/models").status_code == 401


def test_a_cap_of_votes_is_told_429() -> None:
    store = make_store({KEY: "user", OTHER_KEY: "user"}, max_votes=2, period=60)
    with listening(make_service(store=store)) as live:
        shown = chat(live).json()["id"]
        body = {"response_id": shown, "kind": "thumb", "value": True}
        with live.http() as http:
            replay = {"Idempotency-Key": "k"}
            told = [http.post("/v1/feedback", json=body, headers=replay) for _ in range(5)]
            assert [answer.status_code for answer in told] == [200] * 5  # one vote
            assert http.post("/v1/feedback", json=body).status_code == 200
            answer = http.post("/v1/feedback", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 55 <= int(answer.headers["retry-after"]) <= 60
        assert len(live.votes(shown)) == 2


def test_what_must_not_be_stored_is_taken_out_before() -> None:
    store = make_store({KEY: "user"}, redact=lambda text: text.replace("cat", "[animal]"))
    with listening(make_service(store=store)) as live:
        answer = chat(live).json()
        shown = live.shown(answer["id"])
        assert shown.prompt == [{"role": "user", "content": "the [animal]"}]
        assert shown.completion_ids == ()


def test_a_prompt_of_tokens_is_kept_as_text(live: Live) -> None:
    with live.http() as http:
        answer = http.post("/v1/completions", json={"model": "tiny", "prompt": [3, 5], "max_tokens": 2})
    shown = live.shown(answer.json()["id"])
    assert (shown.prompt, shown.prompt_ids) == (live.service.tokenizer.decode([3, 5]), (3, 5))


def test_the_turns_of_an_episode(live: Live) -> None:
    said = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "cat"}]
    for turns in (1, 3, 5):
        chat(live, messages=(said * 3)[:turns], episode_id="talk")
        chat(live, OTHER_KEY, messages=said[:1], episode_id="talk")
    with live.http() as http:
        vote = {"episode_id": "talk", "kind": "rating", "value": 4}
        assert http.post("/v1/feedback", json=vote).status_code == 200
    (judged,) = live.store.judged(live.store.votes(users=["ann"]))
    assert [(one.turn, one.user) for one in judged.answers] == [(0, "ann"), (1, "ann"), (2, "ann")]


def test_what_is_old_expires(live: Live) -> None:
    live.store.record_shown(Shown(id="old", prompt="?", text="!", created=0.0))
    kept = chat(live).json()["id"]
    live.watch.retention_days = 30
    until(lambda: live.store.shown("old") is None, 5)
    assert live.store.shown(kept) is not None


# --- both databases ---


def test_a_duel_on_either_database_as_another_machine_sees_it(url: str, folders: dict[str, Path]) -> None:
    """Answers, votes, a canary and its promotion, by a server and a learner that share the database alone."""
    learner = Store.open(url)
    for name in ("p1", "p2"):
        learner.versions.add(name, "policy", str(folders[name]), weights_hash(folders[name]))
    learner.versions.promote("p1")
    key, _ = learner.keys.make("ann")
    with Store.open(url) as store, listening(make_service(store=store)) as live:
        learner.versions.set_canary("p2", 1.0)
        until(lambda: live.service.runner.canary, 10)
        told = chat(live, key, **PAIR).json()
        answers = [one["response_id"] for one in told["alignfast"]["answers"]]
        vote = {"response_id": answers[0], "kind": "pair", "value": {"than": answers[1], "verdict": "tie"}}
        with live.http(key) as http:
            assert http.post("/v1/feedback", json=vote).status_code == 200
        assert [(one.user, one.wins) for one in learner.duels("p2")] == [("ann", 0.5)]
        learner.versions.promote("p2")
        until(lambda: chat(live, key).json()["alignfast"]["version"] == "p2", 10)
        assert [judged.answer.id for judged in learner.judged(learner.votes())] == [answers[0]]
    learner.close()
