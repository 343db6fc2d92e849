"""Rows to trees of tokens, with the ids that TRL 1.16 gives.

Prompt and completion are tokenised together, and the prompt is cut where it and all its answers stop being alike:
tokens may merge across the border, and a template may render a prompt differently when nothing follows. Plain text
gets the end-of-sequence token if it does not end in it; conversations get what their template writes.

One difference: a tokenizer that adds an end token by itself, or a text that already starts with the beginning-of-
sequence token, gives it twice in TRL and once here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from alignfast.data.formats import Rows
from alignfast.data.packing import Tree
from alignfast.data.sources import DataError, Row
from alignfast.data.templates import (
    Message,
    Span,
    chat_options,
    num_alike,
    render,
    render_turns,
    require_contents,
    tokens_in_spans,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SFT_FORMATS = ("text", "messages", "prompt_completion")
PREFERENCE_FORMATS = ("preference",)
THUMBS_FORMATS = ("thumbs",)
TRUNCATION_MODES = ("keep_start", "keep_end")
_ROWS_AT_ONCE = 1000  # a tokenizer call works on all cores; its result is several times the size of the ids


@dataclass
class PrepareReport:
    """What became of the rows; nothing is cut or dropped that is not counted here.

    Attributes:
        rows: rows that made a tree.
        tokens: tokens of the trees, a prompt counted for each of its answers.
        tokens_shared: the same with each prompt counted once.
        trained_tokens: tokens that are predicted and carry loss.
        truncated_rows: rows cut to `max_length`.
        tokens_lost: tokens of all rows, kept and dropped, that no tree holds.
        dropped_rows: rows left without a token to train on.
        prompt_tokens_moved: tokens of prompts that come after the cut, so that answers start with them.
        largest_token_id: to hold against the size of a model's vocabulary; -1 without tokens.
    """

    rows: int = 0
    tokens: int = 0
    tokens_shared: int = 0
    trained_tokens: int = 0
    truncated_rows: int = 0
    tokens_lost: int = 0
    dropped_rows: int = 0
    prompt_tokens_moved: int = 0
    largest_token_id: int = -1

    def summary(self) -> str:
        """A few plain lines for the log.

        >>> print(PrepareReport(rows=2, tokens=30, tokens_shared=20, trained_tokens=8, dropped_rows=1).summary())
        2 rows, 30 tokens, of which 8 are trained; with prompts shared 20 (1.50 times fewer)
        1 row dropped: nothing to train on was left of it
        """
        lines = [
            f"{_count(self.rows, 'row')}, {self.tokens:,} tokens, of which {self.trained_tokens:,} are trained"
        ]
        if self.tokens_shared < self.tokens:
            saved = self.tokens / self.tokens_shared
            lines[0] += f"; with prompts shared {self.tokens_shared:,} ({saved:.2f} times fewer)"
        if self.truncated_rows:
            lines.append(f"{_count(self.truncated_rows, 'row')} longer than max_length cut")
        if self.dropped_rows:
            lines.append(f"{_count(self.dropped_rows, 'row')} dropped: nothing to train on was left of it")
        if self.tokens_lost:
            lines.append(f"{_count(self.tokens_lost, 'token')} lost to cutting and dropping")
        if self.prompt_tokens_moved:
            lines.append(
                f"{_count(self.prompt_tokens_moved, 'token')} at the ends of prompts differ when an answer follows, "
                "and the answer starts there: end prompts where tokens end, or see how the template renders them"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class Prepared:
    """Trees ready to pack.

    Attributes:
        trees: one a row that was kept, in order.
        report: what became of the rows.
        rows: index of each tree's row in the rows given.
    """

    trees: list[Tree]
    report: PrepareReport
    rows: list[int]


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
    forest = _Forest(max_length, truncation_mode)
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
    forest = _Forest(max_length, truncation_mode)
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
    """Trees of a prompt with its completion, labelled 1 for a thumb up and 0 for one down; completions carry loss.

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
    forest = _Forest(max_length, truncation_mode)
    encoder = Encoder(rows, tokenizer)
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        indices = range(first, min(first + _ROWS_AT_ONCE, len(rows)))
        sequences, _ = encoder.sequences(indices, "completion")
        for index, prompt, sequence in zip(indices, encoder.prompts(indices), sequences):
            forest.plant(index, prompt, [sequence], None, label=float(rows[index]["label"]))
    return forest.prepared()


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


@dataclass
class _Forest:
    """Cuts sequences to length, makes trees of them, and keeps the count."""

    max_length: int | None
    truncation_mode: str
    trees: list[Tree] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    report: PrepareReport = field(default_factory=PrepareReport)

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be >= 1, or None for no cut, got {self.max_length}")
        if self.truncation_mode not in TRUNCATION_MODES:
            raise ValueError(
                f"truncation_mode={self.truncation_mode!r} is not one of {', '.join(TRUNCATION_MODES)}"
            )

    def plant(
        self,
        row: int,
        prompt: list[int],
        sequences: list[list[int]],
        turns: list[bool] | None,
        label: float = 0.0,
    ) -> None:
        """Add a row: its prompt alone, its prompt with each answer, which tokens may be trained at all, its label."""
        context = min(num_alike(prompt, ids) for ids in sequences)
        self.report.prompt_tokens_moved += len(prompt) - context
        windows = [self._window(len(ids)) for ids in sequences]
        heads = {max(0, min(context, window.stop) - window.start) for window in windows}
        head = heads.pop() if len(heads) == 1 else 0
        answers, masks = [], []
        for ids, window in zip(sequences, windows):
            places = range(window.start + head, window.stop)
            answers.append(tuple(ids[places.start : places.stop]))
            masks.append(tuple(at >= context and (turns is None or turns[at]) for at in places))
        shared = tuple(sequences[0][windows[0].start :][:head])
        # Without a prompt, nothing predicts the first token.
        trained = sum(sum(mask if shared else mask[1:]) for mask in masks)
        total = sum(map(len, sequences))
        if not trained or not all(answers):
            self.report.dropped_rows += 1
            self.report.tokens_lost += total
            return
        self._keep(row, Tree(shared, tuple(answers), tuple(masks), label), trained, total)

    def _keep(self, row: int, tree: Tree, trained: int, total: int) -> None:
        """Add a tree with so many predictions, cut from so many tokens."""
        report = self.report
        self.trees.append(tree)
        self.rows.append(row)
        report.rows += 1
        report.tokens += tree.num_tokens_unshared
        report.tokens_shared += tree.num_tokens
        report.trained_tokens += trained
        report.truncated_rows += tree.num_tokens_unshared < total
        report.tokens_lost += total - tree.num_tokens_unshared
        segments = filter(None, (tree.prompt, *tree.answers))
        report.largest_token_id = max(report.largest_token_id, *map(max, segments))

    def _window(self, length: int) -> range:
        """Places of a sequence that stay."""
        if self.max_length is None or length <= self.max_length:
            return range(length)
        return (
            range(self.max_length)
            if self.truncation_mode == "keep_start"
            else range(length - self.max_length, length)
        )

    def prepared(self) -> Prepared:
        return Prepared(self.trees, self.report, self.rows)


def _conversation(row: Row, column: str) -> list[Message]:
    return row[column] if column == "messages" else row["prompt"] + row[column]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
