"""Votes over HTTP that are on disk when they are answered, beside what SQLite commits on this machine in the same run.

32 writers send one vote each and wait for its answer, with an Idempotency-Key, each on an answer of their own;
`alignfast serve` is a process of its own (and so is its writer), the writers are one thread of this one, whose requests
are made before the time runs. Beside it, each a commit (WAL, synchronous=FULL) of one writer, who shares no core with a
server:
    SQLite, one row         one row of the vote's size, in a table without other indexes
    the store, one vote     the statements of a vote, without HTTP and without others to share the commit with
A row is the time of VOTES of them; `extra_info["rate"]` is a second's, `share` the median over the rounds of a round's
rate against that of SQLite's one row right before it: a machine's rates move within a minute.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from harness import sizes

from alignfast.online.feedback import Shown, Vote
from alignfast.online.store import Store

# its clients are those of the tests, which no wheel has
pytest.importorskip("online.server", reason="needs a checkout with its tests")
from online.server.crowd import request
from online.server.process import Server, save_model

WRITERS, EACH, ROUNDS = sizes((32, 60, 9), (4, 3, 1))
VOTES = WRITERS * EACH
numbers = itertools.count()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    folder = tmp_path_factory.mktemp("server")
    db = f"sqlite:///{folder}/feedback.db"
    Store.open(db).close()
    with Store.open(db) as store:
        store.keys.make("operator", "admin")  # so that the server never answers without a key
    found = Server(save_model(folder / "tiny"), db, folder / "log")
    yield found, db
    found.kill()


def answers(store: Store) -> list[list[Shown]]:
    """Of writers who have not voted before."""
    shown = [
        [Shown(id=f"r{next(numbers)}", prompt="2 + 2 =", text=" 4", user=user) for _ in range(EACH)]
        for user in (f"user {next(numbers)}" for _ in range(WRITERS))
    ]
    store.record_shown(*(one for some in shown for one in some))
    return shown


def requests(keys: list[str], shown: list[list[Shown]]) -> list[list[bytes]]:
    """Those of each writer."""
    return [
        [
            request(
                "/v1/feedback",
                {"response_id": one.id, "kind": "thumb", "value": True},
                key,
                **{"Idempotency-Key": one.id},
            )
            for one in own
        ]
        for key, own in zip(keys, shown)
    ]


async def vote_on(server: Server, asked: list[list[bytes]]) -> None:
    host, _, port = server.url.removeprefix("http://").partition(":")

    async def write(own: list[bytes]) -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        for one in own:
            writer.write(one)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 "), head
            _, _, rest = head.lower().partition(b"content-length:")
            told = await reader.readexactly(int(rest.split(b"\r", 1)[0]))
            assert told.startswith(b'{"object":"feedback"'), told
        writer.close()

    await asyncio.gather(*(write(own) for own in asked))


class Plain:
    """SQLite's own commits of one row of a vote's size.

    Args:
        folder: for its file.
    """

    def __init__(self, folder: Path) -> None:
        self.connection = sqlite3.connect(folder / "plain.db", isolation_level=None)
        self.connection.execute("PRAGMA journal_mode=WAL")
        self.connection.execute("PRAGMA synchronous=FULL")
        self.connection.execute("CREATE TABLE votes (seq INTEGER PRIMARY KEY, created REAL, body TEXT)")
        self.body = json.dumps(Vote(response_id="r1", kind="thumb", value=True, user="user 1").body)

    def commit(self) -> None:
        """VOTES of them."""
        for _ in range(VOTES):
            self.connection.execute("BEGIN IMMEDIATE")
            self.connection.execute(
                "INSERT INTO votes (created, body) VALUES (?, ?)", (time.time(), self.body)
            )
            self.connection.execute("COMMIT")

    def seconds(self) -> float:
        """What that takes now."""
        began = time.perf_counter()
        self.commit()
        return time.perf_counter() - began


def told(benchmark: Any, provider: str, beside: list[float] | None = None) -> None:
    """Args: `beside` has the seconds of SQLite's one row before each round."""
    seconds = benchmark.stats.stats.data
    benchmark.extra_info.update(provider=provider, shape=f"{VOTES} votes", rate=VOTES / median(seconds))
    if beside is not None:
        benchmark.extra_info["share"] = median(
            plain / own for plain, own in zip(beside[-len(seconds) :], seconds)
        )
    print(f"\n{provider}: {benchmark.extra_info}")


def bench_sqlite(benchmark: Any, tmp_path: Path) -> None:
    benchmark.pedantic(Plain(tmp_path).commit, rounds=ROUNDS, warmup_rounds=1)
    told(benchmark, "SQLite, one row")


def bench_store(benchmark: Any, tmp_path: Path) -> None:
    plain, beside = Plain(tmp_path), []
    with Store.open(f"sqlite:///{tmp_path}/feedback.db") as store:

        def fresh() -> tuple[tuple[Any, ...], dict[str, Any]]:
            shown = answers(store)
            beside.append(plain.seconds())
            return (shown,), {}

        def write(shown: list[list[Shown]]) -> None:
            for one in (one for some in shown for one in some):
                store.add_vote(
                    Vote(response_id=one.id, kind="thumb", value=True, user=str(one.user)),
                    key=one.id,
                    own=True,
                )

        benchmark.pedantic(write, setup=fresh, rounds=ROUNDS, warmup_rounds=1)
    told(benchmark, "the store, one vote", beside)


def bench_server(benchmark: Any, tmp_path: Path, server: tuple[Server, str]) -> None:
    process, db = server
    plain, beside = Plain(tmp_path), []
    with Store.open(db) as store:

        def fresh() -> tuple[tuple[Any, ...], dict[str, Any]]:
            shown = answers(store)
            asked = requests([store.keys.make(str(own[0].user))[0] for own in shown], shown)
            beside.append(plain.seconds())
            return (process, asked), {}

        def write(*asked: Any) -> None:
            asyncio.run(vote_on(*asked))

        before = store.unused()
        benchmark.pedantic(write, setup=fresh, rounds=ROUNDS, warmup_rounds=1)
        assert store.unused() - before == VOTES * (ROUNDS + 1)
    told(benchmark, f"alignfast serve, {WRITERS} writers", beside)
