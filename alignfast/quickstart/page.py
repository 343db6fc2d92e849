"""report.html of the quickstart: the table, win rates, the frontier, answers side by side, and how training went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignfast.findings import series
from alignfast.quickstart.measure import Comparison
from alignfast.quickstart.run import Passage
from alignfast.quickstart.stages import METHODS, ON_POLICY, SFT
from alignfast.quickstart.summary import (
    ALL,
    HEADERS,
    comparisons,
    figure_rows,
    intervals,
    is_gain,
    verdict,
)
from alignfast.report.page import cards, details, figure, grid, page, section, table
from alignfast.report.plots import Line, Points, frontier_plot, interval_plot, line_plot
from alignfast.trainers.metrics import read_metrics

_KL = "KL of an answer to the fine-tuned model, in nats"
# Folder, metric, and caption of what is drawn over the steps of training.
_CURVES = (
    ("sft", "loss", "SFT: loss"),
    ("reward", "accuracy", "Reward model: share of votes that it is right about"),
    ("dpo", "rewards/accuracies", "DPO: share of votes that it is right about"),
    ("dpo", "rewards/margins", "DPO: margin"),
    ("ppo", "objective/scores", "PPO: reward model's score of what was drawn"),
    ("ppo", "val/explained_variance", "PPO: share of the returns' variance that the critic explains"),
    ("grpo", "reward", "GRPO: reward model's score of what was drawn"),
    ("grpo", "kl", "GRPO: KL of a token to the fine-tuned model, in nats"),
)


def write_page(path: Path, passages: Sequence[Passage], folder: Path, seconds: float) -> None:
    """The whole page; curves are read from the metrics that the trainings left in the folder."""
    compared = comparisons(passages)
    per_seed = [
        [name if i == 0 else "", *row]
        for name in compared
        for i, row in enumerate(figure_rows(name, compared))
    ]
    path.write_text(
        page(
            "alignfast quickstart",
            f"SFT, a reward model, DPO, PPO and GRPO; {len(passages)} seeds, {seconds / 60:.1f} minutes",
            cards(_cards(compared[ALL], passages)),
            f"<p>{verdict(passages)}</p>",
            section("Held-out questions", table(["", *HEADERS], per_seed, numbers=range(2, 7))),
            section(
                "Win rates",
                figure(
                    "Win rate against the fine-tuned model",
                    interval_plot(intervals(compared), label="win rates with 95 % intervals", middle=0.5),
                    "held-out questions, judged by AFINN; 0.5 is no difference",
                ),
            ),
            section(
                "What was gained, and how far the models went for it", grid(_frontiers(passages, folder))
            ),
            section("Answers to held-out questions", *map(_answers, passages)),
            section("Training", grid([_curve(passages, folder, *curve) for curve in _CURVES])),
        )
    )


def _cards(of: Comparison, passages: Sequence[Passage]) -> list[tuple[str, str]]:
    rates = [
        (
            f"win rate of {'SFT against itself' if name == SFT else name.upper()} "
            f"(95 %: {of.rate(name).rate.low:.1%} to {of.rate(name).rate.high:.1%})",
            f"{of.rate(name).rate.estimate:.1%}",
        )
        for name in of.models
    ]
    return [
        *rates,
        ("a gain: PPO and GRPO above SFT in every seed", "yes" if is_gain(passages) else "not shown"),
    ]


def _frontiers(passages: Sequence[Passage], folder: Path) -> list[str]:
    """What the judge and what the reward model says, against the KL; means over seeds."""
    together = comparisons(passages)[ALL]
    gold = {name.upper(): _path(passages, folder, name, "eval_gold/reward") for name in ON_POLICY}
    start, end = together.models[SFT], together.models["dpo"]
    gold["DPO"] = Points([0.0, end.kl], [start.gold, end.gold])  # it draws nothing as it trains
    trained = {name.upper(): _path(passages, folder, name, "eval_reward") for name in ON_POLICY}
    return [
        figure(
            "Gold reward against KL",
            frontier_plot(gold, across=_KL, label="gold reward against KL"),
            "AFINN, which nothing trained on; from the fine-tuned model to the ring, held out",
        ),
        figure(
            "Reward model against KL",
            frontier_plot(trained, across=_KL, label="the reward model's score against KL"),
            "what PPO and GRPO trained on; held out",
        ),
    ]


def _path(passages: Sequence[Passage], folder: Path, method: str, metric: str) -> Points:
    """A metric against the KL as one method trained, each a mean over seeds."""
    distances, values = [], []
    for passage in passages:
        rows = _metrics(folder, passage, method)
        distances.append(series(rows, "eval_kl_sequence")[1])
        values.append(series(rows, metric)[1])
    return Points(np.mean(distances, 0).tolist(), np.mean(values, 0).tolist())


def _answers(passage: Passage) -> str:
    rows = [[question, *answers.values()] for question, answers in passage.samples]
    shown = table(["question", *(name.upper() for name in (SFT, *METHODS))], rows)
    return shown if passage.seed == 0 else details(f"seed {passage.seed}", shown)


def _curve(passages: Sequence[Passage], folder: Path, stage: str, metric: str, caption: str) -> str:
    lines = {}
    for passage in passages:
        lines[f"seed {passage.seed}"] = Line(*series(_metrics(folder, passage, stage), metric))
    return figure(caption, line_plot(lines, label=f"{caption} over steps"))


def _metrics(folder: Path, passage: Passage, stage: str) -> list[dict[str, Any]]:
    return read_metrics(folder / f"seed-{passage.seed}" / stage / "metrics.jsonl")
