"""Every way in which a reward function can fail is named with its row, and the row is left out, never scored 0."""

from __future__ import annotations

import asyncio
import functools
import math
import threading
import time
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from alignfast.rewards import LATE, Estimate, Failure, RewardSet, score

TEXTS = ["a", "bb", "ccc", "dddd"]


def length(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


async def async_length(completions: list[str], **columns: Any) -> list[float]:
    return length(completions)


def scored(function: Any, texts: list[str] = TEXTS, **options: Any) -> score.Scores:
    return RewardSet(function, **options).score([""] * len(texts), texts)


def both_kinds(function: Any) -> list[Any]:
    """A function, and the same as a coroutine."""

    @functools.wraps(function)
    async def waiting(**arguments: Any) -> Any:
        await asyncio.sleep(0)
        return function(**arguments)

    return [function, waiting]


def test_weighted_sum() -> None:
    def only_short(completions: list[str], **columns: Any) -> list[float | None]:
        return [1.0 if len(text) < 3 else None for text in completions]

    def nothing(completions: list[str], **columns: Any) -> list[None]:
        return [None] * len(completions)

    scores = scored([length, only_short, nothing], weights=[0.5, 2.0, 1.0])
    assert scores.names == ("length", "only_short", "nothing")
    assert scores.rewards_N.tolist() == [2.5, 3.0, 1.5, 2.0]
    assert scores.per_function_NF[:, 0].tolist() == [1, 2, 3, 4]
    assert scores.per_function_NF.isnan().sum(0).tolist() == [0, 2, 4]
    assert not scores.failures
    assert not scores.summary()
    assert scored(nothing).rewards_N.isnan().all()


def test_a_row_with_nothing_but_a_measured_only_number_has_no_reward() -> None:
    def long(completions: list[str]) -> list[float | None]:
        return [1.0 if len(text) > 2 else None for text in completions]

    rewards_N = scored([long, length], weights=[1.0, 0.0]).rewards_N
    assert rewards_N.isnan().tolist() == [True, True, False, False]
    assert rewards_N[2:].tolist() == [1, 1]


def test_what_functions_are_given() -> None:
    seen: dict[str, Any] = {}

    def everything(**arguments: Any) -> list[float]:
        seen.update(arguments)
        return [0.0, 0.0]

    def some(completions: list[Any], answer: list[str], completion_ids: list[list[int]]) -> list[float]:
        assert (answer, completion_ids) == (["x", "y"], [[1], [2, 3]])
        completions.clear()  # its own list: the next function finds all
        return [1.0, 1.0]

    prompts = [[{"role": "user", "content": "q"}]] * 2
    completions = [[{"role": "assistant", "content": t}] for t in "ab"]
    columns = {"answer": ["x", "y"], "prompt": prompts, "completion": ["", ""]}
    scores = RewardSet([some, everything]).score(
        prompts, completions, columns, completion_ids=[[1], [2, 3]], trainer_state="state"
    )
    assert not scores.failures
    assert len(completions) == 2
    assert seen == {
        "prompts": prompts,
        "completions": completions,
        "answer": ["x", "y"],
        "completion_ids": [[1], [2, 3]],
        "trainer_state": "state",
    }
    assert seen["prompts"][0] is prompts[0]


@pytest.mark.parametrize(
    "values",
    [
        [1, 2, 3, 4],
        (1.0, 2.0, 3.0, 4.0),
        [True, Fraction(2), np.float32(3), torch.tensor(4.0)],
        [np.bool_(True), np.int64(2), np.array(3), torch.tensor(4, dtype=torch.bfloat16)],
        np.arange(1, 5),
        torch.arange(1, 5).bfloat16(),
    ],
)
def test_kinds_of_numbers(values: Any) -> None:
    for function in both_kinds(lambda **arguments: values):
        assert scored(function).rewards_N.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (math.nan, "returned nan, which is no finite float32"),
        (math.inf, "returned inf, which is no finite float32"),
        (1e39, "which is no finite float32"),
        pytest.param(10**400, "which is no finite float32", id="huge"),
        ("1.0", "returned '1.0', which is no number"),
        ([1.0], r"returned [1.0], which is no number"),
        (1j, "which is no number"),
    ],
)
def test_a_value_that_is_no_number_is_named(kind: int, value: Any, reason: str) -> None:
    function = both_kinds(lambda completions: [1.0, value, 0.0, None])[kind]
    scores = scored([function, length])
    (failure,) = scores.failures
    assert (failure.function, failure.row) == (scores.names[0], 1)
    assert reason in failure.reason
    assert scores.rewards_N.isnan().tolist() == [False, True, False, False]
    assert scores.rewards_N[[0, 2, 3]].tolist() == [2, 3, 4]
    assert scores.per_function_NF[1].isnan().tolist() == [True, False]


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (1.0, "returned float, expected a list of 4 numbers"),
        (None, "returned NoneType"),
        ([1.0], "returned 1 values for 4 completions"),
        ([1.0] * 5, "returned 5 values for 4 completions"),
        (torch.ones(4, 1), r"returned Tensor of shape (4, 1)"),
        (torch.tensor(1.0), r"returned Tensor of shape ()"),
        ({0: 1.0}, "returned dict"),
        ("1234", "returned str"),
    ],
)
def test_an_answer_of_the_wrong_form_leaves_out_the_batch(kind: int, answer: Any, reason: str) -> None:
    calls = []

    def wrong(**arguments: Any) -> Any:
        calls.append(arguments)
        return answer

    scores = scored(both_kinds(wrong)[kind])
    assert [failure.row for failure in scores.failures] == [0, 1, 2, 3]
    assert all(reason in failure.reason for failure in scores.failures)
    assert scores.rewards_N.isnan().all()
    assert len(calls) == 1  # nobody can tell which rows such an answer is for, so nothing is asked again


