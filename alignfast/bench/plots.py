"""Plots of a run as PNG: time and memory of every group, a roofline of all, and how costs grow.

Roofline: a point is a provider at a shape; across stands FLOPs by byte that must be moved, up the FLOPs a second it reached;
the two lines are what the machine itself reached in the same run, so no point can be far above them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from alignfast.bench import growth
from alignfast.bench.results import Row, Run
from alignfast.bench.tables import bytes_text, seconds_text
from alignfast.report.plots import COLOURS

_OURS = {"native": COLOURS[0], "triton": "#1a9c77", "torch": "#7fb2dd"}
# Peers keep their colour from plot to plot and from run to run
_KNOWN = (
    "eager",
    "compile",
    "trl",
    "liger",
    "F.linear_cross_entropy",
    "padded",
    "loop",
    "verl",
    "quack",
    "generate",
)
_PEERS = ("#e0861a", "#c4567e", "#8a6fc4", "#b39b1e", "#a5603c", "#4f5d75", "#d17a7a", "#5e8f3f", "#9c9c9c",
          "#2b7a78", "#7a4f9a", "#c98b2b", "#6d6d6d")  # fmt: skip
_MARKS = "osD^vP*Xph"
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#b8bec8",
    "axes.labelcolor": "#1d2430",
    "text.color": "#1d2430",
    "xtick.color": "#5b6472",
    "ytick.color": "#1d2430",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e6eb",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "figure.facecolor": "white",
}
_MOST_SHAPES = 10  # panels of a bar plot


class Plot(NamedTuple):
    """A file, what it shows, and of what kind it is: time, memory, roofline or growth."""

    path: Path
    title: str
    kind: str


def draw(run: Run, folder: Path) -> list[Plot]:
    """All plots of a run, written into a folder; what has no figures has no plot."""
    plots: list[Plot] = []
    colours = palette(run.rows)

    def save(figure: Figure, name: str, title: str, kind: str) -> None:
        path = folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.png"
        figure.savefig(path, dpi=150)
        plots.append(Plot(path, title, kind))

    with matplotlib.rc_context(_STYLE):
        figure = roofline(run, colours)
        if figure is not None:
            save(figure, "roofline", "Everything against this machine's limits", "roofline")
        for group, rows in _sweep_groups(run).items():
            for what in ("time", "memory"):
                if any(len(growth.points(sweep, what)) > 1 for sweep in growth.sweeps(rows)):
                    title = f"{group}: {what}"
                    save(growth_plot(rows, what, colours), f"growth {title}", title, "growth")
        for group, rows in run.groups.items():
            rows = [row for row in rows if row.axis is None]
            if rows:
                save(bars(rows, run, "time", colours), f"time {group}", group, "time")
            if any(row.peak_bytes for row in rows):
                save(bars(rows, run, "memory", colours), f"memory {group}", group, "memory")
    return plots


def palette(rows: Sequence[Row]) -> dict[str, str]:
    """A colour for each provider."""
    found: dict[str, str] = {}
    others = len(_KNOWN)
    for provider in dict.fromkeys(row.provider for row in rows):
        if provider.startswith("alignfast") or provider == "patched":
            backend = next((name for name in _OURS if name in provider), "native")
            found[provider] = _OURS[backend]
        else:
            known = next((at for at, name in enumerate(_KNOWN) if provider.split()[0] == name), None)
            found[provider] = _PEERS[(others if known is None else known) % len(_PEERS)]
            others += known is None
    return found


def bars(rows: Sequence[Row], run: Run, what: str, colours: dict[str, str]) -> Figure:
    """Providers of a group as bars, a panel a shape; a whisker is the 20th to the 80th percentile, a line the floor."""
    known = list(dict.fromkeys(row.shape for row in rows))
    shapes = known[:_MOST_SHAPES]
    cut = f", {len(shapes)} of {len(known)} shapes" if len(known) > len(shapes) else ""
    panels = [_ordered([row for row in rows if row.shape == shape], what) for shape in shapes]
    heights = [0.62 + 0.3 * len(panel) for panel in panels]
    figure = Figure(figsize=(7.6, 0.65 + sum(heights)), layout="constrained")
    _titled(figure, f"{rows[0].group}: {what}{cut}")
    all_axes = figure.subplots(len(shapes), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, shape, panel in zip(all_axes, shapes, panels):
        _bar_panel(axes, panel, run, what, colours)
        axes.set_title(shape, fontsize=9.5, loc="left", color="#5b6472")
    all_axes[-1].set_xlabel(
        "milliseconds, median; dotted: what this machine's own limits allow" if what == "time"
        else "peak memory beyond the inputs, MiB" if not any("step_s_median" in row.info for row in rows) else "peak memory of the process, MiB"
    )  # fmt: skip
    return figure


def _bar_panel(axes: Axes, panel: Sequence[Row], run: Run, what: str, colours: dict[str, str]) -> None:
    scale = 1e3 if what == "time" else 2**-20
    values = [(row.median if what == "time" else row.peak_bytes or 0.0) * scale for row in panel]
    places = range(len(panel))
    axes.barh(places, values, color=[colours[row.provider] for row in panel], height=0.68)
    if what == "time":
        spans = [
            [max(row.median - row.low, 0) * scale for row in panel],
            [max(row.high - row.median, 0) * scale for row in panel],
        ]
        axes.errorbar(values, places, xerr=spans, fmt="none", ecolor="#1d2430", elinewidth=1, capsize=2)
        floors = [row.floor(run.limits) for row in panel]
        known = [floor for floor in floors if floor is not None]
        if known:
            axes.axvline(min(known) * scale, color="#1d2430", linestyle=":", linewidth=1.2)
    longest = max([*values, *([row.high * scale for row in panel] if what == "time" else [])], default=1.0)
    wide = max(values, default=0) > 100 * max(min(values, default=0), 1e-12)
    if wide and min(values) > 0:  # bars of a hundredth of the axis say nothing
        axes.set_xscale("log")
        axes.set_xlim(min(values) / 3, longest * 4)
    else:
        axes.set_xlim(0, longest * 1.24 or 1.0)
    for place, row, value in zip(places, panel, values):
        text = seconds_text(row.median) if what == "time" else bytes_text(row.peak_bytes) or "not known"
        end = max(value, row.high * scale) if what == "time" else value
        axes.annotate(
            text, (max(end, axes.get_xlim()[0]), place), (5, 0), textcoords="offset points", va="center", fontsize=8.5
        )  # fmt: skip
    axes.set_yticks(places, [row.provider for row in panel], fontsize=9)
    axes.set_ylim(len(panel) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def _titled(figure: Figure, title: str) -> None:
    """A title at the left edge: a PNG is passed on without its page."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")


