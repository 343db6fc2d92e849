"""Several reward functions with weights on a batch of completions; what fails is left out by name, never scored 0.

    r_n = sum_f w_f r_nf     over the functions that gave a number; NaN where none did, where one failed or is late

A function fails on a row by an exception, by an answer that is no finite number, or by taking too long; on the whole
batch by answers of the wrong count. After an exception or a time-out on the batch each row is asked for alone, so that
only the guilty ones are left out: a function must score a row alone as in a batch, and may be called twice for it.

`async def` functions run side by side in an event loop that lives as long as the `RewardSet`, so that clients may be
kept from call to call; the other functions run meanwhile, one after another, on a thread beside the main one (where
signals do not work). A thread can't be killed: one that is given up runs on until its function returns, and a function
that never gives back Python's lock (an endless regular expression) stops everything. What may hang should work in a
process of its own.

Letters: N completions, F functions.
Not done here: gathering over ranks, normalising, what to do about a function that always fails.
"""

from __future__ import annotations

import asyncio
import math
import numbers
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from alignfast.rewards.calls import EventLoop, Threads, TooLong, in_time
from alignfast.rewards.load import load_reward
from alignfast.rewards.protocol import (
    GIVEN,
    LATE,
    OWN_COLUMNS,
    Estimate,
    Late,
    RewardFunction,
    Text,
    accepted,
    check_signature,
    is_async,
    name_of,
)

TIMEOUT = 300.0  # seconds
_GRACE = 5.0  # seconds that the event loop may be late; longer, and a function has blocked it
_LARGEST = torch.finfo(torch.float32).max


class Failure(NamedTuple):
    """A row that a function could not score, and why."""

    function: str
    row: int
    reason: str


@dataclass(frozen=True)
class Scores:
    """Rewards of N completions.

    Attributes:
        names: of the F functions; a name that comes again is numbered.
        per_function_NF: float32, without weights; NaN where a function left a row out or failed.
        rewards_N: float32, the weighted sums; NaN where there is no reward.
        disagreement_NF: float32, of rewards that are an `Estimate`; NaN elsewhere.
        late_N: which completions shall be asked for again: a function said `LATE`, and none failed.
        failures: what failed, by function and row.
    """

    names: tuple[str, ...]
    per_function_NF: Tensor
    rewards_N: Tensor
    disagreement_NF: Tensor
    late_N: Tensor
    failures: list[Failure]

    def summary(self) -> str:
        """The failures in a line for each function and reason; empty without failures."""
        rows: dict[tuple[str, str], list[int]] = {}
        for function, row, reason in self.failures:
            rows.setdefault((function, reason), []).append(row)
        return "\n".join(f"reward {name!r}, {_rows(of)}: {reason}" for (name, reason), of in rows.items())


class _Failed(NamedTuple):
    reason: str


_Outcome = float | None | Late | _Failed


class _WrongAnswer(Exception):
    """An answer that is not one number or None for each completion."""


class _Batch(NamedTuple):
    """What is offered to a function: by name, one list each of N items, and what is alike for all rows."""

    N: int
    lists: dict[str, Sequence[Any]]
    shared: dict[str, Any]

    def row(self, n: int) -> _Batch:
        """A batch of one row."""
        return _Batch(1, {name: values[n : n + 1] for name, values in self.lists.items()}, self.shared)

    def call_of(self, function: RewardFunction) -> partial[Any]:
        """The call; the lists are its own, so that no function finds what another did to them."""
        lists = {name: list(values) for name, values in self.lists.items()}
        return partial(function, **accepted(function, {**lists, **self.shared}))


