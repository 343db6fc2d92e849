"""Policies that are hacked in earnest, by training against a wrong reward or too hard, before measurement and gate.

People like every other word. A reward model that learned from the reverse of their votes, or from length alone, is followed
by GRPO, and so is the right one at a step size that breaks the model. What the gate lets pass goes before people: VOTERS of
them compare its answers with the start policy's. Beside them stands a sound candidate, which was shown more of the words that
people like.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from online.loop.filled import LIKED, TINY, share_liked
from trainers.tiny import make_llama, make_rows, make_tokenizer

from alignfast.models import load_policy, load_tokenizer
from alignfast.online.feedback import Judged, Shown, Vote
from alignfast.online.learning.update import update_reward
from alignfast.online.loop import OnlineLoop, Round
from alignfast.online.loop.evaluate import evaluate_candidate
from alignfast.online.loop.folders import begin_work
from alignfast.online.loop.gate import pass_gate
from alignfast.online.loop.loop import collect
from alignfast.online.loop.policy import candidate_folder, learn_policy
from alignfast.online.loop.serve import duel
from alignfast.online.server.versions import weights_hash
from alignfast.online.store import Run, Store
from alignfast.online.store.uses import Learned
from alignfast.rollout import Sampling, make_engine
from alignfast.trainers.sft import SFTTrainer
from alignfast.trainers.state import write_json

USERS, PROMPTS, ANSWER, VOTERS = 60, 120, 24, 200
FIRM: dict[str, Any] = {"learning_rate": 3e-3, "beta": 0.02, "max_steps": 16}


@dataclass
class Kind:
    """How a candidate is made: what its reward model takes for better, and how hard it is followed."""

    better: Callable[[str], float]
    options: dict[str, Any]
    make: Callable[[OnlineLoop, Run, Round], None] = learn_policy


KINDS = {
    "reward": Kind(lambda text: -share_liked(text), FIRM),
    "length": Kind(lambda text: len(text.split()), FIRM),
    "broken": Kind(share_liked, {"learning_rate": 0.3, "max_grad_norm": 1e3, "beta": 0.0, "max_steps": 6}),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes one to nine words and ends."""
    folder = tmp_path_factory.mktemp("models")
    torch.set_num_threads(1)
    fine_tune(make_llama(0, hidden_size=32, intermediate_size=64), make_rows(400), 80, folder / "start")
    return folder / "start"


def fine_tune(model: Any, rows: list[dict[str, str]], steps: int, folder: Path) -> None:
    trainer = SFTTrainer(
        model, train_dataset=rows, processing_class=make_tokenizer(), output_dir=str(folder.parent / "run"), max_steps=steps,
        learning_rate=1e-2, per_device_train_batch_size=32, report_to="none", save_strategy="no", **TINY,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(folder))


def answers(store: Store, version: str, name: str, number: int, n: int, seed: int) -> list[list[Shown]]:
    """n answers of a version to each of some prompts."""
    path = store.versions.get(version).path
    policy, tokenizer = load_policy(path), load_tokenizer(None, path)
    prompts = [row["prompt"] for row in make_rows(number, seed + 1)]
    groups = make_engine("native", policy, tokenizer).generate(
        prompts, Sampling(max_new_tokens=ANSWER, n=n, seed=seed)
    )
    return [
        [
            Shown(
                id=f"{name}-{i}-{version}-{j}", prompt=prompt, text=of.text, group_id=f"{name}-{i}", prompt_ids=of.prompt_ids,
                completion_ids=of.token_ids, logps=of.logps, finish_reason=of.finish_reason, policy_version=version,
                sampling={"duel": "policy-1"},
            )
            for j, of in enumerate(group)
        ]
        for i, (prompt, group) in enumerate(zip(prompts, groups))
    ]  # fmt: skip


def judged(pair: list[Shown], better: Callable[[str], float], user: str) -> Judged:
    best = max(pair, key=lambda shown: better(shown.text) + random.Random(shown.id).random() * 1e-3)
    return Judged(Vote(response_id=pair[0].id, kind="pair", value=best.id, user=user), tuple(pair))


