"""A store with answers of a tiny model and votes of people who like every other word of it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from trainers.tiny import WORDS, make_llama, make_tokenizer

from alignfast.models import load_policy, load_tokenizer
from alignfast.online.feedback import Shown, Vote
from alignfast.online.server.versions import weights_hash
from alignfast.online.store import Store
from alignfast.rollout import Sampling, make_engine

LIKED = frozenset(WORDS[::2])
TINY: dict[str, Any] = {
    "use_cpu": True,
    "logging_steps": 1,
    "keep_cpu_memory": False,
    "gradient_checkpointing": False,
}
FAST: dict[str, Any] = {
    "min_votes": 4, "max_completion_length": 6, "eval_prompts": 4, "canary_share": 0.0, "watch_seconds": 0.0, "kl_every": 2,
    "reward_options": {**TINY, "max_steps": 2},
    "policy_options": {**TINY, "max_steps": 2, "learning_rate": 1e-3},
}  # fmt: skip


def make_start(folder: Path, seed: int = 3) -> Path:
    """A start policy on disk."""
    torch.set_num_threads(1)
    make_llama(seed, initializer_range=0.5).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def serve_start(store: Store, folder: Path) -> None:
    store.versions.add("start", "policy", str(folder), weights_hash(folder))
    store.versions.promote("start")


def ask(store: Store, number: int, seed: int = 0, n: int = 2) -> list[list[Shown]]:
    """Answers of the version that serves, n side by side, to prompts of a few words."""
    serving = store.versions.serving()
    assert serving is not None
    draw = random.Random(seed)
    prompts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 4))) for _ in range(number)]
    policy, tokenizer = load_policy(serving.path), load_tokenizer(None, serving.path)
    sampling = Sampling(max_new_tokens=6, n=n, seed=seed)
    shown = [
        [
            Shown(
                id=f"{serving.name}-{seed}-{i}-{j}", prompt=prompt, text=of.text, group_id=f"{serving.name}-{seed}-{i}",
                user=f"user-{i % 10}", prompt_ids=of.prompt_ids, completion_ids=of.token_ids, logps=of.logps,
                finish_reason=of.finish_reason, policy_version=serving.name, weights_hash=serving.hash,
            )
            for j, of in enumerate(group)
        ]
        for i, (prompt, group) in enumerate(
            zip(prompts, make_engine("native", policy, tokenizer).generate(prompts, sampling))
        )
    ]  # fmt: skip
    store.record_shown(*(one for group in shown for one in group))
    return shown


def share_liked(text: str) -> float:
    words = text.split()
    return sum(word in LIKED for word in words) / max(1, len(words))


def liking(shown: Shown) -> float:
    """How much people like an answer: the share of words that they like, and a little noise to part ties."""
    return share_liked(shown.text) + random.Random(shown.id).random() * 1e-3


def vote(store: Store, groups: list[list[Shown]], liked: bool = True) -> list[Vote]:
    """A ranking of each group by what people like (or don't), and a thumb on its first answer."""
    votes = []
    for group in groups:
        ranked = sorted(group, key=liking, reverse=liked)
        user = group[0].user or ""
        votes.append(Vote(response_id=group[0].id, kind="ranking", value=[of.id for of in ranked], user=user))
        value = "up" if ranked[0] is group[0] else "down"
        votes.append(Vote(response_id=group[0].id, kind="thumb", value=value, user=user))
    for one in votes:
        store.add_vote(one)
    return votes
