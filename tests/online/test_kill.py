"""Writers killed with -9: what was acknowledged is there, once; what was not may be sent again."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import func, select

from alignfast.online.store import Store
from alignfast.online.store.tables import feedback, responses

WRITER = Path(__file__).with_name("writer.py")


def killed(url: str, threads: int, rounds: int, seed: int) -> dict[tuple[int, int], str]:
    """Id of each vote that was acknowledged, by thread and number; each round goes on with the last of each thread."""
    draw, acknowledged = random.Random(seed), {}
    following = [0] * threads
    for _ in range(rounds):
        pipe = subprocess.PIPE
        writer = subprocess.Popen(
            [sys.executable, str(WRITER), url, str(threads)], stdin=pipe, stdout=pipe, text=True
        )
        assert writer.stdin is not None
        assert writer.stdout is not None
        try:
            writer.stdin.write(json.dumps(following) + "\n")
            writer.stdin.flush()
            lines = [writer.stdout.readline() for _ in range(draw.randint(1, 8 * threads))]
        finally:
            writer.kill()
        rest = writer.communicate()[0].splitlines()
        for line in [*lines, *rest]:
            thread, number, id = line.split()
            key = (int(thread), int(number))
            # sent again after a kill: the answer is the one that was given before
            assert acknowledged.setdefault(key, id) == id
            following[key[0]] = max(following[key[0]], key[1])
    return acknowledged


def check(url: str, acknowledged: dict[tuple[int, int], str]) -> None:
    with Store.open(url) as store:
        kept = {(vote.response_id, vote.id) for vote in store.votes(current=False)}
        assert {(f"{thread}-{number}", id) for (thread, number), id in acknowledged.items()} <= kept
        with store.read() as connection:
            votes = connection.execute(select(func.count()).select_from(feedback)).scalar_one()
            answers = connection.execute(select(func.count()).select_from(responses)).scalar_one()
            if store.dialect == "sqlite":
                assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
        assert len(kept) == votes == len({response_id for response_id, _ in kept})
        assert votes <= answers


def test_acknowledged_votes_survive_a_kill(url: str) -> None:
    acknowledged = killed(url, threads=8, rounds=2, seed=1)
    assert len(acknowledged) > 2
    check(url, acknowledged)


@pytest.mark.slow
def test_acknowledged_votes_survive_fifty_kills(url: str) -> None:
    acknowledged = killed(url, threads=32, rounds=50, seed=2)
    assert len(acknowledged) > 1000
    check(url, acknowledged)
    print(f"{len(acknowledged)} acknowledged votes")
