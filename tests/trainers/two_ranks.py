"""Run by torchrun in test_two_ranks.py: every case trained on these ranks, what came out left in files.

PYTHONPATH=tests torchrun --nproc-per-node 2 tests/trainers/two_ranks.py FOLDER
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from trainers.tiny import (
    make_llama,
    make_pairs,
    make_rankings,
    make_reward_llama,
    make_rows,
    make_thumbs,
    make_tokenizer,
)
from transformers import TrainerCallback

from alignfast import DPOTrainer, GRPOTrainer, KTOTrainer, PPOTrainer, RewardTrainer, SFTTrainer
from alignfast.rewards import LATE
from alignfast.trainers.interrupt import TrainingInterrupted
from alignfast.trainers.machine import leave_ranks
from alignfast.trainers.state import whole

WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


def num_words(completions, **columns):
    return [float(len(text.split())) for text in completions]


def num_words_late(completions, sample_ids, trainer_state, **columns):
    """Of the first draw, every third completion's is late by a draw."""
    late = [number % 3 == 0 and trainer_state.global_step < 2 for number in sample_ids]
    return [LATE if wait else words for wait, words in zip(late, num_words(completions))]


def num_letters(completions, **columns):
    return [float(len(text)) for text in completions]


LORA = dict(peft_config=dict(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))
PPO = dict(reward_funcs=num_words, max_completion_length=6, learning_rate=2e-3)
METHODS = {
    "sft": (SFTTrainer, {}),
    "sft-tied": (SFTTrainer, {}),
    "sft-tokens": (SFTTrainer, dict(max_tokens_per_batch=16)),
    "dpo": (DPOTrainer, {}),
    "dpo-lora": (DPOTrainer, LORA),
    "dpo-precomputed": (DPOTrainer, dict(precompute_ref_log_probs=True)),
    "dpo-sft": (DPOTrainer, dict(loss_type=["sigmoid", "sft"])),
    "kto": (KTOTrainer, {}),
    "kto-lora": (KTOTrainer, LORA),
    "kto-precomputed": (KTOTrainer, dict(precompute_ref_log_probs=True)),
    # Steps of 1e-2 move rewards by more than their size: the ranks' roundings of 1e-7 would be 1e-6 two steps later
    "reward": (RewardTrainer, dict(num_heads=3, center_rewards_coefficient=0.1, learning_rate=2e-3)),
    "reward-lora": (RewardTrainer, LORA),
    "grpo": (
        GRPOTrainer,
        dict(
            reward_funcs=num_words_late,
            late_max_age=2,
            max_completion_length=6,
            num_generations=2,
            beta=0.1,
            judge=num_letters,
            gold_reward_funcs=num_letters,
        ),
    ),
    "grpo-lora": (
        GRPOTrainer,
        dict(LORA, reward_funcs=num_words, max_completion_length=6, num_generations=2, beta=0.1),
    ),
    "ppo": (PPOTrainer, dict(PPO, num_iterations=2)),  # one draw: the second step resumes in the middle of it
    "ppo-shared": (
        PPOTrainer,
        dict(PPO, num_iterations=1, critic="shared", target_kl=0.1, kl_horizon=50, whiten_rewards=True),
    ),
}
ON_POLICY = ("grpo", "grpo-lora", "ppo", "ppo-shared")
ROWS = {
    SFTTrainer: make_rows,
    GRPOTrainer: make_rows,
    PPOTrainer: make_rows,
    DPOTrainer: make_pairs,
    KTOTrainer: make_thumbs,
    RewardTrainer: make_rankings,
}
RESUMED = ("sft", "dpo-lora", "dpo-precomputed", "kto", "reward", "grpo", "ppo", "ppo-shared")
SHARDINGS = ("ddp", "fsdp")
CASES = [(m, s) for m in METHODS for s in SHARDINGS]


