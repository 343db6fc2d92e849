"""How far preference labels can be wrong, from the texts alone: a Bradley-Terry model on n-grams, cross-validated.

    p(chosen beats rejected) = sigmoid(w . (f(chosen) - f(rejected)))      f: which words and pairs of words occur

fitted on four fifths of the prompts and asked about the fifth it has not seen. Where it is surest, most of what
is labelled the other way is noise; its own mistakes count too, so the share is an estimate from above.

Letters: N pairs, Z nonzero features of all pairs together, D hashed features.
Not done here: any reading of meaning. A label that only a careful reader finds wrong is not found.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alignfast.data.intervals import Interval, numbered, proportion

NUM_FOLDS = 5
MIN_PAIRS = 100  # below, the surest tenth is a handful of pairs and says nothing
MAX_PAIRS = 20_000  # 12 s of one core; more would narrow the interval of a rough figure
_NUM_FEATURES = 1 << 18
_DECAY = (
    1e-3  # pull of each weight to zero; held-out accuracy on real pairs moves under 0.01 for a factor of 3
)
_NUM_STEPS = 60
_WORD = re.compile(r"\w+|[^\w\s]")


class Comparison(NamedTuple):
    """One vote: in answer to `prompt`, `chosen` was preferred to `rejected`."""

    prompt: str
    chosen: str
    rejected: str


class NoiseEstimate(NamedTuple):
    """What the n-gram model says.

    Attributes:
        num_pairs: comparisons it was tried on, each while unseen.
        accuracy: share of them where it prefers the chosen answer.
        disagreement: share labelled the other way among the tenth it is surest of: noise, and its own mistakes.
    """

    num_pairs: int
    accuracy: Interval
    disagreement: Interval


def estimate_noise(comparisons: Sequence[Comparison]) -> NoiseEstimate | None:
    """Cross-validate the n-gram model; None with fewer than `MIN_PAIRS` usable pairs or `NUM_FOLDS` prompts.

    Pairs whose answers have the same words are left out, and of more than `MAX_PAIRS` a fixed random choice is used.
    """
    random = np.random.default_rng(0)
    if len(comparisons) > MAX_PAIRS:
        picked = random.choice(len(comparisons), MAX_PAIRS, replace=False)
        comparisons = [comparisons[index] for index in picked]
    found = [_features(comparison) for comparison in comparisons]
    used = [index for index, (feature_Z, _) in enumerate(found) if len(feature_Z)]
    prompt_N = numbered(comparisons[index].prompt for index in used)
    num_prompts = int(prompt_N.max()) + 1 if used else 0
    if len(used) < MIN_PAIRS or num_prompts < NUM_FOLDS:
        return None
    features = _Features.of([found[index] for index in used])
    fold_N = (random.permutation(num_prompts) % NUM_FOLDS)[prompt_N]
    margin_N = np.empty(len(used))
    for fold in range(NUM_FOLDS):
        weight_D = _fit(features.only(fold_N != fold))
        margin_N[fold_N == fold] = features.only(fold_N == fold).margins(weight_D)
    surest_N = np.abs(margin_N) >= np.quantile(np.abs(margin_N), 0.9)
    return NoiseEstimate(
        num_pairs=len(used),
        accuracy=proportion(margin_N > 0, prompt_N.tolist()),
        disagreement=proportion(margin_N[surest_N] <= 0, prompt_N[surest_N].tolist()),
    )


class _Features(NamedTuple):
    """Feature differences of pairs, chosen minus rejected, each pair scaled to length 1."""

    num_pairs: int
    pair_Z: NDArray[np.int64]
    feature_Z: NDArray[np.int64]
    value_Z: NDArray[np.float64]

    @classmethod
    def of(cls, found: Sequence[tuple[NDArray[np.int64], NDArray[np.float64]]]) -> _Features:
        size_N = np.array([len(feature_Z) for feature_Z, _ in found])
        feature_Z = np.concatenate([feature_Z for feature_Z, _ in found])
        value_Z = np.concatenate([sign_Z / len(sign_Z) ** 0.5 for _, sign_Z in found])
        return cls(len(found), np.repeat(np.arange(len(found)), size_N), feature_Z, value_Z)

    def only(self, kept_N: NDArray[np.bool_]) -> _Features:
        kept_Z = kept_N[self.pair_Z]
        number_N = np.cumsum(kept_N) - 1
        return _Features(
            int(kept_N.sum()), number_N[self.pair_Z[kept_Z]], self.feature_Z[kept_Z], self.value_Z[kept_Z]
        )

    def margins(self, weight_D: NDArray[np.float64]) -> NDArray[Any]:
        """w . x of each pair; numpy's stubs call a weighted bincount integer."""
        return np.bincount(self.pair_Z, self.value_Z * weight_D[self.feature_Z], self.num_pairs)


def _features(comparison: Comparison) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Hashes of what occurs in one answer alone, and 1 where that is the chosen one, -1 where it is the rejected."""
    chosen, rejected = _ngrams(comparison.chosen), _ngrams(comparison.rejected)
    plus, minus = sorted(chosen - rejected), sorted(rejected - chosen)
    return np.array(plus + minus, np.int64), np.repeat([1.0, -1.0], [len(plus), len(minus)])


def _ngrams(text: str) -> set[int]:
    words = _WORD.findall(text.lower())
    pairs = map(" ".join, pairwise(words))
    return {zlib.crc32(gram.encode()) % _NUM_FEATURES for gram in (*words, *pairs)}


def _fit(features: _Features) -> NDArray[np.float64]:
    """Minimise mean(log(1 + exp(-margin))) + decay / 2 * |w|^2 by Nesterov's accelerated gradient."""
    step = 1 / (0.25 + _DECAY)  # the loss's curvature is at most 1/4 for pairs of length 1
    weight_D = ahead_D = np.zeros(_NUM_FEATURES)
    for number in range(_NUM_STEPS):
        pull_N = 1 / (1 + np.exp(features.margins(ahead_D))) / features.num_pairs
        pull_D = np.bincount(features.feature_Z, features.value_Z * pull_N[features.pair_Z], _NUM_FEATURES)
        before_D, weight_D = weight_D, ahead_D + step * (pull_D - _DECAY * ahead_D)
        ahead_D = weight_D + number / (number + 3) * (weight_D - before_D)
    return weight_D
