"""Canary, promotion and watch, on versions without a model."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from online.learning.test_trials import canary_passes

from alignfast.cli import main
from alignfast.online.feedback import Shown, Vote
from alignfast.online.loop import OnlineLoop, Round
from alignfast.online.loop.serve import duel, promote, watch
from alignfast.online.store import Run, Store
from alignfast.online.store.stats import first_thumbs, satisfaction


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(f"sqlite:///{tmp_path}/feedback.db") as opened:
        opened.versions.add("start", "policy", "/start", "0")
        opened.versions.promote("start")
        opened.versions.add("policy-1", "policy", "/policy-1", "1", parents=["start"])
        yield opened


def make(store: Store, tmp_path: Path, **options: Any) -> tuple[OnlineLoop, Run, Round]:
    loop = OnlineLoop(store=store, output_dir=str(tmp_path), say=lambda text: None, **options)
    return loop, store.runs.start("canary"), Round(1, "start", policy="policy-1")


def duels(store: Store, outcomes: list[bool], first: int = 0) -> None:
    """A voter each, who finds the candidate's answer better or worse."""
    for i, wins in enumerate(outcomes, first):
        sides = [
            Shown(id=f"d{i}-{name}", prompt="a", text=name, group_id=f"d{i}", policy_version=name, user=f"u{i}",
                  sampling={"duel": "policy-1"})
            for name in ("start", "policy-1")
        ]  # fmt: skip
        store.record_shown(*sides)
        store.add_vote(Vote(response_id=sides[0].id, kind="pair", value=sides[wins].id, user=f"u{i}"))


def thumbs(store: Store, version: str, ups: int, downs: int) -> None:
    for i in range(ups + downs):
        store.record_shown(Shown(id=f"{version}-{i}", prompt="a", text="b", policy_version=version))
        value = "up" if i < ups else "down"
        store.add_vote(Vote(response_id=f"{version}-{i}", kind="thumb", value=value, user=f"t{i}"))


def test_a_candidate_that_wins_its_duels_passes(store: Store, tmp_path: Path) -> None:
    loop, run, round = make(store, tmp_path)
    assert duel(loop, run, round) == "wait"
    canary = store.versions.canary()
    assert canary is not None
    assert (canary.name, canary.share) == ("policy-1", 0.1)
    duels(store, [True] * 5)
    assert duel(loop, run, round) == "wait"
    duels(store, [True] * 20, first=5)
    assert duel(loop, run, round) == "next"
    assert store.versions.get("policy-1").figures["duels"]["voters"] == 25
    assert promote(loop, run, round) == promote(loop, run, round) == "next"
    serving = store.versions.serving()
    assert serving is not None
    assert serving.name == "policy-1"
    assert store.versions.canary() is None
    assert store.versions.roll_back().name == "start"  # promoted once


@pytest.mark.parametrize(
    ("outcomes", "options", "reason"),
    [
        ([False] * 25, {}, "below 0.5"),
        ([True, False] * 6, {"canary_voters": 12}, "the budget is spent"),
        ([], {"canary_seconds": 0.0}, "the budget is spent"),
        ([True, True, False] * 30, {"canary_margin": 0.4}, "below 0.9"),
    ],
)
def test_a_candidate_that_does_not_win_is_refused(
    store: Store, tmp_path: Path, outcomes: list[bool], options: dict[str, Any], reason: str
) -> None:
    loop, run, round = make(store, tmp_path, **options)
    duels(store, outcomes)
    assert duel(loop, run, round) == "end"
    refused = store.versions.get("policy-1")
    assert refused.status == "refused"
    assert reason in refused.reasons[0]
    assert round.outcome is not None
    assert reason in round.outcome
    assert duel(loop, run, round) == "end"  # after a kill before the round was ended


@pytest.mark.parametrize("seed", range(4))
def test_duels_end_as_the_trials_say(store: Store, tmp_path: Path, seed: int) -> None:
    """Looked at after every vote: `canary_passes`, by which thousands of trials are counted, is the stage itself."""
    p = (0.5, 0.65, 0.8, 0.35)[seed]
    passes = canary_passes(np.random.default_rng(seed), p, voters=60)
    wins = np.random.default_rng(seed).random(60) < p
    loop, run, round = make(store, tmp_path, canary_voters=60)
    for i, won in enumerate(wins):
        duels(store, [bool(won)], first=i)
        step = duel(loop, run, round)
        if step != "wait":
            break
    assert (step == "next") == passes


