"""The stage at which a candidate is refused, or goes on to people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from alignfast.online.store import Run

if TYPE_CHECKING:
    from alignfast.online.loop.loop import OnlineLoop
    from alignfast.online.loop.round import Round

LIMITS: dict[str, float] = {"max_kl": 1.0, "max_length_ratio": 1.5, "max_cut": 0.5, "suite_drop": 0.02}


class Decision(NamedTuple):
    """What the gate says, and why."""

    accepted: bool
    reasons: tuple[str, ...]


def pass_gate(loop: OnlineLoop, run: Run, round: Round) -> Literal["next", "end"]:
    """Keep a candidate that is refused, with the reasons."""
    assert round.policy is not None
    found = decide(round.figures, loop.config.gate)
    round.accepted = found.accepted
    if found.accepted:
        return "next"
    loop.store.versions.set_status(round.policy, "refused", found.reasons)
    round.outcome = f"{round.policy} is refused: {'; '.join(found.reasons)}"
    return "end"


def decide(figures: Mapping[str, Any], limits: Mapping[str, Any]) -> Decision:
    """Whether figures let a candidate pass."""
    bounds = {**LIMITS, **limits}
    reasons = []
    preference = figures.get("preference")
    if preference is not None and preference["high"] < 0.5:
        reasons.append(f"held-out preference falls: {preference['estimate']:.3f}")
    if figures["kl"] > bounds["max_kl"]:
        reasons.append(
            f"KL to the start policy is {figures['kl']:.3f} nats a token, at most {bounds['max_kl']:g}"
        )
    if figures["length"] > bounds["max_length_ratio"] * max(1.0, figures["length_serving"]):
        reasons.append(f"answers grew from {figures['length_serving']:.0f} to {figures['length']:.0f} tokens")
    return Decision(not reasons, tuple(reasons))
