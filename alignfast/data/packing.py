"""Trees of tokens laid into one batch: packed and shared, packed, or padded, with the same predictions in all three.

    prediction i:  the hidden row source_P[i] of the B * L flattened rows predicts the token target_P[i]

Nothing is shifted by one: the last row of a prompt predicts the first token of every answer, and a row that
predicts nothing trained is named nowhere, so that it is never projected onto the vocabulary.

Letters: B rows of the batch, L tokens of a row, P predictions, S sequences (a prompt with one of its answers).
Not done here: tokenising, shuffling, and the choice of rows that make a step.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignfast.kernels import PackedLayout

LAYOUTS = ("shared", "packed", "padded")


@dataclass(frozen=True, slots=True)
class Tree:
    """A prompt and the answers that continue it: what packing never separates.

    Attributes:
        prompt: token ids that all answers start with; () where nothing is shared.
        answers: token ids of each answer after the prompt, >= 1 each.
        trained: for each answer, which of its tokens carry loss.
        label: a number that came with the row: 1 for a thumb up and 0 for one down, the margin of a pair.

    Raises:
        ValueError: an answer is empty, or its mask is of another length.

    >>> pair = Tree(prompt=(5, 6), answers=((7, 8), (9,)), trained=((True, True), (True,)))
    >>> pair.num_tokens, pair.num_tokens_unshared
    (5, 7)
    """

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    trained: tuple[tuple[bool, ...], ...]
    label: float = 0.0

    def __post_init__(self) -> None:
        lengths, masks = [*map(len, self.answers)], [*map(len, self.trained)]
        if not lengths or 0 in lengths or lengths != masks:
            raise ValueError(
                f"a tree has answers of >= 1 tokens and masks alike, got lengths {lengths} and {masks}"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens with the prompt counted once."""
        return len(self.prompt) + sum(map(len, self.answers))

    @property
    def num_tokens_unshared(self) -> int:
        """Tokens with the prompt counted for each answer."""
        return len(self.prompt) * len(self.answers) + sum(map(len, self.answers))


@dataclass(frozen=True, eq=False)
class Batch:
    """What a policy's forward takes.

    Attributes:
        input_ids_BL: int64; B is 1 unless the layout is padded.
        position_ids_BL: int64, from 0 in every sequence; answers go on where their prompt ends.
        attention_mask_BL: int64, 1 at real tokens; None unless padded.
        layout: how the row divides into trees; None when padded.
        source_P: int64, the row of the B * L flattened hidden rows that makes the prediction.
        target_P: int64, the token it should predict.
        last_S: int64, the hidden row of each sequence's last token.
        num_answers: sequences of each tree.
        lengths: predictions of each sequence, tree by tree and answer by answer; may be 0, sums to P.
        rows: dataset index of each tree.
        labels: label of each tree.
        num_tokens: real tokens computed.
        num_tokens_unshared: tokens that packing without sharing would compute.
    """

    input_ids_BL: Tensor
    position_ids_BL: Tensor
    attention_mask_BL: Tensor | None
    layout: PackedLayout | None
    source_P: Tensor
    target_P: Tensor
    last_S: Tensor
    num_answers: tuple[int, ...]
    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    labels: tuple[float, ...]
    num_tokens: int
    num_tokens_unshared: int

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        names = ("input_ids_BL", "position_ids_BL", "attention_mask_BL", "source_P", "target_P", "last_S")
        moved = {name: getattr(self, name).to(device) for name in names if getattr(self, name) is not None}
        return replace(self, **moved)


