"""How often one of two answers is the better one, ties counted as half a win for each.

The interval is Wilson's, with the effective count of comparisons where several share a prompt: see
`alignfast.data.intervals`, whose interval is robust to clusters.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from alignfast.data.intervals import Interval, proportion


@dataclass(frozen=True)
class WinRate:
    """Comparisons won, tied and lost, and the rate (wins + ties / 2) / comparisons with its 95 % interval."""

    wins: int
    ties: int
    losses: int
    rate: Interval

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {**asdict(self), "rate": self.rate._asdict()}

    def __str__(self) -> str:
        return f"{self.rate}, {self.wins} won, {self.ties} tied, {self.losses} lost"


def win_rate(score_N: ArrayLike, other_N: ArrayLike, cluster_N: Sequence[Hashable] | None = None) -> WinRate:
    """Compare scores of answers with those of others to the same prompts.

    Args:
        score_N: a judge's score of each answer; the higher wins.
        other_N: its score of the answer that each is compared with.
        cluster_N: what the comparison is about (the prompt), where comparisons share it; None: all independent.

    Raises:
        ValueError: the numbers of scores differ or are zero, or a score is not finite.

    >>> print(win_rate([3, 1, 2, 2], [1, 1, 0, 3]))
    0.625 (95 % 0.219 to 0.908), 2 won, 1 tied, 1 lost
    """
    score_N, other_N = np.asarray(score_N, np.float64), np.asarray(other_N, np.float64)
    if score_N.ndim != 1 or score_N.shape != other_N.shape:
        raise ValueError(
            f"expected two equally long lists of scores, got {score_N.shape} and {other_N.shape}"
        )
    if not (np.isfinite(score_N).all() and np.isfinite(other_N).all()):
        raise ValueError("a score is not finite; leave out what the judge could not judge")
    won_N = (np.sign(score_N - other_N) + 1) / 2
    wins, losses = int((won_N == 1).sum()), int((won_N == 0).sum())
    return WinRate(wins, len(won_N) - wins - losses, losses, proportion(won_N, cluster_N))
