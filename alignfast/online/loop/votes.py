"""Which votes a round learns from, which it measures with, and as which rows.

    held out    SHA-256 of the seed and the voter (or the prompt), as a number in [0, 1), is below the share

So a voter stays on one side for ever, and no reward model has seen a vote that another is measured with. Voters of whom
nothing is known but that they are anonymous are held out prompt by prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from alignfast.online.feedback import ANONYMOUS, Judged, Shown, voter_of
from alignfast.online.store.export import ExportFormat, rows_of

Row = TypeVar("Row", bound=dict[str, Any])


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
    digest = hashlib.sha256(f"{seed}:{whole}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


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


def prompt_key(shown: Shown) -> str:
    """The same for the same prompt."""
    return json.dumps(shown.prompt, sort_keys=True)


def training_rows(judged: Iterable[Judged], format: ExportFormat) -> list[dict[str, Any]]:
    """Votes as rows of one format, all of them plain or all conversational: the larger part of them.

    An answer without a word is in no row: it has no token that a trainer could score.
    """
    return alike([row for row in rows_of(judged, format) if all(map(_says_something, row.items()))])


def _says_something(column: tuple[str, Any]) -> bool:
    name, value = column
    answers = value if name == "ranking" else [value] if name in ("chosen", "rejected", "completion") else []
    return all((of if isinstance(of, str) else of[-1]["content"]).strip() for of in answers)


def alike(rows: Sequence[Row]) -> list[Row]:
    """Rows whose prompts are texts, or those whose prompts are messages: whichever are more, since no trainer mixes them."""
    plain = [row for row in rows if isinstance(row["prompt"], str)]
    return (
        plain if 2 * len(plain) >= len(rows) else [row for row in rows if not isinstance(row["prompt"], str)]
    )


def prompts_of(judged: Iterable[Judged], most: int, longest: int | None = None) -> list[dict[str, Any]]:
    """Rows of the different prompts of votes, the newest first.

    Args:
        judged: the votes.
        most: rows.
        longest: prompts that are known to have more tokens are left out; None keeps all.
    """
    found: dict[str, dict[str, Any]] = {}
    newest = sorted((shown for one in judged for shown in one.answers), key=lambda shown: -shown.created)
    for shown in newest:
        if longest is None or len(shown.prompt_ids) <= longest:
            row = found.setdefault(prompt_key(shown), {"prompt": shown.prompt, "response_ids": []})
            row["response_ids"].append(shown.id)
    return alike(list(found.values()))[:most]
