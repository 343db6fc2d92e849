"""Questions and answers drawn from the words: the quickstart's data, and the check that an answer is still of them.

An answer is two or three sentences: one about what was asked, one about a second thing, and mostly a closing one.
It has a sentiment that each of its sentences follows or not, so that a model of these answers is of mixed mind.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from alignfast.quickstart import words

FOLLOWS = 0.7  # probability that a sentence has the sentiment of its answer; else it is drawn anew
CLOSES = 0.7  # probability that an answer has a third sentence


@dataclass(frozen=True, slots=True)
class Topic:
    """What a question asks about: a thing of a place of a kind."""

    kind: str
    place: str
    aspect: str


@dataclass(frozen=True, slots=True)
class Question:
    """A question in words, and what it is about."""

    text: str
    topic: Topic


def questions(seed: int, held_out: float = 0.2) -> tuple[list[Question], list[Question]]:
    """All questions, as (to train on, to hold out): the two share no (place, aspect), in any wording.

    >>> train, held = questions(seed=0)
    >>> len(train), len(held), {q.topic for q in train} & {q.topic for q in held}
    (1176, 296, set())
    """
    topics = [
        Topic(kind, place, aspect)
        for kind, places in words.PLACES.items()
        for place in places
        for aspect in words.ASPECTS[kind]
    ]
    random.Random(seed).shuffle(topics)
    kept = round(len(topics) * held_out)
    return _asked(topics[kept:]), _asked(topics[:kept])


def _asked(topics: list[Topic]) -> list[Question]:
    return [
        Question(form.format(aspect=topic.aspect, place=topic.place), topic)
        for topic in topics
        for form in words.QUESTIONS
    ]


def answer(topic: Topic, rng: random.Random) -> str:
    """An answer as the grammar's people give it.

    >>> answer(Topic("food", "harbour cafe", "soup"), random.Random(3))[:73] + " ..."
    'Even a colleague was happy with the soup. And thanks to the rich lemonade ...'
    """
    mood = rng.choice(words.SENTIMENTS)
    parts = [words.OPENERS, words.DETAILS]
    if rng.random() < CLOSES:
        parts.append(words.CLOSINGS)
    sentences = []
    for part in parts:
        sentiment = mood if rng.random() < FOLLOWS else rng.choice(words.SENTIMENTS)
        sentences.append(_fill(rng.choice(part[sentiment]), topic, sentiment, rng))
    return " ".join(sentences)


def _fill(sentence: str, topic: Topic, sentiment: str, rng: random.Random) -> str:
    aspects = words.ASPECTS[topic.kind]
    other = rng.choice(list(words.OTHERS))
    return sentence.format(
        aspect=topic.aspect,
        other=other,
        place=topic.place,
        adjective=rng.choice(words.ADJECTIVES[aspects[topic.aspect]][sentiment]),
        second=rng.choice(words.ADJECTIVES[words.OTHERS[other]][sentiment]),
        adverb=rng.choice(words.ADVERBS),
        person=rng.choice(words.PEOPLE),
        time=rng.choice(words.TIMES),
    )


def is_well_formed(topic: Topic, text: str) -> bool:
    """Whether a text could have come from `answer(topic)`: every sentence in its place, every word fitting.

    >>> cafe = Topic("food", "harbour cafe", "soup")
    >>> is_well_formed(cafe, "The soup was very fresh. The manager was kind too.")
    True
    >>> is_well_formed(cafe, "The soup was very rude. The manager was kind too.")
    False
    """
    return _pattern(topic).fullmatch(text) is not None


@cache
def _pattern(topic: Topic) -> re.Pattern[str]:
    opener, detail, closing = (
        "|".join(
            expression
            for sentiment in words.SENTIMENTS
            for sentence in part[sentiment]
            for expression in _expressions(sentence, topic, sentiment)
        )
        for part in (words.OPENERS, words.DETAILS, words.CLOSINGS)
    )
    return re.compile(f"(?:{opener}) (?:{detail})(?: (?:{closing}))?")


def _expressions(sentence: str, topic: Topic, sentiment: str) -> Iterator[str]:
    """One regular expression for each class of second thing: its adjective depends on it."""
    form = re.escape(sentence).replace(r"\{", "{").replace(r"\}", "}")
    classes = dict.fromkeys(words.OTHERS.values()) if "{other}" in sentence else ["room"]
    for kind in classes:
        yield form.format(
            aspect=topic.aspect,
            other=_any([name for name, other_kind in words.OTHERS.items() if other_kind == kind]),
            place=topic.place,
            adjective=_any(words.ADJECTIVES[words.ASPECTS[topic.kind][topic.aspect]][sentiment]),
            second=_any(words.ADJECTIVES[kind][sentiment]),
            adverb=_any(words.ADVERBS),
            person=_any(words.PEOPLE),
            time=_any(words.TIMES),
        )


def _any(choices: Sequence[str]) -> str:
    return f"(?:{'|'.join(map(re.escape, choices))})"
