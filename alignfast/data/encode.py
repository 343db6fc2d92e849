"""Token ids of prompts to be continued, and of what continued them: with the ids that training has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from alignfast.data.formats import Rows
from alignfast.data.templates import Message
from alignfast.data.tokenize import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_FORMATS = ("prompt",)


def encode_prompts(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the prompts of rows; conversations with what asks the assistant to speak.

    Args:
        rows: what `load_rows` gave; columns beside `prompt` are not looked at.
        tokenizer: any of transformers'; it needs no pad token.

    Raises:
        DataError: the rows have no prompt, or a template fails.
        ValueError: the tokenizer lacks what the rows need.
    """
    rows = rows.one_of(PROMPT_FORMATS, "sampling")
    return Encoder(rows, tokenizer).prompts(range(len(rows)))


def encode_completions(
    prompts: Sequence[str] | Sequence[list[Message]],
    completions: Sequence[str] | Sequence[list[Message]],
    tokenizer: PreTrainedTokenizerBase,
) -> list[list[int]]:
    """Token ids of each prompt with its completion, as training has them: for whoever judges what was sampled.

    Args:
        prompts: all texts, or all lists of messages.
        completions: one for each prompt, of the same kind; an empty text is an answer too.
        tokenizer: any of transformers'; it needs no pad token.

    Raises:
        DataError: a template fails.
        ValueError: kinds are mixed, or the tokenizer lacks what they need.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"got {len(prompts)} prompts and {len(completions)} completions")
    if not prompts:
        return []
    conversational = not isinstance(prompts[0], str)
    for index, pair in enumerate(zip(prompts, completions)):
        if any(isinstance(part, str) == conversational for part in pair):
            kind = "lists of messages" if conversational else "texts"
            raise ValueError(f"prompt 0 says that all are {kind}, and prompt or completion {index} is not")
    items = [{"prompt": prompt, "completion": answer} for prompt, answer in zip(prompts, completions)]
    indices = list(range(len(items)))
    columns = ("prompt", "completion")
    rows = Rows("completions", "prompt_completion", conversational, items, "index", indices, columns)
    return Encoder(rows, tokenizer).sequences(indices, "completion")[0]
