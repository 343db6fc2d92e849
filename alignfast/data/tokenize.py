"""Rows to trees of tokens, with the ids that TRL 1.16 gives.

Prompt and completion are tokenised together, and the prompt is cut where it and all its answers stop being alike:
tokens may merge across the border, and a template may render a prompt differently when nothing follows. Plain text
gets the end-of-sequence token if it does not end in it; conversations get what their template writes.

One difference: a tokenizer that adds an end token by itself, or a text that already starts with the beginning-of-
sequence token, gives it twice in TRL and once here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from alignfast.data.forest import Forest, Prepared
from alignfast.data.formats import Rows, unpaired
from alignfast.data.sources import DataError, Row
from alignfast.data.templates import (
    Message,
    Span,
    chat_options,
    render,
    render_turns,
    require_contents,
    tokens_in_spans,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SFT_FORMATS = ("text", "messages", "prompt_completion")
PREFERENCE_FORMATS = ("preference",)
THUMBS_FORMATS = ("thumbs", "preference")
RANKING_FORMATS = ("preference", "ranking")
_ROWS_AT_ONCE = 1000  # a tokenizer call works on all cores; its result is several times the size of the ids


def prepare_sft(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    truncation_mode: str = "keep_start",
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
) -> Prepared:
    """Trees of one answer from text, messages, or prompt + completion.

    Args:
        rows: what `load_rows` gave.
        tokenizer: any of transformers'; it needs no pad token.
        max_length: longest sequence in tokens; None cuts nothing.
        truncation_mode: `keep_start` or `keep_end` of a sequence that is longer.
        completion_only_loss: whether prompts carry no loss; None is so for prompt + completion.
        assistant_only_loss: whether only the assistant's turns carry loss; conversations alone have them.

    Raises:
        DataError: the columns make none of these formats, or a row's template or turns fail.
        ValueError: an option is out of range, does not fit the rows, or the tokenizer lacks what they need.
    """
    rows = rows.one_of(SFT_FORMATS, "SFT")
    has_prompt = rows.format == "prompt_completion"
    if completion_only_loss and not has_prompt:
        raise ValueError(f"completion_only_loss=True needs prompt+completion, got rows of {rows.format!r}")
    if assistant_only_loss and not rows.conversational:
        raise ValueError("assistant_only_loss=True needs conversations, got plain strings")
    completion_only = has_prompt if completion_only_loss is None else completion_only_loss
    forest = Forest(max_length, truncation_mode)
    encoder = Encoder(rows, tokenizer)
    answer = "completion" if has_prompt else rows.format
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        indices = range(first, min(first + _ROWS_AT_ONCE, len(rows)))
        prompts = encoder.prompts(indices) if completion_only else [[]] * len(indices)
        sequences, masks = encoder.sequences(indices, answer, turns=assistant_only_loss)
        for index, prompt, sequence, mask in zip(indices, prompts, sequences, masks):
            forest.plant(index, prompt, [sequence], mask)
    return forest.prepared()


def prepare_preference(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    truncation_mode: str = "keep_start",
) -> Prepared:
    """Trees of a prompt with its chosen and its rejected answer, in this order; answers carry loss.

    Args:
        rows: what `load_rows` gave.
        tokenizer: any of transformers'; it needs no pad token.
        max_length: longest prompt with answer in tokens; None cuts nothing.
        truncation_mode: `keep_start` or `keep_end` of a sequence that is longer. `keep_end` cuts answers of
            different length at different places of the prompt, so that such a pair shares nothing.

    Raises:
        DataError: the columns make no pairs, or a row's template fails.
        ValueError: an option is out of range, or the tokenizer lacks what the rows need.
    """
    rows = rows.one_of(PREFERENCE_FORMATS, "preference training")
    forest = Forest(max_length, truncation_mode)
    encoder = Encoder(rows, tokenizer)
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        indices = range(first, min(first + _ROWS_AT_ONCE, len(rows)))
        chosen, _ = encoder.sequences(indices, "chosen")
        rejected, _ = encoder.sequences(indices, "rejected")
        for index, prompt, *pair in zip(indices, encoder.prompts(indices), chosen, rejected):
            forest.plant(index, prompt, pair, None)
    return forest.prepared()


def prepare_thumbs(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    truncation_mode: str = "keep_start",
) -> Prepared:
    """Trees of a prompt with its completion, labelled 1 for a thumb up and 0 for one down; completions carry loss. Pairs
    make a thumb up and one down each.

    Args:
        rows: what `load_rows` gave.
        tokenizer: any of transformers'; it needs no pad token.
        max_length: longest prompt with completion in tokens; None cuts nothing.
        truncation_mode: `keep_start` or `keep_end` of a sequence that is longer.

    Raises:
        DataError: the columns make no thumbs, a label is neither true nor false, or a row's template fails.
        ValueError: an option is out of range, or the tokenizer lacks what the rows need.
    """
    rows = rows.one_of(THUMBS_FORMATS, "training on thumbs")
    given = len(rows)
    rows = unpaired(rows) if rows.format == "preference" else rows
    forest = Forest(max_length, truncation_mode)
    encoder = Encoder(rows, tokenizer)
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        indices = range(first, min(first + _ROWS_AT_ONCE, len(rows)))
        sequences, _ = encoder.sequences(indices, "completion")
        for index, prompt, sequence in zip(indices, encoder.prompts(indices), sequences):
            forest.plant(index % given, prompt, [sequence], None, label=float(rows[index]["label"]))
    return forest.prepared()


def prepare_ranking(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    truncation_mode: str = "drop",
) -> Prepared:
    """Trees of a prompt with its answers, best first, from rankings or pairs; a pair's label is its `margin`, 0 without.

    Args:
        rows: what `load_rows` gave.
        tokenizer: any of transformers'; it needs no pad token.
        max_length: longest prompt with answer in tokens; None cuts nothing.
        truncation_mode: `drop` leaves a row out of which a sequence is longer; `keep_start` and `keep_end` cut it.

    Raises:
        DataError: the columns make neither, a margin is no number or stands in a ranking, or a row's template fails.
        ValueError: an option is out of range, or the tokenizer lacks what the rows need.
    """
    rows = rows.one_of(RANKING_FORMATS, "reward training")
    ranked = [
        row["ranking"] if rows.format == "ranking" else [row["chosen"], row["rejected"]] for row in rows
    ]
    margins = [_margin(rows, index) for index in range(len(rows))]
    forest = Forest(max_length, truncation_mode)
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        indices = range(first, min(first + _ROWS_AT_ONCE, len(rows)))
        places = [index for index in indices for _ in ranked[index]]
        single = [{**rows[index], "completion": answer} for index in indices for answer in ranked[index]]
        numbers = [rows.numbers[index] for index in places]
        encoder = Encoder(replace(rows, items=single, numbers=numbers), tokenizer)
        sequences = iter(encoder.sequences(range(len(single)), "completion")[0])
        starts = [at for at, index in enumerate(places) if at == 0 or places[at - 1] != index]
        for index, prompt in zip(indices, encoder.prompts(starts)):
            forest.plant(index, prompt, [next(sequences) for _ in ranked[index]], None, margins[index])
    return forest.prepared()


def _margin(rows: Rows, index: int) -> float:
    """By how much the chosen answer of a pair should lead.

    Raises:
        DataError: it is no number, or the row is a ranking.
    """
    if "margin" not in rows.columns:
        return 0.0
    value = rows[index].get("margin")
    if rows.format == "ranking":
        raise DataError(
            f"{rows.name}: column 'margin' is for pairs, and these are rankings: rename or remove it"
        )
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DataError(f"{rows.where(index)}: column 'margin' must be a number, got {value!r}")
    return float(value)


class Encoder:
    """Token ids of the columns of rows, plain or through the chat template."""

    def __init__(self, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> None:
        self.rows, self.tokenizer = rows, tokenizer
        if rows.conversational:
            if not tokenizer.chat_template:
                raise ValueError(
                    "the rows are conversations and the tokenizer has no chat template: set its chat_template"
                )
            return
        if tokenizer.eos_token is None:
            raise ValueError(
                "plain text ends in the tokenizer's eos_token, and it has none: set tokenizer.eos_token"
            )
        alone, ended = tokenizer(["a", "a" + tokenizer.eos_token])["input_ids"]
        self.adds_bos = alone[0] == tokenizer.bos_token_id
        self.adds_eos = len(alone) > 1 and alone[-1] == tokenizer.eos_token_id
        if ended[-1] != tokenizer.eos_token_id:
            raise ValueError(
                f"the tokenizer does not read its eos_token {tokenizer.eos_token!r} as one token"
            )

    def prompts(self, indices: Sequence[int]) -> list[list[int]]:
        """Prompts alone; conversations with what asks the assistant to speak."""
        if not self.rows.conversational:
            return self._encode_plain([self.rows[index]["prompt"] for index in indices])
        return self._encode([self._render(i, self.rows[i]["prompt"], asking=True)[0] for i in indices])[0]

    def sequences(
        self, indices: Sequence[int], column: str, turns: bool = False
    ) -> tuple[list[list[int]], Sequence[list[bool] | None]]:
        """Ids of prompt and `column` together, and with `turns` which tokens are the assistant's."""
        nothing: Sequence[None] = [None] * len(indices)
        if not self.rows.conversational:
            return self._encode_plain([self._ended(self.rows[index], column) for index in indices]), nothing
        rendered = [self._render(i, _conversation(self.rows[i], column), turns=turns) for i in indices]
        ids, offsets = self._encode([text for text, _ in rendered], offsets=turns)
        if not turns:
            return ids, nothing
        return ids, [tokens_in_spans(at, spans) for at, (_, spans) in zip(offsets, rendered)]

    def _ended(self, row: Row, column: str) -> str:
        answer, eos = row[column], self.tokenizer.eos_token
        return (row["prompt"] if column != "text" else "") + answer + ("" if answer.endswith(eos) else eos)

    def _encode_plain(self, texts: list[str]) -> list[list[int]]:
        ids = self.tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
        if self.adds_eos:  # ours stands there already, and a prompt must not end
            ids = [tokens[:-1] for tokens in ids]
        if self.adds_bos:
            twice = [self.tokenizer.bos_token_id] * 2
            ids = [tokens[1:] if tokens[:2] == twice else tokens for tokens in ids]
        return ids

    def _encode(self, texts: list[str], offsets: bool = False) -> tuple[list[list[int]], list[list[Span]]]:
        """Rendered conversations: their special tokens are spelled out in the text."""
        if offsets and not self.tokenizer.is_fast:
            raise ValueError(
                "assistant_only_loss=True needs a fast tokenizer, which knows each token's characters"
            )
        found = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=offsets,
            verbose=False,
        )
        return found["input_ids"], found["offset_mapping"] if offsets else []

    def _render(
        self, index: int, messages: list[Message], *, asking: bool = False, turns: bool = False
    ) -> tuple[str, list[Span]]:
        try:
            options = chat_options(self.rows[index])
            if turns:
                return render_turns(self.tokenizer, messages, options)
            text = render(self.tokenizer, messages, options, add_generation_prompt=asking)
            if not asking:  # earlier turns may be rewritten; the answer itself may not
                require_contents(messages[-1:], text)
            return text, []
        except ValueError as error:
            raise DataError(f"{self.rows.where(index)}: {error}") from error


def _conversation(row: Row, column: str) -> list[Message]:
    return row[column] if column == "messages" else row["prompt"] + row[column]
