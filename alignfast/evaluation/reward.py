"""How good a reward model is on held-out pairs or rankings: accuracy with its interval, and calibration."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from alignfast.data import Rows, prepare_ranking
from alignfast.evaluation.calibration import Calibration, calibration
from alignfast.evaluation.scores import MAX_TOKENS
from alignfast.losses import pair_leads
from alignfast.models import RewardModel


@dataclass(frozen=True)
class RewardReport:
    """A reward model on pairs of answers; a ranking of K makes K (K - 1) / 2 of them.

    Attributes:
        name: file or dataset.
        pairs: pairs that were compared.
        prompts: different prompts among them: the clusters of the interval.
        dropped_rows: rows left out, being longer than max_length.
        margin: mean of the better answer's reward less the worse one's.
        mean_reward: mean over answers.
        disagreement: mean standard deviation over heads; None where there is one.
        calibration: accuracy with its interval, expected calibration error, bins.
        rows: the number of each pair's row, from 0.
        leads: of each pair, the better answer's reward less the worse one's: to compare models pair by pair.
    """

    name: str
    pairs: int
    prompts: int
    dropped_rows: int
    margin: float
    mean_reward: float
    disagreement: float | None
    calibration: Calibration
    rows: list[int]
    leads: list[float]

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {**asdict(self), "calibration": self.calibration.to_dict()}

    def table(self) -> Table:
        """As a table for the terminal."""
        title = f"reward accuracy on {self.name}: {self.pairs:,} pairs, {self.prompts:,} prompts"
        table = Table(title=title, title_justify="left")
        for column in ("accuracy", "95 %", "calibration error", "margin", "mean reward"):
            table.add_column(column, justify="right")
        value, low, high = self.calibration.accuracy
        figures = f"{self.calibration.ece:.3f}", f"{self.margin:.3f}", f"{self.mean_reward:.3f}"
        table.add_row(f"{value:.3f}", f"{low:.3f} to {high:.3f}", *figures)
        lines = ["pairs of one prompt are taken together"]
        if self.disagreement is not None:
            lines.append(f"heads differ by {self.disagreement:.3f} (standard deviation, mean over answers)")
        if self.dropped_rows:
            lines.append(f"{self.dropped_rows} rows left out: longer than max_length")
        table.caption = "\n".join(lines)
        return table


def reward_accuracy(
    model: RewardModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    max_length: int | None = None,
    max_tokens: int = MAX_TOKENS,
) -> RewardReport:
    """Accuracy and calibration of a reward model on pairs or rankings.

    Args:
        model: the reward model; of several heads the mean counts.
        tokenizer: its tokenizer.
        rows: what `alignfast.data.load_rows` gave.
        max_length: rows of which a sequence is longer are left out; None keeps all.
        max_tokens: tokens of one batch.

    Raises:
        DataError: the rows are of another format.
        ValueError: nothing is left to score.
    """
    prepared = prepare_ranking(rows, tokenizer, max_length=max_length)
    rewards_SH = model.score(prepared.trees, max_tokens)
    ends = np.cumsum([len(tree.answers) for tree in prepared.trees])
    each = np.split(rewards_SH.mean(1), ends[:-1])
    leads = [pair_leads(torch.from_numpy(rewards_K)[None])[0].numpy() for rewards_K in each]
    named = [json.dumps(rows[i]["prompt"], sort_keys=True) for i in prepared.rows]
    prompts = [prompt for prompt, lead_Q in zip(named, leads) for _ in lead_Q]
    lead_N = np.concatenate(leads)
    return RewardReport(
        name=rows.name,
        pairs=len(lead_N),
        prompts=len(set(named)),
        dropped_rows=prepared.report.dropped_rows + prepared.report.too_long_rows,
        margin=float(lead_N.mean()),
        mean_reward=float(rewards_SH.mean()),
        disagreement=float(rewards_SH.std(1).mean()) if rewards_SH.shape[1] > 1 else None,
        calibration=calibration(lead_N, prompts),
        rows=[number for number, lead_Q in zip(prepared.rows, leads) for _ in lead_Q],
        leads=lead_N.tolist(),
    )