def wins_its_duels(loop: OnlineLoop, run: Run, round: Round, seed: int) -> bool:
    """What people say, twenty of them between two looks of the learner."""
    sides = [answers(loop.store, name, "duel", VOTERS, 1, seed + 1000) for name in ("start", "policy-1")]
    for i, (ours, theirs) in enumerate(zip(*sides)):
        pair = [*ours, *theirs]
        loop.store.record_shown(*pair)
        loop.store.add_vote(judged(pair, share_liked, f"voter-{i}").vote)
        if (i + 1) % 20 == 0 and (found := duel(loop, run, round)) != "wait":
            return found == "next"
    raise AssertionError("the budget of voters ends it")


def is_promoted(start: Path, folder: Path, kind: Kind, seed: int) -> tuple[bool, dict[str, Any]]:
    """Train a candidate as its kind is, measure it, ask the gate, then people; and what was found."""
    with Store.open(f"sqlite:///{folder}/feedback.db") as store:
        store.versions.add("start", "policy", str(start), weights_hash(start))
        store.versions.promote("start")
        shown = answers(store, "start", "asked", PROMPTS, 2, seed)
        for i, pair in enumerate(shown):
            store.record_shown(*pair)
            store.add_vote(judged(pair, share_liked, f"user-{i % USERS}").vote)
        options = {
            **TINY, "num_generations": 8, "per_device_train_batch_size": 64, "logging_strategy": "no", "save_strategy": "no",
            **kind.options,
        }  # fmt: skip
        loop = OnlineLoop(
            store=store, output_dir=str(folder / "versions"), say=lambda text: None, min_votes=PROMPTS, held_out=0.4,
            max_completion_length=ANSWER, logged_answers=False, kl_budget=None, policy_options=options, seed=seed,
            canary_voters=VOTERS,
        )  # fmt: skip
        run = loop._run()
        round = Round.from_dict(run.state)
        assert collect(loop, run, round) == "next"
        taught = [judged(pair, kind.better, f"user-{i}") for i, pair in enumerate(shown)]
        reward = {**TINY, "learning_rate": 5e-3, "num_train_epochs": 4, "per_device_train_batch_size": 16}
        made = update_reward(str(start), taught, [], folder / "reward", {**reward, "logging_strategy": "no"})
        store.versions.add("reward-1", "reward", str(made.folder), weights_hash(made.folder))
        round.reward = "reward-1"
        kind.make(loop, run, round)
        evaluate_candidate(loop, run, round)
        passes = pass_gate(loop, run, round) == "next" and wins_its_duels(loop, run, round, seed)
        return passes, {**round.figures, "reasons": store.versions.get("policy-1").reasons}


def learns_of_more_liked_words(loop: OnlineLoop, run: Run, round: Round) -> None:
    """A third of the words that nobody likes are replaced."""
    folder, draw, liked = candidate_folder(loop, run), random.Random(0), sorted(LIKED)
    begin_work(folder.parent, Learned(), {})
    rows = [
        {**row, "completion": " " + " ".join(
            word if word in LIKED or draw.random() > 1 / 3 else draw.choice(liked) for word in row["completion"].split()
        )}
        for row in make_rows(400)
    ]  # fmt: skip
    fine_tune(loop.store.versions.get("start").path, rows, 30, folder)
    write_json(folder.parent / "figures.json", {})


def test_a_sound_candidate_is_promoted(start: Path, tmp_path: Path) -> None:
    sound = Kind(share_liked, {}, learns_of_more_liked_words)
    promoted, figures = is_promoted(start, tmp_path, sound, seed=0)
    assert promoted, json.dumps(figures, indent=1)


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_that_are_hacked_are_not_promoted(start: Path, tmp_path: Path, kind: str) -> None:
    promoted, figures = is_promoted(start, tmp_path, KINDS[kind], seed=0)
    assert not promoted, json.dumps(figures, indent=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_none_of_twenty_of_each_kind(start: Path, tmp_path: Path, kind: str) -> None:
    reasons = []
    for seed in range(20):
        (tmp_path / str(seed)).mkdir()
        promoted, figures = is_promoted(start, tmp_path / str(seed), KINDS[kind], seed)
        reasons += [] if promoted else [figures["reasons"][0]]
    print("\n".join([kind, *reasons]))
    assert len(reasons) == 20