def test_a_candidate_is_not_promoted_over_what_it_was_not_compared_with(store: Store, tmp_path: Path) -> None:
    loop, run, round = make(store, tmp_path)
    store.versions.add("by-hand", "policy", "/by-hand", "2")
    store.versions.promote("by-hand")
    duels(store, [True] * 25)
    assert duel(loop, run, round) == "end"
    assert "by-hand serves by now" in store.versions.get("policy-1").reasons[0]


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_what_was_settled_by_hand_stands(store: Store, tmp_path: Path, share: float) -> None:
    """Refused, promoted, rolled back, or another promoted, before the duels or a promotion; none is undone."""
    loop, run, round = make(store, tmp_path, canary_share=share)
    store.versions.add("by-hand", "policy", "/by-hand", "2", parents=["start"])
    store.versions.refuse("policy-1", ["too rude"])
    assert duel(loop, run, round) == promote(loop, run, round) == "end"
    assert round.outcome == "policy-1 is refused: too rude"
    store.versions.promote("policy-1")
    assert duel(loop, run, round) == promote(loop, run, round) == "next"
    store.versions.promote("by-hand")
    assert duel(loop, run, round) == promote(loop, run, round) == "end"
    assert round.outcome == "policy-1 no longer serves: too rude"
    store.versions.roll_back()
    # a learner that was killed while it promoted comes back now
    store.versions.roll_back(reasons=["still rude"])
    assert duel(loop, run, round) == promote(loop, run, round) == "end"
    assert round.outcome == "policy-1 is rolled_back: still rude"
    assert serves(store) == "start"


def test_another_version_that_serves_meanwhile_stays(store: Store, tmp_path: Path) -> None:
    """Between a look at what serves and the write: promotions and roll-backs are of what was looked at."""
    loop, run, round = make(store, tmp_path, canary_share=0.0, watch_seconds=3600.0)
    store.versions.add("by-hand", "policy", "/by-hand", "2")
    meanwhile(store, "promote", lambda: store.versions.promote("by-hand"))
    assert promote(loop, run, round) == "end"
    assert serves(store) == "by-hand"
    assert "by-hand serves by now" in store.versions.get("policy-1").reasons[0]

    thumbs(store, "start", 60, 20)
    thumbs(store, "by-hand", 10, 40)
    meanwhile(store, "roll_back", lambda: store.versions.promote("policy-1"))
    assert watch(loop, run, replace(round, policy="by-hand", since=time.time())) == "end"
    assert serves(store) == "policy-1"
    assert store.versions.get("by-hand").status == "promoted"


def meanwhile(store: Store, name: str, happens: Callable[[], object]) -> None:
    """Something happens just before the next call of a method of the versions."""
    method = getattr(store.versions, name)

    def later(*args: Any, **rest: Any) -> Any:
        delattr(store.versions, name)
        happens()
        return method(*args, **rest)

    setattr(store.versions, name, later)


def serves(store: Store) -> str:
    serving = store.versions.serving()
    assert serving is not None
    return serving.name


def test_the_watch_compares_first_thumbs_with_first_thumbs(store: Store, tmp_path: Path) -> None:
    """Of voters who were not pleased at first, and are by now, with both versions alike."""
    loop, run, round = make(store, tmp_path, watch_seconds=3600.0)
    for version in ("start", "policy-1"):
        if version == "policy-1":
            promote(loop, run, round)
        thumbs(store, version, 0, 40)
        for i in range(40):
            for again in range(9):
                store.record_shown(
                    Shown(id=f"{version}-{i}-{again}", prompt="a", text="b", policy_version=version)
                )
                vote = Vote(response_id=f"{version}-{i}-{again}", kind="thumb", value="up", user=f"t{i}")
                store.add_vote(vote)
    assert satisfaction(store)["start"].rate.estimate == 0.9
    assert watch(loop, run, round) == "wait"


