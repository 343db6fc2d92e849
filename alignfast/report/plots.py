"""Plots as SVG text to stand inside a page: lines and labels take the page's colours, so that they suit light and dark.

Matplotlib writes colours as they are given, so text and axes are drawn in stand-in colours that the SVG's text then
has replaced by CSS variables.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_INK, _GRID = "#010203", "#040506"
# Told apart by people who are colour-blind, and readable on white and on near-black (Okabe and Ito, darkened).
COLOURS = ("#2f81c7", "#e0861a", "#1a9c77", "#c4567e", "#8a6fc4", "#7a7a7a")
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "alignfast",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}


class Line(NamedTuple):
    """Values over steps; `dashed` for held-out data; `band` the lower and upper ends of their intervals."""

    steps: Sequence[float]
    values: Sequence[float]
    dashed: bool = False
    band: tuple[Sequence[float], Sequence[float]] | None = None


class Points(NamedTuple):
    """Values against a measure of distance, in the order of the steps; `right` for a scale of their own."""

    distances: Sequence[float]
    values: Sequence[float]
    right: bool = False


def line_plot(lines: Mapping[str, Line], *, label: str, log: bool = False) -> str:
    """Lines over steps as an SVG element.

    Args:
        lines: by their name in the legend; a single line has no legend.
        label: what the values are, for people who don't see the plot.
        log: put the values on a logarithmic scale.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.4, 2.9), layout="constrained")
        axes = figure.subplots()
        for colour, (name, line) in zip(_cycle(len(lines)), lines.items()):
            alone = len(line.steps) == 1
            axes.plot(
                line.steps, line.values, "--" if line.dashed else "-", color=colour, label=name, linewidth=1.8,
                marker="o" if alone or line.dashed else None, markersize=4,
            )  # fmt: skip
            if line.band is not None:
                axes.fill_between(line.steps, *line.band, color=colour, alpha=0.18, linewidth=0)
        axes.set_xlabel("step")
        if log:
            axes.set_yscale("log")
        axes.margins(x=0.01)
        if len(lines) > 1:
            axes.legend(loc="best")
        return svg(figure, label)


def stack_plot(steps: Sequence[float], parts: Mapping[str, Sequence[float]], *, label: str) -> str:
    """Parts of a whole over steps, on top of each other, as an SVG element.

    Args:
        steps: where the values stand.
        parts: by their name in the legend, the lowest first; at most nine, the last of all in grey.
        label: what the values are, for people who don't see the plot.
    """
    colours = [*COLOURS[: len(COLOURS) - 1], "#b39b1e", "#63b3dd", "#a5603c"][: len(parts) - 1]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.4, 2.9), layout="constrained")
        axes = figure.subplots()
        if len(steps) == 1:  # an area has no width there
            steps, parts = [steps[0] - 0.5, steps[0] + 0.5], {name: [*v, *v] for name, v in parts.items()}
        axes.stackplot(
            steps, *parts.values(), labels=list(parts), colors=[*colours, COLOURS[-1]], linewidth=0
        )
        axes.set_xlabel("step")
        axes.margins(x=0, y=0.02)
        handles, names = axes.get_legend_handles_labels()
        # the order of the stack, beside it: within, it would hide a part
        axes.legend(handles[::-1], names[::-1], loc="center left", bbox_to_anchor=(1, 0.5))
        return svg(figure, label)


