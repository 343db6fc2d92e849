"""The report of one run, from what lies in its folder: metrics.jsonl, config.yaml, samples.jsonl."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from alignfast.findings import Finding, findings, read_run, series
from alignfast.report.page import cards, details, figure, grid, page, section, table
from alignfast.report.plots import Line, line_plot, reliability_plot

# Caption, note, and the metrics drawn together; a metric is drawn where it was logged.
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
    ("Reference point", "in nats", {"kl": "training", "eval_kl": "held out"}),
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
            section("Plots", grid([*plots(rows), *_reliability(folder / "calibration.json")])),
            section("Samples", _samples(folder / "samples.jsonl")),
            section("Options", details("all options of the run", _options(config))),
        )
    )
    return path


def plots(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A figure of every kind of metric that was logged."""
    drawn = []
    for caption, note, names in _PLOTS:
        found = {label: series(rows, name) for name, label in names.items()}
        lines = {
            label: Line(steps, values, dashed=label == "held out")
            for label, (steps, values) in found.items()
            if steps
        }
        if lines:
            drawn.append(figure(caption, line_plot(lines, label=f"{caption} over steps"), note))
    return drawn


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


def _samples(file: Path) -> str:
    """Prompts with their completions, earliest and latest step side by side."""
    if not file.is_file():
        return ""
    rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    steps = sorted({row["step"] for row in rows})
    by_prompt: dict[str, dict[int, str]] = {}
    for row in rows:
        by_prompt.setdefault(_text(row["prompt"]), {}).setdefault(row["step"], _text(row["completion"]))
    ends = list(dict.fromkeys([steps[0], steps[-1]])) if steps else []
    return table(
        ["prompt", *(f"step {step:,}" for step in ends)],
        [[prompt, *(texts.get(step, "") for step in ends)] for prompt, texts in by_prompt.items()],
    )


def _text(value: Any) -> str:
    """A text as it is, of messages what was said."""
    return value if isinstance(value, str) else "\n".join(str(message["content"]) for message in value)


def _options(config: Mapping[str, Any]) -> str:
    return table(["option", "value"], [[name, str(value)] for name, value in config.items()])
