"""From a candidate to what serves: duels before people, promotion, and a watch after it.

canary    share of wins of the candidate, a voter a value in [0, 1], by an anytime-valid interval: looked at after
          every vote, it is wrong once in twenty runs at most
watch     satisfaction with the new version, a voter a value, by the same kind of interval, against its predecessor's
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

from alignfast.online.store import Run

if TYPE_CHECKING:
    from alignfast.online.loop.loop import OnlineLoop
    from alignfast.online.loop.round import Round


def duel(loop: OnlineLoop, run: Run, round: Round) -> Literal["next", "wait", "end"]:
    """Let people compare, until it is certain that the candidate is better, or the budget ends."""
    if loop.config.canary_share == 0:
        return "next"
    raise NotImplementedError


def promote(loop: OnlineLoop, run: Run, round: Round) -> Literal["next"]:
    """Have the candidate serve."""
    assert round.policy is not None
    serving = loop.store.versions.serving()
    if serving is None or serving.name != round.policy:
        loop.store.versions.promote(round.policy)
    round.outcome, round.since = f"{round.policy} serves", time.time()
    return "next"


def watch(loop: OnlineLoop, run: Run, round: Round) -> Literal["next", "wait", "end"]:
    """Go back to the version before where people like the new one less."""
    if loop.config.watch_seconds == 0:
        return "next"
    raise NotImplementedError
