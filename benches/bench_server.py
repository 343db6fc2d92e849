"""Votes over HTTP that are on disk when they are answered, beside what SQLite commits on this machine in the same run.

32 writers send one vote each and wait for its answer, with an Idempotency-Key, each on an answer of their own;
`alignfast serve` is a process of its own, the writers are one thread of this one. Beside it, each a commit (WAL,
synchronous=FULL) of one writer, who shares no core with a server:
    SQLite, one row         one row of the vote's size, in a table without other indexes
    the store, one vote     the statements of a vote, without HTTP and without others to share the commit with
A row is the time of VOTES of them; `extra_info["rate"]` is a second's, `share` that of SQLite's one row.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import sizes

from alignfast.online.feedback import Shown, Vote
from alignfast.online.store import Store

# its clients are those of the tests, which no wheel has
pytest.importorskip("online.server", reason="needs a checkout with its tests")
from online.server.crowd import request
from online.server.process import Server, save_model

WRITERS, EACH, ROUNDS = sizes((32, 60, 5), (4, 3, 1))
VOTES = WRITERS * EACH
numbers = itertools.count()
rates: dict[str, float] = {}


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


async def vote_on(server: Server, keys: list[str], shown: list[list[Shown]]) -> None:
    host, _, port = server.url.removeprefix("http://").partition(":")

    async def write(key: str, own: list[Shown]) -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        for one in own:
            body = {"response_id": one.id, "kind": "thumb", "value": True}
            writer.write(request("/v1/feedback", body, key, **{"Idempotency-Key": one.id}))
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            assert b" 200 " in head.split(b"\r\n")[0], head
            length = next(line for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
            told = json.loads(await reader.readexactly(int(length.split(b":")[1])))
            assert told["object"] == "feedback"
        writer.close()

    await asyncio.gather(*(write(key, own) for key, own in zip(keys, shown)))


def told(benchmark: Any, provider: str) -> None:
    rates[provider] = VOTES / benchmark.stats.stats.median
    benchmark.extra_info.update(provider=provider, shape=f"{VOTES} votes", rate=rates[provider])
    if "SQLite, one row" in rates:
        benchmark.extra_info["share"] = rates[provider] / rates["SQLite, one row"]
    print(f"\n{provider}: {rates[provider]:.0f} a second")


def bench_sqlite(benchmark: Any, tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "plain.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("CREATE TABLE votes (seq INTEGER PRIMARY KEY, created REAL, body TEXT)")
    body = json.dumps(Vote(response_id="r1", kind="thumb", value=True, user="user 1").body)

    def commit() -> None:
        for _ in range(VOTES):
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT INTO votes (created, body) VALUES (?, ?)", (time.time(), body))
            connection.execute("COMMIT")

    benchmark.pedantic(commit, rounds=ROUNDS, warmup_rounds=1)
    told(benchmark, "SQLite, one row")


def bench_store(benchmark: Any, tmp_path: Path) -> None:
    with Store.open(f"sqlite:///{tmp_path}/feedback.db") as store:

        def fresh() -> tuple[tuple[Any, ...], dict[str, Any]]:
            return (answers(store),), {}

        def write(shown: list[list[Shown]]) -> None:
            for one in (one for some in shown for one in some):
                store.add_vote(
                    Vote(response_id=one.id, kind="thumb", value=True, user=str(one.user)),
                    key=one.id,
                    own=True,
                )

        benchmark.pedantic(write, setup=fresh, rounds=ROUNDS, warmup_rounds=1)
    told(benchmark, "the store, one vote")


def bench_server(benchmark: Any, server: tuple[Server, str]) -> None:
    process, db = server
    with Store.open(db) as store:

        def fresh() -> tuple[tuple[Any, ...], dict[str, Any]]:
            shown = answers(store)
            keys = [store.keys.make(str(own[0].user))[0] for own in shown]
            return (process, keys, shown), {}

        def write(*asked: Any) -> None:
            asyncio.run(vote_on(*asked))

        before = store.unused()
        benchmark.pedantic(write, setup=fresh, rounds=ROUNDS, warmup_rounds=1)
        assert store.unused() - before == VOTES * (ROUNDS + 1)
    told(benchmark, f"alignfast serve, {WRITERS} writers")