class RewardSet:
    """Reward functions with their weights.

    Args:
        funcs: what `load_reward` takes, one or several.
        weights: a factor for each; None is 1 for each. A function of weight 0 is measured only; where it fails, the
            row is left out all the same.
        timeout: seconds that a function may take for a batch, and again for its rows one by one; None: no limit.
        disagreement_coef: what the spread of heads costs, of reward models that are given by their folders; see
            `ModelReward`, which an object says for itself.

    Raises:
        ValueError: a function is unknown, the weights do not fit, or there is no ensemble for the coefficient.

    >>> def length(completions, **columns):
    ...     return [len(text) / 4 for text in completions]
    >>> rewards = RewardSet(["numeric", length], [1.0, -0.5])
    >>> scores = rewards.score(["2 + 2 ="] * 3, ["4", " 5  ", "22"], {"answer": [4, "4", None]})
    >>> scores.names, scores.per_function_NF.tolist(), scores.rewards_N.tolist()
    (('numeric', 'length'), [[1.0, 0.25], [0.0, 1.0], [nan, 0.5]], [0.875, -0.5, -0.25])
    >>> print(rewards.score(["2 + 2 ="], ["4"], {"answer": ["four"]}).summary())
    reward 'numeric', row 0: ValueError: the reference 'four' gives no number
    """

    def __init__(
        self,
        funcs: Any,
        weights: Sequence[float] | None = None,
        *,
        timeout: float | None = TIMEOUT,
        disagreement_coef: float | None = None,
    ) -> None:
        specs = list(funcs) if isinstance(funcs, (list, tuple)) else [funcs]
        if not specs:
            raise ValueError("expected at least one reward function")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout must be above 0 seconds, or None for no limit, got {timeout}")
        functions = [load_reward(spec, disagreement_coef=disagreement_coef) for spec in specs]
        self.functions: list[RewardFunction] = functions
        given = [function for spec, function in zip(specs, self.functions) if function is not spec]
        if disagreement_coef is not None and not any(hasattr(of, "disagreement_coef") for of in given):
            raise ValueError(
                f"disagreement_coef={disagreement_coef} is for the folder of a reward model with several heads, and none is "
                "among the reward functions; a ModelReward object takes it itself"
            )
        self.names = _unique([name_of(function) for function in self.functions])
        self.weights = _checked_weights(weights, self.names)
        self.timeout = timeout
        self._threads = [Threads() for _ in self.functions]
        self._loop: EventLoop | None = None

    def check(self, columns: Collection[str], *, conversational: bool = False) -> None:
        """Make sure, before training, that each function can score rows of these columns.

        Args:
            columns: names of the rows' columns, with `prompt` or without.
            conversational: whether prompts and completions are messages.

        Raises:
            ValueError: a column is missing, or has a name that is taken.
        """
        _check_names(columns)
        for function in self.functions:
            check_signature(function, columns)
            require = getattr(function, "require", None)
            if require is not None:
                require({*columns} - {*OWN_COLUMNS}, conversational)

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        columns: Mapping[str, Sequence[Any]] | None = None,
        *,
        completion_ids: Sequence[Sequence[int]] | None = None,
        sample_ids: Sequence[int] | None = None,
        trainer_state: Any = None,
    ) -> Scores:
        """Score N completions.

        Args:
            prompts: texts or lists of messages, passed on as they are.
            completions: one for each prompt, likewise.
            columns: further columns of the rows by name, N items each; `prompt` and `completion` are not passed on.
            completion_ids: token ids of each completion, for functions that take them.
            sample_ids: numbers of the completions, likewise.
            trainer_state: for functions that take it.

        Raises:
            ValueError: the lists differ in length, or a column has a name that is taken.
        """
        columns = columns or {}
        _check_names(columns)
        lists: dict[str, Sequence[Any]] = {"prompts": prompts, "completions": completions}
        lists |= {name: values for name, values in columns.items() if name not in OWN_COLUMNS}
        if completion_ids is not None:
            lists["completion_ids"] = completion_ids
        if sample_ids is not None:
            lists["sample_ids"] = sample_ids
        wrong = {name: len(values) for name, values in lists.items() if len(values) != len(completions)}
        if wrong:
            raise ValueError(
                f"expected {len(completions)} items in each list, as completions has, got {wrong}"
            )
        batch = _Batch(len(completions), lists, {"trainer_state": trainer_state})
        outcomes = self._outcomes(batch) if batch.N else [[] for _ in self.functions]
        return self._scores(outcomes, batch.N)

    def close(self) -> None:
        """End the event loop of async functions; the next call starts another."""
        if self._loop is not None:
            self._loop.close()
            self._loop = None

    def _outcomes(self, batch: _Batch) -> list[list[_Outcome]]:
        """Of each function, of each row: async functions start first and are waited for last."""
        started = time.monotonic()
        futures: dict[int, Future[list[_Outcome]]] = {}
        for f, function in enumerate(self.functions):
            if is_async(function):
                self._loop = self._loop or EventLoop()
                futures[f] = self._loop.submit(_score_async(function, batch, self.timeout))
        found = {
            f: _score_on_threads(function, batch, self.timeout, self._threads[f])
            for f, function in enumerate(self.functions)
            if f not in futures
        }
        for f, future in futures.items():
            # Twice the limit: for the batch, and for its rows
            left = None
            if self.timeout is not None:
                left = max(started + 2 * self.timeout + _GRACE - time.monotonic(), 0)
            try:
                found[f] = future.result(left)
            except FutureTimeoutError:
                self.close()  # the loop hangs with what blocks it
                found[f] = [_Failed("it, or an async function beside it, blocks the event loop")] * batch.N
        return [found[f] for f in range(len(self.functions))]

    def _scores(self, outcomes: list[list[_Outcome]], N: int) -> Scores:
        failures = [
            Failure(name, row, outcome.reason)
            for name, column in zip(self.names, outcomes)
            for row, outcome in enumerate(column)
            if isinstance(outcome, _Failed)
        ]

        def numbers_NF(number_of: Callable[[_Outcome], float]) -> Tensor:
            found_FN = [[number_of(outcome) for outcome in column] for column in outcomes]
            return torch.tensor(found_FN, dtype=torch.float32).view(len(outcomes), N).T.contiguous()

        per_function_NF = numbers_NF(lambda o: o if isinstance(o, float) else math.nan)
        disagreement_NF = numbers_NF(lambda o: o.disagreement if isinstance(o, Estimate) else math.nan)
        late_N = numbers_NF(lambda o: float(o is LATE)).bool().any(1)
        late_N[[failure.row for failure in failures]] = False
        weights_F = torch.tensor(self.weights)
        rewards_N = (per_function_NF * weights_F).nansum(1)
        rewards_N[per_function_NF[:, weights_F != 0].isnan().all(1)] = math.nan
        rewards_N[[failure.row for failure in failures]] = math.nan
        rewards_N[late_N] = math.nan
        return Scores(self.names, per_function_NF, rewards_N, disagreement_NF, late_N, failures)


