"""PPO steps of one trainer, in a process of its own: `bench_ppo_step.py` runs it for each side.

A step draws a completion of each prompt, scores it by a reward model, its tokens by a reference and a critic, and makes
four passes over the draw. Both sides get the same policy, reward model, critic (a copy of the reward model), prompts,
AdamW and options; neither clips gradients, since the peer does not. No token ends a completion. `--replay yes` gives both
the same completions instead of sampling, to compare what they log of the same steps.

The peer is TRL 1.12, the last release with a PPOTrainer, which the caller puts before the installed one in PYTHONPATH.

Prints one JSON line: wall and CPU seconds of each step, the rows that were logged, and the peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import resource
from pathlib import Path
from typing import Any

import torch
from dpo_step import TINY, Clock
from grpo_step import END, Work, completion_of, rows, save_model
from harness import sizes
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

WORK = sizes(Work(32, 128, 64), Work(4, 9, 5))
PASSES, KL_COEF = 4, 0.05


class Laps(Clock):
    """A step ends where the next one begins: the peer tells no beginnings."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.on_step_begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        super().on_step_end(*args, **kwargs)
        self.on_step_begin()


def save_models(folder: Path) -> None:
    """The policy, and in the folders `critic` and `reward` models of its sizes; the last knows the end token too."""
    save_model(folder)
    for seed, (name, vocabulary) in enumerate([("critic", END), ("reward", END + 1)]):
        torch.manual_seed(seed)
        config = LlamaConfig(**{**TINY, "vocab_size": vocabulary}, num_labels=1, pad_token_id=END - 1)
        LlamaForSequenceClassification(config).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder / name)


def replayed(ids: list[int]) -> list[int]:
    """A completion of a prompt that depends on it alone."""
    generator = torch.Generator().manual_seed(sum(ids))
    return torch.randint(0, END - 1, (WORK.answer,), generator=generator).tolist()


def options(steps: int, output: str) -> dict[str, Any]:
    """What both configs take."""
    return {
        "output_dir": output,
        "per_device_train_batch_size": WORK.prompts,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "kl_coef": KL_COEF,
        "temperature": 1.0,
        "vf_coef": 0.1,
        "cliprange": 0.2,
        "cliprange_value": 0.2,
        "gamma": 1.0,
        "lam": 0.95,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": not torch.cuda.is_available(),
    }


