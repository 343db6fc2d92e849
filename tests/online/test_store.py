"""The store on both databases: what counts, what is kept, what is claimed once, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from alignfast.online.feedback import IdempotencyConflict, Shown, TooManyVotes, UnknownResponse, Vote
from alignfast.online.store import Store, StoreError, Version
from alignfast.online.store.lock import LearnerAtWork, one_learner
from alignfast.online.store.tables import metadata
from alignfast.online.store.uses import Forgotten, Learned

CHAT = [{"role": "user", "content": "2 + 2?"}]


def answer(id: str, **fields: Any) -> Shown:
    return Shown(**{"id": id, "prompt": "2 + 2 =", "text": f" {id}", "created": 1.0, **fields})


def thumb(response_id: str, value: str = "up", user: str = "ada", **fields: Any) -> Vote:
    return Vote(response_id=response_id, kind="thumb", value=value, user=user, **fields)


def side_by_side(store: Store, *ids: str, group: str = "g", **fields: Any) -> None:
    store.record_shown(*(answer(id, group_id=group, **fields) for id in ids))


# What was shown


def test_what_was_shown_comes_back_exactly(store: Store) -> None:
    shown = Shown(
        id="r1",
        prompt=[{"role": "system", "content": ""}, *CHAT],
        text="vier \u2028 北京 🙂",
        created=1234.56789,
        episode_id="e1",
        turn=3,
        group_id="g1",
        user="ada",
        prompt_ids=(0, 2**31 - 1),
        completion_ids=(7, 8, 9),
        logps=(-0.1, -1 / 3, -1e-300),
        sampled_logps=(0.0, -0.25, -2.5),
        finish_reason="stop",
        sampling={"temperature": 0.7, "stop": ["\n"]},
        policy_version="policy-1",
        weights_hash="abc",
    )
    store.record_shown(shown)
    assert store.shown("r1") == shown
    assert store.shown("r2") is None
    assert store.shown("\0") is None
    assert store.episode("e1") == store.group("g1") == [shown]


def test_answers_are_kept_all_or_none(store: Store) -> None:
    store.record_shown(answer("r1"))
    with pytest.raises(ValueError, match="stored already"):
        store.record_shown(answer("r2"), answer("r1", text=" 5"))
    assert store.shown("r2") is None
    assert store.shown("r1") == answer("r1")


def test_what_databases_refuse_is_replaced(store: Store) -> None:
    store.record_shown(answer("r1", text="a\0\ud800", prompt=[{"role": "user", "content": "\0"}]))
    shown = store.shown("r1")
    assert shown is not None
    assert (shown.text, shown.prompt) == ("a\ufffd\ufffd", [{"role": "user", "content": "\ufffd"}])


def test_turns_come_in_order(store: Store) -> None:
    store.record_shown(*(answer(f"r{turn}", episode_id="e", turn=turn) for turn in (2, 0, 10, 1)))
    assert [shown.turn for shown in store.episode("e")] == [0, 1, 2, 10]


# What counts


def test_the_last_vote_of_each_slot_counts_and_history_is_kept(store: Store) -> None:
    """150 random votes of 3 users on 4 answers, against a dictionary."""
    side_by_side(store, "a", "b", group="g1")
    side_by_side(store, "c", "d", group="g2")
    draw = random.Random(1)
    last: dict[tuple[str, str, str], Vote] = {}
    given = []
    for _ in range(150):
        kind = draw.choice(["thumb", "rating", "pair", "edit", "implicit"])
        id = draw.choice("abcd")
        group = "ab" if id in "ab" else "cd"
        value: Any = {
            "thumb": draw.choice(["up", "down"]),
            "rating": draw.randint(1, 5),
            "pair": draw.choice([*group, "tie"]),
            "edit": f"better {draw.random()}",
            "implicit": draw.choice(["copy", "stop"]),
        }[kind]
        vote = Vote(response_id=id, kind=kind, value=value, user=draw.choice(["ada", "bob", "eve"]))
        kept = store.add_vote(vote)
        key = (vote.user, vote.slot, group if kind == "pair" else id)
        assert kept.replaces == (last[key].id if key in last else None)
        assert dataclasses.replace(kept.vote, among=()) == vote
        last[key] = kept.vote
        given.append(kept.vote)
    assert store.votes(current=False) == given
    current = store.votes()
    assert sorted(current, key=lambda vote: vote.id) == sorted(last.values(), key=lambda vote: vote.id)


def test_one_verdict_of_a_user_on_an_answer(store: Store) -> None:
    store.record_shown(answer("r1", episode_id="e1"), answer("r2", episode_id="e1"))
    store.add_vote(thumb("r1"))
    store.add_vote(Vote(response_id="r1", kind="rating", value=2, user="ada"))
    store.add_vote(Vote(episode_id="e1", kind="thumb", value="up", user="ada"))
    store.add_vote(thumb("r2"))
    store.add_vote(thumb("r1", user="bob"))
    assert [(vote.kind, vote.value, vote.user) for vote in store.votes()] == [
        ("rating", 2, "ada"),
        ("thumb", "up", "ada"),
        ("thumb", "up", "ada"),
        ("thumb", "up", "bob"),
    ]


def test_votes_are_found_by_kind_time_and_user(store: Store) -> None:
    store.record_shown(answer("r1"))
    for number, user in enumerate(["ada", "bob", "cleo"]):
        store.add_vote(thumb("r1", user=user, created=float(number)))
    store.add_vote(Vote(response_id="r1", kind="edit", value="4", user="ada", created=3.0))

    def users(**conditions: Any) -> list[str]:
        return [vote.user for vote in store.votes(**conditions)]

    assert users(kinds=["thumb"]) == ["ada", "bob", "cleo"]
    assert users(since=1.0, until=3.0) == ["bob", "cleo"]
    assert users(users=["ada"]) == ["ada", "ada"]
    assert users(kinds=["edit"], users=["bob"]) == []


def test_votes_come_with_what_they_are_about(store: Store) -> None:
    side_by_side(store, "a", "b", "c", episode_id="e1", prompt=CHAT)
    store.record_shown(answer("d", episode_id="e1", turn=1))
    votes = [
        store.add_vote(Vote(response_id="b", kind="ranking", value=["c", ["a", "b"]], user="ada")).vote,
        store.add_vote(thumb("d")).vote,
        store.add_vote(Vote(episode_id="e1", kind="rating", value=5, user="ada")).vote,
    ]
    ranking, single, conversation = store.judged(votes)
    assert [shown.id for shown in ranking.answers] == ["a", "b", "c"]
    assert ranking.vote.among == ("a", "b", "c")
    assert ranking.answer.id == "b"
    assert [shown.id for shown in single.answers] == ["d"]
    assert [shown.id for shown in conversation.answers] == ["a", "b", "c", "d"]


# What may be voted on


def test_what_is_not_there_can_not_be_voted_on(store: Store) -> None:
    store.record_shown(answer("r1"))
    for vote in (
        thumb("r2"),
        Vote(episode_id="e1", kind="thumb", value="up"),
        Vote(response_id="r1", kind="pair", value="r2", among=("r1", "r2")),
    ):
        with pytest.raises(UnknownResponse):
            store.add_vote(vote)
    assert store.votes(current=False) == []


def test_answers_are_compared_that_were_shown_side_by_side(store: Store) -> None:
    store.record_shown(answer("alone"), answer("other", prompt="3 + 3 ="))
    side_by_side(store, "a", "b", group="two")
    side_by_side(store, "c", "d", "e", group="three")
    for response_id, kind, value, said in (
        ("alone", "pair", "tie", "was shown alone"),
        ("a", "pair", "c", "c is not among what was compared; this pair is of a, b"),
        ("c", "pair", "d", "a pair is of two answers, and these are 3"),
        ("c", "ranking", ["c", "a"], "a is not among"),
    ):
        with pytest.raises(ValueError, match=said):
            store.add_vote(Vote(response_id=response_id, kind=kind, value=value))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="of answers to one prompt; these answer 2"):
        store.add_vote(Vote(response_id="alone", kind="pair", value="tie", among=("alone", "other")))
    with pytest.raises(ValueError, match="b is not among"):
        store.add_vote(Vote(response_id="b", kind="pair", value="tie", among=("alone", "a")))
    assert store.votes() == []
    kept = store.add_vote(Vote(response_id="alone", kind="pair", value="a", among=("a", "alone")))
    assert store.judged([kept.vote])[0].answers == (answer("a", group_id="two"), answer("alone"))


def test_own_answers_alone_unless_their_token_came(store: Store) -> None:
    side_by_side(store, "a", "b", user="ada", episode_id="e1")
    store.record_shown(answer("c", user="eve", episode_id="e2"))
    store.add_vote(thumb("a", user="ada"), own=True)
    store.add_vote(Vote(episode_id="e1", kind="thumb", value="up", user="ada"), own=True)
    store.add_vote(thumb("a", user="anonymous:1"), own=True, token_of="a")
    store.add_vote(thumb("a", user="annotator"))
    for vote in (
        thumb("a", user="eve"),
        Vote(episode_id="e1", kind="thumb", value="down", user="eve"),
        Vote(response_id="a", kind="pair", value="a", user="eve"),
        Vote(response_id="c", kind="pair", value="c", among=("a", "c"), user="eve"),
    ):
        with pytest.raises(UnknownResponse):
            store.add_vote(vote, own=True)
    with pytest.raises(UnknownResponse):
        store.add_vote(thumb("a", user="eve"), own=True, token_of="b")


# The same request again


def test_an_idempotency_key_counts_once(store: Store) -> None:
    store.record_shown(answer("r1"), answer("r2"))
    first = store.add_vote(thumb("r1"), key="k1")
    store.add_vote(thumb("r1", "down"))
    again = store.add_vote(thumb("r1"), key="k1")
    assert again == (first.vote, True, None)
    assert [vote.value for vote in store.votes()] == ["down"]  # a replay changes nothing
    with pytest.raises(IdempotencyConflict, match="'k1' came before with another vote"):
        store.add_vote(thumb("r2"), key="k1")
    with pytest.raises(IdempotencyConflict):
        store.add_vote(thumb("r1", comment="!"), key="k1")
    assert not store.add_vote(thumb("r1", user="bob"), key="k1").replayed  # keys are each caller's own
    assert not store.add_vote(thumb("r1"), key="k1", caller="another key of ada").replayed
    with pytest.raises(ValueError, match="Idempotency-Key must be"):
        store.add_vote(thumb("r1"), key="")


def test_the_same_requests_at_once_count_once(store: Store) -> None:
    store.record_shown(answer("r1"))
    found: list[Any] = []
    barrier = threading.Barrier(16)

    def send() -> None:
        barrier.wait()
        found.append(store.add_vote(thumb("r1"), key="k1"))

    threads = [threading.Thread(target=send) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({kept.vote for kept in found}) == 1
    assert sum(not kept.replayed for kept in found) == 1
    assert len(store.votes(current=False)) == 1


def test_one_that_fails_takes_none_of_its_batch_along(store: Store) -> None:
    store.record_shown(*(answer(f"r{i}") for i in range(20)))
    outcomes: dict[str, str] = {}
    barrier = threading.Barrier(20)

    def send(i: int) -> None:
        barrier.wait()
        try:
            store.add_vote(thumb(f"r{i}" if i % 2 else "nowhere"), key=f"k{i}")
            outcomes[f"r{i}"] = "kept"
        except UnknownResponse:
            outcomes[f"r{i}"] = "refused"

    threads = [threading.Thread(target=send, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {f"r{i}": "kept" if i % 2 else "refused" for i in range(20)}
    assert {vote.response_id for vote in store.votes()} == {f"r{i}" for i in range(1, 20, 2)}


def test_nothing_is_acknowledged_before_its_commit(store: Store) -> None:
    store.record_shown(answer("r1"))

    def broken(connection: Any) -> None:
        raise OSError("the disk is full")

    sqlalchemy.event.listen(store.engine, "commit", broken)
    with pytest.raises(OSError, match="the disk is full"):
        store.add_vote(thumb("r1"), key="k1")
    sqlalchemy.event.remove(store.engine, "commit", broken)
    assert store.votes(current=False) == []
    assert not store.add_vote(thumb("r1"), key="k1").replayed


def test_a_limit_a_user_and_period(url: str) -> None:
    with Store.open(url, max_votes=3, period=60) as store:
        store.record_shown(answer("r1"))
        for created in (0.0, 10.0, 20.0):
            store.add_vote(thumb("r1", created=created))
        with pytest.raises(TooManyVotes, match="'ada' has given 3 votes in 60 seconds") as error:
            store.add_vote(thumb("r1", created=45.0))
        assert error.value.retry_after == 15.0
        store.add_vote(thumb("r1", user="bob", created=45.0))
        store.add_vote(thumb("r1", created=61.0))
        assert len(store.votes(users=["ada"], current=False)) == 4
    with pytest.raises(ValueError, match="max_votes >= 1"):
        Store.open(url, max_votes=0)


# What has used it


def test_each_vote_is_used_once_a_version(store: Store) -> None:
    store.record_shown(*(answer(f"r{i}") for i in range(6)))
    votes = [store.add_vote(thumb(f"r{i}")).vote for i in range(4)]
    store.versions.add("rm-1", "reward", "/rm-1", "h1")
    assert store.unused() == 4
    assert store.use_for("rm-1", limit=3) == votes[:3]
    assert store.use_for("rm-1") == votes[3:]
    assert store.use_for("rm-1") == []
    assert store.used_by("rm-1") == votes

    changed = store.add_vote(thumb("r0", "down")).vote
    late = store.add_vote(Vote(response_id="r5", kind="edit", value="4", user="ada")).vote
    store.versions.add("rm-2", "reward", "/rm-2", "h2", parents=["rm-1"])
    store.versions.add("other", "reward", "/other", "h3")
    assert store.unused("rm-2") == store.unused("rm-1") == 2
    assert store.unused("rm-2", kinds=["edit"]) == 1
    assert store.use_for("rm-2", kinds=["thumb"]) == [changed]
    # replay: current votes that the line has used, by name, each once; the replaced one is not among them
    asked = [vote.id for vote in (votes[2], votes[0], votes[1])]
    assert store.use_for("rm-2", ids=asked) == []
    many = [*asked, *(f"gone-{i}" for i in range(3000)), *asked]  # more than one statement asks for
    assert store.use_for("rm-2", ids=many, fresh=False) == [votes[1], votes[2]]
    assert store.use_for("rm-2", ids=asked, fresh=False) == []
    assert store.use_for("other") == [*votes[1:], changed, late]
    with pytest.raises(ValueError, match="there is no version 'rm-3'"):
        store.use_for("rm-3")


def test_a_version_is_kept_with_what_it_has_learned_from_or_not_at_all(store: Store) -> None:
    store.record_shown(*(answer(f"r{i}") for i in range(3)))
    votes = [store.add_vote(thumb(f"r{i}", user=f"user-{i}")).vote for i in range(3)]
    ids = [vote.id for vote in votes]

    def made(name: str) -> Version:
        return Version(name, "policy", f"/{name}", "0", (), 1.0, "candidate", figures={"kl": 0.1})

    learned = Learned(votes=ids[:2], responses=["r0"], seen=[*ids, "gone"])
    store.publish(made("p1"), learned)
    assert store.versions.get("p1").figures == {"kl": 0.1}
    assert store.used_by("p1") == votes
    with pytest.raises(ValueError, match="there is a version 'p1' already"):
        store.publish(made("p1"), learned)
    assert store.delete_user("user-0").versions == ("p1",)
    with pytest.raises(Forgotten, match="1 of the feedback that p2 has learned from are deleted"):
        store.publish(made("p2"), learned)
    with pytest.raises(Forgotten, match="1 of the responses that p2"):
        store.publish(made("p2"), Learned(responses=["r1", "gone"]))
    assert [version.name for version in store.versions.all()] == ["p1"]
    store.publish(made("p2"), Learned(votes=ids[1:2], seen=ids))
    assert store.used_by("p2") == votes[1:]


_LEARN = """
import sys
from alignfast.online.store import Store
from alignfast.online.store.lock import one_learner
with Store.open(sys.argv[1]) as store, one_learner(store.engine):
    print("ready", flush=True)
    sys.stdin.readline()
