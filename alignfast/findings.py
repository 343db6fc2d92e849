"""What a run's metrics say, in plain words: `alignfast doctor RUN_DIR`, and the head of its report.

Each rule looks at the logged figures alone and has its bound beside it. A bound is a rule of thumb: what it finds is a
place to look, not a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from alignfast.trainers.metrics import read_metrics

Rows = Sequence[Mapping[str, Any]]
GOOD, LOOK, BAD = "good", "look", "bad"


class Finding(NamedTuple):
    """Something worth a sentence: `good`, `look` (may be all right) or `bad`, and the sentence."""

    level: str
    text: str


def read_run(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A run's logged rows and its config.

    Raises:
        ValueError: the folder holds no run, or nothing was logged yet.
    """
    file = folder / "metrics.jsonl"
    if not file.is_file():
        raise ValueError(
            f"{folder} holds no run: there is no metrics.jsonl; give the output_dir of a training"
        )
    rows = read_metrics(file)
    if not rows:
        raise ValueError(f"{file} is empty: nothing was logged yet")
    config = folder / "config.yaml"
    return rows, yaml.safe_load(config.read_text()) if config.is_file() else {}


def findings(rows: Rows, config: Mapping[str, Any]) -> list[Finding]:
    """All that the rules find, the bad first; one good one where they find nothing.

    >>> findings([{"step": i, "loss": 2.0 - i / 10} for i in range(9)], {})
    [Finding(level='good', text='The loss fell from 1.95 to 1.25, and nothing stands out.')]
    """
    found = [finding for rule in _RULES for finding in rule(rows, config)]
    if not found:
        rewards = series(rows, "reward")[1]
        values = rewards or series(rows, "loss")[1]
        start, end = _ends(values) if len(values) > 1 else (math.nan, math.nan)
        text = "Nothing stands out."
        if rewards and end > start:
            text = f"The reward rose from {start:.3g} to {end:.3g}, and nothing stands out."
        elif end < start:
            text = f"The loss fell from {start:.3g} to {end:.3g}, and nothing stands out."
        return [Finding(GOOD, text)]
    return sorted(found, key=lambda finding: (BAD, LOOK, GOOD).index(finding.level))


def series(rows: Rows, name: str) -> tuple[list[int], list[float]]:
    """Steps and finite values at which a metric was logged."""
    points = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    return [step for step, _ in points], [value for _, value in points]


def _ends(values: Sequence[float], share: float = 0.2) -> tuple[float, float]:
    """Means of the first and of the last fifth."""
    count = max(1, round(len(values) * share))
    return sum(values[:count]) / count, sum(values[-count:]) / count


def _non_finite(rows: Rows, config: Mapping[str, Any]) -> Iterator[Finding]:
    skipped = max((row.get("skipped_steps", 0) for row in rows), default=0)
    broken = [row["step"] for row in rows if not math.isfinite(row.get("loss", 0.0))]
    if skipped or broken:
        where = f", the first logged at step {broken[0]}" if broken else ""
        text = (
            f"{skipped:g} steps were skipped because loss or gradient was no number{where}. Lower learning_rate, or look "
            "for odd rows with `alignfast data check`."
        )
        yield Finding(BAD, text)


def _no_progress(rows: Rows, config: Mapping[str, Any]) -> Iterator[Finding]:
    if series(rows, "reward")[1]:
        return  # a policy gradient's loss says nothing of progress
    losses = series(rows, "loss")[1]
    if len(losses) < 5:  # fewer say nothing
        yield Finding(
            LOOK, f"The log has few losses: {len(losses)}. Lower logging_steps to see how training goes."
        )
        return
    start, end = _ends(losses)
    if end > start * 1.02:
        yield Finding(
            BAD, f"The loss rose from {start:.3g} to {end:.3g}. Lower learning_rate, or warm up longer."
        )
    elif end > start * 0.99:
        yield Finding(
            LOOK, f"The loss hardly moved: {start:.3g} to {end:.3g}. Raise learning_rate or train longer."
        )


