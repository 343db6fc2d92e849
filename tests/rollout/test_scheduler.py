"""Continuous batching without a model: slots, pages and their owners, random calls to the end."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignfast.rollout.pages import Pages
from alignfast.rollout.scheduler import PromptState, Running, Scheduler, pages_needed

SIZE = 4


def group(length: int, number: int, limit: int, first: int = 0) -> list[Running]:
    """The sequences of one prompt."""
    prompt = PromptState(tuple(range(length)), left=number)
    return [Running(prompt, first + i, first + i, limit) for i in range(number)]


def test_a_prompt_is_computed_once_and_its_full_pages_are_shared() -> None:
    pages = Pages(20, SIZE)
    scheduler = Scheduler(group(10, 3, 3), pages, max_sequences=8, max_prefill_tokens=100)
    started = scheduler.admit()
    assert len(started.prompts) == 1
    assert len(started.sequences) == 3
    shared = {tuple(sequence.pages[:2]) for sequence in started.sequences}
    assert shared == {tuple(started.prompts[0].pages[:2])}
    # the third page holds two tokens of the prompt: two get a copy, the last has the page itself
    partial = started.prompts[0].pages[2]
    assert [source for source, _ in started.copies] == [partial, partial]
    assert [sequence.pages[2] == partial for sequence in started.sequences] == [False, False, True]
    assert pages.num_free == 20 - 2 - 3 * 2
    scheduler.finish(set(started.sequences))
    assert pages.num_free == 20
    assert scheduler.done


def test_a_finished_slot_is_refilled_at_once() -> None:
    scheduler = Scheduler(group(5, 5, 2), Pages(50, SIZE), max_sequences=2, max_prefill_tokens=100)
    first, second = scheduler.admit().sequences
    assert scheduler.admit().sequences == []
    scheduler.finish({first})
    started = scheduler.admit()
    assert (started.prompts, len(started.sequences)) == ([], 1)  # of the prompt that is computed already
    assert scheduler.running == [second, *started.sequences]


def test_prompts_of_one_forward_pass_stay_within_the_budget() -> None:
    waiting = [*group(6, 1, 1), *group(6, 1, 1), *group(30, 1, 1)]
    scheduler = Scheduler(waiting, Pages(50, SIZE), max_sequences=8, max_prefill_tokens=13)
    assert [len(scheduler.admit().prompts) for _ in range(3)] == [2, 1, 0]


def test_sequences_wait_for_pages() -> None:
    scheduler = Scheduler(group(4, 3, 4), Pages(3, SIZE), max_sequences=8, max_prefill_tokens=100)
    (first, second) = scheduler.admit().sequences  # a page of the prompt, and one of each sequence
    assert scheduler.admit().sequences == []
    scheduler.finish({second})
    assert len(scheduler.admit().sequences) == 1
    assert first in scheduler.running


def test_what_can_never_start_is_an_error() -> None:
    scheduler = Scheduler(group(9, 1, 9), Pages(2, SIZE), max_sequences=8, max_prefill_tokens=100)
    with pytest.raises(RuntimeError, match="a prompt of 9 tokens with room for 9 more does not fit"):
        scheduler.admit()


@settings(max_examples=300)
@given(
    st.lists(st.tuples(st.integers(1, 13), st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=6),
    st.integers(1, 6), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_every_sequence_ends_on_pages_of_its_own(
    groups: list[tuple[int, int, int]], max_sequences: int, tight: bool, seed: int
) -> None:
    waiting = [
        sequence
        for i, (length, n, limit) in enumerate(groups)
        for sequence in group(length, n, limit, 10 * i)
    ]
    wanted, least = pages_needed(waiting, SIZE, max_sequences)
    pages = Pages(least if tight else wanted, SIZE)
    scheduler = Scheduler(waiting, pages, max_sequences, max_prefill_tokens=20)
    draw, ended = random.Random(seed), 0
    while not scheduler.done:
        started = scheduler.admit()
        assert tight or len(scheduler.running) == min(max_sequences, len(waiting) - ended) or started.prompts
        writable = [page for s in scheduler.running for page in s.pages[len(s.prompt.ids) // SIZE :]]
        shared = {page for s in scheduler.running for page in s.pages[: len(s.prompt.ids) // SIZE]}
        assert len(writable) == len(set(writable))
        assert not shared & set(writable)
        for sequence in scheduler.running:
            assert len(sequence.pages) * SIZE >= len(sequence.prompt.ids) + sequence.limit
        finished = {sequence for sequence in scheduler.running if draw.random() < 0.4}
        ended += len(finished)
        scheduler.finish(finished)
    assert ended == len(waiting)
    assert pages.num_free == (least if tight else wanted)


def test_pages_that_are_not_free_cannot_be_taken() -> None:
    pages = Pages(2, SIZE)
    pages.take(1)
    with pytest.raises(RuntimeError, match="2 pages were asked for, 1 are free"):
        pages.take(2)