"""


def test_one_learner_a_database(store: Store, url: str) -> None:
    """Until its process is gone, in whichever way."""
    command = [sys.executable, "-c", _LEARN, url]
    for ends in ("killed", "done"):
        other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        with (
            pytest.raises(LearnerAtWork, match="another learner is at work on this database"),
            one_learner(store.engine),
        ):
            pass
        if ends == "killed":
            other.kill()
        other.communicate("\n")
        until = time.monotonic() + 10
        while True:  # the server notices a dead client when it likes
            try:
                with one_learner(store.engine):
                    break
            except LearnerAtWork:
                assert time.monotonic() < until
                time.sleep(0.05)


_CLAIM = """
import json, sys
from alignfast.online.store import Store
with Store.open(sys.argv[1]) as store:
    print("ready", flush=True)
    sys.stdin.readline()
    mine = []
    while votes := store.use_for("rm-1", limit=3):
        mine += [vote.id for vote in votes]
    print(json.dumps(mine))
"""


def test_two_processes_never_get_the_same_vote(url: str) -> None:
    with Store.open(url) as store:
        shown = [answer(f"r{i}") for i in range(60)]
        store.add_all(shown, votes := [thumb(one.id) for one in shown])
        store.versions.add("rm-1", "reward", "/rm-1", "h1")
    words = [sys.executable, "-c", _CLAIM, url]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(words, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    claimed = [json.loads(process.communicate()[0]) for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert sorted(claimed[0] + claimed[1]) == sorted(vote.id for vote in votes)
    with Store.open(url) as store:
        assert store.used_by("rm-1") == votes


# Versions and runs


def test_promotion_and_rolling_back(store: Store) -> None:
    assert store.versions.serving() is None
    for name in ("p1", "p2", "p3"):
        store.versions.add(name, "policy", f"/{name}", name)
    store.versions.add("rm-1", "reward", "/rm-1", "h")
    store.versions.promote("p1")
    with pytest.raises(ValueError, match="no policy served before p1"):
        store.versions.roll_back()
    store.versions.promote("rm-1")
    store.versions.promote("p2")
    store.versions.promote("p3")
    assert store.versions.roll_back(reasons=["satisfaction fell"]).name == "p2"
    assert store.versions.roll_back().name == "p1"
    assert store.versions.serving().name == "p1"  # type: ignore[union-attr]
    store.versions.promote("p3")
    assert store.versions.serving().name == "p3"  # type: ignore[union-attr]
    assert store.versions.roll_back().name == "p1"
    assert store.versions.serving("reward").name == "rm-1"  # type: ignore[union-attr]
    assert [(v.name, v.status, v.reasons) for v in store.versions.all("policy")] == [
        ("p1", "promoted", ()),
        ("p2", "rolled_back", ()),
        ("p3", "rolled_back", ()),
    ]


def test_versions_never_change(store: Store) -> None:
    made = store.versions.add("p1", "policy", "/p1", "h1")
    with pytest.raises(ValueError, match="there is a version 'p1' already"):
        store.versions.add("p1", "policy", "/other", "h2")
    assert store.versions.get("p1") == made
    store.versions.set_status("p1", "refused", ["longer by half"])
    assert store.versions.get("p1").reasons == ("longer by half",)
    for call in (
        lambda: store.versions.add("p2", "policy", "/p2", "h", parents=["p0"]),
        lambda: store.versions.promote("p0"),
        lambda: store.versions.set_status("p0", "refused"),
        lambda: store.versions.set_status("p1", "good"),  # type: ignore[arg-type]
        lambda: store.versions.add("p2", "judge", "/p2", "h"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError):
            call()
    assert [version.name for version in store.versions.all()] == ["p1"]


def test_a_run_goes_on_where_it_was(url: str) -> None:
    with Store.open(url) as store:
        done, run = store.runs.start("collect"), store.runs.start("collect", {"seed": 1})
        store.runs.end(done.id)
        store.runs.to_stage(run.id, "policy", {"version": "rm-2"})
        with pytest.raises(ValueError, match="under way"):
            store.runs.to_stage(done.id, "policy", {})
    with Store.open(url) as store:
        (left,) = store.runs.unfinished()
        assert (left.id, left.stage, left.state) == (run.id, "policy", {"version": "rm-2"})
        store.runs.end(left.id, "failed")
        assert [one.status for one in store.runs.all()] == ["done", "failed"]


# The database


def test_migrations_make_the_tables_of_today(store: Store) -> None:
    with store.read() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": "schema_version"})
        assert compare_metadata(context, metadata) == []


def test_opening_again_keeps_everything(url: str) -> None:
    with Store.open(url) as store:
        store.record_shown(answer("r1"))
        vote = store.add_vote(thumb("r1")).vote
        secret = store.secret("cookies")
    with Store.open(url, create=False) as store:
        assert store.votes() == [vote]
        assert store.secret("cookies") == secret
        assert store.secret("tokens") != secret
        assert len(secret) == 32


def test_a_later_schema_is_refused(url: str) -> None:
    with Store.open(url) as store:
        store.write(lambda c: c.execute(sqlalchemy.text("UPDATE schema_version SET version_num = '9999'")))
    with pytest.raises(StoreError, match="schema 9999 of a later alignfast"):
        Store.open(url)


def test_several_open_an_empty_database_at_once(url: str) -> None:
    stores: list[Store] = []
    threads = [threading.Thread(target=lambda: stores.append(Store.open(url))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores) == 4
    for store in stores:
        store.close()


def test_sqlite_is_set_to_lose_nothing(tmp_path: Any) -> None:
    with Store.open(f"sqlite:///{tmp_path}/feedback.db") as store, store.read() as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout", "secure_delete")
        }
    full = 2
    assert found == {
        "journal_mode": "wal",
        "synchronous": full,
        "foreign_keys": 1,
        "busy_timeout": 30_000,
        "secure_delete": 1,
    }


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("feedback.db", "expected an address such as"),
        ("sqlite://", "in memory alone"),
        ("sqlite:////no/where/feedback.db", "there is no folder for"),
        ("mysql://localhost/x", "mysql is not supported"),
        ("postgresql://nobody@localhost:1/x", "can't be opened"),
    ],
)
def test_addresses_that_will_not_do(url: str, said: str) -> None:
    with pytest.raises(StoreError, match=said):
        Store.open(url)


def test_a_password_is_in_no_message() -> None:
    with pytest.raises(StoreError) as error:
        Store.open("postgresql://ada:geheim@localhost:1/x")
    assert "geheim" not in str(error.value)


def test_a_closed_store_says_so(store: Store) -> None:
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.record_shown(answer("r1"))
