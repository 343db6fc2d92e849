"""Perplexity of a model on a file.

    nll = -sum of log-probs / number of tokens,   perplexity = exp(nll)

over the tokens that carry loss: completions of prompt + completion, all of text and messages. Rows are the clusters
of the interval: var(nll) = R / (R - 1) * sum_r (s_r - nll * n_r)^2 / n^2 for rows of n_r tokens with loss s_r, and
its ends go through exp. With one row there is no such estimate and the interval is (0, inf).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from alignfast.data import Rows, prepare_sft
from alignfast.data.intervals import Interval
from alignfast.evaluation.scores import MAX_TOKENS, answer_scores
from alignfast.models import Policy

_Z = 1.959964  # two-sided 95 %


@dataclass(frozen=True)
class Perplexity:
    """Perplexity with its 95 % interval, mean loss in nats, and what it was measured on."""

    name: str
    rows: int
    dropped_rows: int
    tokens: int
    nll: float
    perplexity: Interval

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {**asdict(self), "perplexity": self.perplexity._asdict()}

    def table(self) -> Table:
        """As a table for the terminal."""
        table = Table(title=f"perplexity on {self.name}", title_justify="left")
        for column in ("rows", "tokens", "loss", "perplexity", "95 %"):
            table.add_column(column, justify="right")
        value, low, high = self.perplexity
        table.add_row(
            f"{self.rows:,}",
            f"{self.tokens:,}",
            f"{self.nll:.4f}",
            f"{value:.3f}",
            f"{low:.3f} to {high:.3f}",
        )
        if self.dropped_rows:
            table.caption = f"{self.dropped_rows} rows had no token to predict"
        return table


def perplexity(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    max_length: int | None = None,
    max_tokens: int = MAX_TOKENS,
) -> Perplexity:
    """Perplexity of a policy on rows of text, messages, or prompt + completion.

    Args:
        policy: the model.
        tokenizer: its tokenizer.
        rows: what `alignfast.data.load_rows` gave.
        max_length: longer sequences are cut to it at their end; None cuts nothing.
        max_tokens: tokens of one batch.

    Raises:
        DataError: the rows are of another format.
        ValueError: no row has a token to predict.
    """
    prepared = prepare_sft(rows, tokenizer, max_length=max_length)
    loss_R, count_R = answer_scores(policy, prepared.trees, max_tokens)
    loss_R, count_R = -loss_R, count_R.astype(np.float64)
    tokens, R = count_R.sum(), len(loss_R)
    if not tokens:
        raise ValueError(f"{rows.name}: no row has a token to predict")
    nll = float(loss_R.sum() / tokens)
    half = math.inf
    if R > 1:
        half = _Z * math.sqrt(R / (R - 1) * float(np.square(loss_R - nll * count_R).sum())) / tokens
    ends = Interval(math.exp(nll), math.exp(nll - half), math.exp(nll + half))
    return Perplexity(rows.name, R, prepared.report.dropped_rows, int(tokens), nll, ends)
