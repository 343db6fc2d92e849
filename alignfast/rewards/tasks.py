"""Tasks whose answers can be checked: sums of our own, and those of reasoning-gym.

Rows have a `prompt` and an `answer`; the reward of a sum is `numeric`, that of reasoning-gym's tasks `ReasoningGym`.

Not done here: chat templates; wrap the prompts as messages where the model wants them.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Collection, Iterator, Sequence
from importlib import import_module
from typing import Any

from alignfast.rewards.protocol import Text, completion_text

_ENTRY = "reasoning_gym"  # column of the task's own record
_MOST_SHUFFLED = 100_000  # of so few sums all are shuffled; of more they are drawn until enough differ


def arithmetic(
    num_items: int, seed: int = 0, *, digits: int = 2, terms: int = 2, exclude: Collection[str] = ()
) -> list[dict[str, str]]:
    """Different sums and differences, such as "27 + 51 - 13 =", drawn evenly.

    Args:
        num_items: how many, >= 0.
        seed: the same seed gives the same rows.
        digits: of each number; numbers of one digit may be 0.
        terms: numbers in each, >= 2.
        exclude: prompts that must not come: those of training, when the rows are to test it.

    Raises:
        ValueError: an option is out of range, or there are not so many.

    >>> arithmetic(2, digits=1, terms=3)
    [{'prompt': '8 + 5 - 7 =', 'answer': '6'}, {'prompt': '7 - 7 + 7 =', 'answer': '7'}]
    """
    if num_items < 0 or digits < 1 or terms < 2:
        raise ValueError(
            f"expected num_items >= 0, digits >= 1 and terms >= 2, got {num_items}, {digits} and {terms}"
        )
    low, high = (0 if digits == 1 else 10 ** (digits - 1)), 10**digits
    rows: list[dict[str, str]] = []
    seen = set(exclude)
    for index in _drawn((high - low) ** terms * 2 ** (terms - 1), seed):
        if len(rows) == num_items:
            break
        prompt, answer = _sum(index, low, high, terms)
        if prompt not in seen:
            seen.add(prompt)
            rows.append({"prompt": prompt, "answer": str(answer)})
    if len(rows) < num_items:
        raise ValueError(
            f"there are only {len(rows)} sums of {terms} numbers of {digits} digits that are not excluded, and "
            f"{num_items} were asked for; raise digits or terms"
        )
    return rows


def _drawn(count: int, seed: int) -> Iterator[int]:
    """Numbers below `count` in random order: all of few, with repetitions of many."""
    draw = random.Random(seed)
    if count <= _MOST_SHUFFLED:
        yield from draw.sample(range(count), count)
    while count > _MOST_SHUFFLED:
        yield draw.randrange(count)


def _sum(index: int, low: int, high: int, terms: int) -> tuple[str, int]:
    """The sum of this number, and its value: the number's digits are the terms and the signs between them."""
    index, first = divmod(index, high - low)
    text, value = str(low + first), low + first
    for _ in range(terms - 1):
        index, term = divmod(index, high - low)
        index, minus = divmod(index, 2)
        text += f" {'-' if minus else '+'} {low + term}"
        value += -(low + term) if minus else low + term
    return f"{text} =", value


def reasoning_gym_rows(task: str, num_items: int, seed: int = 0, **options: Any) -> list[dict[str, Any]]:
    """Tasks of reasoning-gym (https://github.com/open-thought/reasoning-gym, version 0.1.25), for `ReasoningGym`.

    Args:
        task: one of its data sets, e.g. `chain_sum`.
        num_items: how many.
        seed: the same seed gives the same rows.
        **options: of the data set, e.g. `min_terms=2`.

    Returns:
        Rows with `prompt`, `answer` and the task's own record.

    Raises:
        RuntimeError: reasoning-gym is not installed.
        ValueError: there is no such task, or it refuses an option.
    """
    gym = _reasoning_gym()
    known = import_module("reasoning_gym.factory").DATASETS
    if task not in known:
        near = difflib.get_close_matches(task, known, n=1)
        raise ValueError(
            f"reasoning-gym has no task {task!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    try:
        entries = gym.create_dataset(task, size=num_items, seed=seed, **options)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"reasoning-gym's task {task!r} refuses {options}: {error}") from error
    return [
        {"prompt": entry["question"], "answer": entry["answer"], _ENTRY: {**entry, "task": task}}
        for entry in entries
    ]


class ReasoningGym:
    """Reasoning-gym's own score of an answer, from 0 to 1, for rows of `reasoning_gym_rows`; None for other rows.

    The answer is what stands in the last <answer>...</answer>, or without such the whole completion.

    Raises:
        RuntimeError: reasoning-gym is not installed.
    """

    name = "reasoning_gym"

    def __init__(self) -> None:
        self._score_of = _reasoning_gym().get_score_answer_fn

    def require(self, columns: Collection[str], conversational: bool) -> None:
        """Raise ValueError unless the column of the tasks' records is there."""
        if _ENTRY not in columns:
            raise ValueError(f"rows lack the column {_ENTRY!r}; make them with reasoning_gym_rows")

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
    ) -> list[float | None]:
        """The score of each completion."""
        return [
            None if entry is None else float(self._score_of(entry["task"])(_answer(completion), entry))
            for completion, entry in zip(completions, columns[_ENTRY])
        ]


def _answer(completion: Text) -> str:
    text = completion_text(completion)
    opened = text.rpartition("<answer>")[2]
    return opened.partition("</answer>")[0].strip()


def _reasoning_gym() -> Any:
    try:
        return import_module("reasoning_gym")
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"reasoning-gym's tasks are missing ({error}): pip install reasoning-gym"
        ) from error
