"""How a row of packed tokens divides: into trees of a prompt and its answers, and these into segments.

Letters: T tokens of the row, S segments.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """A run of rows, a prompt or an answer, and the rows of its prompt; a prompt has a `prompt_length` of 0 itself."""

    start: int
    length: int
    prompt_start: int
    prompt_length: int

    @property
    def own(self) -> slice:
        """Its rows."""
        return slice(self.start, self.start + self.length)

    @property
    def prompt(self) -> slice:
        """Its prompt's rows."""
        return slice(self.prompt_start, self.prompt_start + self.prompt_length)


@dataclass(frozen=True)
class PackedLayout:
    """How a row of packed tokens divides into trees: a prompt, then the answers that continue it, tree by tree.

    A sequence that shares nothing is a tree with a prompt and no answers, or no prompt and one answer.

    Attributes:
        prompts: tokens of each tree's prompt, >= 0.
        answers: for each tree, the tokens of each of its answers, >= 1.

    Raises:
        ValueError: the two differ in length, or a length is out of range.

    >>> layout = PackedLayout(prompts=(3, 2), answers=((2, 1), ()))
    >>> layout.num_tokens
    8
    >>> layout.segments[2]
    Segment(start=5, length=1, prompt_start=0, prompt_length=3)
    """

    prompts: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.answers):
            raise ValueError(f"got {len(self.prompts)} prompts and {len(self.answers)} lists of answers")
        if any(prompt < 0 for prompt in self.prompts) or any(n < 1 for tree in self.answers for n in tree):
            raise ValueError(
                f"a prompt has >= 0 tokens, an answer >= 1, got {self.prompts} and {self.answers}"
            )

    @classmethod
    def of_sequences(cls, lengths: Iterable[int]) -> PackedLayout:
        """Sequences that share nothing, laid end to end."""
        lengths = tuple(lengths)
        return cls(lengths, ((),) * len(lengths))

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The row's segments from its first token to its last; none is empty."""
        found, start = [], 0
        for prompt, answers in zip(self.prompts, self.answers):
            prompt_start = start
            if prompt:
                found.append(Segment(start, prompt, start, 0))
                start += prompt
            for length in answers:
                found.append(Segment(start, length, prompt_start, prompt))
                start += length
        return tuple(found)

    @cached_property
    def num_tokens(self) -> int:
        """Tokens in the row."""
        return sum(self.prompts) + sum(map(sum, self.answers))

    @cached_property
    def segments_S4(self) -> Tensor:
        """`segments` as an int32 tensor on the CPU, what compiled kernels read."""
        return torch.tensor(self.segments, dtype=torch.int32).reshape(-1, 4)

    def positions(self) -> Tensor:
        """Position of each token in its own sequence, int64 on the CPU: answers go on where their prompt ends.

        >>> PackedLayout((2,), ((2, 1),)).positions().tolist()
        [0, 1, 2, 3, 2]
        """
        ranges = [torch.arange(prefix, prefix + length) for _, length, _, prefix in self.segments]
        return torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.int64)
