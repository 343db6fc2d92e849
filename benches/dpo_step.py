"""DPO steps of one trainer on one shape, in a process of its own: `bench_dpo_step.py` runs it for each side.

Both sides get the same model, the same rows in the same order, the same reference (a frozen copy that is computed in
every step), the same AdamW, and fresh rows each step. Prints one JSON line: wall and CPU seconds of each step, the
losses, and the peak resident memory of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import sizes, synchronise
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers import PreTrainedTokenizerFast as Tokenizer


@dataclass(frozen=True)
class Work:
    """Sizes of one row of the table: tokens of prompt and answer, pairs of a step."""

    prompt: int
    answer: int
    pairs: int


WORKS = sizes(
    {"tiny": Work(128, 64, 8), "long": Work(2048, 64, 2), "135m": Work(0, 0, 2), "0.5b": Work(512, 256, 16)},
    {"tiny": Work(9, 5, 2), "long": Work(40, 5, 2), "135m": Work(0, 0, 2), "0.5b": Work(9, 5, 2)},
)
TINY = {
    "vocab_size": 32_000,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}

# Qwen2.5-0.5B's sizes with random weights, for a GPU; tokens of texts are those of the tiny model's vocabulary
HALF = sizes(
    {
        "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 4096, "tie_word_embeddings": True,
    },
    {**TINY, "num_hidden_layers": 2, "tie_word_embeddings": True},
)  # fmt: skip


def config_of(shape: str) -> dict[str, Any]:
    """Sizes of the model of a shape that has random weights."""
    return HALF if shape == "0.5b" else TINY


def dtype_of(shape: str) -> torch.dtype:
    """The 0.5B model trains in bfloat16 throughout, on both sides; the small ones in float32."""
    return torch.bfloat16 if shape == "0.5b" and torch.cuda.is_available() else torch.float32


def model_and_tokenizer(shape: str) -> tuple[Any, Any]:
    """The tiny Llama with a tokenizer of one word a token, or the real 135M model from `ALIGNFAST_BENCH_MODEL`."""
    if shape == "135m":
        path = os.environ["ALIGNFAST_BENCH_MODEL"]
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(
            path
        )
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = {f"w{i}": i for i in range(TINY["vocab_size"] - 2)} | {"<eos>": 31_998, "<unk>": 31_999}
    backend = Backend(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config_of(shape), eos_token_id=31_998, pad_token_id=31_999))
    return model.to(dtype_of(shape)), Tokenizer(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<unk>"
    )


def rows(shape: str, count: int) -> list[dict[str, str]]:
    """Preference pairs, all different: real ones of GSM8K for the 135M model, random words otherwise."""
    if shape == "135m":
        path = Path(os.environ["ALIGNFAST_DATA"]) / "gsm8k" / "pairs_train.jsonl"
        lines = path.read_text().splitlines()[:count]
        return [{key: json.loads(line)[key] for key in ("prompt", "chosen", "rejected")} for line in lines]
    work, generator = WORKS[shape], torch.Generator().manual_seed(1)

    def words(n: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(0, 31_000, (n,), generator=generator).tolist())

    # An answer ends in <eos>, which the trainers add: one word less
    return [
        {
            "prompt": words(work.prompt) + " ",
            "chosen": words(work.answer - 1),
            "rejected": words(work.answer - 1),
        }
        for _ in range(count)
    ]


class Clock(TrainerCallback):
    """Wall and CPU time from the beginning of each step to its end."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        synchronise()
        self._start = (time.perf_counter(), time.process_time())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronise()
        self.wall.append(time.perf_counter() - self._start[0])
        self.cpu.append(time.process_time() - self._start[1])


def train(provider: str, shape: str, steps: int, output: str, **options: Any) -> tuple[list[float], Clock]:
    """Run the steps; returns the losses and the clock."""
    model, tokenizer = model_and_tokenizer(shape)
    pairs = WORKS[shape].pairs
    data, clock = rows(shape, pairs * steps), Clock()
    common: dict[str, Any] = {
        "output_dir": output,
        "per_device_train_batch_size": pairs,
        "max_steps": steps,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "max_length": None,
        "beta": 0.1,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",  # the same rows in the same step
        "bf16": False,
        "gradient_checkpointing": False,  # on by default on both sides, and a third more work
        "use_cpu": not torch.cuda.is_available(),
    }
    if provider == "trl":
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        trainer: Any = DPOTrainer(
            model, ref_model=_copy(shape), args=DPOConfig(**common), train_dataset=Dataset.from_list(data),
            processing_class=tokenizer, callbacks=[clock],
        )  # fmt: skip
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], clock
    from alignfast import DPOConfig as Config
    from alignfast import DPOTrainer as Trainer

    config = Config(**common, **options)
    ours = Trainer(model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[clock])
    ours.train()
    lines = (Path(output) / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row], clock


def peak_mib() -> float:
    """Most memory of the device that tensors held; of the whole process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _copy(shape: str) -> Any:
    """TRL would load its reference by name, which a model made in memory has not."""
    return model_and_tokenizer(shape)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--provider", choices=["alignfast", "trl"], required=True)
    parser.add_argument("--shape", choices=sorted(WORKS), required=True)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--output", required=True)
    parser.add_argument("--keep-cpu-memory", choices=["yes", "no"], default="yes")
    arguments = parser.parse_args()
    options = (
        {"keep_cpu_memory": arguments.keep_cpu_memory == "yes"} if arguments.provider == "alignfast" else {}
    )
    losses, clock = train(arguments.provider, arguments.shape, arguments.steps, arguments.output, **options)
    peak = peak_mib()
    print(json.dumps({"losses": losses, "wall": clock.wall, "cpu": clock.cpu, "peak_mib": peak}))


if __name__ == "__main__":
    main()