def train_trl(steps: int, output: str, replays: bool) -> tuple[list[dict[str, Any]], Clock]:
    """Run the steps in TRL 1.12; returns what it logged and the clock."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    tokenizer, clock = AutoTokenizer.from_pretrained(output), Laps()
    policy, reference = (AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32) for _ in range(2))
    scorers = {
        f"{name}_model": AutoModelForSequenceClassification.from_pretrained(
            f"{output}/{folder}", dtype=torch.float32
        )
        for name, folder in (("value", "critic"), ("reward", "reward"))
    }

    def replay(model: Any, queries_BL: Any, _: int, pad_id: int, config: Any) -> tuple[Any, Any]:
        """What sampling returns: tokens, and logits of the completion over the temperature."""
        answers_BL = torch.tensor([replayed(ids) for ids in queries_BL.tolist()])
        both_BL = torch.cat((queries_BL, answers_BL.to(queries_BL.device)), 1)
        logits_BLV = ppo_trainer.forward(model, both_BL, pad_id).logits
        return both_BL, logits_BLV[:, queries_BL.shape[1] - 1 : -1] / config.temperature

    if replays:
        ppo_trainer.batch_generation = replay
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows(WORK, WORK.prompts * steps)]
    trainer = PPOTrainer(
        args=PPOConfig(
            **options(steps, output), total_episodes=WORK.prompts * steps, response_length=WORK.answer,
            num_ppo_epochs=PASSES, num_mini_batches=1, num_sample_generations=0,
        ),
        processing_class=tokenizer, model=policy, ref_model=reference, **scorers,
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        eval_dataset=Dataset.from_dict({"input_ids": prompts[: WORK.prompts]}), callbacks=[clock],
    )  # fmt: skip
    if replays:  # in the order of the rows, as ours
        trainer.dataloader = torch.utils.data.DataLoader(
            trainer.train_dataset, batch_size=WORK.prompts, collate_fn=trainer.data_collator
        )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "objective/kl" in entry], clock


def train_ours(
    steps: int, output: str, replays: bool, keep_cpu_memory: bool
) -> tuple[list[dict[str, Any]], Clock]:
    """The same in our trainer."""
    from alignfast import PPOConfig, PPOTrainer
    from alignfast.rollout import Completion, Sampling

    clock = Laps()

    class Replay:
        """An engine that gives the stored completions."""

        name, seconds = "replay", {"prefill": 0.0, "decode": 0.0}

        def generate(self, prompts: Any, sampling: Sampling, **_: Any) -> list[list[Completion]]:
            return [[completion_of(trainer, ids, replayed(list(ids)))] for ids in prompts]

    class Replaying(PPOTrainer):
        def before_training(self) -> None:
            super().before_training()
            if replays:
                self.engine = Replay()

        def trees_of(self, *args: Any) -> Any:
            experience = super().trees_of(*args)
            if replays:
                experience.old_logps = self.of_tokens(experience, lambda batch: self.policy(batch))
            return experience

    config = PPOConfig(
        **options(steps, output), max_steps=PASSES * steps, num_iterations=PASSES,
        max_completion_length=WORK.answer, max_grad_norm=0, train_sampling_strategy="sequential",
        keep_cpu_memory=keep_cpu_memory,
    )  # fmt: skip
    rewards = last_token_scores(output) if replays else f"{output}/reward"
    trainer = Replaying(
        output, rewards, args=config, train_dataset=rows(WORK, WORK.prompts * steps),
        value_model=f"{output}/critic", callbacks=[clock],
    )  # fmt: skip
    trainer.train()
    lines = map(json.loads, (Path(output) / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if "loss" in row], clock


def last_token_scores(output: str) -> Any:
    """A reward function that reads the model as the peer does: no end token after a completion that was cut."""
    tokenizer = AutoTokenizer.from_pretrained(output)
    scorer = AutoModelForSequenceClassification.from_pretrained(f"{output}/reward", dtype=torch.float32)

    @torch.no_grad()
    def scores(prompts: list[str], completions: list[str], completion_ids: Any, **_: Any) -> list[float]:
        ids_BL = torch.tensor(
            [tokenizer(prompt)["input_ids"] + list(ids) for prompt, ids in zip(prompts, completion_ids)]
        )
        return scorer.score(scorer.model(ids_BL).last_hidden_state[:, -1])[:, 0].tolist()

    return scores


def whole_draws(seconds: list[float]) -> list[float]:
    """Our steps are passes over a draw: their seconds, draw by draw."""
    return [sum(seconds[i : i + PASSES]) for i in range(0, len(seconds), PASSES)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--provider", choices=["alignfast", "trl"], required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", required=True)
    parser.add_argument("--keep-cpu-memory", choices=["yes", "no"], default="yes")
    parser.add_argument("--replay", choices=["yes", "no"], default="no")
    arguments = parser.parse_args()
    save_models(Path(arguments.output))
    common = (arguments.steps, arguments.output, arguments.replay == "yes")
    if arguments.provider == "trl":
        logged, clock = train_trl(*common)
        wall, cpu = clock.wall, clock.cpu
    else:
        logged, clock = train_ours(*common, keep_cpu_memory=arguments.keep_cpu_memory == "yes")
        wall, cpu = whole_draws(clock.wall), whole_draws(clock.cpu)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"wall": wall, "cpu": cpu, "peak_mib": peak, "logged": logged}))


if __name__ == "__main__":
    main()