def pack(
    trees: Sequence[Tree], rows: Sequence[int], layout: str = "shared", pad_id: int | None = None
) -> Batch:
    """Lay trees into one batch.

    Args:
        trees: at least one.
        rows: dataset index of each tree.
        layout: `shared` computes every prompt once, also where several trees have the same one; `packed` gives each
            answer its own copy of the prompt; `padded` makes one row a sequence, padded on the right.
        pad_id: token that fills padded rows; needed for `padded` alone.

    Raises:
        ValueError: there is nothing to pack, the counts differ, the layout is unknown, or `pad_id` is missing.

    >>> pair = Tree((5, 6), ((7, 8), (9,)), ((True, True), (True,)))
    >>> batch = pack([pair], rows=[0])
    >>> batch.input_ids_BL.tolist(), batch.position_ids_BL.tolist()
    ([[5, 6, 7, 8, 9]], [[0, 1, 2, 3, 2]])
    >>> batch.source_P.tolist(), batch.target_P.tolist(), batch.lengths, batch.last_S.tolist()
    ([1, 2, 1], [7, 8, 9], (2, 1), [3, 4])
    """
    _check_layout(layout)
    if not trees or len(trees) != len(rows):
        raise ValueError(
            f"expected at least one tree and a row number for each, got {len(trees)} and {len(rows)}"
        )
    sequences = [(tree.prompt, answer) for tree in trees for answer in tree.answers]
    if layout == "padded":
        if pad_id is None:
            raise ValueError(
                "layout='padded' fills rows with a pad token: pass pad_id, or use another layout"
            )
        placed = _pad(sequences, pad_id)
    else:
        placed = _lay_in_a_row(sequences, share=layout == "shared")
    masks = chain.from_iterable(mask for tree in trees for mask in tree.trained)
    source_P, target_P, lengths = _predictions(placed, sequences, masks)
    unshared = sum(len(prompt) + len(answer) for prompt, answer in sequences)
    return Batch(
        input_ids_BL=torch.from_numpy(placed.input_ids_BL),
        position_ids_BL=placed.position_ids_BL,
        attention_mask_BL=placed.attention_mask_BL,
        layout=placed.layout,
        source_P=torch.from_numpy(source_P),
        target_P=torch.from_numpy(target_P),
        last_S=torch.from_numpy(placed.start_S) + torch.tensor([len(answer) - 1 for _, answer in sequences]),
        num_answers=tuple(len(tree.answers) for tree in trees),
        lengths=tuple(lengths.tolist()),
        rows=tuple(rows),
        labels=tuple(tree.label for tree in trees),
        num_tokens=unshared if placed.layout is None else placed.layout.num_tokens,
        num_tokens_unshared=unshared,
    )


def cut(
    trees: Sequence[Tree], layout: str, max_tokens: int | None, rows: Sequence[int] | None = None
) -> list[range]:
    """Divide trees into consecutive runs whose batches stay within a budget of tokens.

    Args:
        trees: the trees of a step, in order.
        layout: decides what counts: `padded` counts pad tokens too, B * L.
        max_tokens: budget of a run; None makes one run of all.
        rows: dataset index of each tree, for the error; the position in `trees` where not given.

    Returns:
        Ranges over `trees`, in order, none empty.

    Raises:
        ValueError: the layout is unknown, or one tree alone is over the budget.

    >>> text = Tree((), ((1, 2, 3),), ((True, True, True),))
    >>> cut([text, text, text], "packed", max_tokens=6)
    [range(0, 2), range(2, 3)]
    """
    _check_layout(layout)
    if max_tokens is None:
        return [range(len(trees))] if trees else []
    runs, first, count = [], 0, _Count(layout)
    for index, tree in enumerate(trees):
        num_tokens = count.add(tree)
        if num_tokens > max_tokens and index > first:
            runs.append(range(first, index))
            first, count = index, _Count(layout)
            num_tokens = count.add(tree)
        if num_tokens > max_tokens:
            raise ValueError(
                f"row {index if rows is None else rows[index]} alone has {num_tokens} tokens in layout {layout!r}, "
                f"over max_tokens_per_batch={max_tokens}: raise max_tokens_per_batch, or lower max_length"
            )
    return [*runs, range(first, len(trees))] if trees else []


def mismatched(
    trees: Sequence[Tree], together: int, max_length: int | None, keep_end: bool = False
) -> list[Tree]:
    """Every prompt with the answer of another row: of the one before it among `together` rows, the first takes the last's.

    So the rows of a step that come in their own order have the same answers in both forms (KTO, arXiv 2402.01306
    section 4.1, and TRL 1.16). A row that is alone takes the one before it in the data. An answer that was cut when it was
    read stays cut, where TRL cuts it anew behind each prompt.

    Args:
        trees: two at least, of one answer each.
        together: rows of a step, >= 1.
        max_length: tokens of a sequence; longer ones are cut. None cuts nothing.
        keep_end: cut the beginning of the prompt, not the end of the answer.

    Raises:
        ValueError: there are fewer than two rows.

    >>> trees = [Tree((5,), ((7, 8),), ((True, True),)), Tree((6,), ((9,),), ((True,),))]
    >>> [(tree.prompt, tree.answers) for tree in mismatched(trees, together=2, max_length=None)]
    [((5,), ((9,),)), ((6,), ((7, 8),))]
    """
    if len(trees) < 2:
        raise ValueError(f"a prompt with another row's answer takes two rows at least, got {len(trees)}")
    found = []
    for index, tree in enumerate(trees):
        first = index - index % together
        last = min(first + together, len(trees)) - 1
        other = trees[last if index == first < last else index - 1]
        prompt, (answer,), (mask,) = tree.prompt, other.answers, other.trained
        over = 0 if max_length is None else max(0, len(prompt) + len(answer) - max_length)
        if keep_end:
            prompt = prompt[over:]
        elif over:
            answer, mask = answer[:-over], mask[:-over]
        found.append(Tree(prompt, (answer,), (mask,)))
    return found