def test_a_coroutine_that_nobody_awaits_is_no_answer() -> None:
    scores = scored(lambda **arguments: async_length(**arguments))
    assert "returned coroutine" in scores.failures[0].reason


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("error", [ValueError("bad"), SystemExit(3), TimeoutError("the judge's own")])
def test_an_exception_leaves_out_the_guilty_rows_only(kind: int, error: BaseException) -> None:
    def picky(completions: list[str], answer: list[int]) -> list[float]:
        if "bb" in completions:
            raise error
        return [float(value) for value in answer]

    function = both_kinds(picky)[kind]
    rewards = RewardSet([function, length])
    scores = rewards.score([""] * 4, TEXTS, {"answer": [10, 20, 30, 40]})
    text = f"{type(error).__name__}: {error}"
    (failure,) = scores.failures
    assert (failure.function, failure.row) == (rewards.names[0], 1)
    assert failure.reason.endswith(text)
    assert scores.rewards_N.isnan().tolist() == [False, True, False, False]
    assert scores.rewards_N[[0, 2, 3]].tolist() == [11, 33, 44]
    assert scores.summary() == f"reward '{rewards.names[0]}', row 1: {failure.reason}"


def test_summary_gathers_rows() -> None:
    def broken(**arguments: Any) -> list[float]:
        raise KeyError("level")

    scores = scored(broken, ["a"] * 8)
    assert scores.summary() == "reward 'broken', rows 0, 1, 2, 3, 4 and 3 more: KeyError: 'level'"
    assert scores.failures[0] == Failure("broken", 0, "KeyError: 'level'")


