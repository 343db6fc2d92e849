"""The stage at which a candidate is refused, or goes on to people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from alignfast.online.learning.gate import GateConfig, gate
from alignfast.online.store import Run

if TYPE_CHECKING:
    from alignfast.online.loop.loop import OnlineLoop
    from alignfast.online.loop.round import Round


def pass_gate(loop: OnlineLoop, run: Run, round: Round) -> Literal["next", "end"]:
    """Keep a candidate that is refused, with the reasons."""
    assert round.policy is not None
    found = gate(round.figures, GateConfig(**loop.config.gate))
    round.accepted = found.accepted
    if found.accepted:
        return "next"
    loop.store.versions.set_status(round.policy, "refused", found.reasons)
    round.outcome = f"{round.policy} is refused: {'; '.join(found.reasons)}"
    return "end"
