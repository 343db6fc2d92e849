"""Steps of one of TRL's trainers, as it comes or patched by `alignfast.patch_trl`, in a process of its own.

`bench_patch_trl.py` runs it for each side. Both get the same model, rows, AdamW and options; GRPO and RLOO are given stored
completions instead of sampling, so that what is timed is what the patch changes. Prints one JSON line: wall and CPU seconds
of each step, the losses and gradient norms, and the peak resident memory of the process.
"""

from __future__ import annotations

import argparse
import json
import resource
from pathlib import Path
from typing import Any

import torch
from dpo_step import WORKS, Clock, rows
from grpo_step import EACH, END, replayed, reward, save_model
from grpo_step import WORKS as GROUPS
from grpo_step import rows as prompts

TRAINERS = ("sft", "dpo", "kto", "grpo", "rloo", "reward")


def options(steps: int, output: str, batch: int) -> dict[str, Any]:
    """What all configs take."""
    return {
        "output_dir": output,
        "per_device_train_batch_size": batch,
        "max_steps": steps,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": not torch.cuda.is_available(),
    }


def make(name: str, shape: str, steps: int, output: str, clock: Clock) -> Any:
    """A trainer on the shape's rows; a step has the sequences of a DPO step, or of a GRPO step."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    kind, config = {
        "sft": (trl.SFTTrainer, trl.SFTConfig),
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "kto": (trl.KTOTrainer, trl.KTOConfig),
        "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
        "rloo": (trl.RLOOTrainer, trl.RLOOConfig),
        "reward": (trl.RewardTrainer, trl.RewardConfig),
    }[name]
    save_model(Path(output))
    tokenizer = AutoTokenizer.from_pretrained(output)
    common: dict[str, Any] = {"processing_class": tokenizer, "callbacks": [clock]}
    if name in ("grpo", "rloo"):
        work = GROUPS[shape]
        batch = work.prompts * EACH
        group = {"num_generations": EACH, "max_completion_length": work.answer, "beta": 0.04}
        trainer = kind(
            AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32), reward,
            args=config(**options(steps, output, batch), **group),
            train_dataset=Dataset.from_list(prompts(work, work.prompts * steps)), **common,
        )  # fmt: skip

        def stored(ids: list[list[int]], *_: Any) -> Any:
            answers = [replayed(prompt, work)[i % EACH] for i, prompt in enumerate(ids)]
            return (answers, None) if name == "grpo" else answers

        trainer._generate_single_turn = stored
        return trainer
    tokenizer.padding_side = "right"
    pairs = WORKS[shape].pairs
    batch = pairs if name in ("dpo", "reward") else 2 * pairs
    data = rows(shape, batch * steps)
    if name in ("sft", "kto"):
        data = [
            {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 > 0}
            for i, row in enumerate(data)
        ]
        data = (
            data if name == "kto" else [{key: row[key] for key in ("prompt", "completion")} for row in data]
        )
    model: Any = AutoModelForCausalLM
    if name == "reward":
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification
    loaded = model.from_pretrained(
        output, dtype=torch.float32, **({"num_labels": 1} if name == "reward" else {})
    )
    loaded.config.eos_token_id = END  # one past the vocabulary; the trainers append it to texts
    if loaded.get_input_embeddings().num_embeddings <= END:
        loaded.resize_token_embeddings(END + 1)
    if name in ("dpo", "kto"):
        reference = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
        reference.resize_token_embeddings(END + 1)
        common["ref_model"] = reference
    return kind(
        loaded, args=config(**options(steps, output, batch), max_length=None),
        train_dataset=Dataset.from_list(data), **common,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--provider", choices=["patched", "trl"], required=True)
    parser.add_argument("--trainer", choices=TRAINERS, required=True)
    parser.add_argument("--shape", choices=["tiny", "long"], default="tiny")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--output", required=True)
    parser.add_argument("--keep-cpu-memory", default="no", help="for sides.run; without effect")
    arguments = parser.parse_args()
    if arguments.provider == "patched":
        import alignfast

        alignfast.patch_trl(strict=True)
    clock = Clock()
    torch.manual_seed(0)
    trainer = make(arguments.trainer, arguments.shape, arguments.steps, arguments.output, clock)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures = {name: [row[name] for row in logged] for name in ("loss", "grad_norm")}
    print(json.dumps({"wall": clock.wall, "cpu": clock.cpu, "peak_mib": peak, **figures}))


if __name__ == "__main__":
    main()