class _Count:
    """Tokens that a growing run of trees comes to."""

    def __init__(self, layout: str) -> None:
        self.layout = layout
        self.prompts: set[tuple[int, ...]] = set()
        self.num_tokens = self.num_sequences = self.longest = 0

    def add(self, tree: Tree) -> int:
        """Tokens of the run with this tree at its end."""
        if self.layout == "padded":
            self.num_sequences += len(tree.answers)
            self.longest = max(self.longest, len(tree.prompt) + max(map(len, tree.answers)))
            return self.num_sequences * self.longest
        if self.layout == "packed":
            self.num_tokens += tree.num_tokens_unshared
        else:
            self.num_tokens += tree.num_tokens - (len(tree.prompt) if tree.prompt in self.prompts else 0)
            self.prompts.add(tree.prompt)
        return self.num_tokens


class _Placed(NamedTuple):
    """Sequences in their places; `before_S` is the row that predicts an answer's first token, -1 for none."""

    input_ids_BL: NDArray[np.int64]
    position_ids_BL: Tensor
    attention_mask_BL: Tensor | None
    layout: PackedLayout | None
    start_S: NDArray[np.int64]
    before_S: NDArray[np.int64]


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is not one of {', '.join(LAYOUTS)}")


def _lay_in_a_row(sequences: list[tuple[tuple[int, ...], tuple[int, ...]]], share: bool) -> _Placed:
    groups: dict[Hashable, list[int]] = {}
    for index, (prompt, _) in enumerate(sequences):
        groups.setdefault(prompt if share else index, []).append(index)
    segments: list[tuple[int, ...]] = []
    prompts, answers, row = [], [], 0
    start_S, before_S = np.empty(len(sequences), np.int64), np.empty(len(sequences), np.int64)
    for members in groups.values():
        prompt = sequences[members[0]][0]
        segments.append(prompt)
        row += len(prompt)
        before_S[members] = row - 1 if prompt else -1
        for index in members:
            start_S[index] = row
            segments.append(sequences[index][1])
            row += len(segments[-1])
        lengths = tuple(len(sequences[index][1]) for index in members)
        # A lone answer continues its prompt as one segment: attention needs no second part for it.
        prompts.append(len(prompt) + (lengths[0] if len(members) == 1 else 0))
        answers.append(lengths if len(members) > 1 else ())
    layout = PackedLayout(tuple(prompts), tuple(answers))
    input_ids_L = np.fromiter(chain.from_iterable(segments), np.int64, row)
    return _Placed(input_ids_L[None], layout.positions()[None], None, layout, start_S, before_S)


def _pad(sequences: list[tuple[tuple[int, ...], tuple[int, ...]]], pad_id: int) -> _Placed:
    prompt_S = np.array([len(prompt) for prompt, _ in sequences])
    length_S = np.array([len(prompt) + len(answer) for prompt, answer in sequences])
    B, L = len(sequences), int(length_S.max())
    real_BL = np.arange(L) < length_S[:, None]
    input_ids_BL = np.full((B, L), pad_id, np.int64)
    tokens = chain.from_iterable(chain(prompt, answer) for prompt, answer in sequences)
    input_ids_BL[real_BL] = np.fromiter(tokens, np.int64, int(length_S.sum()))
    start_S = np.arange(B) * L + prompt_S
    return _Placed(
        input_ids_BL,
        torch.arange(L).expand(B, L).contiguous(),
        torch.from_numpy(real_BL.astype(np.int64)),
        None,
        start_S,
        np.where(prompt_S > 0, start_S - 1, -1),
    )


def _predictions(
    placed: _Placed, sequences: list[tuple[tuple[int, ...], tuple[int, ...]]], masks: chain[bool]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(source_P, target_P, predictions of each sequence): the trained answer tokens that have a predecessor."""
    answer_S = np.array([len(answer) for _, answer in sequences])
    end_S = answer_S.cumsum()
    first_S, total = end_S - answer_S, int(end_S[-1])
    row_T = np.arange(total) + np.repeat(placed.start_S - first_S, answer_S)
    source_T = row_T - 1
    source_T[first_S] = placed.before_S
    kept_T = np.fromiter(masks, np.bool_, total) & (source_T >= 0)
    lengths_S = np.add.reduceat(kept_T.astype(np.int64), first_S)
    return source_T[kept_T], placed.input_ids_BL.reshape(-1)[row_T[kept_T]], lengths_S