class KeepGradients(TrainerCallback):
    """The whole gradients of every step, before clipping, end to end."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        wholes = [whole(p.grad).flatten() for _, p in sorted(model.named_parameters()) if p.requires_grad]
        self.gradients.append(torch.cat(wholes).clone())


class SignalRankOne(TrainerCallback):
    """SIGTERM to the second rank alone, in step 2."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1 and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGTERM)


def run(folder: Path, method: str, fsdp: bool, resume: bool = False) -> None:
    trainer_class, options = METHODS[method]
    make, keep = ROWS[trainer_class], KeepGradients()
    # in steps of 4: every other step has 3 rows, so that one of two ranks has a micro-batch less, or one, so that it has none
    num_rows = 5 if method in ("kto", "reward") else 7
    model = make_llama(tie_word_embeddings=method == "sft-tied")
    if trainer_class is RewardTrainer:
        model = make_reward_llama(num_labels=options.get("num_heads", 1))
    if method in ON_POLICY:  # two steps on each draw, so that the second resumes in the middle of one
        options = {**options, "steps_per_generation": 8 // WORLD_SIZE}
    trainer = trainer_class(
        model, train_dataset=make(num_rows), eval_dataset=make(5, 3),
        processing_class=make_tokenizer(), callbacks=[keep], output_dir=str(folder), report_to="none", fsdp=fsdp,
        per_device_train_batch_size=1, gradient_accumulation_steps=4 // WORLD_SIZE,
        max_steps=4, adam_epsilon=1e-3, logging_steps=1, eval_steps=4, save_steps=2,
        disable_tqdm=True, **{"learning_rate": 1e-2, **options},
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(folder / "checkpoints" / "step-2") if resume else None)
    assert fsdp == any(isinstance(p, DTensor) for p in trainer.module.parameters())
    state = {name: whole(tensor).clone().contiguous() for name, tensor in trainer.model.state_dict().items()}
    if trainer_class is PPOTrainer:
        state |= {
            f"critic.{name}": whole(tensor).clone().contiguous()
            for name, tensor in trainer.module.critic.state_dict().items()
        }
    if trainer.accelerator.is_main_process:
        suffix = "-resumed" if resume else ""
        gradients = {str(step): gradient for step, gradient in enumerate(keep.gradients)}
        save_file(state, folder / f"weights{suffix}.safetensors")
        save_file(gradients, folder / f"gradients{suffix}.safetensors")
        (folder / f"log{suffix}.json").write_text(json.dumps(trainer.state.log_history))
    trainer.accelerator.wait_for_everyone()


def interrupt(folder: Path) -> None:
    """All ranks must leave together, with a checkpoint, when one of them is asked to stop."""
    trainer = SFTTrainer(
        make_llama(), train_dataset=make_rows(8), processing_class=make_tokenizer(), output_dir=str(folder),
        per_device_train_batch_size=1, max_steps=4, report_to="none", callbacks=[SignalRankOne],
    )  # fmt: skip
    try:
        trainer.train()
    except TrainingInterrupted as leaving:
        rank = trainer.accelerator.process_index
        (folder / f"left-{rank}").write_text(f"{leaving.code} {leaving.checkpoint}")


def main(root: Path) -> None:
    torch.set_num_threads(1)
    interrupt(root / "interrupted")
    for sharding in SHARDINGS:
        for method in METHODS:
            print(sharding, method, flush=True)  # the last words of a rank that aborts say where
            run(root / sharding / method, method, fsdp=sharding == "fsdp")
            if method in RESUMED:
                run(root / sharding / method, method, fsdp=sharding == "fsdp", resume=True)
    leave_ranks()
    threads = [Path("/proc/self/task", task, "comm").read_text() for task in os.listdir("/proc/self/task")]
    assert not any("gloo" in name for name in threads), f"threads of a process group live on: {threads}"


if __name__ == "__main__":
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    main(Path(sys.argv[1]))
