"""Late rewards: what waits, what is handed out, what is dropped and counted; and the state as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from alignfast.losses import importance_weights
from alignfast.rewards import LateBuffer, LateSample


def sample(id: str | int, step: int) -> LateSample:
    return LateSample(id, [1, 2], [3, 4], [-0.1, -1 / 3], step, extra={"group": 7})


def test_rewards_join_a_later_step_in_the_order_of_sampling() -> None:
    buffer = LateBuffer(max_age=5)
    for id in "abc":
        buffer.add(sample(id, 0))
    assert buffer.ready(0) == []
    assert buffer.arrive("c", -1.0)
    assert buffer.arrive("a", 2)
    found = buffer.ready(1)
    assert [(s.id, s.reward) for s in found] == [("a", 2.0), ("c", -1.0)]
    assert found[0].logps == [-0.1, -1 / 3]
    assert found[0].extra == {"group": 7}
    assert len(buffer) == 1
    assert buffer.ready(1) == []  # handed out once
    assert buffer.arrive("b", 0.5)
    assert [s.id for s in buffer.ready(5)] == ["b"]
    assert (buffer.expired, buffer.unclaimed) == (0, 0)


def test_the_limit_on_age_holds_with_and_without_a_reward() -> None:
    buffer = LateBuffer(max_age=2)
    for step in range(4):
        buffer.add(sample(step, step))
    for id in (0, 1):
        buffer.arrive(id, 1.0)
    assert [s.id for s in buffer.ready(3)] == [1]  # of age 2; 0 is of age 3
    assert buffer.expired == 1
    assert [s.id for s in buffer.ready(5)] == []  # 2 is dropped without a reward, 3 still waits
    assert buffer.expired == 2
    assert not buffer.arrive(2, 1.0)
    assert buffer.unclaimed == 1
    assert buffer.arrive(3, 1.0)
    assert len(buffer) == 1


def test_a_group_leaves_together() -> None:
    buffer = LateBuffer(max_age=4)
    for id, group in (("a", "g"), ("b", "h"), ("c", "g"), ("d", None)):
        buffer.add(replace(sample(id, 0), group=group))
    buffer.arrive("a", 1.0)
    buffer.arrive("b", 2.0)
    assert [s.id for s in buffer.ready(1)] == ["b"]  # a waits for c
    assert [s.id for s in buffer.waiting()] == ["c", "d"]
    assert buffer.arrive("c", None, {"why": "asked nobody"})  # no reward will come: it holds nobody up
    assert [(s.id, s.reward) for s in buffer.ready(2)] == [("a", 1.0), ("c", None)]
    assert buffer.expired == 0
    assert buffer.arrive("d", None)
    assert buffer.ready(2) == []  # nothing to learn from
    assert len(buffer) == 0


def test_at_the_last_chance_a_group_leaves_with_what_it_has() -> None:
    buffer = LateBuffer(max_age=4)
    for id, group in (("a", "g"), ("b", "g"), ("c", "h"), ("d", "i")):
        buffer.add(replace(sample(id, 1 if id == "d" else 0), group=group))
    buffer.arrive("a", 1.0)
    assert buffer.ready(2, next_step=4) == []  # of age 4 then
    assert [(s.id, s.reward) for s in buffer.ready(4, next_step=5)] == [("a", 1.0), ("b", None)]
    assert buffer.expired == 2  # b and c
    assert [s.id for s in buffer.waiting()] == ["d"]
    again = LateBuffer(max_age=4)
    again.load_state_dict(json.loads(json.dumps(buffer.state_dict())))
    assert again.waiting() == buffer.waiting()


def test_max_age_0_takes_this_steps_own_alone() -> None:
    buffer = LateBuffer(max_age=0)
    buffer.add(sample("a", 3))
    buffer.arrive("a", 1.0)
    assert len(buffer.ready(3)) == 1


def test_the_last_reward_counts() -> None:
    buffer = LateBuffer(max_age=1)
    buffer.add(sample("a", 0))
    buffer.arrive("a", 1.0)
    buffer.arrive("a", -1.0)
    assert [s.reward for s in buffer.ready(0)] == [-1.0]


def test_state_goes_through_json() -> None:
    buffer = LateBuffer(max_age=2)
    for id, step in (("a", 0), (5, 1), ("b", 3)):
        buffer.add(sample(id, step))
    buffer.arrive(5, 0.1)
    buffer.arrive("gone", 1.0)
    again = LateBuffer(max_age=2)
    again.load_state_dict(json.loads(json.dumps(buffer.state_dict())))
    for one in (buffer, again):
        assert [s.id for s in one.ready(3)] == [5]
    assert again.state_dict() == buffer.state_dict()
    assert (again.expired, again.unclaimed, len(again)) == (1, 1, 1)


def test_what_is_kept_is_what_the_importance_correction_needs() -> None:
    buffer = LateBuffer(max_age=3)
    buffer.add(sample("a", 0))
    buffer.arrive("a", 1.0)
    (late,) = buffer.ready(3)
    now_P = torch.tensor(late.logps) + torch.tensor([math.log(2), math.log(8)])
    weights_P = importance_weights(now_P, torch.tensor(late.logps), [len(late.logps)], cap=4.0).weights_P
    assert weights_P.tolist() == pytest.approx([2, 4])


def test_bad_input_is_refused() -> None:
    buffer = LateBuffer(max_age=1)
    buffer.add(sample("a", 4))
    with pytest.raises(ValueError, match="with the id 'a' waits already"):
        buffer.add(sample("a", 5))
    with pytest.raises(ValueError, match="has 2 tokens and 1 log-probs"):
        buffer.add(LateSample("b", [], [1, 2], [0.0], 4))
    with pytest.raises(ValueError, match="the reward of 'a' must be a finite number, got nan"):
        buffer.arrive("a", math.nan)
    with pytest.raises(ValueError, match="was made in step 4, and now is step 3"):
        buffer.ready(3)
    with pytest.raises(ValueError, match="max_age must be at least 0"):
        LateBuffer(max_age=-1)
