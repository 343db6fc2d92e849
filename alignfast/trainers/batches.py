"""The rows of a step shared out over the ranks and cut into micro-batches, with the counts of the whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from alignfast.data import Batch, Prepared, PrepareReport, Tree, cut, pack
from alignfast.trainers.config import TrainerConfig

Counts = dict[str, int]


@dataclass(frozen=True)
class Data:
    """Rows that a trainer has read.

    Attributes:
        trees: one a row that was kept.
        sources: index of each tree's row in what was given, for errors.
        report: what became of the rows.
        first: number of the first tree, counted over everything the trainer has read: a row's number is its own.
    """

    trees: list[Tree]
    sources: list[int]
    report: PrepareReport
    first: int


NO_DATA = Data([], [], PrepareReport(), 0)


def longest_row(max_length: int | None, positions: int | None) -> int | None:
    """Tokens of a row by the option and the model: whichever is less; None where neither says."""
    return min((limit for limit in (max_length, positions) if limit is not None), default=None)


def join_data(
    known: list[Data], prepared: Prepared, config: TrainerConfig, vocabulary: int, positions: int | None
) -> Data:
    """Add prepared rows to what a trainer has read.

    Args:
        known: what it has read so far; the new rows are appended.
        prepared: the new rows.
        config: for layout and budget.
        vocabulary: tokens that the model knows.
        positions: tokens of a sequence that the model has positions for; None where it does not say.

    Raises:
        ValueError: a token is outside the vocabulary, a sequence longer than the model's positions, or a row larger
            than the budget of a micro-batch.
    """
    largest = prepared.report.largest_token_id
    if largest >= vocabulary:
        raise ValueError(
            f"the tokenizer gives token id {largest} and the model knows {vocabulary} tokens: take the model's own "
            "tokenizer, or resize the model with model.resize_token_embeddings(len(tokenizer))"
        )
    for tree, row in zip(prepared.trees, prepared.rows):
        longest = len(tree.prompt) + max(map(len, tree.answers))
        if positions is not None and longest > positions:
            raise ValueError(
                f"row {row} has {longest} tokens and the model's positions end at {positions}: set max_length to that or "
                "less"
            )
        # refuses a row that alone is over the budget
        cut([tree], config.layout, config.max_tokens_per_batch, [row])
    first = sum(len(data.trees) for data in known)
    known.append(Data(prepared.trees, prepared.rows, prepared.report, first))
    return known[-1]


@dataclass(frozen=True)
class Share:
    """One rank's share of the rows of a step.

    Attributes:
        runs: rows of each micro-batch of this rank, as positions in the data; equally many on all ranks.
        num_real: how many of the runs count; the others fill up, with a weight of zero.
        counts: sums over all rows and ranks; `batches` micro-batches, `tokens` with prompts counted for each answer.
    """

    runs: list[list[int]]
    num_real: int
    counts: Counts


def share_out(
    data: Data,
    rows: Sequence[int],
    max_rows: int,
    config: TrainerConfig,
    accelerator: Accelerator,
    count: Callable[[Tree], Counts],
) -> Share:
    """Every rank's own rows in runs, and the counts that all ranks agree on. To be called on all ranks.

    Args:
        data: the trees.
        rows: positions of the whole step's rows, at least one.
        max_rows: rows of a micro-batch, unless `max_tokens_per_batch` cuts them.
        config: for layout and budget.
        accelerator: for the ranks.
        count: what a tree adds to the counts.
    """
    mine = list(rows[accelerator.process_index :: accelerator.num_processes])
    trees = [data.trees[row] for row in mine]
    if config.max_tokens_per_batch is None:
        ranges = [range(i, min(i + max_rows, len(mine))) for i in range(0, len(mine), max_rows)]
    else:
        ranges = cut(trees, config.layout, config.max_tokens_per_batch, [data.sources[row] for row in mine])
    runs = [[mine[i] for i in places] for places in ranges]
    mine_counted = {name: 0 for name in count(data.trees[rows[0]])}
    for tree in trees:
        for name, number in count(tree).items():
            mine_counted[name] += number
    mine_counted["tokens"] = sum(tree.num_tokens_unshared for tree in trees)
    mine_counted["batches"] = len(runs)
    counted_WN = accelerator.gather(torch.tensor([[*mine_counted.values()]], device=accelerator.device))
    counts = dict(zip(mine_counted, counted_WN.sum(0).tolist()))
    fillers = [[rows[0]]] * (int(counted_WN[:, -1].max()) - len(runs))
    return Share(runs + fillers, len(runs), counts)


def pack_rows(data: Data, rows: Sequence[int], layout: str, pad_id: int | None) -> Batch:
    """Rows by their positions in the data, packed; the batch's `rows` are their numbers."""
    return pack([data.trees[row] for row in rows], [data.first + row for row in rows], layout, pad_id)


def content_hash(trees: Sequence[Tree]) -> str:
    """SHA-256 of tokens, masks and labels, in their order."""
    digest = hashlib.sha256()
    for tree in trees:
        digest.update(repr((tree.prompt, tree.answers, tree.trained, tree.label)).encode())
    return digest.hexdigest()


def num_predictions(tree: Tree) -> list[int]:
    """Tokens of each answer that are predicted and carry loss: without a prompt, nothing predicts the first one."""
    return [sum(mask if tree.prompt else mask[1:]) for mask in tree.trained]


def whole_on_ranks(rows: list[int], ranks: int) -> list[int]:
    """Rows in such an order that every rank, which takes each ranks-th one, has neighbours: groups share a prompt.

    >>> whole_on_ranks([0, 1, 2, 3, 4], 2)
    [0, 3, 1, 4, 2]
    """
    share = -(-len(rows) // ranks)
    blocks = [rows[r * share : (r + 1) * share] for r in range(ranks)]
    return [block[i] for i in range(share) for block in blocks if i < len(block)]
