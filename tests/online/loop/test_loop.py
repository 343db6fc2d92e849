"""Rounds of the learner on a store that a script has filled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from online.loop.filled import FAST, ask, make_start, serve_start, vote

from alignfast.online.learning.gate import Decision
from alignfast.online.loop import OnlineLoop
from alignfast.online.loop import gate as loop_gate
from alignfast.online.loop.folders import read_manifest
from alignfast.online.server.versions import weights_hash
from alignfast.online.store import Store


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("models") / "start")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(f"sqlite:///{tmp_path}/feedback.db") as opened:
        yield opened


def make_loop(store: Store, tmp_path: Path, **options: Any) -> OnlineLoop:
    merged = {**FAST, **options}
    merged["policy_options"] = {**FAST["policy_options"], **options.get("policy_options", {})}
    return OnlineLoop(store=store, output_dir=str(tmp_path / "versions"), **merged)


@pytest.fixture
def open_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps make no model that is better for certain."""
    monkeypatch.setattr(loop_gate, "gate", lambda figures, limits: Decision(True, ()))


@pytest.mark.usefixtures("open_gate")
@pytest.mark.parametrize("method", ["grpo", "dpo", "kto", "ppo"])
def test_a_round_ends_with_a_new_version_that_serves(
    store: Store, tmp_path: Path, start: Path, method: str
) -> None:
    serve_start(store, start)
    votes = vote(store, ask(store, 12))
    options = {"num_generations": 4} if method == "grpo" else {}
    loop = make_loop(store, tmp_path, method=method, policy_options=options)
    round = loop.run(once=True)
    assert round is not None
    assert round.outcome == "policy-1 serves"
    serving = store.versions.serving()
    assert serving is not None
    assert serving.name == "policy-1"
    assert serving.parents == ("start", "reward-1")
    assert serving.hash == weights_hash(Path(serving.path)) != weights_hash(start)
    manifest = read_manifest(Path(serving.path))
    assert manifest["hash"] == serving.hash
    assert manifest["figures"] == serving.figures
    assert {"kl", "length", "reward", "preference", "win_rate"} - {"win_rate"} <= set(serving.figures)
    assert {one.id for one in store.used_by("reward-1")} == {one.id for one in votes}
    assert [run.status for run in store.runs.all()] == ["done"]
    assert not (tmp_path / "versions" / ".runs" / store.runs.all()[0].id).exists()
