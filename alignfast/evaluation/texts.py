"""What sampled texts are like: how varied, how long.

    distinct-n = different n-grams / all n-grams        over all texts together (arXiv 1510.03055, section 5)

It falls as texts grow longer and more, so that only figures of alike many texts compare.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np


def distinct_n(texts: Sequence[str | Sequence[Hashable]], n: int) -> float:
    """Share of n-grams that are different ones; no n-gram reaches from one text into the next.

    Args:
        texts: words in one string, with white space between, or a list of tokens each.
        n: length of the n-grams, >= 1.

    Returns:
        In (0, 1]; NaN where no text has n tokens.

    Raises:
        ValueError: n is below 1.

    >>> distinct_n(["the cat the cat", "the dog"], 1), distinct_n([[1, 2, 1, 2], [1, 3]], 2)
    (0.5, 0.75)
    """
    if n < 1:
        raise ValueError(f"n must be >= 1, got {n}")
    seen: set[tuple[Hashable, ...]] = set()
    total = 0
    for text in texts:
        tokens = text.split() if isinstance(text, str) else text
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else float("nan")


def length_figures(lengths_N: Sequence[int], ended_N: Sequence[bool]) -> dict[str, float]:
    """TRL's figures of completions' lengths.

    Args:
        lengths_N: tokens of each completion, at least one completion.
        ended_N: whether it ended by itself; the others were cut.

    Raises:
        ValueError: the lists differ in length or are empty.

    >>> length_figures([2, 4, 6], [True, True, False])["mean_terminated_length"]
    3.0
    """
    if not len(lengths_N) or len(lengths_N) != len(ended_N):
        raise ValueError(
            f"expected two equally long lists with something in them, got {len(lengths_N)} and {len(ended_N)} items"
        )
    lengths, ended = np.asarray(lengths_N, np.float64), np.asarray(ended_N, bool)
    terminated = lengths[ended] if ended.any() else np.zeros(1)  # TRL's 0 where none ended
    return {
        "mean_length": float(lengths.mean()),
        "min_length": float(lengths.min()),
        "max_length": float(lengths.max()),
        "clipped_ratio": float(1 - ended.mean()),
        "mean_terminated_length": float(terminated.mean()),
        "min_terminated_length": float(terminated.min()),
        "max_terminated_length": float(terminated.max()),
    }