def _score_on_threads(
    function: RewardFunction, batch: _Batch, timeout: float | None, threads: Threads
) -> list[_Outcome]:
    try:
        return _read(threads.run(batch.call_of(function), timeout), batch.N)
    except _WrongAnswer as error:
        return [_Failed(str(error))] * batch.N
    except Exception as error:
        if batch.N == 1:
            return [_Failed(_reason(error))]
    outcomes: list[_Outcome] = []
    started = time.monotonic()
    for n in range(batch.N):
        left = None
        # an equal share of the time for each row, and what earlier ones left of theirs
        if timeout is not None:
            left = max(started + timeout * (n + 1) / batch.N - time.monotonic(), timeout / batch.N)
        outcomes += _score_on_threads(function, batch.row(n), left, threads)
    return outcomes


async def _score_async(function: RewardFunction, batch: _Batch, timeout: float | None) -> list[_Outcome]:
    try:
        return _read(await in_time(batch.call_of(function), timeout), batch.N)
    except _WrongAnswer as error:
        return [_Failed(str(error))] * batch.N
    except Exception as error:
        if batch.N == 1:
            return [_Failed(_reason(error))]
    rows = await asyncio.gather(*(_score_async(function, batch.row(n), timeout) for n in range(batch.N)))
    return [outcome for row in rows for outcome in row]


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, TooLong) else f"{type(error).__name__}: {error}"


def _read(answer: Any, N: int) -> list[_Outcome]:
    """The outcomes in a function's answer.

    Raises:
        _WrongAnswer: it is not a list of N items; one number is not taken for all.
    """
    if isinstance(answer, (Tensor, np.ndarray)) and answer.ndim == 1:
        answer = answer.tolist()
    if not isinstance(answer, (list, tuple)):
        if hasattr(answer, "close") and hasattr(answer, "send"):  # a coroutine that nobody awaited
            answer.close()
        shape = f" of shape {tuple(answer.shape)}" if hasattr(answer, "shape") else ""
        raise _WrongAnswer(
            f"returned {type(answer).__name__}{shape}, expected a list of {N} numbers, one for each completion"
        )
    if len(answer) != N:
        raise _WrongAnswer(f"returned {len(answer)} values for {N} completions")
    return [_number(value) for value in answer]


def _number(value: Any) -> _Outcome:
    if value is None or value is LATE:
        return value
    if isinstance(value, (Tensor, np.generic, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, numbers.Real):
        return _Failed(f"returned {_short(value)}, which is no number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= _LARGEST:
        return _Failed(f"returned {_short(value)}, which is no finite float32")
    return value if isinstance(value, Estimate) else number


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _check_names(columns: Iterable[str]) -> None:
    taken = sorted({*columns} & {*GIVEN})
    if taken:
        raise ValueError(
            f"the column {taken[0]!r} has the name of an argument that reward functions get anyway; rename it"
        )


def _checked_weights(weights: Sequence[float] | None, names: Sequence[str]) -> tuple[float, ...]:
    weights = (1.0,) * len(names) if weights is None else tuple(map(float, weights))
    if len(weights) != len(names):
        raise ValueError(
            f"expected {len(names)} weights, one for each of {', '.join(names)}, got {len(weights)}"
        )
    if not all(map(math.isfinite, weights)) or not any(weights):
        raise ValueError(f"weights must be finite and not all 0, got {list(weights)}")
    return weights


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    """Names with a number where one comes again.

    >>> _unique(["a", "b", "a"])
    ('a', 'b', 'a_2')
    """
    found: list[str] = []
    for name in names:
        count, wanted = 1, name
        while wanted in found:
            count += 1
            wanted = f"{name}_{count}"
        found.append(wanted)
    return tuple(found)


def _rows(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:5]))
    return f"row{'s' * (len(rows) > 1)} {shown}" + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
