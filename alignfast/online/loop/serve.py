"""From a candidate to what serves: duels before people, promotion, and a watch after it.

    canary    share of wins of the candidate, a voter a value in {0, 1/2, 1}: it passes when the interval lies above
              1/2 + margin, is refused when it lies below that, or when the budget ends first
    watch     share of thumbs up with the new version, a voter a value in {0, 1}: it is rolled back when the interval lies
              below that of its predecessor, less watch_drop

The interval holds at all times at once (Ville's inequality for the hedged capital of arXiv 2010.09686, sequential.py), so that
one may look after every vote, since a voter's value is their first vote and never changes. Of the predecessor, which gets no
further votes, it is Wilson's.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

from alignfast.online.learning.sequential import mean_interval
from alignfast.online.store import Run
from alignfast.online.store.stats import first_thumbs, satisfaction

if TYPE_CHECKING:
    from alignfast.online.loop.loop import OnlineLoop
    from alignfast.online.loop.round import Round


def duel(loop: OnlineLoop, run: Run, round: Round) -> Literal["next", "wait", "end"]:
    """Let people compare, until it is certain that the candidate is better, or the budget ends."""
    config, versions = loop.config, loop.store.versions
    assert round.policy is not None
    serving, candidate = versions.serving(), versions.get(round.policy)
    assert serving is not None
    if config.canary_share == 0 or serving.name == round.policy:  # promoted by hand meanwhile
        return "next"
    if serving.name != round.serving:
        return _refuse(loop, round, f"{serving.name} serves by now, and it was compared with {round.serving}")
    if candidate.status in ("refused", "rolled_back"):
        round.outcome = f"{round.policy} is {candidate.status}: {'; '.join(candidate.reasons) or 'by hand'}"
        return "end"
    if round.since is None:
        versions.set_canary(round.policy, config.canary_share)
        round.since = time.time()
    wins = [one.wins for one in loop.store.duels(round.policy)]
    found = mean_interval(wins)
    round.figures["duels"] = {**found._asdict(), "voters": len(wins)}
    versions.set_figures(round.policy, round.figures)
    wanted, told = 0.5 + config.canary_margin, f"wins {found} of the duels of {len(wins)} voters"
    if found.low > wanted:
        loop.say(f"{round.policy} {told}")
        return "next"
    if found.high < wanted:
        return _refuse(loop, round, f"it {told}: below {wanted:g}")
    if len(wins) >= config.canary_voters or time.time() >= round.since + config.canary_seconds:
        return _refuse(loop, round, f"it {told}: not certain to be above {wanted:g}, and the budget is spent")
    loop.say(f"{round.policy} {told}")
    return "wait"


def promote(loop: OnlineLoop, run: Run, round: Round) -> Literal["next"]:
    """Have the candidate serve."""
    assert round.policy is not None
    serving = loop.store.versions.serving()
    if serving is None or serving.name != round.policy:
        loop.store.versions.promote(round.policy)
    round.outcome, round.since = f"{round.policy} serves", time.time()
    loop.say(f"round {round.number}: {round.outcome}")
    return "next"


def watch(loop: OnlineLoop, run: Run, round: Round) -> Literal["next", "wait", "end"]:
    """Go back to the version before where people like the new one less."""
    config, store = loop.config, loop.store
    assert round.policy is not None
    assert round.since is not None
    serving = store.versions.serving()
    if config.watch_seconds == 0:
        return "next"
    if serving is None or serving.name != round.policy:
        reasons = "; ".join(store.versions.get(round.policy).reasons) or "by hand"
        round.outcome = f"{round.policy} no longer serves: {reasons}"
        return "end"
    before = satisfaction(store).get(round.serving)
    if before is not None:
        found = mean_interval([one.up for one in first_thumbs(store, round.policy)])
        if found.high < before.rate.low - config.watch_drop:
            reason = f"satisfaction fell from {before.rate} with {round.serving} to {found}"
            store.versions.roll_back(reasons=[reason])
            round.outcome = f"{round.policy} is rolled back: {reason}"
            return "end"
    if time.time() >= round.since + config.watch_seconds:
        return "next"
    loop.say(f"{round.policy} is watched")
    return "wait"


def _refuse(loop: OnlineLoop, round: Round, reason: str) -> Literal["end"]:
    assert round.policy is not None
    loop.store.versions.set_status(round.policy, "refused", [reason])
    round.accepted, round.outcome = False, f"{round.policy} is refused: {reason}"
    return "end"
