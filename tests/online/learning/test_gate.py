"""What the gate refuses, and in which words."""

from __future__ import annotations

from typing import Any

import pytest

from alignfast.online.learning.gate import GateConfig, gate

FAIR: dict[str, Any] = {
    "kl": 0.2, "length": 60.0, "length_serving": 60.0, "length_start": 60.0, "cut": 0.0, "cut_serving": 0.0,
    "distinct_2": 0.6, "distinct_2_serving": 0.6, "reward": 0.3, "reward_serving": 0.0,
    "preference": {"estimate": 0.55, "low": 0.48, "high": 0.62}, "win_rate": {"estimate": 0.6, "low": 0.51, "high": 0.69},
    "kl_budget": {"spent": 0.15, "most": 0.1, "ended": True}, "unjudged": 0.1,
}  # fmt: skip
BETTER = {"estimate": 0.6, "low": 0.51, "high": 0.69}


def test_a_fair_candidate_passes() -> None:
    assert gate(FAIR, GateConfig()) == (True, ())


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"not_finite": ["kl", "reward"]}, "kl, reward: no finite number"),
        ({"unjudged": 0.6}, "the judge has left 60% of the answers without a verdict"),
        ({"unjudged": 1.0, "win_rate": None}, "the judge has left 100% of the answers"),
        ({"kl": 1.1}, "KL to the start policy is 1.100"),
        ({"kl_budget": {"spent": 0.21, "most": 0.1, "ended": True}}, "has spent 0.210 nats a token of 0.1"),
        # 1.49 times in each of three rounds
        ({"length": 198.0, "length_serving": 133.0}, "answers have 198 tokens, and 60 with the start policy"),
        ({"length": 20.0, "length_serving": 25.0}, "answers have 20 tokens, and 60 with the start policy"),
        ({"length": 91.0}, "answers have 91 tokens, and 60 with the serving version"),
    ],
)
def test_what_is_refused(changed: dict[str, Any], reason: str) -> None:
    figures = {name: value for name, value in {**FAIR, **changed}.items() if value is not None}
    accepted, reasons = gate(figures, GateConfig())
    assert not accepted
    assert reason in reasons[0]
    assert len(reasons) == 1


def test_each_that_was_measured_must_be_better_where_that_is_required() -> None:
    sure = GateConfig(require_significant=True)
    assert gate({**FAIR, "preference": BETTER}, sure).accepted
    (reason,) = gate(FAIR, sure).reasons
    assert reason == "preference 0.550 (0.480 to 0.620) is not above 1/2 for certain"
    alone = {name: value for name, value in FAIR.items() if name != "preference"}
    assert gate(alone, sure).accepted
    del alone["win_rate"]
    assert "neither held-out preference nor a win rate was measured" in gate(alone, sure).reasons[0]


@pytest.mark.parametrize(
    "limits",
    [dict(max_kl=0), dict(max_kl_overrun=0.5), dict(max_length_drift=0.5), dict(max_unjudged=1.5)],
)
def test_limits_that_make_no_sense(limits: dict[str, float]) -> None:
    (name,) = limits
    with pytest.raises(ValueError, match=f"gate: {name} must"):
        GateConfig(**limits)
