"""Satisfaction round by round, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alignfast.simulation.run import Phase

_BLUE, _GREY = "#1f5fa8", "#6b7280"


def draw(phases: Sequence[Phase], path: Path) -> None:
    """Write a PNG: the share of thumbs up after each round with its interval, and when the preference drifted."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rounds = [phase.number for phase in phases]
    shares = [phase.satisfaction for phase in phases]
    axes.fill_between(
        rounds, [s.low for s in shares], [s.high for s in shares], color=_BLUE, alpha=0.15, lw=0
    )
    axes.plot(rounds, [s.estimate for s in shares], color=_BLUE, marker="o", ms=4)
    axes.axhline(0.5, color=_GREY, lw=0.8, ls=":")
    drift = next((phase.number for phase in phases if phase.drifted), None)
    if drift is not None and drift > 0:
        axes.axvline(drift - 0.5, color=_GREY, lw=1, ls="--")
        axes.annotate("preference drifts", (drift - 0.42, 0.03), color=_GREY, fontsize=9)
    axes.set(xlabel="rounds of the learner", ylabel="thumbs up", ylim=(0, 1), xticks=rounds)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
