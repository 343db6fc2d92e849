"""Where the time of a step went, by its stages: what metrics.jsonl has under `seconds/` (alignfast.trainers.stages).

A draw may serve several steps: its stages are set beside those of all its steps, the logs of one draw together.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from alignfast.report.page import figure, table
from alignfast.report.plots import stack_plot

_OF_A_DRAW = {"prefill": "prefill", "decode": "decode", "rewards": "rewards", "logps": "log-probs"}
_OF_A_STEP = {"forward": "forward", "backward": "backward", "optimizer": "optimizer"}
_NEEDED = ("tokens_per_second", "num_tokens")


def seconds_plot(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> list[str]:
    """The stages over the steps, on top of each other; nothing where none was logged."""
    steps, parts, samples = _parts(rows, config)
    if not steps:
        return []
    note = "of a draw and its steps" if samples else "of a step"
    return [figure("Seconds", stack_plot(steps, parts, label="Seconds over steps"), note)]


def seconds_table(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> str:
    """Mean seconds of each stage over the run, and its share of the whole."""
    steps, parts, samples = _parts(rows, config)
    means = {name: sum(values) / len(steps) for name, values in parts.items()}
    whole = sum(means.values())
    if not whole:
        return ""
    means |= {"a draw and its steps" if samples else "a step": whole}
    return table(
        ["stage", "seconds, mean", "share"],
        [[name, f"{mean:.3g}", f"{mean / whole:.1%}"] for name, mean in means.items()],
        numbers=(1, 2),
    )


def _parts(
    rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]
) -> tuple[list[float], dict[str, list[float]], bool]:
    """(logged steps, seconds of each stage at each of them, whether the run samples)."""
    names = {name for row in rows for name in row if name.startswith("seconds/")}
    samples = "seconds/sampling" in names
    if not names:
        return [], {}, samples
    micro_batches = config.get("gradient_accumulation_steps", 1)
    steps_per_draw = (config.get("steps_per_generation") or micro_batches) // micro_batches
    steps_per_draw = steps_per_draw * config.get("num_iterations", 1) if samples else 1
    steps: list[float] = []
    found: list[dict[str, float]] = []
    before, tokens_before = 0, 0.0
    sums: dict[str, float] = defaultdict(float)
    for row in rows:
        if not all(_finite(row, name) for name in _NEEDED) or not any(_finite(row, name) for name in names):
            continue
        logged, tokens = row["step"] - before, row["num_tokens"] - tokens_before
        before, tokens_before = row["step"], row["num_tokens"]
        if logged < 1 or not row["tokens_per_second"]:
            continue
        for name in names:
            sums[name] += logged * row.get(name, 0.0)
        sums["whole"] += tokens / row["tokens_per_second"]
        sums["steps"] += logged
        if sums["steps"] >= steps_per_draw:  # the first step of a draw alone has the draw's time
            steps.append(row["step"])
            found.append(_stages(sums, steps_per_draw))
            sums.clear()
    order = ["prefill", "decode", "other sampling", "rewards", "log-probs", *_OF_A_STEP.values(), "rest"]
    parts = {name: [of[name] for of in found] for name in order}
    return steps, {name: values for name, values in parts.items() if any(values)}, samples


def _stages(sums: Mapping[str, float], steps_per_draw: int) -> dict[str, float]:
    """Seconds of each stage in a draw and its steps, of sums over logged steps."""
    number = sums["steps"]
    of = {label: sums[f"seconds/{name}"] / number for name, label in _OF_A_DRAW.items()}
    sampling = sums["seconds/sampling"] / number
    of["other sampling"] = max(0.0, sampling - of["prefill"] - of["decode"])
    of |= {label: steps_per_draw * sums[f"seconds/{name}"] / number for name, label in _OF_A_STEP.items()}
    of["rest"] = max(0.0, steps_per_draw * sums["whole"] / number - sum(of.values()))
    return of


def _finite(row: Mapping[str, Any], name: str) -> bool:
    return math.isfinite(row.get(name, math.nan))
