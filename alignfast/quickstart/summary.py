"""What the quickstart shows at its end: a table, a plot, quickstart.json and report.html, all from the same figures."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from alignfast.evaluation import WinRate
from alignfast.findings import series
from alignfast.quickstart.judges import FLIPPED
from alignfast.quickstart.run import Measured, Sizes, together
from alignfast.report.page import cards, details, figure, grid, page, section, table
from alignfast.report.plots import Line, draw_intervals, interval_plot, line_plot
from alignfast.trainers.metrics import read_metrics

BEFORE, AFTER = "before: sampled again", "after: aligned by DPO"


def show(seeds: Sequence[Measured], folder: Path, sizes: Sizes, seconds: float, console: Console) -> bool:
    """Print the summary and write its files; says whether there is a gain.

    A gain is: over all seeds, the interval of the aligned model's win rate lies above that of the second sample.
    """
    before, after = together(seeds)
    gain = after.rate.low > before.rate.high
    rates = {f"seed {one.seed}": one.rates for one in seeds} | {"all seeds": (before, after)}
    _write_json(folder / "quickstart.json", seeds, rates, gain, sizes, seconds)
    _write_plot(folder / "quickstart.png", rates)
    _write_page(folder / "report.html", seeds, folder, rates, gain, seconds)
    console.print(_rates_table(rates))
    console.print(_samples_table(seeds[0]))
    console.print(verdict(seeds, before, after), soft_wrap=True)
    return gain


def verdict(seeds: Sequence[Measured], before: WinRate, after: WinRate) -> str:
    """What the figures say, and what they do not."""
    well = [sum(one.well_formed[i] for one in seeds) / len(seeds) for i in range(2)]
    shown = (
        f"A gain: the aligned model wins {after.rate}, against {before.rate} for a second sample of the model it came "
        "from; the intervals do not overlap."
        if after.rate.low > before.rate.high
        else f"No gain is shown: the aligned model wins {after.rate}, a second sample of the model it came from "
        f"{before.rate}; the intervals overlap."
    )
    return (
        f"{shown} The judge, AFINN, took no part in training; the simulated user, VADER, had {FLIPPED:.0%} of its votes "
        f"flipped. Answers that follow the grammar to the letter: {well[0]:.0%} before, {well[1]:.0%} after."
    )


def _rates_table(rates: dict[str, tuple[WinRate, WinRate]]) -> Table:
    table = Table(title="win rate against the fine-tuned model, held-out questions", title_justify="left")
    table.add_column("")
    for name in ("before", "after"):
        table.add_column(name, justify="right")
        table.add_column("95 %", justify="right")
    for name, pair in rates.items():
        cells = [(f"{r.rate.estimate:.3f}", f"{r.rate.low:.3f} to {r.rate.high:.3f}") for r in pair]
        table.add_row(
            name, *(text for cell in cells for text in cell), style="bold" if name == "all seeds" else None
        )
    return table


def _samples_table(measured: Measured) -> Table:
    table = Table(
        title=f"answers to held-out questions, seed {measured.seed}", title_justify="left", show_lines=True
    )
    for name in ("question", "before", "after"):
        table.add_column(name, ratio=1)
    for row in measured.samples[:4]:
        table.add_row(*row)
    return table


def _write_json(
    path: Path,
    seeds: Sequence[Measured],
    rates: dict[str, tuple[WinRate, WinRate]],
    gain: bool,
    sizes: Sizes,
    seconds: float,
) -> None:
    def plain(pair: tuple[WinRate, WinRate]) -> dict[str, Any]:
        return {"before": pair[0].to_dict(), "after": pair[1].to_dict()}

    content = {
        "gain": gain,
        "all_seeds": plain(rates["all seeds"]),
        "seeds": [
            {
                "seed": one.seed,
                **plain(one.rates),
                "votes": one.pairs,
                "well_formed": dict(zip(("before", "after"), one.well_formed)),
                "samples": [dict(zip(("question", "before", "after"), sample)) for sample in one.samples],
            }
            for one in seeds
        ],
        "votes_flipped": FLIPPED,
        "sizes": vars(sizes),
        "seconds": round(seconds, 1),
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            **{name: version(name) for name in ("torch", "transformers")},
        },
    }
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _intervals(rates: dict[str, tuple[WinRate, WinRate]]) -> dict[str, dict[str, tuple[float, float, float]]]:
    return {name: {BEFORE: b.rate, AFTER: a.rate} for name, (b, a) in rates.items()}


def _write_plot(path: Path, rates: dict[str, tuple[WinRate, WinRate]]) -> None:
    drawing = Figure(figsize=(8, 1.6 + 0.5 * len(rates)), layout="constrained")
    axes = drawing.subplots()
    draw_intervals(axes, _intervals(rates), middle=0.5)
    axes.set_xlabel("win rate against the fine-tuned model, judged by AFINN, with 95 % intervals")
    drawing.savefig(path, dpi=150)


def _write_page(
    path: Path,
    seeds: Sequence[Measured],
    folder: Path,
    rates: dict[str, tuple[WinRate, WinRate]],
    gain: bool,
    seconds: float,
) -> None:
    before, after = rates["all seeds"]
    samples = [
        details(f"seed {one.seed}", table(["question", "before", "after"], one.samples)) for one in seeds[1:]
    ]
    curves = [
        _curves(seeds, folder / "{}" / part, metric, caption)
        for part, metric, caption in (
            ("sft", "loss", "Fine-tuning: loss"),
            ("dpo", "loss", "DPO: loss"),
            ("dpo", "rewards/accuracies", "DPO: preference accuracy"),
            ("dpo", "rewards/margins", "DPO: margin"),
        )
    ]
    path.write_text(
        page(
            "alignfast quickstart",
            f"{len(seeds)} seeds, {seconds / 60:.1f} minutes",
            cards(
                [
                    (_card("win rate before", before), f"{before.rate.estimate:.1%}"),
                    (_card("win rate after", after), f"{after.rate.estimate:.1%}"),
                    ("a gain: intervals apart", "yes" if gain else "not shown"),
                    ("votes of the simulated user", f"{sum(one.pairs for one in seeds):,}"),
                ]
            ),
            f"<p>{verdict(seeds, before, after)}</p>",
            section(
                "Win rates",
                figure(
                    "Win rate against the fine-tuned model",
                    interval_plot(_intervals(rates), label="win rates with 95 % intervals", middle=0.5),
                    "held-out questions, judged by AFINN; 0.5 is no difference",
                ),
            ),
            section(
                f"Samples, seed {seeds[0].seed}",
                table(["question", "before", "after"], seeds[0].samples),
                *samples,
            ),
            section("Training", grid(curves)),
        )
    )


def _card(name: str, rate: WinRate) -> str:
    return f"{name} (95 %: {rate.rate.low:.1%} to {rate.rate.high:.1%})"


def _curves(seeds: Sequence[Measured], folder: Path, metric: str, caption: str) -> str:
    lines = {}
    for one in seeds:
        rows = read_metrics(str(folder / "metrics.jsonl").format(f"seed-{one.seed}"))
        lines[f"seed {one.seed}"] = Line(*series(rows, metric))
    return figure(caption, line_plot(lines, label=f"{caption} over steps"))
