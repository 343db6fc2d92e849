"""Completions by transformers' own `generate`: the reference, and the way out for models that can't be packed.

Prompts of like length share a batch, padded on the left. What is sampled depends on the seed and on the batches: other
prompts beside it, or another batch size, give a prompt another sample of the same distribution.

Letters: B rows, L tokens of the longest prompt, N tokens drawn, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from alignfast.rollout.finish import Finish
from alignfast.rollout.prompts import check_room, encode_prompt, end_tokens, evaluating, room_for
from alignfast.rollout.sampling import Completion, Prompt, Sampling


class TransformersEngine:
    """Completions by `model.generate`.

    Args:
        model: a causal language model; it stays on its device, its mode is put back after each call.
        tokenizer: its tokenizer; it needs no pad token.
        batch_size: completions computed at once, >= 1.
    """

    name = "transformers"

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 32) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        self.model: PreTrainedModel = model
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.seconds: dict[str, float] = {}  # `generate` does not tell its parts apart

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, sequence_ids: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`; of `sequence_ids` the first alone bears on what is drawn, with the seed.

        torch's own random numbers are left as they were.
        """
        encoded = [tuple(encode_prompt(self.tokenizer, prompt)) for prompt in prompts]
        embeddings: Any = self.model.get_input_embeddings()
        vocabulary = int(embeddings.weight.shape[0])
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        check_room(encoded, vocabulary, positions)
        stops = sampling.stop_token_ids
        if stops is None:
            stops = end_tokens(self.model, self.tokenizer)
        config = self._config(sampling, stops)
        finish = Finish(self.tokenizer, frozenset(stops), sampling.stop)
        order = sorted(
            (i for i in range(len(prompts)) for _ in range(sampling.n)), key=lambda i: len(encoded[i])
        )
        limits = [room_for(ids, sampling.max_new_tokens, positions) for ids in encoded]
        found: list[list[Completion]] = [[] for _ in prompts]
        device = self.model.device
        with evaluating(self.model), _no_defaults(self.model):
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                # the CPU's generator reads the low 32 bits of a seed alone
                torch.manual_seed(sampling.seed * 1_000_003 + (sequence_ids[0] if sequence_ids else 0))
                for limit, alike in groupby(order, lambda i: limits[i]):  # learned positions have a hard end
                    config.max_new_tokens = limit
                    for rows in batched(alike, self.batch_size):
                        completions = self._complete([encoded[i] for i in rows], config, sampling, finish)
                        for index, completion in zip(rows, completions):
                            found[index].append(completion)
        return found

    def _config(self, sampling: Sampling, stops: Sequence[int]) -> GenerationConfig:
        # Any pad token will do: it is masked before a prompt and cut away after a stop.
        pad = next((token for token in (self.tokenizer.pad_token_id, *stops) if token is not None), 0)
        drawn = {
            "do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k,
            "min_p": sampling.min_p or None,
        }  # fmt: skip
        return GenerationConfig(
            **(drawn if sampling.temperature else {"do_sample": False}),
            eos_token_id=list(stops) or None,
            pad_token_id=pad,
            return_dict_in_generate=True,
            output_logits=True,
            output_scores=True,
        )

    def _complete(
        self, prompts: list[tuple[int, ...]], config: GenerationConfig, sampling: Sampling, finish: Finish
    ) -> list[Completion]:
        longest, device = max(map(len, prompts)), self.model.device
        ids_BL = torch.tensor([(config.pad_token_id,) * (longest - len(ids)) + ids for ids in prompts])
        mask_BL = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
        # transformers declares it on a mixin that mypy takes for a tensor
        generate: Any = self.model.generate
        output = generate(
            input_ids=ids_BL.to(device), attention_mask=mask_BL.to(device), generation_config=config,
            stopping_criteria=[_StopText(finish, longest)] if sampling.stop else None,
        )  # fmt: skip
        tokens_BN = output.sequences[:, longest:]
        logps_BN = _logps(output.logits, tokens_BN, sampling.temperature or 1.0)
        # the scores are the logits behind temperature and filters; greedy decoding has no others than its own
        sampled_BN = _logps(output.scores, tokens_BN, 1.0) if sampling.temperature else 0 * logps_BN
        return [
            finish.first_end(ids, *row)
            for ids, *row in zip(prompts, tokens_BN.tolist(), logps_BN.tolist(), sampled_BN.tolist())
        ]


class _StopText(StoppingCriteria):
    """Our own stop texts: transformers' take tokenizers of bytes and word pieces alone."""

    def __init__(self, finish: Finish, prompt_length: int) -> None:
        self.finish, self.prompt_length = finish, prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        rows = input_ids[:, self.prompt_length :].tolist()
        return torch.tensor([self.finish.stopped_by_text(row) for row in rows], device=input_ids.device)


@contextmanager
def _no_defaults(model: Any) -> Iterator[None]:
    """Without the model's own generation config, from which `generate` takes whatever is None in the one it is given."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def batched(numbers: Iterable[int], size: int) -> Iterator[list[int]]:
    """Runs of `size`, the last one shorter.

    >>> list(batched(range(5), 2))
    [[0, 1], [2, 3], [4]]
    """
    rest = iter(numbers)
    while run := list(islice(rest, size)):
        yield run


def _logps(logits: Sequence[Tensor], tokens_BN: Tensor, temperature: float) -> Tensor:
    """Log-probs of the tokens, from one (B, V) of logits a step."""
    steps = [
        (step_BV.float() / temperature).log_softmax(-1).gather(1, token_B[:, None])[:, 0]
        for step_BV, token_B in zip(logits, tokens_BN.T)
    ]
    return torch.stack(steps, 1)
