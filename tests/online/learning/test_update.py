"""Reward models learn from each kind of vote alone, and from none that is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from online.learning.people import OPTIONS, make_start, votes_of

from alignfast.online.feedback import KINDS, Judged, Kind
from alignfast.online.learning.update import RewardUpdate, update_reward


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("start"))


def update(
    start: Path, folder: Path, train: list[Judged], held_out: list[Judged], **more: Any
) -> RewardUpdate:
    replay = more.pop("replay", ())
    return update_reward(str(start), train, held_out, folder, {**OPTIONS, **more}, replay)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_alone_raises_held_out_accuracy(start: Path, tmp_path: Path, kind: Kind) -> None:
    gold = votes_of("pair", 150, seed=7)
    found = update(start, tmp_path, votes_of(kind, 240), gold, num_train_epochs=3, implicit_weight=1.0)
    assert found.figures["reward_accuracy"]["low"] > 0.6
