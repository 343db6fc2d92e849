"""A run of the benches as one HTML page that needs no other file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from alignfast.bench import growth
from alignfast.bench.plots import Plot
from alignfast.bench.results import Row, Run
from alignfast.bench.tables import bytes_text, machine_line, seconds_text
from alignfast.report import page as html

_KINDS = {
    "growth": (
        "How costs grow",
        "Fitted exponents stand in the legends: 1 is in proportion, 0 stays as it is, 2 is the square.",
    ),
    "time": (
        "Time",
        "A whisker is the 20th to the 80th percentile; the dotted line is what this machine's own bandwidth and GEMM rate "
        "allow for what must be moved and computed.",
    ),
    "memory": (
        "Memory",
        "Most that a call held at once beyond its inputs: its results and all it used on the way.",
    ),
}


def page(run: Run, plots: Sequence[Plot], source: Callable[[Path], str]) -> str:
    """The page's HTML.

    Args:
        run: what was measured.
        plots: of it.
        source: what a picture's `src` is.
    """
    parts = [html.cards(_cards(run))]
    for plot in plots:
        if plot.kind == "roofline":
            parts += [
                "<h2>Roofline</h2><p class=soft>Across: FLOPs by byte that must be moved. Up: FLOPs a second that were "
                "reached. The lines are this machine's own limits, measured in the same run; what stays in the cache may pass "
                "the memory's.</p>",
                _picture(plot, source),
            ]
    for kind, (title, text) in _KINDS.items():
        found = [_picture(plot, source) for plot in plots if plot.kind == kind]
        if found:
            parts.append(f"<h2>{title}</h2><p class=soft>{text}</p>{html.grid(found)}")
    parts.append("<h2>Figures</h2>")
    parts += [_table(group, rows, run) for group, rows in run.groups.items()]
    sweeps = _growth(run)
    if sweeps:
        parts.append(f"<h2>Exponents</h2>{sweeps}")
    if run.left_out:
        whys = dict.fromkeys((e["provider"], e["outcome"], e["reason"]) for e in run.left_out)
        parts.append(
            f"<h2>Without a time</h2>{html.table(['provider', 'outcome', 'why'], [list(why) for why in whys])}"
        )
    style = "<style>img { display: block; width: 100%; height: auto; border-radius: .3rem; }</style>"
    return html.page("alignfast bench", machine_line(run), style + "".join(parts))


def _cards(run: Run) -> list[tuple[str, str]]:
    limits = run.limits
    return [
        ("reading memory", f"{limits['read_gb_s']:.4g} GB/s"),
        ("copying memory", f"{limits['copy_gb_s']:.4g} GB/s"),
        ("matrix products", f"{limits['gemm_gflop_s']:.4g} GFLOP/s"),
        ("figures", str(len(run.rows))),
    ]


def _picture(plot: Plot, source: Callable[[Path], str]) -> str:
    title = escape(plot.title, quote=True)
    return html.figure(plot.title, f'<img loading="lazy" alt="{title}" src="{source(plot.path)}">')


def _table(group: str, rows: Sequence[Row], run: Run) -> str:
    shapes = list(dict.fromkeys(row.shape for row in rows))
    lines = []
    for row in sorted(rows, key=lambda row: (shapes.index(row.shape), row.median)):
        floor, error = row.floor(run.limits), row.info.get("error")
        lines.append(
            [
                row.shape,
                row.provider,
                seconds_text(row.median),
                f"{seconds_text(row.low)} to {seconds_text(row.high)}",
                "" if floor is None else seconds_text(floor),
                f"{row.info['share']:.0%}" if "share" in row.info else "",
                bytes_text(row.peak_bytes),
                "" if error is None else f"{error:.1e}",
            ]
        )
    head = [
        "shape",
        "provider",
        "median",
        "20 to 80 %",
        "floor",
        "share of the limit",
        "peak memory",
        "error",
    ]
    return html.details(group, html.table(head, lines, range(2, 8)))


def _growth(run: Run) -> str:
    lines = []
    for sweep in growth.sweeps(run.rows):
        fits = [growth.fit(sweep, what) for what in ("time", "memory")]
        shown = ["" if fit is None else f"{fit:.2f}" for fit in fits]
        lines.append([sweep.group, sweep.axis, sweep.provider, *shown])
    return html.table(["what", "over", "provider", "time ~ x^", "memory ~ x^"], lines, (3, 4))
