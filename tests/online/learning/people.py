"""People who like one word, say so in every kind of vote, and a model that can learn it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from trainers.tiny import WORDS, make_llama, make_tokenizer

from alignfast.online.feedback import TIE, Judged, Kind, Shown, Vote

LIKED, HATED = "cat", "dog"
OPTIONS: dict[str, Any] = {
    "use_cpu": True,
    "keep_cpu_memory": False,
    "gradient_checkpointing": False,
    "learning_rate": 5e-3,
    "per_device_train_batch_size": 16,
    "logging_strategy": "no",
    "save_strategy": "no",
}


def make_start(folder: Path) -> Path:
    make_llama(0, initializer_range=0.3).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def liking(text: str) -> int:
    words = text.split()
    return words.count(LIKED) - words.count(HATED)


def answers(draw: random.Random, name: str, number: int) -> tuple[Shown, ...]:
    prompt = " ".join(draw.choices(WORDS, k=3))
    words = [*WORDS, LIKED, LIKED, HATED, HATED]
    return tuple(
        Shown(id=f"{name}-{i}", prompt=prompt, text=" " + " ".join(draw.choices(words, k=5)), group_id=name)
        for i in range(number)
    )


def votes_of(kind: Kind, number: int, seed: int = 0, users: int = 20) -> list[Judged]:
    """Votes of one kind. Users are pleased more or less easily; thumbs and ratings say more of them than of answers."""
    draw = random.Random(f"{kind} {seed}")
    found: list[Judged] = []
    while len(found) < number:
        at = len(found)
        shown = answers(draw, f"{kind}-{seed}-{at}", {"pair": 2, "ranking": 4}.get(kind, 1))
        user = draw.randrange(users)
        said = say(kind, shown, 2 * (user % 3) - 2)
        if said is not None:
            vote = Vote(
                response_id=shown[0].id, kind=kind, value=said, user=f"user {seed} {user}", created=at
            )
            found.append(Judged(vote, shown))
    return found


def say(kind: Kind, shown: tuple[Shown, ...], ease: int) -> Any:
    """What somebody says who is pleased so easily; None: nothing."""
    likings = {one.id: liking(one.text) for one in shown}
    first = likings[shown[0].id]
    if kind == "thumb":
        return first + ease > 0 if first + ease else None
    if kind == "rating":
        return max(1, min(5, 3 + first + ease))
    if kind == "implicit":
        return None if not first else "copy" if first > 0 else "regenerate"
    if kind == "edit":
        return shown[0].text.replace(HATED, LIKED) if HATED in shown[0].text else None
    if kind == "pair":
        best = max(likings, key=likings.__getitem__)
        return TIE if len(set(likings.values())) == 1 else best
    return [[id for id in likings if likings[id] == value] for value in sorted(set(likings.values()))[::-1]]
