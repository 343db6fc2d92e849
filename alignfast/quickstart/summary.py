"""What the quickstart shows at its end: one table, answers, a verdict; quickstart.json and a plot of the same figures.

A gain is: PPO and GRPO beat the fine-tuned model in every seed, as `Comparison.beats_sft` says.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from alignfast.quickstart.judges import FLIPPED
from alignfast.quickstart.measure import MOST_KL, Comparison, together
from alignfast.quickstart.run import Passage, Sizes
from alignfast.quickstart.stages import METHODS, ON_POLICY, SFT
from alignfast.report.plots import draw_intervals

HEADERS = ("model", "gold\nreward", "win rate (95 %)", "KL", "seconds", "beats\nSFT")
ALL = "all seeds"
_ANSWERS = 2  # questions whose answers are printed


def show(passages: Sequence[Passage], folder: Path, sizes: Sizes, seconds: float, console: Console) -> None:
    """Print the summary, and write its figures and their plot."""
    compared = comparisons(passages)
    _write_json(folder / "quickstart.json", passages, compared, sizes, seconds)
    _write_plot(folder / "quickstart.png", compared)
    console.print(_figures_table(compared))
    console.print(_answers_table(passages[0]))
    console.print(verdict(passages), soft_wrap=True)


def comparisons(passages: Sequence[Passage]) -> dict[str, Comparison]:
    """By name: all seeds together, then each."""
    each = {f"seed {passage.seed}": passage.comparison for passage in passages}
    return {ALL: together(list(each.values()))} | each


def seeds_won(passages: Sequence[Passage]) -> dict[str, int]:
    """In how many seeds each method beats the fine-tuned model."""
    return {name: sum(passage.comparison.beats_sft(name) for passage in passages) for name in METHODS}


def is_gain(passages: Sequence[Passage]) -> bool:
    """Whether PPO and GRPO do so in every seed."""
    won = seeds_won(passages)
    return all(won[name] == len(passages) for name in ON_POLICY)


def verdict(passages: Sequence[Passage]) -> str:
    """What the figures say, and what they do not."""
    of, number = comparisons(passages)[ALL], len(passages)
    itself, won = of.rate(SFT).rate.estimate, seeds_won(passages)
    if is_gain(passages):
        rates = ", ".join(f"{name.upper()} {of.rate(name).rate.estimate:.3f}" for name in METHODS)
        farthest = max(passage.comparison.models[name].kl for passage in passages for name in ON_POLICY)
        shown = (
            f"A gain: against the fine-tuned model, which wins {itself:.3f} against itself, the win rates are {rates}. Of PPO "
            f"and GRPO the intervals lie above that model's in each of {number} seeds, at a KL of at most {farthest:.1f} nats."
        )
    else:
        counts = ", ".join(f"{name.upper()} {count}" for name, count in won.items())
        shown = (
            "No gain is shown: the win rate's interval lies above that of the fine-tuned model against itself, at a KL under "
            f"{MOST_KL:g} nats, in so many of {number} seeds: {counts}."
        )
    right = sorted({f"{passage.reward_accuracy.estimate:.0%}" for passage in passages})
    formed = ", ".join(
        f"{name.upper()} {np.mean(model.well_formed):.0%}" for name, model in of.models.items()
    )
    return (
        f"{shown} The judge, AFINN, took no part in training; the simulated user, VADER, had {FLIPPED:.0%} of its votes "
        f"flipped, and the reward model is right about {' to '.join(dict.fromkeys((right[0], right[-1])))} of those it has not seen. Answers "
        f"that follow the grammar to the letter: {formed}."
    )


def figure_rows(name: str, compared: dict[str, Comparison]) -> list[tuple[str, ...]]:
    """A row of figures for each model of one comparison, under `HEADERS`."""
    of = compared[name]
    seeds = [one for key, one in compared.items() if key != ALL]
    rows: list[tuple[str, ...]] = []
    for model, measured in of.models.items():
        rate = of.rate(model).rate
        won = f"{sum(one.beats_sft(model) for one in seeds)} of {len(seeds)}"
        beats = won if name == ALL else "yes" if of.beats_sft(model) else "no"
        rows.append(
            (
                model.upper(),
                f"{measured.gold:.2f}",
                f"{rate.estimate:.3f} ({rate.low:.3f} to {rate.high:.3f})",
                f"{round(measured.kl, 1) + 0:.1f}",  # no -0.0
                f"{measured.seconds:.0f}",
                "" if model == SFT else beats,
            )
        )
    return rows


def _figures_table(compared: dict[str, Comparison]) -> Table:
    table = Table(
        title="Held-out questions, judged by AFINN; win rate against SFT's answers",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("")
    for name in HEADERS:
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for name in compared:
        for i, row in enumerate(figure_rows(name, compared)):
            table.add_row("" if i else name, *row, style="bold" if name == ALL else None)
        table.add_section()
    table.caption = "KL to SFT in nats of an answer. SFT against itself: answers drawn anew."
    return table


def _answers_table(passage: Passage) -> Table:
    table = Table(
        title=f"Answers to held-out questions, seed {passage.seed}",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        show_header=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("model", style="bold")
    table.add_column("answer")
    for question, answers in passage.samples[:_ANSWERS]:
        table.add_row("", question, style="italic")
        for name, text in answers.items():
            table.add_row(name.upper(), text)
        table.add_section()
    return table


def _write_json(
    path: Path, passages: Sequence[Passage], compared: dict[str, Comparison], sizes: Sizes, seconds: float
) -> None:
    def plain(of: Comparison) -> dict[str, Any]:
        return {
            name: {
                "gold_reward": model.gold,
                "win_rate": of.rate(name).to_dict(),
                "kl": model.kl,
                "seconds": round(model.seconds, 1),
                "well_formed": float(np.mean(model.well_formed)),
            }
            for name, model in of.models.items()
        }

    content = {
        "gain": is_gain(passages),
        "seeds_won": seeds_won(passages),
        "all_seeds": plain(compared[ALL]),
        "seeds": [
            {
                "seed": passage.seed,
                "models": plain(passage.comparison),
                "votes": passage.votes,
                "reward_model": {
                    "accuracy": passage.reward_accuracy._asdict(),
                    "seconds": round(passage.reward_seconds, 1),
                },
                "samples": [{"question": question, **answers} for question, answers in passage.samples],
            }
            for passage in passages
        ],
        "votes_flipped": FLIPPED,
        "most_kl": MOST_KL,
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


def intervals(compared: dict[str, Comparison]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Win rates for a plot of intervals."""
    return {
        name: {
            "SFT against itself" if model == SFT else model.upper(): of.rate(model).rate
            for model in of.models
        }
        for name, of in compared.items()
    }


def _write_plot(path: Path, compared: dict[str, Comparison]) -> None:
    drawing = Figure(figsize=(8, 1.6 + 0.6 * len(compared)), layout="constrained")
    axes = drawing.subplots()
    draw_intervals(axes, intervals(compared), middle=0.5)
    axes.set_xlabel("win rate against the fine-tuned model, judged by AFINN, with 95 % intervals")
    drawing.savefig(path, dpi=150)
