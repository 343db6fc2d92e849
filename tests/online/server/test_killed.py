"""The server killed with -9 while people vote: what it acknowledged is there, once, whatever was sent again.

Each writer asks for an answer, votes on it with an Idempotency-Key, and sends now and then the same vote again, as a
client does that did not hear the answer; what a kill cut off it sends again to the next server. Each server's process
that writes votes is killed once before, which the server must outlive.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from online.server.process import Server, save_model
from sqlalchemy import func, select

from alignfast.online.store import Store
from alignfast.online.store.tables import feedback

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 2}


class Writer(threading.Thread):
    """One user, who goes on until told to stop.

    Attributes:
        url: of the server; None while there is none.
        answered: ids of answers that were given.
        acknowledged: id of the vote on each response.
    """

    def __init__(self, key: str, seed: int) -> None:
        super().__init__(daemon=True)
        self.key, self.draw = key, random.Random(seed)
        self.url: str | None = None
        self.over = False
        self.answered: list[str] = []
        self.acknowledged: dict[str, str] = {}
        self.replays = 0
        self.fault = ""
        self.client = httpx.Client(timeout=10)

    def run(self) -> None:
        try:
            while not self.over:
                answer = self._post("chat/completions", CHAT)
                if answer is None:
                    return
                self.answered.append(answer["id"])
                for _ in range(1 + (self.draw.random() < 0.5)):
                    self._vote(answer["id"])
                if len(self.answered) > 1:
                    self._vote(self.draw.choice(self.answered[:-1]))  # perhaps of a server that is dead
        except AssertionError as error:
            self.fault = str(error)

    def _vote(self, response_id: str) -> None:
        body = {"response_id": response_id, "kind": "thumb", "value": len(response_id) % 2 == 0}
        told = self._post("feedback", body, {"Idempotency-Key": response_id})
        if told is None:
            return
        self.replays += response_id in self.acknowledged
        before = self.acknowledged.setdefault(response_id, told["id"])
        assert before == told["id"], f"the vote on {response_id} was {before}, then {told['id']}"

    def _post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Any:
        """What a server answers, this one or a later one; None if the test is over first."""
        while not self.over:
            url = self.url
            if url is not None:
                try:
                    answer = self.client.post(
                        f"{url}/v1/{path}", json=body,
                        headers={"Authorization": f"Bearer {self.key}", **(headers or {})},
                    )  # fmt: skip
                    assert answer.status_code in (200, 429, 503), f"{answer.status_code} {answer.text}"
                    if answer.status_code == 200:
                        return answer.json()
                except httpx.TransportError:
                    pass  # killed before it could say
            time.sleep(0.01)
        return None


def wait_for(wanted: int, crowd: list[Writer], server: Server) -> None:
    """Until so many votes were acknowledged."""
    while sum(len(writer.acknowledged) for writer in crowd) < wanted:
        assert server.process.poll() is None, server.said
        assert not any(writer.fault for writer in crowd), [w.fault for w in crowd if w.fault]
        time.sleep(0.01)


def writers_of(server: Server) -> list[int]:
    """Processes that a server has started."""
    pid = server.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def check(folder: Path, writers: int, kills: int, seed: int) -> None:
    """Kill a server so often under so many writers, and see what is in the database."""
    draw, db, model = random.Random(seed), f"sqlite:///{folder}/feedback.db", save_model(folder / "tiny")
    with Store.open(db) as store:
        crowd = [Writer(store.keys.make(f"user {i}")[0], i) for i in range(writers)]
    for writer in crowd:
        writer.start()
    for killed in range(kills + 1):
        server = Server(model, db, folder / "log", ["--max_votes", "1000000"])
        before = sum(len(writer.acknowledged) for writer in crowd)
        for writer in crowd:
            writer.url = server.url
        wanted = before + draw.randint(1, 4 * writers)
        wait_for((before + wanted) // 2, crowd, server)
        writing = writers_of(server)
        assert len(writing) == 1
        os.kill(writing[0], signal.SIGKILL)
        # who was answered before the kill may be told of it only then
        wait_for(wanted + writers, crowd, server)
        if killed == kills:
            for writer in crowd:
                writer.over = True
            for writer in crowd:
                writer.join()
        for writer in crowd:
            writer.url = None
        server.kill()
    with Store.open(db) as store, store.read() as connection:
        assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
        rows = dict(
            connection.execute(
                select(feedback.c.response_id, func.count()).group_by(feedback.c.response_id)
            ).all()
        )
        kept = dict(connection.execute(select(feedback.c.response_id, feedback.c.id)).all())
    assert set(rows.values()) == {1}, "a vote counts twice"
    for writer in crowd:
        assert not writer.fault, writer.fault
        assert writer.acknowledged.items() <= kept.items(), "an acknowledged vote is lost"
        with Store.open(db) as store:
            assert len(store.shown_among(writer.answered)) == len(writer.answered), "an answer is lost"
    votes, replays = sum(len(w.acknowledged) for w in crowd), sum(w.replays for w in crowd)
    print(
        f"{kills} kills, {writers} writers: {votes} acknowledged votes, {replays} sent again, {len(kept)} kept"
    )
    assert votes > writers
    assert replays > 0


def test_acknowledged_votes_survive_the_server(tmp_path: Path) -> None:
    check(tmp_path, writers=8, kills=1, seed=5)


@pytest.mark.slow
def test_acknowledged_votes_survive_fifty_kills_of_the_server(tmp_path: Path) -> None:
    check(tmp_path, writers=32, kills=50, seed=2)
