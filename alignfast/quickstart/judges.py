"""Two judges of how pleasant a text is, from lexicons made by different people: one votes, the other only measures.

VADER (Hutto and Gilbert, 2014) is the simulated user, AFINN (Nielsen, 2011) the judge that training never sees.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

Judge = Callable[[str], float]
FLIPPED = 0.1  # share of the user's votes that are the wrong way round
INDIFFERENT = 0.05  # scores nearer than this (VADER's run from -1 to 1) are no preference: no vote


def simulated_user() -> Judge:
    """VADER's compound score, from -1 to 1."""
    analyser = _package("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()
    return lambda text: analyser.polarity_scores(text)["compound"]


def second_judge() -> Judge:
    """AFINN's score: the sum of its words' values from -5 to 5."""
    return _package("afinn").Afinn().score


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"the quickstart's judges are missing ({error}): pip install '.[quickstart]' in alignfast's checkout"
        ) from error


def vote(
    prompts: Iterable[str], answers: Iterable[list[str]], judge: Judge, rng: random.Random
) -> list[dict[str, Any]]:
    """Preferences of the simulated user on two answers to each prompt; where it sees no difference there is none.

    Args:
        prompts: what was asked.
        answers: two answers to each.
        judge: the user's taste.
        rng: decides which votes are flipped.

    Returns:
        Rows of TRL's conversational preference format.
    """
    pairs = []
    for prompt, (one, other) in zip(prompts, answers):
        gap = judge(one) - judge(other)
        if abs(gap) < INDIFFERENT or not one or not other:  # an answer of nothing is none to learn from
            continue
        chosen, rejected = (one, other) if (gap > 0) != (rng.random() < FLIPPED) else (other, one)
        pairs.append(
            {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
        )
    return pairs