def _ordered(rows: Sequence[Row], what: str) -> list[Row]:
    return sorted(rows, key=lambda row: row.median if what == "time" else row.peak_bytes or 0.0)


def roofline(run: Run, colours: dict[str, str]) -> Figure | None:
    """Every provider at its group's largest shape, under the machine's bandwidth and GEMM rate; one mark an op."""
    points: list[tuple[str, Row]] = []
    for rows in run.groups.values():
        counted = [row for row in rows if row.info.get("flops") and _moved(row) and row.axis is None]
        if counted:
            most = max(counted, key=lambda row: row.info["flops"]).shape
            points += [(_op(row.group), row) for row in counted if row.shape == most]
    if not points:
        return None
    ops = list(dict.fromkeys(op for op, _ in points))
    figure = Figure(figsize=(9.6, 6.2), layout="constrained")
    _titled(figure, "What each provider reached, under this machine's own limits")
    axes = figure.subplots()
    intensities = [row.info["flops"] / _moved(row) for _, row in points]
    left, right = min(intensities) / 3, max(max(intensities) * 3, 100.0)
    bandwidth, peak = max(run.limits["read_gb_s"], run.limits["copy_gb_s"]), run.limits["gemm_gflop_s"]
    corner = peak / bandwidth
    xs = [left, *([corner] if left < corner < right else []), right]
    axes.plot(xs, [min(x * bandwidth, peak) for x in xs], color="#1d2430", linewidth=1.6)
    middle = (left * min(corner, right)) ** 0.5
    labels: Any = {"textcoords": "offset points", "fontsize": 9, "ha": "right"}
    axes.annotate(f"memory {bandwidth:.3g} GB/s", (middle, middle * bandwidth), (-7, 3), **labels)
    axes.annotate(f"GEMM {peak:.4g} GFLOP/s", (right, peak), (-4, 5), **labels)
    for (op, row), x in zip(points, intensities):
        axes.plot(
            x, row.info["flops"] / row.median / 1e9, _MARKS[ops.index(op) % len(_MARKS)], markersize=8, alpha=0.9,
            color=colours[row.provider], markeredgecolor="white", markeredgewidth=0.8,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOPs by byte that must be moved", ylabel="GFLOP/s reached, median",
             xlim=(left, right))  # fmt: skip
    kinds = [
        axes.plot([], [], _MARKS[at % len(_MARKS)], color="#5b6472", markersize=7, label=op)[0]
        for at, op in enumerate(ops)
    ]
    whose = [
        axes.plot([], [], "s", color=colours[provider], markersize=7, label=provider)[0]
        for provider in dict.fromkeys(row.provider for _, row in points)
    ]
    figure.legend(handles=[*whose, *kinds], loc="outside right upper", fontsize=8.5)
    return figure


