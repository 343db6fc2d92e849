"""Log-probs of answers under a policy: packed, prompts shared, no gradients, through the policy's own forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from alignfast.data import Tree
from alignfast.models import Policy

MAX_TOKENS = 4096  # of one batch; the logits are never stored, so that this bounds the trunk's activations


class Scores(NamedTuple):
    """Of S answers, tree by tree: log-probs in nats summed over the tokens that carry loss, and how many those are."""

    sums_S: NDArray[np.float64]
    lengths_S: NDArray[np.int64]


def answer_scores(policy: Policy, trees: Sequence[Tree], max_tokens: int = MAX_TOKENS) -> Scores:
    """Score every answer of every tree.

    Args:
        policy: runs on the device where it is, in its own layout; its mode and attention are put back afterwards.
        trees: at least one.
        max_tokens: tokens of one batch; a tree that is longer is a batch of its own.

    Raises:
        ValueError: there are no trees.
        ModelRefused: the model can't be run in the policy's layout.
    """
    if not trees:
        raise ValueError("there is nothing to score: no row has a token to predict")
    sums, lengths = [], []
    for batch, logps_P in policy.over(trees, max_tokens):
        lengths_S = torch.tensor(batch.lengths)
        logps_P = logps_P.double().cpu()
        sums.append(torch.segment_reduce(logps_P, "sum", lengths=lengths_S, initial=0).numpy())
        lengths.append(lengths_S.numpy())
    return Scores(np.concatenate(sums), np.concatenate(lengths))
