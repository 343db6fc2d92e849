"""Completions of texts and conversations, by transformers' generate.

Prompts of like length share a batch, padded on the left. What is sampled depends on the seed and on the batches: other
prompts beside it, or another batch size, give a prompt another sample of the same distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

Prompt: TypeAlias = str | list[dict[str, Any]]


@torch.no_grad()
def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    chat: bool | None = None,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    num_samples: int = 1,
    batch_size: int = 32,
    seed: int = 0,
) -> list[list[str]]:
    """Complete each prompt `num_samples` times.

    Args:
        model: a causal language model; it stays on its device, its mode is put back afterwards.
        tokenizer: its tokenizer; it needs no pad token.
        prompts: texts, or conversations that the assistant is to answer.
        chat: whether a text is put into the chat template as a user's turn; None: where there is a template.
        max_new_tokens: a completion ends here at the latest, >= 1.
        temperature: 0 takes the likeliest token each time.
        top_p: sample among the likeliest tokens that hold this probability, in (0, 1].
        top_k: sample among so many likeliest tokens; 0 among all.
        num_samples: completions of each prompt, >= 1.
        batch_size: completions computed at once, >= 1.
        seed: of the samples; torch's own random numbers are left as they were.

    Returns:
        For each prompt, in order, its completions without special tokens.

    Raises:
        ValueError: an option is out of range, a prompt has no token, or the tokenizer lacks a chat template.
    """
    for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    config = _config(model, tokenizer, max_new_tokens, temperature, top_p, top_k)
    encoded = [_encode(tokenizer, prompt, chat) for prompt in prompts]
    order = sorted(
        (i for i in range(len(prompts)) for _ in range(num_samples)), key=lambda i: len(encoded[i])
    )
    found: list[list[str]] = [[] for _ in prompts]
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for first in range(0, len(order), batch_size):
                rows = order[first : first + batch_size]
                completions = _complete(model, [encoded[i] for i in rows], config)
                for index, text in zip(rows, tokenizer.batch_decode(completions, skip_special_tokens=True)):
                    found[index].append(text)
    finally:
        model.train(training)
    return found


def _config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
) -> GenerationConfig:
    """All that bears on a completion, said outright: none of the model's own defaults come in."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(
            f"expected temperature >= 0, 0 < top_p <= 1 and top_k >= 0, got {temperature}, {top_p}, {top_k}"
        )
    own = getattr(model.generation_config, "eos_token_id", None)
    stops = [own] if isinstance(own, int) else list(own or [])
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in stops:
        stops.append(tokenizer.eos_token_id)
    # Any pad token will do: it is masked before a prompt and cut away after a stop.
    pad = next((token for token in (tokenizer.pad_token_id, *stops) if token is not None), 0)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    return GenerationConfig(
        **(sampling if temperature else {"do_sample": False}),
        max_new_tokens=max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=pad,
    )


def _complete(model: PreTrainedModel, prompts: list[list[int]], config: GenerationConfig) -> list[list[int]]:
    """Tokens that continue each prompt, up to the first stop."""
    longest = max(map(len, prompts))
    device = next(model.parameters()).device
    ids_BL = torch.tensor([[config.pad_token_id] * (longest - len(ids)) + ids for ids in prompts])
    mask_BL = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    generate: Any = model.generate  # transformers declares it on a mixin that mypy takes for a tensor
    output_BL = generate(
        input_ids=ids_BL.to(device), attention_mask=mask_BL.to(device), generation_config=config
    )
    rows, stops = output_BL[:, longest:].tolist(), config.eos_token_id or []
    ends = [next((at for at, token in enumerate(row) if token in stops), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends)]


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, chat: bool | None) -> list[int]:
    if isinstance(prompt, str) and (tokenizer.chat_template is not None if chat is None else chat):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif tokenizer.chat_template is None:
        raise ValueError(
            "a conversation needs a chat template, and the tokenizer has none: set its chat_template"
        )
    else:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"prompt {prompt!r} has no token to start from")
    return ids