def _overfitting(rows: Rows, config: Mapping[str, Any]) -> Iterator[Finding]:
    steps, losses = series(rows, "eval_loss")
    if len(losses) < 3:
        return
    best = min(range(len(losses)), key=losses.__getitem__)
    if losses[-1] > losses[best] * 1.03:
        text = (
            f"The held-out loss was lowest at step {steps[best]} ({losses[best]:.3g}) and is {losses[-1]:.3g} at the end: "
            "overfitting. Train shorter, or set load_best_model_at_end."
        )
        yield Finding(BAD, text)


def _preferences(rows: Rows, config: Mapping[str, Any]) -> Iterator[Finding]:
    # DPO's name, or a reward model's
    name = "accuracy" if series(rows, "accuracy")[1] else "rewards/accuracies"
    accuracies = series(rows, name)[1]
    if len(accuracies) < 5:
        return
    _, end = _ends(accuracies)
    held_out = series(rows, f"eval_{name}")[1]
    if end < 0.55:
        text = (
            f"At the end the chosen answer wins in {end:.0%} of training pairs: little was learned. Raise learning_rate, "
            "train longer, or look at the pairs with `alignfast data check`."
        )
        yield Finding(BAD, text)
    if held_out and end - held_out[-1] > 0.15:
        text = (
            f"The chosen answer wins in {end:.0%} of training pairs and {held_out[-1]:.0%} of held-out ones: the pairs are "
            "being learned by heart. Train shorter, raise beta, or use more pairs."
        )
        yield Finding(LOOK, text)
    elif end > 0.98 and not held_out:
        text = (
            f"The chosen answer wins in {end:.0%} of training pairs; give an eval_dataset to see whether that holds on "
            "others."
        )
        yield Finding(LOOK, text)


def _chosen_falls(rows: Rows, config: Mapping[str, Any]) -> Iterator[Finding]:
    logps = series(rows, "logps/chosen")[1]
    if len(logps) < 5:
        return
    start, end = _ends(logps)
    if end < start - 10:  # nats: the answer became e^10 times less likely
        text = (
            f"The chosen answers became less likely: their log-prob fell from {start:.1f} to {end:.1f}. Often harmless in "
            "DPO, but text may degrade: read samples; raise beta, lower learning_rate, or add sft to loss_type."
        )
        yield Finding(LOOK, text)


def _rewards(rows: Rows, config: Mapping[str, Any]) -> Iterator[Finding]:
    rewards = series(rows, "reward")[1]
    if len(rewards) < 5:  # fewer say nothing
        if rewards:
            text = f"The log has few rewards: {len(rewards)}. Lower logging_steps to see how training goes."
            yield Finding(LOOK, text)
        return
    start, end = _ends(rewards)
    spread = max(series(rows, "reward_std")[1], default=0.0)
    if end < start - 0.25 * spread:
        text = f"The reward fell from {start:.3g} to {end:.3g}. Lower learning_rate, or raise the weight of the KL."
        yield Finding(BAD, text)
    elif end < start + 0.05 * spread:
        text = (
            f"The reward hardly moved: {start:.3g} to {end:.3g}. Raise learning_rate, train longer, or look whether the "
            "reward tells completions apart."
        )
        yield Finding(LOOK, text)
    flat = series(rows, "frac_reward_zero_std")[1]
    if flat and _ends(flat)[1] > 0.8:
        text = (
            f"At the end {_ends(flat)[1]:.0%} of the prompts have completions with one and the same reward, which teach "
            "nothing: take prompts of another difficulty, more num_generations, or dynamic_sampling_rounds."
        )
        yield Finding(LOOK, text)


