"""Generation for requests that come and go: the engine of a server, stepped from outside.

A step gives every running sequence its next token and starts as many waiting ones as have room, first come first
served. The pieces are those of `NativeEngine` (cache, pages, scheduler, passes, drawing), so greedy completions are
transformers' own and a completion depends on its prompt, its options, its seed and its number alone, never on what runs
beside it.

The weights are not to change while a request is in it: the keys of older tokens would be those of other weights, and the
log-probs those of no model. A server that changes its model opens another engine and lets this one run empty.

Not done here: threads (one calls everything but `check`), time limits, text as it comes (pieces.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from alignfast.models.attention import NAME, attention_set
from alignfast.models.policy import Policy
from alignfast.rollout.cache import PagedCache
from alignfast.rollout.finish import Finish
from alignfast.rollout.native import PAGE, NativeEngine
from alignfast.rollout.pages import Pages
from alignfast.rollout.prompts import check_room, end_tokens, evaluating, room_for
from alignfast.rollout.sampling import Completion, Sampling
from alignfast.rollout.scheduler import PromptState, Running, Scheduler, pages_needed
from alignfast.rollout.step import Step, no_numbers


@dataclass(eq=False)
class Request:
    """A prompt and the completions that are being drawn for it.

    Attributes:
        prompt_ids: its tokens.
        sampling: how they are drawn.
        finish: what ends them.
        sequences: one a completion.
        left: completions that have not ended.
    """

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    finish: Finish
    sequences: list[Running] = field(default_factory=list)
    left: int = 0


@dataclass(frozen=True)
class Drawn:
    """What one step did for one sequence.

    Attributes:
        request: it belongs to.
        index: of its completion, below `sampling.n`.
        token: that was drawn; None where there was nothing to draw from.
        logp: its log-probability, as in `Completion.logps`.
        sampled_logp: and as in `Completion.sampled_logps`.
        completion: the whole of it, where the token ended it.
        fault: why there is no token; the sequence has ended without a completion.
    """

    request: Request
    index: int
    token: int | None
    logp: float = 0.0
    sampled_logp: float = 0.0
    completion: Completion | None = None
    fault: str | None = None


class LiveEngine:
    """Continuous batching over requests that are submitted and cancelled between steps.

    Args:
        policy: the model; under packed attention and in evaluation mode until `close`.
        tokenizer: its tokenizer.
        max_sequences: that run at once.
        cache_tokens: tokens that the cache holds, prompts and room for completions together. On a CPU the memory is
            taken as it is first used, on a GPU at once.
        max_prefill_tokens: of prompts in one forward pass.

    Raises:
        ModelRefused: the model gives other logits this way than on its own.
        ValueError: a size is below 1.

    >>> engine = LiveEngine(Policy(model), tokenizer)  # doctest: +SKIP
    >>> request = engine.submit(tokenizer("The cat")["input_ids"], Sampling(max_new_tokens=8))  # doctest: +SKIP
    >>> while engine.num_running + engine.num_waiting: drawn = engine.step()  # doctest: +SKIP
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_sequences: int = 32,
        cache_tokens: int = 32768,
        max_prefill_tokens: int = 8192,
    ) -> None:
        if cache_tokens < PAGE:
            raise ValueError(f"cache_tokens must be >= {PAGE}, got {cache_tokens}")
        NativeEngine(
            policy, tokenizer, max_sequences=max_sequences, max_prefill_tokens=max_prefill_tokens
        ).probe()
        self.policy, self.tokenizer = policy, tokenizer
        self.max_sequences, self.cache_tokens = max_sequences, cache_tokens
        self.max_prefill_tokens = max_prefill_tokens
        self._stops = end_tokens(policy.base, tokenizer)
        self._cache = PagedCache(cache_tokens // PAGE, PAGE, backend=policy.backend)
        self._reset()
        self._attached = ExitStack()
        self._attached.enter_context(evaluating(policy.model))
        self._attached.enter_context(attention_set(policy.base, NAME))

    def _reset(self) -> None:
        pages = Pages(self._cache.num_pages, self._cache.size)
        self._scheduler = Scheduler((), pages, self.max_sequences, self.max_prefill_tokens)
        self._step = Step(self.policy, self._cache)
        self._of: dict[Running, tuple[Request, int]] = {}

    @property
    def num_running(self) -> int:
        """Sequences that get a token in each step."""
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that have not started."""
        return len(self._scheduler.waiting)

    @property
    def free_tokens(self) -> int:
        """Tokens of the cache that no sequence holds."""
        return self._scheduler.pages.num_free * PAGE

    def check(self, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        """Refuse what can never run; any thread may ask.

        Raises:
            ValueError: a token is unknown, or the prompt leaves no room in the model's positions or in the cache.
        """
        self._made(prompt_ids, sampling, None)

    def submit(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, numbers: Sequence[int] | None = None
    ) -> Request:
        """Queue `sampling.n` completions of a prompt.

        Args:
            prompt_ids: its tokens.
            sampling: how to draw.
            numbers: of each completion, by which its random numbers are keyed; None counts from 0.

        Raises:
            ValueError: as `check`.
        """
        request = self._made(prompt_ids, sampling, numbers)
        self._of |= {sequence: (request, i) for i, sequence in enumerate(request.sequences)}
        self._scheduler.add(request.sequences)
        return request

    def cancel(self, request: Request) -> None:
        """End what has not ended of a request: its slots and its memory are free for the next step."""
        sequences = {sequence for sequence in request.sequences if self._of.pop(sequence, None) is not None}
        self._scheduler.drop(sequences)
        request.left = 0

    @torch.no_grad()
    def step(self) -> list[Drawn]:
        """A token for each running sequence, and the first one for each that starts now.

        Any error leaves the engine in disorder: `abort` it, or close it.
        """
        running = list(self._scheduler.running)
        started = self._scheduler.admit()
        lost: set[Running] = set()
        if started.sequences:
            lost |= self._step.prefill(started)
        if running:
            lost |= self._step.decode(running)
        drawn, ended = [], set()
        for sequence in (*running, *started.sequences):
            what = self._drawn(sequence, sequence in lost)
            drawn.append(what)
            if what.completion is not None or what.fault is not None:
                what.request.left -= 1
                ended.add(sequence)
                del self._of[sequence]
        self._scheduler.finish(ended)
        return drawn

    def abort(self) -> list[Request]:
        """Drop everything, and return the requests that had not ended."""
        found = list(dict.fromkeys(request for request, _ in self._of.values()))
        for request in found:
            request.left = 0
        self._reset()
        return found

    def close(self) -> None:
        """Give the model its own mode and attention back."""
        self._attached.close()

    def _drawn(self, sequence: Running, lost: bool) -> Drawn:
        request, index = self._of[sequence]
        if lost:
            return Drawn(request, index, None, fault=no_numbers(sequence))
        newest = (sequence.tokens[-1], sequence.logps[-1], sequence.sampled_logps[-1])
        return Drawn(request, index, *newest, completion=request.finish.completion(sequence))

    def _made(self, prompt_ids: Sequence[int], sampling: Sampling, numbers: Sequence[int] | None) -> Request:
        ids = tuple(prompt_ids)
        if not ids:
            raise ValueError("the prompt has no token to start from")
        check_room([ids], self.policy.vocabulary, self.policy.positions)
        numbers = range(sampling.n) if numbers is None else numbers
        if len(numbers) != sampling.n:
            raise ValueError(f"expected a number for each of {sampling.n} completions, got {len(numbers)}")
        limit = room_for(ids, sampling.max_new_tokens, self.policy.positions)
        prompt = PromptState(ids, left=sampling.n)
        stops = self._stops if sampling.stop_token_ids is None else sampling.stop_token_ids
        request = Request(ids, sampling, Finish(self.tokenizer, frozenset(stops), sampling.stop))
        request.sequences = [Running(prompt, i, number, limit, sampling) for i, number in enumerate(numbers)]
        request.left = sampling.n
        _, least = pages_needed(request.sequences, PAGE, self.max_sequences)
        if least > self._cache.num_pages:
            raise ValueError(
                f"a prompt of {len(ids)} tokens with {limit} more may need {least * PAGE} tokens of the cache, which has "
                f"{self._cache.num_pages * PAGE}: ask for fewer tokens, or raise cache_tokens"
            )
        return request
