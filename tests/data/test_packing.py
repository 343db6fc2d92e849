"""Every layout holds the same predictions: the same tokens, each from the same context."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignfast.data import LAYOUTS, Batch, Tree, cut, mismatched, pack

PAD = 999  # no token of a tree, so that a pad token in a context or target shows

tokens = st.integers(0, 4)  # few ids, so that prompts repeat and trees merge


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    answers = draw(st.lists(st.lists(tokens, min_size=1, max_size=5), min_size=1, max_size=4))
    masks = [draw(st.lists(st.booleans(), min_size=len(a), max_size=len(a))) for a in answers]
    prompt = draw(st.lists(tokens, max_size=3))
    return Tree(tuple(prompt), tuple(map(tuple, answers)), tuple(map(tuple, masks)))


forests = st.lists(trees(), min_size=1, max_size=6)


def expected(forest: list[Tree]) -> list[list[tuple[tuple[int, ...], int]]]:
    """(context, target) of every trained token that has a context, sequence by sequence, straight from the trees."""
    return [
        [
            (tree.prompt + answer[:place], answer[place])
            for place in range(len(answer))
            if trained[place] and len(tree.prompt) + place > 0
        ]
        for tree in forest
        for answer, trained in zip(tree.answers, tree.trained)
    ]


def contexts(batch: Batch) -> dict[int, tuple[int, ...]]:
    """The tokens that each flattened row has seen, by the layout's or the attention mask's word alone."""
    ids = batch.input_ids_BL.flatten().tolist()
    if batch.layout is None:
        assert batch.attention_mask_BL is not None
        L = batch.input_ids_BL.shape[1]
        return {
            row: tuple(ids[row - row % L : row + 1])
            for row, real in enumerate(batch.attention_mask_BL.flatten().tolist())
            if real
        }
    return {
        row: tuple(ids[prompt_start : prompt_start + prompt]) + tuple(ids[start : row + 1])
        for start, length, prompt_start, prompt in batch.layout.segments
        for row in range(start, start + length)
    }


@settings(max_examples=150, derandomize=True, deadline=None)
@given(forests, st.sampled_from(LAYOUTS))
def test_unpacking_gives_the_trees_predictions(forest: list[Tree], layout: str) -> None:
    batch = pack(forest, range(len(forest)), layout, pad_id=PAD)
    seen = contexts(batch)
    pairs = [(seen[row], target) for row, target in zip(batch.source_P.tolist(), batch.target_P.tolist())]
    ends = torch.tensor((0, *batch.lengths)).cumsum(0).tolist()
    assert [pairs[a:b] for a, b in pairwise(ends)] == expected(forest)
    assert ends[-1] == len(pairs) == len(batch.source_P)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(forests, st.sampled_from(LAYOUTS))
def test_positions_and_token_counts(forest: list[Tree], layout: str) -> None:
    batch = pack(forest, range(len(forest)), layout, pad_id=PAD)
    seen = contexts(batch)
    positions = batch.position_ids_BL.flatten().tolist()
    assert all(positions[row] == len(context) - 1 for row, context in seen.items())
    unshared = sum(tree.num_tokens_unshared for tree in forest)
    assert batch.num_tokens == len(seen)
    assert batch.num_tokens_unshared == unshared
    if layout == "shared":
        prompts = {tree.prompt for tree in forest}
        assert batch.num_tokens == sum(map(len, prompts)) + sum(
            len(a) for tree in forest for a in tree.answers
        )
    else:
        assert batch.num_tokens == unshared
    assert (PAD in batch.input_ids_BL) == (layout == "padded" and batch.input_ids_BL.numel() > unshared)


@settings(max_examples=100, derandomize=True, deadline=None)
# 35: the largest tree drawn, 4 * (3 + 5), fits
@given(forests, st.sampled_from(LAYOUTS), st.integers(35, 90))
def test_cut_keeps_order_and_budget_and_wastes_nothing(forest: list[Tree], layout: str, budget: int) -> None:
    runs = cut(forest, layout, budget)
    assert [index for run in runs for index in run] == list(range(len(forest)))

    def size(indices: range) -> int:
        batch = pack([forest[i] for i in indices], indices, layout, pad_id=PAD)
        return batch.input_ids_BL.numel()

    assert all(size(run) <= budget for run in runs)
    # the next tree did not fit
    assert all(size(range(run.start, run.stop + 1)) > budget for run in runs[:-1])


def pair(prompt: int, *answers: int) -> Tree:
    return Tree(
        tuple(range(prompt)), tuple(tuple(range(n)) for n in answers), tuple((True,) * n for n in answers)
    )


def test_trees_with_one_prompt_share_it_wherever_they_stand() -> None:
    other = Tree((9, 9), ((1,),), ((True,),))
    batch = pack([pair(3, 1, 2), other, pair(3, 4)], [7, 8, 9])
    assert batch.layout is not None
    assert batch.layout.prompts == (3, 3)  # the other tree's lone answer continues its prompt as one segment
    assert batch.layout.answers == ((1, 2, 4), ())
    assert batch.rows == (7, 8, 9)
    assert batch.lengths == (1, 2, 1, 4)


def test_packed_lays_whole_sequences() -> None:
    batch = pack([pair(3, 1, 2)], [0], "packed")
    assert batch.layout is not None
    assert (batch.layout.prompts, batch.layout.answers) == ((4, 5), ((), ()))


def test_a_sequence_without_predictions_has_length_zero() -> None:
    text = Tree((), ((5,),), ((True,),))  # its only token has no predecessor
    batch = pack([text, pair(2, 1)], [0, 1])
    assert batch.lengths == (0, 1)


def test_shapes_types_and_the_move_to_a_device() -> None:
    batch = pack([pair(2, 1, 3)], [0], "padded", pad_id=0).to("meta")
    assert batch.input_ids_BL.shape == batch.position_ids_BL.shape == (2, 5)
    tensors = [
        batch.last_S,
        batch.input_ids_BL,
        batch.position_ids_BL,
        batch.attention_mask_BL,
        batch.source_P,
        batch.target_P,
    ]
    assert {(t.dtype, t.device.type) for t in tensors if t is not None} == {(torch.int64, "meta")}


def test_budget_none_is_one_run_and_no_trees_are_none() -> None:
    assert cut([pair(1, 1)] * 3, "shared", None) == [range(3)]
    assert cut([], "shared", None) == cut([], "shared", 5) == []


def test_shared_budget_counts_a_prompt_once_a_run() -> None:
    two = [pair(3, 1, 1), pair(3, 1, 1)]  # 3 + 2 tokens, then 2 more
    assert cut(two, "shared", 7) == [range(2)]
    assert cut(two, "shared", 6) == cut(two, "packed", 15) == [range(1), range(1, 2)]


def test_padded_budget_counts_pad_tokens() -> None:
    # 2 rows of 4 and 2 rows of 2: alone 8 and 4 tokens, together 4 rows of 4 = 16
    assert cut([pair(2, 2, 1), pair(1, 1, 1)], "padded", 15) == [range(1), range(1, 2)]
    assert cut([pair(2, 2, 1), pair(1, 1, 1)], "padded", 16) == [range(2)]


def test_a_tree_over_the_budget_is_named_with_both_ways_out() -> None:
    with pytest.raises(
        ValueError, match=r"row 40 alone has 6 tokens.*max_tokens_per_batch=5.*lower max_length"
    ):
        cut([pair(1, 1), pair(2, 2, 2)], "shared", 5, rows=[30, 40])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "at least one tree"),
        (([pair(1, 1)], [0, 1]), "at least one tree"),
        (([pair(1, 1)], [0], "tight"), "'tight' is not one of shared, packed, padded"),
        (([pair(1, 1)], [0], "padded"), "pass pad_id"),
    ],
)
def test_pack_refuses(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(*arguments)


@pytest.mark.parametrize(
    ("answers", "trained"), [((), ()), (((),), ((),)), (((1, 2),), ((True,),)), (((1,),), ())]
)
def test_tree_refuses_empty_answers_and_masks_of_another_length(answers: tuple, trained: tuple) -> None:
    with pytest.raises(ValueError, match="masks alike"):
        Tree((1,), answers, trained)


def test_last_rows_labels_and_answers_in_every_layout() -> None:
    """The hidden row of each sequence's last token holds that token, shared prompts or not."""
    trees = [pair(3, 2, 1), pair(0, 4), pair(2, 1, 3, 2)]
    expected = [answer[-1] for tree in trees for answer in tree.answers]
    for layout in LAYOUTS:
        batch = pack(trees, [0, 1, 2], layout, pad_id=0)
        assert batch.input_ids_BL.flatten()[batch.last_S].tolist() == expected
        assert batch.num_answers == (2, 1, 3)
        assert batch.labels == (0.0, 0.0, 0.0)


def test_mismatched_answers_stay_within_the_rows_of_a_step() -> None:
    """Seven rows in steps of three: two rotations, and a lone row that takes the one before it."""
    trees = [Tree((i,), ((10 + i,),), ((True,),)) for i in range(7)]
    found = mismatched(trees, together=3, max_length=None)
    assert [tree.prompt for tree in found] == [tree.prompt for tree in trees]
    assert [tree.answers[0][0] - 10 for tree in found] == [2, 0, 1, 5, 3, 4, 5]
    assert [tree.answers[0][0] - 10 for tree in mismatched(trees, 100, None)] == [6, 0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="two rows at least, got 1"):
        mismatched(trees[:1], 3, None)
