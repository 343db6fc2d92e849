"""Which sequences run, and on which pages of the cache: continuous batching, without a tensor in it.

Sequences wait in order, those of one prompt together. One starts as soon as a slot and all pages that it may come to
need are free: so none is ever stopped half-way. A prompt's full pages are shared by all its sequences; the page that it
fills in part is copied for each, and its last sequence takes it over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from alignfast.rollout.pages import Pages
from alignfast.rollout.sampling import Sampling


@dataclass(eq=False)
class PromptState:
    """A prompt whose sequences have not all started.

    Attributes:
        ids: its tokens.
        pages: where its keys lie; empty before it is computed.
        left: sequences that have yet to start.
    """

    ids: tuple[int, ...]
    left: int
    pages: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Running:
    """A sequence and what it has drawn.

    Attributes:
        prompt: what it continues.
        index: of its completion among all that were asked for.
        number: what its random numbers are keyed by.
        limit: tokens that it may draw.
        sampling: how they are drawn.
        pages: where its keys lie, room for all that it may draw included.
    """

    prompt: PromptState
    index: int
    number: int
    limit: int
    sampling: Sampling = field(default_factory=Sampling)
    pages: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    sampled_logps: list[float] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens so far, those of the prompt included."""
        return len(self.prompt.ids) + len(self.tokens)


@dataclass(frozen=True)
class Started:
    """What an admission asks of the engine, in this order.

    Attributes:
        prompts: to be computed now, their keys stored in their pages.
        sequences: to draw their first token, each from its prompt's last row.
        copies: (from, to) of pages that must be copied before the sequences' first step.
    """

    prompts: list[PromptState]
    sequences: list[Running]
    copies: list[tuple[int, int]]


class Scheduler:
    """The waiting and the running sequences of one engine.

    Args:
        waiting: the first sequences, those of one prompt next to each other.
        pages: of the cache.
        max_sequences: that run at once.
        max_prefill_tokens: of prompts computed in one forward pass, one prompt at least.
    """

    def __init__(
        self, waiting: Iterable[Running], pages: Pages, max_sequences: int, max_prefill_tokens: int
    ) -> None:
        self.waiting, self.pages = deque(waiting), pages
        self.max_sequences, self.max_prefill_tokens = max_sequences, max_prefill_tokens
        self.running: list[Running] = []

    @property
    def done(self) -> bool:
        """Whether nothing runs or waits."""
        return not self.waiting and not self.running

    def add(self, sequences: Iterable[Running]) -> None:
        """More sequences at the end of the queue, those of one prompt next to each other."""
        self.waiting.extend(sequences)

    def admit(self) -> Started:
        """Start what can be started now.

        Raises:
            RuntimeError: nothing runs and the first in the queue does not fit: the cache is too small for it alone.
        """
        started, budget = Started([], [], []), self.max_prefill_tokens
        while self.waiting and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            prompt, is_new = sequence.prompt, not sequence.prompt.pages
            if is_new and started.prompts and len(prompt.ids) > budget:
                break
            if self._pages_for(sequence, is_new) > self.pages.num_free:
                break
            if is_new:
                prompt.pages = self.pages.take(self.pages.needed(len(prompt.ids)))
                budget -= len(prompt.ids)
                started.prompts.append(prompt)
            self._start(self.waiting.popleft(), started)
        if not self.running and self.waiting:
            raise RuntimeError(
                f"a prompt of {len(self.waiting[0].prompt.ids)} tokens with room for {self.waiting[0].limit} more does not "
                f"fit into a cache with {self.pages.num_free} pages of {self.pages.size} tokens free: raise cache_tokens"
            )
        return started

    def _pages_for(self, sequence: Running, prompt_is_new: bool) -> int:
        length = len(sequence.prompt.ids)
        total = self.pages.needed(length + sequence.limit)
        if prompt_is_new and sequence.prompt.left == 1:
            return total
        shared = length // self.pages.size + self._takes_over(sequence.prompt)
        return total - shared + (self.pages.needed(length) if prompt_is_new else 0)

    def _takes_over(self, prompt: PromptState) -> bool:
        """Whether the next sequence of a prompt gets the page that it fills in part."""
        return prompt.left == 1 and len(prompt.ids) % self.pages.size > 0

    def _start(self, sequence: Running, started: Started) -> None:
        prompt, pages = sequence.prompt, self.pages
        full = len(prompt.ids) // pages.size
        pages.share(prompt.pages[:full])
        total = pages.needed(len(prompt.ids) + sequence.limit)
        if self._takes_over(prompt):
            sequence.pages = prompt.pages + pages.take(total - full - 1)
        else:
            sequence.pages = prompt.pages[:full] + pages.take(total - full)
            if len(prompt.pages) > full:
                started.copies.append((prompt.pages[full], sequence.pages[full]))
        prompt.left -= 1
        if not prompt.left:
            pages.give_back(prompt.pages[:full])
        self.running.append(sequence)
        started.sequences.append(sequence)

    def finish(self, finished: set[Running]) -> None:
        """End sequences: their slots and pages are free."""
        if finished:
            self.running = [sequence for sequence in self.running if sequence not in finished]
            for sequence in finished:
                self.pages.give_back(sequence.pages)

    def drop(self, sequences: set[Running]) -> None:
        """Take sequences out, running or waiting; what they alone held is free."""
        self.finish({sequence for sequence in self.running if sequence in sequences})
        for sequence in [sequence for sequence in self.waiting if sequence in sequences]:
            self.waiting.remove(sequence)
            prompt = sequence.prompt
            prompt.left -= 1
            if not prompt.left:  # it may be computed, for others that have started: nobody takes it over
                self.pages.give_back(prompt.pages)


def pages_needed(sequences: Iterable[Running], size: int, max_sequences: int) -> tuple[int, int]:
    """(pages with which no sequence ever waits for memory, those that the largest needs alone)."""
    totals, prompts = [], {}
    for sequence in sequences:
        length = len(sequence.prompt.ids)
        totals.append(-(-(length + sequence.limit) // size))
        prompts[sequence.prompt] = -(-length // size)
    largest = max(totals) + max(prompts.values())
    return max(largest, sum(sorted(totals)[-max_sequences:]) + max(prompts.values())), largest
