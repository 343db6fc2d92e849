"""Learners killed with -9 between any two things that last: every vote is used once, and what served goes on serving."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from online.loop.filled import FAST, ask, make_start, serve_start, vote

from alignfast.online.server.versions import weights_hash
from alignfast.online.store import Store

LEARNER = Path(__file__).with_name("learner.py")
NEVER = 1 << 30


class Learner:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.read()

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def run(self, moment: int, **options: Any) -> int:
        """The exit code, or the signal that ended it as a negative number."""
        assert self.process.stdin is not None
        self.process.stdin.write(
            json.dumps({"moment": moment, "options": {**FAST, "method": "dpo", **options}}) + "\n"
        )
        self.process.stdin.flush()
        return int(self.read())


@contextmanager
def learner() -> Iterator[Learner]:
    tests = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tests)}
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, str(LEARNER)], stdin=pipe, stdout=pipe, text=True, env=environment
    )
    try:
        yield Learner(process)
    finally:
        process.kill()
        process.wait()


def check_serving(store: Store, expected: set[str]) -> None:
    serving = store.versions.serving()
    assert serving is not None
    assert serving.name in expected
    assert weights_hash(Path(serving.path)) == serving.hash


def check_uses(store: Store, votes: list[str], refused: bool) -> None:
    """Every vote in one reward model, and in the training or measuring of one policy that serves, or of each refused one."""
    used = [one.id for version in store.versions.all("reward") for one in store.used_by(version.name)]
    assert sorted(used) == sorted(votes)
    policies = store.versions.all("policy")[-1:] if refused else store.versions.all("policy")
    trained = [one.id for version in policies for one in store.used_by(version.name)]
    held_out = {id for run in store.runs.all() for id in run.state["held_out"]}
    assert sorted(trained) == sorted(set(votes) - held_out)


def rounds_of_kills(
    tmp_path: Path, moments: Iterable[list[int]], refused: bool = False, **options: Any
) -> list[str]:
    """Rounds whose learner is killed at each of a round's moments, then left to end; hashes of what it made.

    A moment that a round does not have ends it all.

    Args:
        tmp_path: folder of all.
        moments: of each round.
        refused: whether each round ends with a candidate that is refused.
        **options: of the loop.
    """
    url, folder = f"sqlite:///{tmp_path}/feedback.db", tmp_path / "versions"
    start = make_start(tmp_path / "start")
    votes: list[str] = []
    with Store.open(url) as store:
        serve_start(store, start)
        with learner() as learns:
            before, over = "start", False
            for number, kills in enumerate(moments, 1):
                votes += [one.id for one in vote(store, ask(store, 6, seed=number))]
                after = before if refused else f"policy-{number}"
                for moment in kills:
                    ended = learns.run(moment, db=url, output_dir=str(folder), **options)
                    over = ended == 0
                    assert over or ended == -signal.SIGKILL
                    check_serving(store, {before, after})
                if not over:
                    assert learns.run(NEVER, db=url, output_dir=str(folder), **options) == 0
                before = after
                check_serving(store, {before})
                check_uses(store, votes, refused)
                if refused:
                    made = store.versions.get(f"policy-{number}")
                    assert (made.status, len(made.reasons)) == ("refused", 1)
                    assert store.versions.canary() is None
                assert list((folder / ".runs").iterdir()) == []
                if over:
                    break
        assert {run.status for run in store.runs.all()} == {"done"}
        return [version.hash for version in store.versions.all()]


GRPO = {
    "method": "grpo",
    "policy_options": {**FAST["policy_options"], "num_generations": 4, "save_steps": 1},
}
DUELS = {"canary_share": 0.5, "canary_seconds": 0.0, "watch_seconds": 3600.0}  # nobody votes: it is refused


def test_a_killed_learner_goes_on(tmp_path: Path) -> None:
    rounds_of_kills(tmp_path, [[3, 9]])


def test_a_killed_learner_goes_on_with_logged_answers(tmp_path: Path) -> None:
    rounds_of_kills(tmp_path, [[3, 14]], **GRPO)


def test_a_canary_whose_learner_is_killed_is_refused_once(tmp_path: Path) -> None:
    rounds_of_kills(tmp_path, [[20], [23, 25]], refused=True, **DUELS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, GRPO, {"refused": True, **DUELS}], ids=["dpo", "grpo", "refused in the canary"]
)
def test_kills_at_every_moment(tmp_path: Path, options: dict[str, Any]) -> None:
    """Of a round, one after the other; the versions are those of a learner that nobody killed."""
    (tmp_path / "killed").mkdir()
    (tmp_path / "left").mkdir()
    killed = rounds_of_kills(tmp_path / "killed", ([n] for n in itertools.count(1)), **options)
    rounds = len(killed) // 2
    print(f"{rounds - 1} kills")
    assert rounds > 30
    assert killed == rounds_of_kills(tmp_path / "left", [[] for _ in range(rounds)], **options)