def frontier_plot(points: Mapping[str, Points], *, across: str, label: str) -> str:
    """What was gained against how far the policy went for it, as an SVG element; a ring marks where it ended.

    Args:
        points: by their name in the legend.
        across: what the distance is.
        label: what the values are, for people who don't see the plot.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.4, 2.9), layout="constrained")
        axes = figure.subplots()
        right = axes.twinx() if any(of.right for of in points.values()) else axes
        if right is not axes:
            right.grid(visible=False)
        handles = []
        for colour, (name, of) in zip(_cycle(len(points)), points.items()):
            side = right if of.right else axes
            handles += side.plot(
                of.distances, of.values, "-o", color=colour, label=name, linewidth=1.4, markersize=4
            )
            side.plot(of.distances[-1:], of.values[-1:], "o", color=colour, markersize=11, fillstyle="none")
            if right is not axes:  # each scale in the colour of what it measures
                side.tick_params(axis="y", labelcolor=colour)
        axes.set_xlabel(across)
        if len(points) > 1:
            # above the plot: "best" would know the points of one scale alone
            axes.legend(
                handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(points), borderaxespad=0
            )
        return svg(figure, label)


def interval_plot(
    rows: Mapping[str, Mapping[str, tuple[float, float, float]]], *, label: str, middle: float
) -> str:
    """Estimates with their intervals, one row a name, one colour a kind, as an SVG element.

    Args:
        rows: name, kind, and (estimate, low, high).
        label: what the values are, for people who don't see the plot.
        middle: where a line is drawn: no difference.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10.8, 0.8 + 0.5 * len(rows)), layout="constrained")
        axes = figure.subplots()
        draw_intervals(axes, rows, middle)
        return svg(figure, label)


def reliability_plot(bins: Sequence[tuple[float, float, int]]) -> str:
    """Accuracy against confidence as an SVG element.

    Args:
        bins: confidence, accuracy, and pairs of each bin; larger bins have larger points.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.4, 2.9), layout="constrained")
        axes = figure.subplots()
        axes.plot([0.5, 1], [0.5, 1], ":", color=matplotlib.rcParams["text.color"], linewidth=1)
        most = max(count for _, _, count in bins)
        confidences, accuracies = [entry[0] for entry in bins], [entry[1] for entry in bins]
        axes.plot(confidences, accuracies, color=COLOURS[0], linewidth=1.2)
        axes.scatter(confidences, accuracies, [10 + 70 * entry[2] / most for entry in bins], COLOURS[0])
        axes.set(xlim=(0.49, 1.01), ylim=(-0.03, 1.03), xlabel="confidence", ylabel="share right")
        return svg(figure, "share of pairs that are right against confidence")


def draw_intervals(
    axes: Axes, rows: Mapping[str, Mapping[str, tuple[float, float, float]]], middle: float
) -> None:
    """The same on axes of a figure of one's own."""
    kinds = list(dict.fromkeys(kind for values in rows.values() for kind in values))
    for kind, colour in zip(kinds, _cycle(len(kinds))):
        points = [(at, values[kind]) for at, values in enumerate(rows.values()) if kind in values]
        offset = 0.13 * (kinds.index(kind) - (len(kinds) - 1) / 2)
        estimates = [value[0] for _, value in points]
        errors = [[v[0] - v[1] for _, v in points], [v[2] - v[0] for _, v in points]]
        axes.errorbar(
            estimates, [at + offset for at, _ in points], xerr=errors, fmt="o", color=colour, label=kind,
            capsize=3, markersize=6, linewidth=2,
        )  # fmt: skip
    axes.axvline(middle, color=matplotlib.rcParams["text.color"], linewidth=1, linestyle=":")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(kinds), borderaxespad=0)


def svg(figure: Figure, label: str) -> str:
    """A figure drawn in this module's style as an SVG element for a page."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "var(--ink)").replace(_GRID, "var(--grid)")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'font: ([\d.]+px) [^;"]+', r"font: \1 inherit", text)
    # The element's size is the page's affair; viewBox keeps its shape.
    return re.sub(r'<svg [^>]*?(viewBox="[^"]+")[^>]*>', _opening(label), text, count=1)


def _opening(label: str) -> str:
    safe = label.replace("&", "&amp;").replace('"', "&quot;").replace("\\", "")
    return rf'<svg \1 role="img" aria-label="{safe}" xmlns:xlink="http://www.w3.org/1999/xlink">'


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]
