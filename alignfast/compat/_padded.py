"""Padded batches as others make them, read as trees: what `patch` packs.

A sequence is a run of real tokens: of a row under its attention mask, or between restarts of the position ids. It ends with
the last token that anything is asked of, since no earlier one attends further. What comes before the first is its prompt, so
that sequences with the same prompt are one tree; prompts shorter than `SHORT` are not worth a second attention call.

Letters: B rows, L tokens of a row, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from alignfast.data.packing import Tree

IGNORED = -100
SHORT = 8


class NotServed(ValueError):
    """A call that the packed path does not do; the message says why."""


class Span(NamedTuple):
    """A sequence's place: its row, its first column, and the column behind its last."""

    row: int
    start: int
    stop: int


def spans(attention_mask: Tensor | None, position_ids: Tensor | None, shape: Sequence[int]) -> list[Span]:
    """The sequences of a batch of `shape` (B, L), row by row.

    Raises:
        NotServed: a mask has holes, positions jump, or both came.
    """
    B, L = shape
    if attention_mask is not None and position_ids is not None:
        raise NotServed("position_ids came together with an attention_mask")
    if attention_mask is not None:
        if tuple(attention_mask.shape) != (B, L):
            raise NotServed(f"an attention_mask of shape {tuple(attention_mask.shape)}")
        real_BL = attention_mask.cpu().numpy() != 0
        found = []
        for row in range(B):
            columns = real_BL[row].nonzero()[0]
            if len(columns) and len(columns) != columns[-1] + 1 - columns[0]:
                raise NotServed("an attention_mask with holes")
            if len(columns):
                found.append(Span(row, int(columns[0]), int(columns[-1]) + 1))
        return found
    if position_ids is None:
        return [Span(row, 0, L) for row in range(B)]
    return _between_restarts(position_ids.expand(B, L).cpu().numpy())


def _between_restarts(position_BL: NDArray[np.int64]) -> list[Span]:
    B, L = position_BL.shape
    found = []
    for row in range(B):
        starts = (position_BL[row] == 0).nonzero()[0]
        stops = np.append(starts[1:], L)
        steps = np.arange(L) - np.repeat(starts, stops - starts) if len(starts) and not starts[0] else None
        if steps is None or (position_BL[row] != steps).any():
            raise NotServed("position_ids that do not count from 0 in each sequence")
        found += [Span(row, int(start), int(stop)) for start, stop in zip(starts, stops)]
    return found


def labelled_trees(
    ids_BL: NDArray[np.int64], labels_BL: NDArray[np.int64], found: Sequence[Span]
) -> list[Tree]:
    """A tree of one answer for each sequence that has a label, in their order: its predictions are the labels of columns
    1 and up, row by row.

    Raises:
        NotServed: a label is not its own token, or none comes before it.
    """
    scored_BL = labels_BL != IGNORED
    scored_BL[:, 0] = False
    if (ids_BL[scored_BL] != labels_BL[scored_BL]).any():
        raise NotServed("labels that are other tokens than the input's")
    trees, num_labels = [], 0
    for row, start, stop in found:
        columns = scored_BL[row, start:stop].nonzero()[0]
        if not len(columns):
            continue
        if columns[0] == 0:
            raise NotServed("a labelled token that begins its sequence")
        num_labels += len(columns)
        tokens = tuple(ids_BL[row, start : start + columns[-1] + 1].tolist())
        trained = scored_BL[row, start : start + columns[-1] + 1]
        cut = int(columns[0]) if columns[0] >= SHORT else 0
        trees.append(Tree(tokens[:cut], (tokens[cut:],), (tuple(trained[cut:].tolist()),)))
    if num_labels != scored_BL.sum():
        raise NotServed("labels on masked tokens")
    return trees


def paired_trees(sequences: Sequence[tuple[int, ...]]) -> list[Tree]:
    """A tree of one answer for each sequence; the prompt is what sequence i has in common with sequence i + S / 2.

    >>> [len(tree.prompt) for tree in paired_trees([(1,) * 9 + (2, 3), (1,) * 9 + (4,)])]
    [9, 9]
    """
    half = len(sequences) // 2
    cuts = [0] * len(sequences)
    for one in range(half if len(sequences) % 2 == 0 else 0):
        a, b = sequences[one], sequences[one + half]
        longest = min(len(a), len(b)) - 1  # each keeps a token of its own
        differ = (np.array(a[:longest]) != np.array(b[:longest])).nonzero()[0]
        common = int(differ[0]) if len(differ) else longest
        cuts[one] = cuts[one + half] = common if common >= SHORT else 0
    return [
        Tree(ids[:cut], (ids[cut:],), ((False,) * (len(ids) - cut),)) for ids, cut in zip(sequences, cuts)
    ]