def test_thumbs_on_conversations_count(store: Store, tmp_path: Path) -> None:
    """Once with each version that answered in it."""
    loop, run, round = make(store, tmp_path, watch_seconds=3600.0)
    thumbs(store, "start", 60, 20)
    promote(loop, run, round)
    for i in range(40):
        store.record_shown(
            *(
                Shown(
                    id=f"c{i}-{turn}",
                    prompt="a",
                    text="b",
                    episode_id=f"c{i}",
                    turn=turn,
                    policy_version="policy-1",
                )
                for turn in range(2)
            )
        )
        store.add_vote(Vote(episode_id=f"c{i}", kind="thumb", value="down", user=f"t{i}"))
    assert satisfaction(store)["policy-1"].votes == len(first_thumbs(store, "policy-1")) == 40
    assert watch(loop, run, round) == "end"
    assert store.versions.get("policy-1").status == "rolled_back"


def test_a_version_that_people_like_less_is_rolled_back(store: Store, tmp_path: Path) -> None:
    loop, run, round = make(store, tmp_path, watch_seconds=3600.0)
    thumbs(store, "start", 60, 20)
    promote(loop, run, round)
    assert watch(loop, run, round) == "wait"
    thumbs(store, "policy-1", 10, 40)
    assert watch(loop, run, round) == "end"
    serving = store.versions.serving()
    assert serving is not None
    assert serving.name == "start"
    left = store.versions.get("policy-1")
    assert left.status == "rolled_back"
    assert "satisfaction fell from 0.750" in left.reasons[0]
    assert watch(loop, run, round) == "end"  # after a kill: not back once more
    assert store.versions.serving() == serving


def test_a_version_that_people_like_as_much_stays(store: Store, tmp_path: Path) -> None:
    loop, run, round = make(store, tmp_path, watch_seconds=3600.0)
    thumbs(store, "start", 60, 20)
    promote(loop, run, round)
    thumbs(store, "policy-1", 28, 12)
    assert watch(loop, run, round) == "wait"
    assert round.since is not None
    round.since -= 3600
    assert watch(loop, run, round) == "next"


def test_commands(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    db = f"sqlite:///{tmp_path}/feedback.db"
    thumbs(store, "start", 3, 1)
    store.runs.start("canary", Round(1, "start", policy="policy-1").to_dict())
    assert main(["online", "promote", "policy-1", "--db", db]) == 0
    assert main(["online", "status", "--db", db]) == 0
    told = capsys.readouterr().out
    assert "* policy-1        promoted    no thumbs" in told
    assert "start           promoted    thumbs up 0.750" in told
    assert "round 1: canary" in told
    began = time.perf_counter()
    assert main(["online", "rollback", "--db", db, "--reason", "too rude"]) == 0
    assert time.perf_counter() - began < 1
    serving = store.versions.serving()
    assert serving is not None
    assert serving.name == "start"
    assert store.versions.get("policy-1").reasons == ("too rude",)
    store.versions.add("reward-1", "reward", "/reward-1", "3")
    assert main(["online", "promote", "reward-1", "--db", db]) == 1
    assert main(["online", "refuse", "reward-1", "--db", db]) == 1
    assert main(["online", "refuse", "start", "--db", db]) == 1
    assert "'start' serves: roll it back" in capsys.readouterr().err
    store.versions.add("policy-2", "policy", "/policy-2", "4")
    assert main(["online", "refuse", "policy-2", "--db", db, "--reason", "too long"]) == 0
    assert store.versions.get("policy-2").reasons == ("too long",)
    assert main(["online", "rollback", "--db", db]) == 1
    assert main(["online", "roll", "--db", db]) == 2
    assert "there is no `alignfast online roll`" in capsys.readouterr().err
    assert main(["online", "--method", "sft"]) == 1
    assert "method must be one of grpo, ppo, dpo, kto, got 'sft'" in capsys.readouterr().err


def test_a_rollback_waits_for_no_import_of_torch() -> None:
    """It takes most of the seconds that a process begins with."""
    script = "import sys, alignfast.commands.online, alignfast.online.store; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
