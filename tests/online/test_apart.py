"""A store whose votes are written by a process of its own: the same as any other, and what becomes of it in the end."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from online import test_store
from sqlalchemy import Connection

from alignfast.online.feedback import Shown, TooManyVotes, Vote
from alignfast.online.store import Store, StoreError
from alignfast.online.store.apart import Apart


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with Store.open(url, apart=True, max_votes=1000) as opened:
        opened.record_shown(*(Shown(id=f"own {i}", prompt="2 + 2 =", text=" 4") for i in range(4)))
        yield opened


def child_of(store: Store) -> subprocess.Popen[bytes]:
    assert store._apart is not None
    return store._apart._child


def up(number: int) -> Vote:
    return Vote(response_id=f"own {number}", kind="thumb", value="up", user="ada")


@pytest.mark.parametrize(
    "test",
    [
        test_store.test_the_last_vote_of_each_slot_counts_and_history_is_kept,
        test_store.test_what_is_not_there_can_not_be_voted_on,
        test_store.test_answers_are_compared_that_were_shown_side_by_side,
        test_store.test_own_answers_alone_unless_their_token_came,
        test_store.test_an_idempotency_key_counts_once,
        test_store.test_the_same_requests_at_once_count_once,
    ],
    ids=lambda test: test.__name__.removeprefix("test_"),
)
def test_as_in_one_process(store: Store, test: Callable[[Store], None]) -> None:
    test(store)


def test_an_error_comes_with_all_that_it_says(url: str) -> None:
    with Store.open(url, apart=True, max_votes=1, period=60) as store:
        store.record_shown(*(Shown(id=f"own {i}", prompt="2 + 2 =", text=" 4") for i in range(2)))
        store.add_vote(up(0))
        with pytest.raises(TooManyVotes, match="'ada' has given 1 votes in 60 seconds") as told:
            store.add_vote(up(1))
        assert 50 < told.value.retry_after <= 60


class Mute(Exception):
    """Can be pickled and not be made again."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)


def complain(connection: Connection) -> None:
    raise Mute("no ", "words")


def leave(connection: Connection) -> None:
    os._exit(7)


def test_an_error_that_can_not_be_sent_says_its_words(url: str) -> None:
    Store.open(url).close()
    apart = Apart(url)
    try:
        (outcome,) = apart.commit([complain])
        assert (type(outcome.error), str(outcome.error)) == (StoreError, "Mute: no words")
        (outcome,) = apart.commit([partial(complain, of="a word that it does not know")])
        assert isinstance(outcome.error, TypeError)
    finally:
        apart.close()


def test_who_is_killed_is_followed_by_another(store: Store) -> None:
    first = child_of(store)
    assert store.add_vote(up(0)).vote.user == "ada"
    first.kill()
    first.wait()
    store.add_vote(up(1))
    assert child_of(store) is not first
    with pytest.raises(
        StoreError, match=r"ended \(exit code 7\).*send it again, with the same Idempotency-Key"
    ):
        store._vote_writer.write(leave)
    store.add_vote(up(2))
    assert len(store.votes()) == 3


def test_a_stop_of_the_whole_group_leaves_it_its_work(store: Store) -> None:
    child = child_of(store)
    for number in (signal.SIGINT, signal.SIGTERM):
        child.send_signal(number)
    store.add_vote(up(0))
    assert child_of(store) is child
    assert child.poll() is None


def test_it_ends_with_the_store(url: str) -> None:
    with Store.open(url, apart=True) as store:
        child = child_of(store)
    assert child.returncode == 0
    with pytest.raises(StoreError, match="the store is closed"):
        store.add_vote(up(0))


OPENS = """
import sys, time
from alignfast.online.store import Store
store = Store.open(sys.argv[1], apart=True)
print(store._apart._child.pid, flush=True)
time.sleep(60)
"""


def test_it_ends_with_a_killed_server(url: str) -> None:
    with subprocess.Popen([sys.executable, "-c", OPENS, url], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        child = int(server.stdout.readline())
        assert _runs(child)
        server.kill()
    end = time.monotonic() + 30
    while _runs(child):
        assert time.monotonic() < end
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_database_that_is_gone_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"the process that writes to the database ended \(exit code 1\)"):
        Apart(f"sqlite:///{tmp_path}/none.db")


def test_nothing_in_its_way_is_a_closure(store: Store) -> None:
    work: Any = store.voting(up(0), key="once")
    assert pickle.loads(pickle.dumps(work)).keywords == work.keywords
