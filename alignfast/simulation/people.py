"""People with a hidden preference: what they like, and how they vote on it.

    like      VADER's compound score of the text, in [-1, 1]: pleasant answers
    after     like, less (words - BRIEF) / SPAN where a text has more words than that: now they want it short too
    P(up)     = sigmoid(like / NOISE)              a thumb on one answer
    P(a > b)  = sigmoid((like_a - like_b) / NOISE) which of two is better; a tie where they differ by less than INDIFFERENT

A contrarian likes what the others don't. The policy is never told any of it: votes alone reach the server.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from alignfast.quickstart.judges import INDIFFERENT, Judge

NOISE = 0.25
BRIEF, SPAN = 18, 10
_FAR = 30.0  # logits beyond which a vote is certain


@dataclass
class Person:
    """Who talks to the server.

    Attributes:
        name: the user that the server knows.
        key: with which it is known.
        contrarian: whether the person likes what others don't.
        rng: of the person's questions and votes.
    """

    name: str
    key: str
    contrarian: bool
    rng: random.Random

    def thumb(self, text: str, like: Judge) -> bool:
        """Up or down."""
        return self._says(self._taste(text, like))

    def verdict(self, text: str, other: str, like: Judge) -> str:
        """Whether a text is `better` or `worse` than another one, or it is a `tie`."""
        gap = self._taste(text, like) - self._taste(other, like)
        if abs(gap) < INDIFFERENT:
            return "tie"
        return "better" if self._says(gap) else "worse"

    def _taste(self, text: str, like: Judge) -> float:
        return -like(text) if self.contrarian else like(text)

    def _says(self, gap: float) -> bool:
        logit = max(-_FAR, min(_FAR, gap / NOISE))
        return self.rng.random() < 1 / (1 + math.exp(-logit))


def brief_too(like: Judge) -> Judge:
    """The preference after the drift.

    >>> like = brief_too(lambda text: 1.0)
    >>> like("short and good"), like("a word " * 14)
    (1.0, 0.0)
    """
    return lambda text: like(text) - max(0, len(text.split()) - BRIEF) / SPAN


def is_contrarian(place: int, share: float) -> bool:
    """Whether the person at a place of the line is one: a share of all, evenly spread.

    >>> sum(is_contrarian(place, 0.1) for place in range(60))
    6
    """
    return math.floor((place + 1) * share) > math.floor(place * share)
