"""How far the loop is, as plain lines."""

from __future__ import annotations

from alignfast.online.feedback import SAID
from alignfast.online.loop.round import Round
from alignfast.online.store import Store
from alignfast.online.store.stats import satisfaction


def status(store: Store) -> str:
    """What serves, every version with what became of it, the votes that wait, and the round that is under way."""
    thumbs, serving = satisfaction(store), store.versions.serving()
    lines = []
    for version in store.versions.all("policy"):
        mark = "*" if serving is not None and serving.name == version.name else " "
        rate = f"thumbs up {thumbs[version.name].rate}" if version.name in thumbs else "no thumbs"
        lines.append(f"{mark} {version.name:<16}{version.status:<12}{rate}")
        lines += [f"    {reason}" for reason in version.reasons]
    reward = store.versions.serving("reward")
    lines.append(
        "votes that no reward model has learned from: "
        f"{store.unused(None if reward is None else reward.name, SAID):,}"
    )
    for run in store.runs.unfinished():
        lines.append(f"round {Round.from_dict(run.state).number}: {run.stage}")
    return "\n".join(lines)
