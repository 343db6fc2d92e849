"""What a reward function is.

    (prompts, completions, **columns) -> list[float | None | LATE]

Called with a batch, by keyword, TRL's convention: `prompts` and `completions` as the rows have them, texts or lists
of messages; `columns`, one list for each further column of the rows; and `completion_ids`, `sample_ids` (a number for each
sample, its own for the whole run) and `trainer_state`. A function gets what its signature names, or everything if it
takes `**kwargs`. It answers with one number for each completion, None where it has nothing to say, `LATE` where it does
not know yet and wants to be asked again; an `Estimate` is a number that also says how unsure it is. It may be `async def`, or an object with `__call__`; such an object may
check the rows before training in a method `require(columns, conversational)`.

Not done here: TRL's `log_extra`, `log_metric` and `environments`.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

Text: TypeAlias = str | Sequence[Mapping[str, Any]]  # plain, or messages
RewardFunction: TypeAlias = Callable[..., Any]


class Late(enum.Enum):
    """The type of `LATE`."""

    LATE = "late"

    def __repr__(self) -> str:
        return self.name


LATE = Late.LATE  # a reward that has not come yet


class Estimate(float):
    """A reward with the spread of what it was made from; counts as any number does.

    >>> reward = Estimate(0.5, disagreement=0.1)
    >>> reward + 1, reward.disagreement
    (1.5, 0.1)
    """

    disagreement: float

    def __new__(cls, value: float, *, disagreement: float) -> Estimate:
        number = super().__new__(cls, value)
        number.disagreement = disagreement
        return number


# A row's own prompt and completion are given as `prompts` and `completions`.
OWN_COLUMNS = ("prompt", "completion")
# What is given besides columns; a column can't have such a name.
GIVEN = ("prompts", "completions", "completion_ids", "sample_ids", "trainer_state")


def completion_text(completion: Text) -> str:
    """What a completion says: a text itself; of messages the last one's text.

    >>> completion_text("4"), completion_text([{"role": "assistant", "content": "4"}])
    ('4', '4')
    >>> completion_text([{"role": "assistant", "content": [{"type": "text", "text": "4"}]}])
    '4'
    """
    if isinstance(completion, str):
        return completion
    content = (completion[-1].get("content") if completion else None) or ""
    if isinstance(content, str):
        return content
    return "".join(block.get("text", "") for block in content)


def name_of(function: RewardFunction) -> str:
    """What a function is called in metrics and messages.

    >>> name_of(len), name_of(partial(len)), name_of(dict())
    ('len', 'len', 'dict')
    """
    while isinstance(function, partial):
        function = function.func
    return str(
        getattr(function, "__name__", None) or getattr(function, "name", None) or type(function).__name__
    )


def is_async(function: RewardFunction) -> bool:
    """Whether calling it gives something to await."""
    while isinstance(function, partial):
        function = function.func
    call = getattr(function, "__call__", None)  # noqa: B004 - an object's own, to be looked at
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def accepted(function: RewardFunction, offered: Mapping[str, Any]) -> dict[str, Any]:
    """Of what is offered, by name, what the function takes.

    >>> accepted(lambda completions, answer: [], {"prompts": 1, "completions": 2, "answer": 3, "level": 4})
    {'completions': 2, 'answer': 3}
    """
    named = {parameter.name for parameter in _parameters(function)}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in _parameters(function)):
        return dict(offered)
    return {name: value for name, value in offered.items() if name in named}


def check_signature(function: RewardFunction, columns: Collection[str]) -> None:
    """Make sure that a function can be called with the rows' columns.

    Args:
        function: a reward function.
        columns: names of the rows' columns.

    Raises:
        ValueError: it needs what is not there, or can't be called by keyword.

    >>> check_signature(lambda completions, solution: [], ["prompt", "answer"])
    Traceback (most recent call last):
    ValueError: reward function '<lambda>' needs 'solution', which is no column of the rows (answer); ...
    """
    offered = {*GIVEN, *columns} - {*OWN_COLUMNS}
    for parameter in _parameters(function):
        needed = parameter.default is parameter.empty
        if parameter.kind is parameter.POSITIONAL_ONLY and needed:
            raise ValueError(
                f"reward function {name_of(function)!r} takes {parameter.name!r} by position alone; reward functions "
                "are called by keyword, as (prompts, completions, **columns)"
            )
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            if needed and parameter.name not in offered:
                raise ValueError(
                    f"reward function {name_of(function)!r} needs {parameter.name!r}, which is no column of the rows "
                    f"({_listed(set(columns) - {*OWN_COLUMNS})}); its arguments are prompts, completions and columns by name"
                )


def _parameters(function: RewardFunction) -> Iterator[inspect.Parameter]:
    try:
        yield from inspect.signature(function).parameters.values()
    except ValueError:  # some builtins have none: they are offered everything
        yield inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names)) or "there are none"
