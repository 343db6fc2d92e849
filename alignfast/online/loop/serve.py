"""From a candidate to what serves: duels before people, promotion, and a watch after it.

    canary    share of wins of the candidate, a voter a value in {0, 1/2, 1}: it passes when the interval lies above
              1/2 + margin, is refused when it lies below that, or when the budget ends first
    watch     share of thumbs up with the new version, a voter a value in {0, 1}: it is rolled back when the interval lies
              below that of its predecessor, less watch_drop

The interval holds at all times at once (Ville's inequality for the hedged capital of arXiv 2010.09686, sequential.py), so that
one may look after every vote, since a voter's value is their first vote and never changes. Of the predecessor, which gets no
further votes, it is Wilson's, of the first thumbs of its voters likewise.

People promote and roll back by hand meanwhile. What they did stands: a promotion is over the version that the candidate was
compared with, a roll-back is of the candidate, and the store refuses either where something else serves by then.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

from alignfast.data.intervals import proportion
from alignfast.online.learning.sequential import mean_interval
from alignfast.online.store import Run
from alignfast.online.store.stats import first_thumbs
from alignfast.online.store.versions import ServesAnother

if TYPE_CHECKING:
    from alignfast.online.loop.loop import OnlineLoop
    from alignfast.online.loop.round import Round


def duel(loop: OnlineLoop, run: Run, round: Round) -> Literal["next", "wait", "end"]:
    """Let people compare, until it is certain that the candidate is better, or the budget ends."""
    config, versions = loop.config, loop.store.versions
    assert round.policy is not None
    settled = _settled(loop, round)
    if settled is not None:
        return settled
    if config.canary_share == 0:
        return "next"
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


def promote(loop: OnlineLoop, run: Run, round: Round) -> Literal["next", "end"]:
    """Have the candidate serve."""
    assert round.policy is not None
    settled = _settled(loop, round)
    if settled == "end":
        return settled
    if settled is None:
        try:
            loop.store.versions.promote(round.policy, over=round.serving)
        except ServesAnother:
            return promote(loop, run, round)  # by a hand that was faster
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
        return _gone(loop, round)
    thumbs = [one.up for one in first_thumbs(store, round.serving)]
    if thumbs:
        before, found = (
            proportion(thumbs),
            mean_interval([one.up for one in first_thumbs(store, round.policy)]),
        )
        if found.high < before.low - config.watch_drop:
            reason = f"satisfaction fell from {before} with {round.serving} to {found}"
            try:
                store.versions.roll_back(reasons=[reason], of=round.policy)
            except ServesAnother:
                return _gone(loop, round)
            round.outcome = f"{round.policy} is rolled back: {reason}"
            return "end"
    if time.time() >= round.since + config.watch_seconds:
        return "next"
    loop.say(f"{round.policy} is watched")
    return "wait"


def _settled(loop: OnlineLoop, round: Round) -> Literal["next", "end"] | None:
    """What people have settled by hand: that the candidate serves, or shall not. None: nothing."""
    assert round.policy is not None
    serving, candidate = loop.store.versions.serving(), loop.store.versions.get(round.policy)
    assert serving is not None
    if serving.name == round.policy:
        return "next"
    if candidate.status == "promoted":  # and something else since
        return _gone(loop, round)
    if candidate.status in ("refused", "rolled_back"):
        round.accepted = False
        round.outcome = f"{round.policy} is {candidate.status}: {'; '.join(candidate.reasons) or 'by hand'}"
        return "end"
    if serving.name != round.serving:
        return _refuse(loop, round, f"{serving.name} serves by now, and it was compared with {round.serving}")
    return None


def _gone(loop: OnlineLoop, round: Round) -> Literal["end"]:
    assert round.policy is not None
    reasons = "; ".join(loop.store.versions.get(round.policy).reasons) or "by hand"
    round.outcome = f"{round.policy} no longer serves: {reasons}"
    return "end"


def _refuse(loop: OnlineLoop, round: Round, reason: str) -> Literal["end"]:
    assert round.policy is not None
    loop.store.versions.set_status(round.policy, "refused", [reason])
    round.accepted, round.outcome = False, f"{round.policy} is refused: {reason}"
    return "end"
