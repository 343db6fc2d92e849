"""How often a model is on the side of the chosen answer, by three measures.

    implicit reward    beta * (log pi(y|x) - log ref(y|x))      what DPO trains; its sign does not depend on beta
    log-prob           log pi(y|x)                              what a sampler does
    per token          log pi(y|x) / |y|                        the same, blind to length

A tie counts as half. Intervals are Wilson's with the effective count of pairs, robust to pairs that share a prompt, or
whatever a column names (`alignfast.data.intervals`). Rows that have a `subset` are also counted by subset, and RewardBench's subsets
(https://arxiv.org/abs/2403.13787) by section.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from alignfast.data import Prepared, Rows, prepare_preference
from alignfast.data.intervals import Interval, proportion
from alignfast.evaluation.scores import MAX_TOKENS, Scores, answer_scores
from alignfast.models import Policy

IMPLICIT, LOGPS, PER_TOKEN = "implicit_reward", "logps", "logps_per_token"
_TITLES = {IMPLICIT: "implicit reward", LOGPS: "log-prob", PER_TOKEN: "log-prob per token"}
_CODE = tuple(f"hep-{language}" for language in ("cpp", "go", "java", "js", "python", "rust"))
SECTIONS = {
    "Chat": ("alpacaeval-easy", "alpacaeval-hard", "alpacaeval-length", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": (
        "llmbar-adver-GPTInst", "llmbar-adver-GPTOut", "llmbar-adver-manual", "llmbar-adver-neighbor", "llmbar-natural",
        "mt-bench-hard",
    ),
    "Safety": (
        "donotanswer", "refusals-dangerous", "refusals-offensive", "xstest-should-refuse", "xstest-should-respond",
    ),
    "Reasoning": ("math-prm", *_CODE),
}  # fmt: skip


@dataclass(frozen=True)
class PreferenceReport:
    """Accuracies on pairs.

    Attributes:
        name: file or dataset.
        pairs: pairs that were scored.
        prompts: different prompts among them.
        dropped_rows: rows of which cutting left nothing to score.
        reference: what the implicit reward is measured against; None where there is no such reward.
        beta: factor of the implicit reward.
        margin: mean of the chosen answer's implicit reward over the rejected one's; None without a reference.
        accuracy: by measure.
        rows: the number of each pair's row, from 0.
        leads: by measure, of each pair the chosen answer's score less the rejected one's: to compare models pair by pair.
        subsets: by subset and measure, where the rows name subsets.
        sections: by section of RewardBench and measure; a section is there when all its subsets are.
    """

    name: str
    pairs: int
    prompts: int
    dropped_rows: int
    reference: str | None
    beta: float
    margin: float | None
    accuracy: dict[str, Interval]
    rows: list[int]
    leads: dict[str, list[float]]
    subsets: dict[str, dict[str, Interval]] = field(default_factory=dict)
    sections: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            **asdict(self),
            "accuracy": _plain(self.accuracy),
            "subsets": {name: _plain(measures) for name, measures in self.subsets.items()},
        }

    def table(self) -> Table:
        """As a table for the terminal."""
        title = f"preference accuracy on {self.name}: {self.pairs:,} pairs, {self.prompts:,} prompts"
        table = Table(title=title, title_justify="left")
        table.add_column("")
        for measure in self.accuracy:
            table.add_column(_TITLES[measure], justify="right")
        for name, measures in {"all": self.accuracy, **self.subsets}.items():
            table.add_row(name, *(f"{m.estimate:.3f} ({m.low:.3f}-{m.high:.3f})" for m in measures.values()))
        for name, rates in self.sections.items():
            table.add_row(name, *(f"{rate:.3f}" for rate in rates.values()), style="bold")
        lines = ["in brackets 95 % intervals, pairs of one prompt taken together"]
        if self.reference is not None:
            lines.append(f"reference: {self.reference}; mean margin {self.margin:.4f} at beta {self.beta:g}")
        if self.dropped_rows:
            lines.append(f"{self.dropped_rows} rows left out: nothing of an answer was left after cutting")
        table.caption = "\n".join(lines)
        return table


def preference_accuracy(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    reference: Policy | None = None,
    beta: float = 0.1,
    max_length: int | None = None,
    max_tokens: int = MAX_TOKENS,
    together: str | None = None,
) -> PreferenceReport:
    """Preference accuracy of a policy on rows of chosen and rejected answers.

    Args:
        policy: the model.
        tokenizer: its tokenizer, and the reference's.
        rows: what `alignfast.data.load_rows` gave; a column `subset` divides them.
        reference: what the implicit reward compares with. None: the model with its adapters off where it has some,
            else there is no implicit reward.
        beta: factor of the implicit reward, > 0.
        max_length: longer sequences are cut to it at their end; None cuts nothing.
        max_tokens: tokens of one batch.
        together: column of which equal values are taken together in the intervals, e.g. who judged; None: the prompt.

    Raises:
        DataError: the rows are of another format.
        ValueError: beta is not positive, or nothing is left to score.
    """
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta}")
    prepared = prepare_preference(rows, tokenizer, max_length=max_length)
    scores = answer_scores(policy, prepared.trees, max_tokens)
    against, name = _reference_scores(policy, reference, prepared, max_tokens)
    margins = {
        LOGPS: _margin(scores.sums_S),
        PER_TOKEN: _margin(scores.sums_S / np.maximum(scores.lengths_S, 1)),
    }
    if against is not None:
        margins = {IMPLICIT: beta * _margin(scores.sums_S - against.sums_S), **margins}
    right = {measure: (np.sign(margin_N) + 1) / 2 for measure, margin_N in margins.items()}
    prompts = [json.dumps(rows[i]["prompt"], sort_keys=True) for i in prepared.rows]
    clusters = prompts if together is None else [rows[i][together] for i in prepared.rows]
    named = [rows[i].get("subset") for i in prepared.rows]
    subsets = {
        subset: _accuracy(right, clusters, np.array([other == subset for other in named]))
        for subset in sorted({str(subset) for subset in named if subset is not None})
    }
    counts = {subset: named.count(subset) for subset in subsets}
    return PreferenceReport(
        name=rows.name,
        pairs=len(prompts),
        prompts=len(set(prompts)),
        dropped_rows=prepared.report.dropped_rows,
        reference=name,
        beta=beta,
        margin=float(margins[IMPLICIT].mean()) if against is not None else None,
        accuracy=_accuracy(right, clusters, np.ones(len(prompts), np.bool_)),
        rows=[int(i) for i in prepared.rows],
        leads={measure: margin_N.tolist() for measure, margin_N in margins.items()},
        subsets=subsets,
        sections=_sections(subsets, counts),
    )


def _reference_scores(
    policy: Policy, reference: Policy | None, prepared: Prepared, max_tokens: int
) -> tuple[Scores | None, str | None]:
    if reference is not None:
        name = getattr(reference.base.config, "_name_or_path", "") or "a given model"
        return answer_scores(reference, prepared.trees, max_tokens), name
    if not hasattr(policy.model, "disable_adapter"):
        return None, None
    with policy.adapters_off():
        return answer_scores(policy, prepared.trees, max_tokens), "the model without its adapters"


def _margin(score_S: NDArray[np.float64]) -> NDArray[np.float64]:
    """Chosen minus rejected; trees hold the chosen answer first."""
    return score_S[::2] - score_S[1::2]


def _accuracy(
    right: dict[str, NDArray[np.float64]], clusters: Sequence[str], kept_N: NDArray[np.bool_]
) -> dict[str, Interval]:
    kept_clusters = [cluster for cluster, kept in zip(clusters, kept_N) if kept]
    return {measure: proportion(right_N[kept_N], kept_clusters) for measure, right_N in right.items()}


def _sections(subsets: dict[str, dict[str, Interval]], counts: dict[str, int]) -> dict[str, dict[str, float]]:
    """RewardBench's sections: means over their subsets by number of pairs, where mathematics weighs as much as all
    code."""
    weights = {**counts, "math-prm": sum(counts.get(subset, 0) for subset in _CODE)}
    found = {}
    for section, members in SECTIONS.items():
        if all(member in subsets for member in members):
            total = sum(weights[member] for member in members)
            found[section] = {
                measure: sum(weights[m] * subsets[m][measure].estimate for m in members) / total
                for measure in subsets[members[0]]
            }
    return found


def _plain(measures: dict[str, Interval]) -> dict[str, dict[str, float]]:
    return {measure: interval._asdict() for measure, interval in measures.items()}
