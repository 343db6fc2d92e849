"""The quickstart's five trainings, each from a folder to a folder, as `alignfast sft`, `reward`, ... would do it.

    sft              from random weights: to speak as the grammar does
    reward           from sft, with a fresh head: which of two answers the simulated user votes for
    dpo, ppo, grpo   all three from sft: dpo from the same votes, the other two from what the reward model says

PPO and GRPO answer held-out questions as they go, where the second judge measures them and nothing is learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignfast.data.intervals import Interval
from alignfast.quickstart.judges import second_judge
from alignfast.quickstart.model import make_model, make_tokenizer
from alignfast.trainers.dpo import DPOConfig, DPOTrainer
from alignfast.trainers.grpo import GRPOConfig, GRPOTrainer
from alignfast.trainers.ppo import PPOConfig, PPOTrainer
from alignfast.trainers.reward import RewardConfig, RewardTrainer
from alignfast.trainers.sft import SFTConfig, SFTTrainer

SFT, REWARD = "sft", "reward"
ANSWER_TOKENS = 56  # the grammar's longest answer has 48
_BATCH = 16
_PASSES = 2  # over each draw, in two steps each
GROUP = 8  # answers to a question that GRPO compares
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Material:
    """What the three methods start from.

    Attributes:
        folder: of the seed; `sft` and `reward` lie in it.
        votes: pairs, as the simulated user sees them.
        prompts: questions to train on.
        held_out: questions to measure on while training goes on.
        draws: how often answers are drawn.
        completions: answers of a draw.
        seed: of the order of rows, and of what is drawn.
    """

    folder: Path
    votes: Rows
    prompts: Rows
    held_out: Rows
    draws: int
    completions: int
    seed: int


def fine_tune(rows: Rows, hidden_size: int, folder: Path, seed: int) -> None:
    """A model and its tokenizer, made of questions and the grammar's answers, into `sft`."""
    tokenizer = make_tokenizer(row[side][0]["content"] for row in rows for side in ("prompt", "completion"))
    args = SFTConfig(
        num_train_epochs=1,
        per_device_train_batch_size=_BATCH,
        learning_rate=4e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        adam_beta2=0.95,
        **_shared(folder / SFT, seed),
    )
    model = make_model(tokenizer, seed, hidden_size)
    _run(SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer))


def learn_votes(votes: Rows, unseen: Rows, folder: Path, seed: int) -> Interval:
    """A reward model from votes into `reward`; returns the share of unseen votes that it is right about."""
    args = RewardConfig(
        num_train_epochs=1,
        per_device_train_batch_size=_BATCH,
        learning_rate=1e-3,
        warmup_steps=5,
        center_rewards_coefficient=0.01,
        **_shared(folder / REWARD, seed),
    )
    trainer = RewardTrainer(str(folder / SFT), args=args, train_dataset=votes, eval_dataset=unseen)
    _run(trainer)
    found = trainer.evaluate()
    return Interval(*(found[f"eval_accuracy{end}"] for end in ("", "_low", "_high")))


def by_dpo(material: Material) -> None:
    """Straight from the votes into `dpo`."""
    args = DPOConfig(
        num_train_epochs=1,
        per_device_train_batch_size=_BATCH,
        learning_rate=3e-4,
        warmup_steps=5,
        beta=0.1,
        precompute_ref_log_probs=True,
        **_shared(material.folder / "dpo", material.seed),
    )
    _run(DPOTrainer(str(material.folder / SFT), args=args, train_dataset=material.votes))


def by_ppo(material: Material) -> None:
    """From the reward model into `ppo`."""
    args = PPOConfig(critic_learning_rate=1e-3, kl_coef=0.05, **_on_policy(material, "ppo"))
    _run(PPOTrainer(args=args, **_against_the_reward_model(material)))


def by_grpo(material: Material) -> None:
    """From the reward model into `grpo`."""
    args = GRPOConfig(num_generations=GROUP, num_generations_eval=1, beta=0.2, **_on_policy(material, "grpo"))
    _run(GRPOTrainer(args=args, **_against_the_reward_model(material)))


METHODS: dict[str, Callable[[Material], None]] = {"dpo": by_dpo, "ppo": by_ppo, "grpo": by_grpo}
ON_POLICY = ("ppo", "grpo")


def gold(completions: Sequence[list[dict[str, str]]], **columns: Any) -> list[float]:
    """The second judge as a reward function."""
    judge = second_judge()
    return [judge(messages[-1]["content"]) for messages in completions]


def _against_the_reward_model(material: Material) -> dict[str, Any]:
    return {
        "model": str(material.folder / SFT),
        "reward_funcs": str(material.folder / REWARD),
        "train_dataset": material.prompts,
        "eval_dataset": material.held_out,
        "judge": gold,
        "gold_reward_funcs": gold,
    }


def _on_policy(material: Material, name: str) -> dict[str, Any]:
    return {
        "max_steps": 2 * _PASSES * material.draws,
        "per_device_train_batch_size": material.completions // 2,
        "steps_per_generation": 2,
        "num_iterations": _PASSES,
        "learning_rate": 3e-4,
        "warmup_steps": 5,
        "max_completion_length": ANSWER_TOKENS,
        "per_device_eval_batch_size": 64,
        "eval_steps": 0.2,
        "eval_on_start": True,
        **_shared(material.folder / name, material.seed),
    }


def _shared(folder: Path, seed: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "seed": seed,
        "gradient_checkpointing": False,  # the model is small: memory is no matter
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 0.05,
        "use_cpu": True,  # the same figures with and without a GPU
    }


def _run(trainer: Any) -> None:
    trainer.train()
    trainer.save_model()