def _over_optimised(rows: Rows, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Goodhart's law (arXiv 2210.10760): what is trained on still rises where what it stands for falls."""
    points = [
        (row["step"], row["eval_gold/reward"], row["eval_reward"], row.get("eval_kl_sequence", math.nan))
        for row in rows
        if math.isfinite(row.get("eval_gold/reward", math.nan))
        and math.isfinite(row.get("eval_reward", math.nan))
    ]
    if len(points) < 3:
        return
    best = max(points, key=lambda point: point[1])
    golds = [gold for _, gold, _, _ in points]
    (_, last_gold, last_proxy, _), lost = points[-1], best[1] - points[-1][1]
    if lost > 0.25 * (max(golds) - min(golds)) and last_proxy > best[2]:
        distance = f", at a KL of {best[3]:.3g}" if math.isfinite(best[3]) else ""
        text = (
            f"Over-optimisation: the gold reward was highest at step {best[0]} ({best[1]:.3g}{distance}) and is "
            f"{last_gold:.3g} at the end, while the reward that is trained on rose from {best[2]:.3g} to {last_proxy:.3g}. "
            "Stop there, raise the weight of the KL, or mend the reward."
        )
        yield Finding(BAD, text)


def _start_wins(rows: Rows, config: Mapping[str, Any]) -> Iterator[Finding]:
    rates, highs = series(rows, "eval_win_rate")[1], series(rows, "eval_win_rate_high")[1]
    if rates and highs and highs[-1] < 0.5:
        text = (
            f"The model as it was before training is the better one: against it the trained one wins {rates[-1]:.0%}, ties "
            f"counted half, and {highs[-1]:.0%} at most. Lower learning_rate, or look at the reward."
        )
        yield Finding(BAD, text)


def _collapse(rows: Rows, config: Mapping[str, Any]) -> Iterator[Finding]:
    entropies = series(rows, "entropy")[1] if series(rows, "reward")[1] else []
    if len(entropies) >= 5:
        start, end = _ends(entropies)
        if end < 0.1 * start:
            text = (
                f"Entropy fell from {start:.3g} to {end:.3g} nats a token: the model writes nearly the same each time and "
                "explores no more. Raise temperature or entropy_coef, or lower learning_rate."
            )
            yield Finding(LOOK, text)
    cut = series(rows, "completions/clipped_ratio")[1]
    if len(cut) >= 5 and _ends(cut)[1] > 0.5:
        text = (
            f"At the end {_ends(cut)[1]:.0%} of the completions were cut at max_completion_length: raise it, or reward "
            "coming to an end."
        )
        yield Finding(LOOK, text)


def _gradients(rows: Rows, config: Mapping[str, Any]) -> Iterator[Finding]:
    norms, bound = series(rows, "grad_norm")[1], config.get("max_grad_norm") or math.inf
    if len(norms) < 5:
        return
    clipped = sum(norm > bound for norm in norms) / len(norms)
    if clipped > 0.8:
        text = (
            f"The gradient was above max_grad_norm={bound:g} in {clipped:.0%} of the logs: its length hardly counts. Common "
            "in DPO; a larger batch or a lower learning_rate calms it."
        )
        yield Finding(LOOK, text)
    usual = sorted(norms)[len(norms) // 2]
    if max(norms) > 20 * usual > 0:
        at = series(rows, "grad_norm")[0][norms.index(max(norms))]
        yield Finding(LOOK, f"At step {at} the gradient was {max(norms) / usual:.0f} times its usual size.")


def _slowing(rows: Rows, config: Mapping[str, Any]) -> Iterator[Finding]:
    speeds = series(rows, "tokens_per_second")[1]
    if len(speeds) < 10:
        return
    start, end = _ends(speeds[1:])  # the first holds what happens once
    if end < start * 0.6:
        text = f"Speed fell from {start:,.0f} to {end:,.0f} tokens/s: something else uses the machine, or it grows hot."
        yield Finding(LOOK, text)


def _unfinished(rows: Rows, config: Mapping[str, Any]) -> Iterator[Finding]:
    steps, planned = rows[-1]["step"], config.get("max_steps", -1)
    epochs, wanted = rows[-1].get("epoch"), config.get("num_train_epochs")
    short = steps < planned if planned > 0 else bool(epochs and wanted and epochs < wanted * 0.999)
    if short:
        text = f"The run is at step {steps} and not at its end; go on with the same command and --resume."
        yield Finding(LOOK, text)


_RULES: tuple[Callable[[Rows, Mapping[str, Any]], Iterator[Finding]], ...] = (
    _non_finite,
    _no_progress,
    _overfitting,
    _preferences,
    _chosen_falls,
    _rewards,
    _over_optimised,
    _start_wins,
    _collapse,
    _gradients,
    _slowing,
    _unfinished,
)
