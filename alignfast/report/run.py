"""The report of one run, from what lies in its folder: metrics.jsonl, config.yaml, samples.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from alignfast.findings import Finding, findings, read_run, series
from alignfast.report.page import cards, details, figure, grid, page, section, table
from alignfast.report.plots import Line, Points, frontier_plot, line_plot, reliability_plot
from alignfast.report.seconds import seconds_plot, seconds_table

# Caption, note, and the metrics drawn together; a metric is drawn where it was logged.
_HELD_OUT = "held out"
_PLOTS: tuple[tuple[str, str, Mapping[str, str]], ...] = (
    ("Loss", "", {"loss": "training", "eval_loss": "held out"}),
    (
        "Preference accuracy",
        "share of pairs where the chosen answer has the higher reward",
        {"rewards/accuracies": "training", "eval_rewards/accuracies": "held out"},
    ),
    (
        "Accuracy",
        "share of pairs where the better answer has the higher reward",
        {"accuracy": "training", "eval_accuracy": "held out"},
    ),
    ("Margin", "chosen reward over rejected", {"rewards/margins": "training", "eval_rewards/margins": "held out"}),
    ("Lead", "better answer's reward less the worse one's", {"margin": "training", "eval_margin": "held out"}),
    ("Rewards of answers", "", {"max_reward": "largest", "mean_reward": "mean", "min_reward": "smallest"}),
    ("Disagreement of heads", "standard deviation", {"disagreement": "training", "eval_disagreement": "held out"}),
    ("Reward", "of sampled completions", {
        "reward": "training", "objective/scores": "training", "eval_reward": "held out",
    }),
    ("Gold reward", "never trained on", {"eval_gold/reward": "held out"}),
    ("Win rate", "against the model as it was before training, with its 95 % interval", {"eval_win_rate": "held out"}),
    ("KL to the reference", "in nats, a token's mean; of KTO a completion's, its reference point", {
        "kl": "training", "eval_kl": "held out",
    }),
    ("KL of a completion", "to the reference, in nats", {
        "objective/kl": "training", "eval_kl_sequence": "held out",
    }),
    ("Completion length", "in tokens", {
        "completions/mean_length": "training", "eval_completions/mean_length": "held out",
    }),
    ("Cut completions", "share that reached max_completion_length", {
        "completions/clipped_ratio": "training", "eval_completions/clipped_ratio": "held out",
    }),
    ("Variety", "share of n-grams that are different ones, held out", {
        "eval_distinct_1": "distinct-1", "eval_distinct_2": "distinct-2",
    }),
    ("Clip fraction", "share of tokens whose ratio was clipped", {
        "clip_ratio/region_mean": "either way", "clip_ratio/low_mean": "below", "clip_ratio/high_mean": "above",
        "policy/clipfrac_avg": "policy", "val/clipfrac_avg": "critic",
    }),
    ("Groups alike", "share of prompts whose completions have all one reward", {"frac_reward_zero_std": "training"}),
    ("Rewards", "beta times the log-ratio to the reference", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
    ("Log-probs of answers", "in nats", {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
    ("Token accuracy", "share of tokens that were the likeliest", {
        "mean_token_accuracy": "training", "eval_mean_token_accuracy": "held out",
    }),
    ("Entropy", "in nats a token", {"entropy": "training", "eval_entropy": "held out"}),
    ("Speed", "tokens a second", {"tokens_per_second": "tokens/s"}),
    ("Learning rate", "", {"learning_rate": "learning rate"}),
    ("Gradient norm", "before clipping", {"grad_norm": "gradient norm"}),
)  # fmt: skip

# Distance, what the axis says of it, and what is set against it; the first that was logged is drawn.
_FRONTIERS: tuple[tuple[str, str, Mapping[str, str]], ...] = (
    (
        "eval_kl_sequence",
        "KL of a held-out completion to the reference, in nats",
        {"eval_reward": "trained on", "eval_gold/reward": "gold"},
    ),
    ("objective/kl", "KL of a completion to the reference, in nats", {"objective/scores": "trained on"}),
    ("kl", "KL of a token to the reference, in nats", {"reward": "trained on"}),
)


def write_report(folder: str | Path) -> Path:
    """Write report.html into a run's folder and return its path.

    Args:
        folder: the output_dir of a training.

    Raises:
        ValueError: the folder holds no run, or nothing was logged yet.
    """
    folder = Path(folder)
    rows, config = read_run(folder)
    path = folder / "report.html"
    path.write_text(
        page(
            folder.resolve().name,
            _subtitle(rows, config),
            cards(_figures(rows)),
            section("What stands out", finding_list(findings(rows, config))),
            section("Plots", grid([*plots(rows, config), *_reliability(folder / "calibration.json")])),
            section("Where the time went", seconds_table(rows, config)),
            *_samples(folder / "samples.jsonl"),
            section("Options", details("all options of the run", _options(config))),
        )
    )
    return path


def plots(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any] | None = None) -> list[str]:
    """A figure of every kind of metric that was logged; some need the run's config."""
    drawn = frontier(rows)
    for caption, note, names in _PLOTS:
        found: dict[str, Line] = {}
        for name, label in names.items():
            steps, values = series(rows, name)
            if steps and label not in found:  # of two names for one thing, the first
                found[label] = Line(
                    steps, values, dashed=label == _HELD_OUT, band=_band(rows, name, len(steps))
                )
        if found:
            drawn.append(figure(caption, line_plot(found, label=f"{caption} over steps"), note))
    return drawn + seconds_plot(rows, config or {})


