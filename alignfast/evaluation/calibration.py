"""Whether a reward model is as often right as it says: accuracy, expected calibration error, reliability.

It says that the better answer of a pair is better with probability sigmoid(lead), lead being the difference of their
rewards; so it does of any two answers of a ranking (Plackett and Luce). Pairs are put into bins by how sure it is,

    confidence = sigmoid(|lead|) in [1/2, 1]        ECE = sum over bins of share * |accuracy - mean confidence|

arXiv 1706.04599 section 2. Accuracy counts a tie as half; its interval is Wilson's, robust to pairs that share a prompt.

Letter: N pairs.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from alignfast.data.intervals import Interval, proportion


class Bin(NamedTuple):
    """Pairs about which a model is about equally sure: its mean confidence, how often it is right, and how many."""

    confidence: float
    accuracy: float
    pairs: int


class Calibration(NamedTuple):
    """Accuracy with its 95 % interval, expected calibration error, and the bins that hold pairs."""

    accuracy: Interval
    ece: float
    bins: list[Bin]

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        bins = [entry._asdict() for entry in self.bins]
        return {"accuracy": self.accuracy._asdict(), "ece": self.ece, "bins": bins}


def calibration(
    lead_N: ArrayLike, prompts: Sequence[Hashable] | None = None, num_bins: int = 10
) -> Calibration:
    """Calibration of a reward model on pairs.

    Args:
        lead_N: reward of the better answer less that of the worse one; at least one pair.
        prompts: which pairs belong together; None takes all as independent.
        num_bins: bins of equal width between 1/2 and 1.

    Raises:
        ValueError: there are no pairs, or not one prompt for each.

    >>> found = calibration([2.0, 2.0, 2.0, -2.0], num_bins=5)
    >>> found.accuracy.estimate, round(found.ece, 4), found.bins[0].pairs
    (0.75, 0.1308, 4)
    """
    lead_N = np.asarray(lead_N, np.float64)
    hit_N = (np.sign(lead_N) + 1) / 2
    accuracy = proportion(hit_N, prompts)
    confidence_N = 1 / (1 + np.exp(-np.abs(lead_N)))
    bin_N = np.minimum((confidence_N - 0.5) * 2 * num_bins, num_bins - 1).astype(np.int64)
    bins = [
        Bin(float(confidence_N[inside].mean()), float(hit_N[inside].mean()), int(inside.sum()))
        for inside in (bin_N == number for number in range(num_bins))
        if inside.any()
    ]
    error = sum(entry.pairs * abs(entry.accuracy - entry.confidence) for entry in bins) / len(lead_N)
    return Calibration(accuracy, error, bins)
