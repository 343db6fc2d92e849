"""What engines share: prompts as tokens, the tokens that end a completion, a model that drops nothing meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from alignfast.rollout.sampling import Prompt


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Tokens of a prompt.

    Args:
        tokenizer: the model's.
        prompt: a text as it is, a conversation that the assistant is to answer, or token ids.

    Raises:
        ValueError: it has no token, or the tokenizer lacks the chat template that a conversation needs.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif prompt and isinstance(prompt[0], dict):
        if tokenizer.chat_template is None:
            raise ValueError(
                "a conversation needs a chat template, and the tokenizer has none: set its chat_template"
            )
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = prompt
    if not ids:
        raise ValueError(f"prompt {prompt!r} has no token to start from")
    return list(ids)


def check_room(prompts: Sequence[Sequence[int]], vocabulary: int, positions: int | None) -> None:
    """Refuse prompts that a model can't continue.

    Raises:
        ValueError: a token is outside the vocabulary, or a prompt fills the model's positions.
    """
    for index, ids in enumerate(prompts):
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            raise ValueError(
                f"prompt {index} holds token id {max(ids) if max(ids) >= vocabulary else min(ids)} and the model knows "
                f"{vocabulary} tokens: take the model's own tokenizer"
            )
        if positions is not None and len(ids) >= positions:
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens, which leaves no room in the model's {positions} positions: "
                "shorten it, or take a model of a longer context"
            )


def room_for(ids: Sequence[int], max_new_tokens: int, positions: int | None) -> int:
    """Tokens that a completion of a prompt may have: what is asked for, or what the model's positions leave."""
    return max_new_tokens if positions is None else min(max_new_tokens, positions - len(ids))


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end a completion: the model's, as its generation config names them, and the tokenizer's."""
    own = getattr(model.generation_config, "eos_token_id", None)
    found = [own] if isinstance(own, int) else list(own or [])
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in found:
        found.append(tokenizer.eos_token_id)
    return tuple(found)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, the model's own mode after it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