def test_a_row_that_takes_too_long_is_left_out() -> None:
    release = threading.Event()

    def hangs(completions: list[str]) -> list[float]:
        if "bb" in completions:
            release.wait(60)
        return length(completions)

    try:
        rewards = RewardSet(hangs, timeout=1.6)
        started = time.monotonic()
        scores = rewards.score([""] * 4, TEXTS)
        assert time.monotonic() - started < 30  # twice the limit, on a busy machine
        (failure,) = scores.failures
        assert failure.row == 1
        assert failure.reason.startswith("took longer than ")
        assert float(failure.reason.split()[-2]) <= 0.8  # its share and the first row's, of a limit of 1.6
        assert scores.rewards_N[[0, 2, 3]].tolist() == [1, 3, 4]
        hung = [thread for thread in threading.enumerate() if thread.name == "alignfast reward"]
        assert len(hung) == 2
        assert all(thread.daemon for thread in hung)  # so that the process can end
    finally:
        release.set()


def test_hanging_calls_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignfast.rewards.calls._MOST_STRAYS", 2)
    release = threading.Event()

    def hangs(completions: list[str]) -> list[float]:
        release.wait(60)
        return length(completions)

    try:
        rewards = RewardSet(hangs, timeout=0.05)
        reasons = [rewards.score([""], ["a"]).failures[0].reason for _ in range(3)]
    finally:
        release.set()
    assert ["took longer" in reason for reason in reasons] == [True, True, False]
    assert "2 earlier calls that took too long still run" in reasons[2]


def test_an_async_row_that_takes_too_long_is_cancelled() -> None:
    cancelled, both = [], threading.Event()

    async def hangs(completions: list[str]) -> list[float]:
        if "bb" in completions:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.append(len(completions))
                if len(cancelled) == 2:
                    both.set()
                raise
        return length(completions)

    rewards = RewardSet(hangs, timeout=0.2)  # kept: forgotten, it would cancel what still runs
    scores = rewards.score([""] * 4, TEXTS)
    assert [(failure.row, failure.reason) for failure in scores.failures] == [(1, "took longer than 0.2 s")]
    assert scores.rewards_N[[0, 2, 3]].tolist() == [1, 3, 4]
    assert both.wait(20)
    assert cancelled == [4, 1]


def test_async_functions_run_side_by_side() -> None:
    """Each waits for the other: one after the other they would never end."""
    first, second = threading.Event(), threading.Event()

    def meets(mine: threading.Event, other: threading.Event) -> Any:
        async def meet(completions: list[str]) -> list[float]:
            mine.set()
            while not other.is_set():
                await asyncio.sleep(0.001)
            return length(completions)

        return meet

    def waits_for_both(completions: list[str]) -> list[float]:
        assert first.wait(60)
        assert second.wait(60)
        return length(completions)

    scores = scored([meets(first, second), waits_for_both, meets(second, first)], timeout=60)
    assert scores.names == ("meet", "waits_for_both", "meet_2")
    assert scores.rewards_N.tolist() == [3, 6, 9, 12]


def test_inside_a_running_loop_and_with_a_client_that_lives_on() -> None:
    loops = []

    async def remembers(completions: list[str]) -> list[float]:
        loops.append(asyncio.get_running_loop())
        return length(completions)

    rewards = RewardSet(remembers)

    async def main() -> list[float]:
        return rewards.score([""] * 4, TEXTS).rewards_N.tolist()

    assert asyncio.run(main()) == [1, 2, 3, 4]
    assert rewards.score([""] * 4, TEXTS).rewards_N.tolist() == [1, 2, 3, 4]
    assert loops[0] is loops[1]
    rewards.close()
    assert rewards.score([""] * 4, TEXTS).rewards_N.tolist() == [1, 2, 3, 4]
    assert loops[2] is not loops[0]


def test_a_function_that_blocks_the_event_loop_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "_GRACE", 0.1)
    release = threading.Event()

    async def blocks(completions: list[str]) -> list[float]:
        release.wait(60)
        return length(completions)

    try:
        rewards = RewardSet([blocks, length], timeout=0.1)
        scores = rewards.score([""] * 4, TEXTS)
        assert all("blocks the event loop" in failure.reason for failure in scores.failures)
        assert scores.rewards_N.isnan().all()
        assert scores.per_function_NF[:, 1].tolist() == [1, 2, 3, 4]
    finally:
        release.set()


