"""Which votes a round learns from, which it measures with, and as which rows.

    held out    SHA-256 of the seed and the voter (or the prompt), as a number in [0, 1), is below the share

So a voter stays on one side for ever, and no reward model has seen a vote that another is measured with. Voters of whom
nothing is known but that they are anonymous are held out prompt by prompt.

What a trainer can't take is left out, and counted by its reason:

    other_text     edits that are another text rather than a better one      (learning/said.py)
    wordless       rows with an answer of no word: no token could be scored
    other_format   texts among conversations, or the other way round: whichever are fewer, since no trainer mixes them
    too_long       prompts that leave no room for an answer
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from alignfast.online.feedback import ANONYMOUS, Judged, Prompt, Shown, voter_of
from alignfast.online.learning.said import is_mended
from alignfast.online.store.export import ExportFormat, Row, rows_of
from alignfast.online.voters import voter_weights

_ROUNDING = 1e-6  # of weights that add up to a whole number of votes


class Rows(NamedTuple):
    """What a trainer can take.

    Attributes:
        rows: in the trainer's format.
        left: how many were left out, by the reason.
    """

    rows: list[Row]
    left: dict[str, int]


def is_held_out(judged: Judged, share: float, by: str = "user", seed: int = 0) -> bool:
    """Whether a vote is measured with and not trained on.

    Args:
        judged: the vote.
        share: of what is held out, in [0, 1).
        by: `user` or `prompt`.
        seed: of the choice.
    """
    whole = (
        prompt_key(judged.answers[0]) if by == "prompt" or judged.vote.user == ANONYMOUS else judged.vote.user
    )
    return _drawn(f"{seed}:{whole}") < share


def first_of_each(judged: Sequence[Judged], most: int | None) -> tuple[list[Judged], list[str]]:
    """The first votes of each voter; and the ids of the others: what comes later takes nothing away.

    Args:
        judged: in the order in which they came.
        most: of one voter, as `feedback.voter_of` names them; None for any number.
    """
    if most is None:
        return list(judged), []
    counts: Counter[str] = Counter()
    kept, beyond = [], []
    for one in judged:
        voter = voter_of(one.vote.user)
        counts[voter] += 1
        if counts[voter] <= most:
            kept.append(one)
        else:
            beyond.append(one.vote.id)
    return kept, beyond


def outweighing_nobody(judged: Sequence[Judged], most: float) -> list[Judged]:
    """The newest votes of each voter, as many as weigh what the voter's do in a reward model's update.

    For trainers that weigh no rows: of n_v votes of weight w_v = min(1, most / n_v) stay n_v w_v / max w, and of one voter
    alone all.

    Args:
        judged: in the order in which they came, which they keep.
        most: what all votes of one voter weigh together at most, > 0.
    """
    weights = voter_weights([one.vote.user for one in judged], most)
    left: dict[str, float] = defaultdict(float)
    for one, weight in zip(judged, weights):
        left[voter_of(one.vote.user)] += weight / max(weights)
    kept = []
    for one in reversed(judged):
        voter = voter_of(one.vote.user)
        if left[voter] > _ROUNDING:
            kept.append(one)
            left[voter] -= 1
    return kept[::-1]


def prompt_key(shown: Shown) -> str:
    """The same for the same prompt."""
    return json.dumps(shown.prompt, sort_keys=True)


def training_rows(judged: Iterable[Judged], format: ExportFormat, edit_kept: float = 0.5) -> Rows:
    """Votes as rows of one format, all of them plain or all conversational: the larger part of them.

    Args:
        judged: the votes.
        format: `pairs` or `kto`. A thumb on a conversation is a row of one of its turns, drawn by the vote's id: in the mean
            each turn weighs as in the reward model's update, and who votes on twenty turns votes once.
        edit_kept: share of an edit that must be the original's, as the reward model's option says.
    """
    votes = list(judged)
    mended = [one for one in votes if one.vote.kind != "edit" or _is_mended(one, edit_kept)]
    turns = [_one_turn(one) for one in mended] if format == "kto" else mended
    found = rows_of(turns, format, with_users=True)
    spoken = [row for row in found if all(map(_says_something, row.items()))]
    kept = alike(spoken)
    left = {
        "other_text": len(votes) - len(mended),
        "wordless": len(found) - len(spoken),
        "other_format": len(spoken) - len(kept),
    }
    return Rows(kept, left)


def _is_mended(judged: Judged, kept: float) -> bool:
    return is_mended(judged.answer.text, judged.vote.value, kept)


def _one_turn(judged: Judged) -> Judged:
    at = int(_drawn(judged.vote.id) * len(judged.answers))
    return replace(judged, answers=judged.answers[at : at + 1])


def _drawn(text: str) -> float:
    """A number in [0, 1), the same for the same text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _says_something(column: tuple[str, Any]) -> bool:
    name, value = column
    answers = value if name == "ranking" else [value] if name in ("chosen", "rejected", "completion") else []
    return all((of if isinstance(of, str) else of[-1]["content"]).strip() for of in answers)


def alike(rows: Sequence[Row]) -> list[Row]:
    """Rows whose prompts are texts, or those whose prompts are messages: whichever are more."""
    plain = [row for row in rows if isinstance(row["prompt"], str)]
    return (
        plain if 2 * len(plain) >= len(rows) else [row for row in rows if not isinstance(row["prompt"], str)]
    )


def prompts_of(
    judged: Iterable[Judged],
    most: int,
    *,
    longest: int | None = None,
    tokens_of: Callable[[Prompt], int] | None = None,
) -> Rows:
    """Rows of the different prompts of votes, the newest first.

    Args:
        judged: the votes.
        most: rows.
        longest: prompts that have more tokens are left out; None keeps all.
        tokens_of: counts the tokens of a prompt that came without them, from another program; None keeps those.
    """
    found: dict[str, Row] = {}
    too_long: set[str] = set()
    newest = sorted((shown for one in judged for shown in one.answers), key=lambda shown: -shown.created)
    for shown in newest:
        key = prompt_key(shown)
        if key in too_long:
            continue
        if key not in found and longest is not None and _tokens(shown, tokens_of) > longest:
            too_long.add(key)
            continue
        row = found.setdefault(key, {"prompt": shown.prompt, "response_ids": []})
        row["response_ids"].append(shown.id)
    kept = alike(list(found.values()))
    return Rows(kept[:most], {"too_long": len(too_long), "other_format": len(found) - len(kept)})


def _tokens(shown: Shown, tokens_of: Callable[[Prompt], int] | None) -> int:
    if shown.prompt_ids or tokens_of is None:
        return len(shown.prompt_ids)
    return tokens_of(shown.prompt)
