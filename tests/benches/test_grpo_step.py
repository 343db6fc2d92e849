"""The parts of a GRPO step: those that the trainer clocked, and what is left."""

from __future__ import annotations

import pytest
from grpo_step import parts_of


def test_parts_are_the_trainers_stages_and_make_up_the_step() -> None:
    seconds = {"sampling": 5.0, "prefill": 1.0, "decode": 3.5, "rewards": 0.25, "logps": 2.0, "forward": 4.0,
               "backward": 3.0, "optimizer": 0.5}  # fmt: skip
    parts = parts_of({"loss": 0.1, **{f"seconds/{name}": value for name, value in seconds.items()}}, 15.0)
    assert parts == {
        "prefill": 1.0, "decode": 3.5, "other sampling": 0.5, "rewards": 0.25, "logps": 2.0, "forward": 4.0,
        "backward": 3.0, "optimizer": 0.5, "rest": pytest.approx(0.25),
    }  # fmt: skip
    without_engine_parts = parts_of({"seconds/sampling": 5.0}, 6.0)
    assert without_engine_parts["other sampling"] == 5.0
    assert without_engine_parts["rest"] == 1.0