def test_threads_take_over_the_grad_mode() -> None:
    modes = []

    def looks(completions: list[str]) -> list[float]:
        modes.append(torch.is_grad_enabled())
        return length(completions)

    with torch.no_grad():
        scored(looks)
    scored(looks)
    assert modes == [False, True]


def test_no_completions_are_no_call() -> None:
    def never(**arguments: Any) -> list[float]:
        raise AssertionError

    scores = RewardSet([never, never]).score([], [])
    assert scores.per_function_NF.shape == (0, 2)
    assert scores.rewards_N.shape == (0,)
    assert not scores.failures


def test_check_before_training() -> None:
    rewards = RewardSet(["numeric", lambda completions, level: []])
    rewards.check(["prompt", "answer", "level"])
    with pytest.raises(
        ValueError, match=r"reward 'numeric' compares with the column 'answer' or 'solution'.*have level"
    ):
        rewards.check(["prompt", "level"])
    with pytest.raises(ValueError, match="needs 'level'"):
        rewards.check(["prompt", "answer"])
    with pytest.raises(ValueError, match="the column 'prompts' has the name of an argument"):
        rewards.check(["prompts", "answer", "level"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"funcs": []}, "at least one reward function"),
        ({"funcs": [length], "weights": [1.0, 2.0]}, "expected 1 weights, one for each of length, got 2"),
        ({"funcs": [length], "weights": [math.nan]}, "weights must be finite"),
        ({"funcs": [length], "weights": [0.0]}, "not all 0"),
        ({"funcs": length, "timeout": 0}, "timeout must be above 0"),
        ({"funcs": "numerik"}, "did you mean 'numeric'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardSet(**options)


def test_lists_of_different_length_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"expected 2 items in each list, as completions has, got \{'answer': 3\}"
    ):
        RewardSet(length).score(["", ""], ["", ""], {"answer": [1, 2, 3]})
    with pytest.raises(ValueError, match="'prompts': 1"):
        RewardSet(length).score([""], ["", ""])


@pytest.mark.parametrize("kind", [0, 1], ids=["sync", "async"])
def test_late_rewards_have_none_yet(kind: int) -> None:
    def half(completions: list[str], sample_ids: list[int], **columns: Any) -> list[Any]:
        return [LATE if number % 2 else None for number in sample_ids]

    def fails_last(completions: list[str], **columns: Any) -> list[float]:
        return [math.nan if len(text) == 4 else 1.0 for text in completions]

    functions = [both_kinds(half)[kind], length, fails_last]
    scores = RewardSet(functions).score([""] * 4, TEXTS, sample_ids=[8, 7, 6, 5])
    # the last one failed: asking again is of no use
    assert scores.late_N.tolist() == [False, True, False, False]
    assert scores.rewards_N.isnan().tolist() == [False, True, False, True]
    assert scores.per_function_NF[1].tolist()[1:] == [2.0, 1.0]
    assert repr(LATE) == "LATE"


def test_an_estimate_is_a_number_that_says_how_unsure_it_is() -> None:
    def unsure(completions: list[str], **columns: Any) -> list[float]:
        return [Estimate(len(text), disagreement=0.5) if len(text) > 1 else 1.0 for text in completions]

    scores = scored([length, unsure])
    assert scores.rewards_N.tolist() == [2.0, 4.0, 6.0, 8.0]
    assert scores.disagreement_NF[:, 0].isnan().all()
    assert scores.disagreement_NF[1:, 1].tolist() == [0.5] * 3
    assert scores.disagreement_NF[0, 1].isnan()
    (failure, *_) = scored(lambda completions: [Estimate(math.inf, disagreement=0.0)] * 4).failures
    assert "no finite float32" in failure.reason
