"""Our own engine: packed prefill, each prompt once for all its completions, then one token a sequence and step.

A step is one forward pass over a row of S tokens, each the newest of its sequence; attention reads the cache's pages,
the head's logits go straight into `sample_tokens`. The model is the one that is trained: a changed weight is seen by the
next token, and the log-probs are those that its trainer computes on the same tokens.

Letters: L tokens of a prompt, N tokens of a completion, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedTokenizerBase

from alignfast.models.attention import NAME, ModelRefused, attention_set, check_layer_kinds
from alignfast.models.four_bit import arithmetic_of
from alignfast.models.policy import Policy
from alignfast.models.trunk import PROBE_TOLERANCE
from alignfast.rollout.cache import PagedCache, check_backend
from alignfast.rollout.finish import Finish
from alignfast.rollout.graphs import Recorder, StepGraphs
from alignfast.rollout.pages import Pages
from alignfast.rollout.prompts import check_room, encode_prompt, end_tokens, evaluating, room_for
from alignfast.rollout.sampling import Completion, Prompt, Sampling
from alignfast.rollout.scheduler import PromptState, Running, Scheduler, pages_needed
from alignfast.rollout.step import Step, no_numbers

PAGE = 16
_PAGE_OF = {"flash": 256}  # that flash-attn 2 takes
_WAY_OUT = "use engine='transformers'"


class NativeEngine:
    """Completions by packed attention and a paged cache.

    Args:
        policy: the model; it stays on its device, its mode is put back after each call.
        tokenizer: its tokenizer.
        max_sequences: that run at once.
        cache_tokens: tokens that the cache holds at most; None: as many as `max_sequences` of a call may need. Fewer make
            sequences wait.
        max_prefill_tokens: of prompts in one forward pass.
        cuda_graphs: replay the trunk's steps as CUDA graphs (`alignfast.rollout.graphs`); None: on a GPU.
        decode_backend: of `paged_attention`: `flash` takes flash-attn's, with pages of 256 tokens; None: the policy's
            backend, where `auto` never takes flash-attn.

    Attributes:
        seconds: of the last call: `prefill` and `decode`, drawing included.

    Raises:
        ValueError: a size is below 1.
        RuntimeError: the backend can't run here, and why.

    >>> engine = NativeEngine(Policy(model), tokenizer)  # doctest: +SKIP
    >>> engine.generate(["The cat"], Sampling(max_new_tokens=8))[0][0].text  # doctest: +SKIP
    ' sat on the mat.'
    """

    name = "native"

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_sequences: int = 256,
        cache_tokens: int | None = None,
        max_prefill_tokens: int = 8192,
        cuda_graphs: bool | None = None,
        decode_backend: str | None = None,
    ) -> None:
        for name, value in (("max_sequences", max_sequences), ("max_prefill_tokens", max_prefill_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        self.policy, self.tokenizer = policy, tokenizer
        self.max_sequences, self.cache_tokens = max_sequences, cache_tokens
        self.max_prefill_tokens, self.cuda_graphs = max_prefill_tokens, cuda_graphs
        self.decode_backend = decode_backend or policy.backend
        self.page = _PAGE_OF.get(self.decode_backend, PAGE)
        # what can't be had is told now; a 16-bit type, since autocast may come later
        if decode_backend is not None:
            check_backend(decode_backend, next(policy.parameters()).device)
        self.recorder: Recorder | None = None  # CUDA's, but for tests
        self.seconds = {"prefill": 0.0, "decode": 0.0}
        self._cache: PagedCache | None = None
        self._graphs: StepGraphs | None = None
        self._probed = False

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, sequence_ids: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`.

        Raises:
            ModelRefused: at the first call, the model gives other logits this way than on its own.
        """
        if not self._probed:
            self.probe()
        encoded = [tuple(encode_prompt(self.tokenizer, prompt)) for prompt in prompts]
        check_room(encoded, self.policy.vocabulary, self.policy.positions)
        sequences = self._sequences(encoded, sampling, sequence_ids)
        self.seconds = {"prefill": 0.0, "decode": 0.0}
        found: dict[int, Completion] = {}
        if sequences:
            with self._attached():
                for sequence, completion in self._run(sequences, sampling):
                    found[sequence.index] = completion
        n = sampling.n
        return [[found[i * n + j] for j in range(n)] for i in range(len(prompts))]

    @torch.no_grad()
    def probe(self) -> None:
        """Compare log-probs of a few tokens, drawn one by one, with the model's own forward.

        Raises:
            ModelRefused: they differ by more than rounding, so completions would be silently wrong.
        """
        self._probed = True
        base, device = self.policy.base, next(self.policy.parameters()).device
        check_layer_kinds(base)
        # into a second page where there is room
        length = min(self.page + 3, (self.policy.positions or self.page + 6) - 3)
        prompt = tuple((7 * i * i + 3 * i + 2) % self.policy.vocabulary for i in range(length))
        try:
            sampling = Sampling(max_new_tokens=3, temperature=0, stop_token_ids=())
            ((completion,),) = self.generate([list(prompt)], sampling)
            with evaluating(self.policy.model), attention_set(base, "eager"):
                ids_1L = torch.tensor([prompt + completion.token_ids], device=device)
                theirs_NV = self.policy.plain_logits(ids_1L)[len(prompt) - 1 : -1].float()
        except ModelRefused:
            raise
        except Exception as error:
            raise ModelRefused(
                f"{type(base).__name__} does not run in the native engine: {error}; {_WAY_OUT}"
            ) from error
        tokens_N1 = torch.tensor(completion.token_ids, device=device)[:, None]
        theirs_N = theirs_NV.log_softmax(-1).gather(1, tokens_N1)[:, 0]
        ours_N = torch.tensor(completion.logps, device=device)
        difference = float((ours_N - theirs_N).abs().max() / theirs_NV.abs().max())
        autocast = torch.is_autocast_enabled(device.type)
        dtype = arithmetic_of(base, torch.get_autocast_dtype(device.type) if autocast else base.dtype)
        tolerance = 2 * PROBE_TOLERANCE[dtype]  # a log-prob is a difference of two
        if not difference <= tolerance:
            raise ModelRefused(
                f"{type(base).__name__} gives other log-probs in the native engine than on its own: they differ by "
                f"{difference:.1e} of the largest logit (rounding explains {tolerance:.0e}); {_WAY_OUT}"
            )

    def _sequences(
        self, encoded: list[tuple[int, ...]], sampling: Sampling, sequence_ids: Sequence[int] | None
    ) -> list[Running]:
        """All completions that are asked for, those of one prompt next to each other."""
        n = sampling.n
        numbers = range(len(encoded) * n) if sequence_ids is None else sequence_ids
        if len(numbers) != len(encoded) * n:
            raise ValueError(
                f"expected a sequence id for each of {len(encoded) * n} completions, got {len(numbers)}"
            )
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, ids in enumerate(encoded):
            groups.setdefault(ids, []).extend(range(i * n, (i + 1) * n))
        sequences: list[Running] = []
        for ids, members in groups.items():
            prompt = PromptState(ids, left=len(members))
            limit = room_for(ids, sampling.max_new_tokens, self.policy.positions)
            sequences += [Running(prompt, index, numbers[index], limit, sampling) for index in members]
        return sequences

    @contextmanager
    def _attached(self) -> Iterator[None]:
        with evaluating(self.policy.model), attention_set(self.policy.base, NAME):
            yield

    def _run(self, sequences: list[Running], sampling: Sampling) -> Iterator[tuple[Running, Completion]]:
        """Completions as they end."""
        cache = self._cache_for(sequences)
        graphs = self._graphs_of(cache)
        stops = sampling.stop_token_ids
        if stops is None:
            stops = end_tokens(self.policy.base, self.tokenizer)
        finish = Finish(self.tokenizer, frozenset(stops), sampling.stop)
        pages = Pages(cache.num_pages - 1, cache.size)  # the last is of what fills up a graph's sequences
        scheduler = Scheduler(sequences, pages, self.max_sequences, self.max_prefill_tokens)
        most_pages = max(-(-(len(s.prompt.ids) + s.limit) // self.page) for s in sequences)
        step = Step(self.policy, cache, graphs, most_pages)
        while not scheduler.done:
            started, began = scheduler.admit(), time.perf_counter()
            drawn = started.sequences
            if drawn:
                lost = step.prefill(started)
            else:
                drawn = scheduler.running
                lost = step.decode(drawn)
            if lost:
                raise RuntimeError(no_numbers(lost.pop()))
            # a step ends by reading its tokens, so that a GPU is not ahead of the clock
            self.seconds["prefill" if started.sequences else "decode"] += time.perf_counter() - began
            ended = {}
            for sequence in drawn:
                completion = finish.completion(sequence)
                if completion is not None:
                    ended[sequence] = completion
            scheduler.finish(set(ended))
            yield from ended.items()

    def _cache_for(self, sequences: list[Running]) -> PagedCache:
        """A cache that is large enough, kept for the next call."""
        wanted, least = pages_needed(sequences, self.page, self.max_sequences)
        if self.cache_tokens is not None:
            wanted = min(wanted, self.cache_tokens // self.page)
            if wanted < least:
                raise ValueError(
                    f"cache_tokens={self.cache_tokens} is too few: the longest prompt with its completion may need "
                    f"{least * self.page}"
                )
        if self._cache is None or self._cache.num_pages <= wanted:
            self._cache = PagedCache(wanted + 1, self.page, backend=self.decode_backend)
        return self._cache

    def _graphs_of(self, cache: PagedCache) -> StepGraphs | None:
        """The graphs over a cache, kept for the next call; None where there are to be none.

        Raises:
            ValueError: they are asked for where there is no GPU.
        """
        device = next(self.policy.parameters()).device
        possible = device.type == "cuda" or self.recorder is not None
        if self.cuda_graphs and not possible:
            raise ValueError(f"cuda_graphs=True needs a GPU, and the model is on {device}: leave it out")
        if not possible or self.cuda_graphs is False:
            return None
        if self._graphs is None or self._graphs.cache is not cache:
            self._graphs = StepGraphs(self.policy, cache, self.recorder)
        self._graphs.begin()
        return self._graphs