def _op(group: str) -> str:
    return group.replace(",", " ").split()[0]


def _moved(row: Row) -> float:
    return row.info.get("moved_bytes") or row.info.get("read_bytes") or 0.0


def growth_plot(rows: Sequence[Row], what: str, colours: dict[str, str]) -> Figure:
    """A sweep of one group, each provider with its fitted exponent."""
    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    _titled(figure, f"{rows[0].group}: {what}")
    axes = figure.subplots()
    scale: Callable[[float], float] = (lambda y: y * 1e3) if what == "time" else (lambda y: y / 2**20)
    label = ""
    for at, sweep in enumerate(growth.sweeps(rows)):
        known = growth.points(sweep, what)
        if not known:
            continue
        fit, label = growth.fit(sweep, what), sweep.axis
        name = sweep.provider if fit is None else f"{sweep.provider}  ~ x^{fit:.2f}"
        xs, ys = [x for x, _ in known], [scale(y) for _, y in known]
        axes.plot(
            xs, ys, f"-{_MARKS[at % len(_MARKS)]}", color=colours[sweep.provider], label=name, markersize=5
        )
        if what == "time":
            axes.fill_between(
                xs, [scale(row.low) for row in sweep.rows], [scale(row.high) for row in sweep.rows],
                color=colours[sweep.provider], alpha=0.18, linewidth=0,
            )  # fmt: skip
    share = label.endswith("share")
    axes.set(
        xscale="linear" if share else "log", yscale="log", xlabel=label,
        ylabel="milliseconds, median" if what == "time" else "peak memory beyond the inputs, MiB",
    )  # fmt: skip
    ticks = sorted({row.axis[1] for row in rows if row.axis})
    axes.set_xticks(ticks, [_size_text(tick) for tick in ticks], fontsize=8.5)
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    figure.legend(loc="outside right upper", fontsize=9)
    return figure


def _size_text(size: float) -> str:
    """Powers of two by 1024, other thousands by 1000.

    >>> [_size_text(size) for size in (64, 65_536, 151_936, 256_000)]
    ['64', '64k', '152k', '256k']
    """
    if size < 1000:
        return f"{size:g}"
    return f"{size / (1024 if math.log2(size).is_integer() else 1000):.0f}k"


def _sweep_groups(run: Run) -> dict[str, list[Row]]:
    """Rows that are swept, by group and axis."""
    found: dict[str, list[Row]] = {}
    for row in run.rows:
        if row.axis is not None:
            name = row.group if row.axis[0] in row.group else f"{row.group} over {row.axis[0]}"
            found.setdefault(name, []).append(row)
    return found