def frontier(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Reward against KL: what was gained, and how far the model went for it; the reward that it trains on and the one that
    it should stand for."""
    for distance, across, names in _FRONTIERS:
        found: dict[str, Points] = {}
        for name, label in names.items():
            points = [
                (row[distance], row[name]) for row in rows if _finite(row, distance) and _finite(row, name)
            ]
            if len(points) > 1:
                distances, values = zip(*points)
                found[label] = Points(distances, values, right=bool(found))  # proxy and gold differ in scale
        if found:
            drawing = frontier_plot(found, across=across, label="reward against KL")
            return [figure("Reward against KL", drawing, "from the first step to the ring")]
    return []


def _finite(row: Mapping[str, Any], name: str) -> bool:
    return math.isfinite(row.get(name, math.nan))


def _band(
    rows: Sequence[Mapping[str, Any]], name: str, number: int
) -> tuple[Sequence[float], Sequence[float]] | None:
    """The ends of a metric's intervals, where it was logged with them."""
    low, high = series(rows, f"{name}_low")[1], series(rows, f"{name}_high")[1]
    return (low, high) if len(low) == len(high) == number else None


def finding_list(found: Sequence[Finding]) -> str:
    """Findings as a list, each with its mark."""
    items = "".join(f'<li><span class="tag {f.level}">{f.level}</span>{escape(f.text)}</li>' for f in found)
    return f'<ul class="findings">{items}</ul>'


def _subtitle(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> str:
    minutes = rows[-1].get("time", 0) / 60
    length = f"{minutes:.1f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"
    return f"{rows[-1]['step']:,} steps in {length}, seed {config.get('seed', 'unknown')}"


def _figures(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The last value of what people ask for first, and the speed over all."""
    wanted = {
        "reward": ("reward", "{:.3g}"),
        "eval_reward": ("held-out reward", "{:.3g}"),
        "eval_gold/reward": ("held-out gold reward", "{:.3g}"),
        "eval_win_rate": ("held-out win rate against the start", "{:.1%}"),
        "eval_kl_sequence": ("held-out KL of a completion", "{:.3g}"),
        "loss": ("loss", "{:.4g}"),
        "eval_loss": ("held-out loss", "{:.4g}"),
        "rewards/accuracies": ("preference accuracy", "{:.1%}"),
        "eval_rewards/accuracies": ("held-out preference accuracy", "{:.1%}"),
        "accuracy": ("accuracy", "{:.1%}"),
        "eval_accuracy": ("held-out accuracy", "{:.1%}"),
        "eval_ece": ("held-out calibration error", "{:.3f}"),
        "rewards/margins": ("margin", "{:.3g}"),
        "mean_token_accuracy": ("token accuracy", "{:.1%}"),
        "num_tokens": ("tokens trained on", "{:,.0f}"),
    }
    shown = []
    for name, (title, form) in wanted.items():
        values = series(rows, name)[1]
        if values:
            shown.append((title, form.format(values[-1])))
    speeds = series(rows, "tokens_per_second")[1]
    if speeds:
        shown.append(("tokens/s, median", f"{sorted(speeds)[len(speeds) // 2]:,.0f}"))
    return shown


def _reliability(file: Path) -> list[str]:
    """How often a reward model is right against how sure it is, from its last evaluation."""
    if not file.is_file():
        return []
    bins = json.loads(file.read_text())["bins"]
    drawing = reliability_plot([(entry["confidence"], entry["accuracy"], entry["pairs"]) for entry in bins])
    return [figure("Reliability", drawing, "held out: on the dotted line it is as often right as it says")]


def _samples(file: Path) -> list[str]:
    """Prompts with their completions, earliest and latest step side by side; then those drawn in training."""
    if not file.is_file():
        return []
    # not splitlines: a text may hold other ends of lines
    rows = [json.loads(line) for line in file.read_text().split("\n") if line.strip()]
    answers, drawn = [row for row in rows if "reward" not in row], [row for row in rows if "reward" in row]
    by_prompt: dict[str, dict[int, str]] = {}
    for row in answers:
        by_prompt.setdefault(_text(row["prompt"]), {}).setdefault(row["step"], _text(row["completion"]))
    ends = _ends(answers)
    sides = table(
        ["prompt", *(f"step {step:,}" for step in ends)],
        [[prompt, *(texts.get(step, "") for step in ends)] for prompt, texts in by_prompt.items()],
    )
    ends = _ends(drawn)
    shown = [row for row in drawn if row["step"] in ends]
    each = list(dict.fromkeys(name for row in shown for name in row.get("rewards", {})))
    each = each if len(each) > 1 else []  # one function's is the reward
    draws = table(
        ["step", "prompt", "completion", *each, "reward"],
        [
            [
                f"{row['step']:,}", _text(row["prompt"]), _text(row["completion"]),
                *(_reward(row["rewards"].get(name)) for name in each), _reward(row["reward"]),
            ]
            for row in shown
        ],
        numbers=(0, *range(3, 4 + len(each))),
    )  # fmt: skip
    return [section("Samples", sides), section("Completions that were trained on, first and last", draws)]


def _ends(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """The earliest and the latest step."""
    steps = [row["step"] for row in rows]
    return list(dict.fromkeys([min(steps), max(steps)])) if steps else []


def _reward(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"


def _text(value: Any) -> str:
    """A text as it is, of messages what was said."""
    return value if isinstance(value, str) else "\n".join(str(message["content"]) for message in value)


def _options(config: Mapping[str, Any]) -> str:
    return table(["option", "value"], [[name, str(value)] for name, value in config.items()])
