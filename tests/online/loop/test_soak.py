"""A learner that goes on for long holds no more memory and no more open files than in its first rounds."""

from __future__ import annotations

import gc
import os
import resource
from pathlib import Path
from typing import Any

import pytest
from online.loop.filled import FAST, ask, make_start, serve_start, vote

from alignfast.online.learning.gate import Decision
from alignfast.online.loop import OnlineLoop
from alignfast.online.loop import gate as loop_gate
from alignfast.online.store import Store

OPTIONS: dict[str, Any] = {
    **FAST,
    "method": "dpo",
    "kl_budget": None,
    "reward_options": {**FAST["reward_options"], "max_steps": 1},
    "policy_options": {**FAST["policy_options"], "max_steps": 1},
}


def resident() -> int:
    """Bytes in memory now."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("rounds", [10, pytest.param(1000, marks=pytest.mark.slow)])
def test_memory_and_files_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
    """From a tenth of the rounds on: at most 5 % more memory, and the same files."""
    monkeypatch.setattr(loop_gate, "gate", lambda *_: Decision(True, ()))
    started: tuple[int, int] | None = None
    with Store.open(f"sqlite:///{tmp_path}/feedback.db") as store:
        serve_start(store, make_start(tmp_path / "start"))
        loop = OnlineLoop(
            store=store, output_dir=str(tmp_path / "versions"), say=lambda text: None, **OPTIONS
        )
        for number in range(1, rounds + 1):
            # a taste that turns: under one alone all answers became the same after 553 rounds, with nothing to learn
            vote(store, ask(store, 4, seed=number), liked=number // 20 % 2 == 0)
            round = loop.run(once=True)
            assert round is not None
            assert round.outcome == f"policy-{number} serves"
            if number == max(3, rounds // 10):
                started = resident(), open_files()
        assert started is not None
        print(
            f"{started[0] / 2**20:.0f} MiB and {started[1]} files, then {resident() / 2**20:.0f} MiB and {open_files()}"
        )
        assert open_files() <= started[1]
        assert resident() <= 1.05 * started[0]
