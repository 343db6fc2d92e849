"""Token ids of prompts and answers to trees, cut to length, with an account of what became of the rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from alignfast.data.packing import Tree
from alignfast.data.templates import num_alike

# `drop` leaves a row out of which a sequence is too long: where an answer without its end would be another answer.
TRUNCATION_MODES = ("keep_start", "keep_end", "drop")


@dataclass
class PrepareReport:
    """What became of the rows; nothing is cut or dropped that is not counted here.

    Attributes:
        rows: rows that made a tree.
        tokens: tokens of the trees, a prompt counted for each of its answers.
        tokens_shared: the same with each prompt counted once.
        trained_tokens: tokens that are predicted and carry loss.
        truncated_rows: rows cut to `max_length`.
        too_long_rows: rows left out because a sequence is longer than `max_length`.
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
    too_long_rows: int = 0
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
        if self.too_long_rows:
            lines.append(f"{_count(self.too_long_rows, 'row')} longer than max_length left out")
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


@dataclass
class Forest:
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
        total = sum(map(len, sequences))
        if self.truncation_mode == "drop" and max(map(len, sequences)) > (self.max_length or math.inf):
            self.report.too_long_rows += 1
            self.report.tokens_lost += total
            return
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


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
