"""A writer in a process of its own: votes are kept as by any other, and what becomes of it in the end."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from online import test_store
from sqlalchemy import Connection

from alignfast.online.feedback import Shown, TooManyVotes, Vote
from alignfast.online.store import Kept, Store, StoreError
from alignfast.online.store.apart import Apart

pytestmark = pytest.mark.anyio


class Through(Store):
    """A store whose votes go through such a writer, of a loop in another thread."""

    loop: asyncio.AbstractEventLoop
    writer: Apart

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def add_vote(self, vote: Vote, **request: Any) -> Kept:
        kept: Kept = self.do(self.writer.write(self.voting(vote, **request)))
        return kept


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def store(url: str) -> Iterator[Through]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    with Through.open(url) as opened:
        assert isinstance(opened, Through)
        opened.loop = loop
        opened.writer = opened.do(opened.apart())
        yield opened
        opened.do(opened.writer.close())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.mark.parametrize(
    "test",
    [
        test_store.test_the_last_vote_of_each_slot_counts_and_history_is_kept,
        test_store.test_one_verdict_of_a_user_on_an_answer,
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


@asynccontextmanager
async def apart(store: Store) -> AsyncIterator[Apart]:
    writer = await store.apart()
    yield writer
    await writer.close()


def up(number: int) -> Vote:
    return Vote(response_id=f"r{number}", kind="thumb", value="up", user="ada")


def show(store: Store, number: int) -> None:
    store.record_shown(*(Shown(id=f"r{i}", prompt="2 + 2 =", text=" 4") for i in range(number)))


async def test_an_error_comes_with_all_that_it_says(url: str) -> None:
    with Store.open(url, max_votes=1, period=60) as store:
        show(store, 2)
        async with apart(store) as writer:
            await writer.write(store.voting(up(0)))
            with pytest.raises(TooManyVotes, match="'ada' has given 1 votes in 60 seconds") as told:
                await writer.write(store.voting(up(1)))
            assert 50 < told.value.retry_after <= 60


async def test_what_is_asked_at_once_is_answered_each(url: str) -> None:
    """Also what is larger than a pipe holds, and beside one that fails."""
    with Store.open(url) as store:
        show(store, 100)
        edits = [
            Vote(response_id=f"r{i}", kind="edit", value=f"{i} " * 20_000, user=f"user {i}")
            for i in range(100)
        ]
        async with apart(store) as writer:
            works = [store.voting(vote) for vote in (*edits, up(100))]
            *kept, unknown = await asyncio.gather(*map(writer.write, works), return_exceptions=True)
        assert [one.vote for one in kept] == edits
        assert "there is no response 'r100'" in str(unknown)
        assert {vote.value for vote in store.votes()} == {vote.value for vote in edits}


async def test_who_leaves_is_not_waited_for(url: str) -> None:
    with Store.open(url) as store:
        show(store, 2)
        async with apart(store) as writer:
            left = asyncio.create_task(writer.write(store.voting(up(0))))
            await asyncio.sleep(0)
            left.cancel()
            await writer.write(store.voting(up(1)))
        assert len(store.votes()) == 2


class Mute(Exception):
    """Can be pickled and not be made again."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)


def complain(connection: Connection) -> None:
    raise Mute("no ", "words")


def chatter(connection: Connection) -> str:
    print("not an answer")
    return "an answer"


def leave(connection: Connection) -> None:
    os._exit(7)


async def test_what_can_not_be_sent_says_its_words(url: str) -> None:
    with Store.open(url) as store:
        async with apart(store) as writer:
            with pytest.raises(StoreError, match="Mute: no words"):
                await writer.write(complain)
            with pytest.raises(TypeError, match="of"):
                await writer.write(partial(complain, of="a word that it does not know"))
            assert await writer.write(chatter) == "an answer"


def pid_of(writer: Apart) -> int:
    assert writer._child is not None
    return writer._child._process.pid


async def test_who_is_killed_is_followed_by_another(url: str) -> None:
    with Store.open(url) as store:
        show(store, 3)
        async with apart(store) as writer:
            await writer.write(store.voting(up(0)))
            first = pid_of(writer)
            os.kill(first, signal.SIGKILL)
            while writer._child is not None and not writer._child.ended:
                await asyncio.sleep(0.01)
            # both find it gone, and one of them starts the next
            await asyncio.gather(*(writer.write(store.voting(up(i))) for i in (1, 2)))
            assert pid_of(writer) != first
            with pytest.raises(StoreError, match=r"ended \(exit code 7\).*with the same Idempotency-Key"):
                await writer.write(leave)
            await writer.write(store.voting(up(0)))
        assert len(store.votes()) == 3


async def test_a_stop_of_the_whole_group_leaves_it_its_work(url: str) -> None:
    with Store.open(url) as store:
        show(store, 1)
        async with apart(store) as writer:
            child = pid_of(writer)
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(child, number)
            await writer.write(store.voting(up(0)))
            assert pid_of(writer) == child


async def test_it_ends_with_its_owner(url: str) -> None:
    with Store.open(url) as store:
        async with apart(store) as writer:
            child = pid_of(writer)
            assert runs(child)
        assert not runs(child)
        await writer.close()
        with pytest.raises(StoreError, match="closed"):
            await writer.write(chatter)


OPENS = """
import asyncio, sys
from alignfast.online.store import Store

async def main():
    writer = await Store.open(sys.argv[1]).apart()
    print(writer._child._process.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_it_ends_with_a_killed_server(url: str) -> None:
    with subprocess.Popen([sys.executable, "-c", OPENS, url], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        child = int(server.stdout.readline())
        assert runs(child)
        server.kill()
    end = time.monotonic() + 30
    while runs(child):
        assert time.monotonic() < end
        time.sleep(0.01)


def runs(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


async def test_a_database_that_is_gone_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"the process that writes to the database ended \(exit code 1\)"):
        await Apart.start(f"sqlite:///{tmp_path}/none.db")


def test_a_vote_can_be_sent(store: Store) -> None:
    work: Any = store.voting(up(0), key="once")
    assert pickle.loads(pickle.dumps(work)).keywords == work.keywords
