"""GRPO steps of one trainer on one shape, in a process of its own: `bench_grpo_step.py` runs it for each side.

A step draws completions of fresh prompts, scores them by a trivial function, and trains on them once. Both sides get the
same model, prompts, reward, AdamW and options; with `beta` both compute the same reference, a frozen copy. No token ends
a completion: both believe in an end token that the model can't draw. Samples differ between the sides, so `--replay yes`
gives both the same completions instead of sampling, to compare what they log of the same steps.

Prints one JSON line: wall and CPU seconds of each step, the rows that were logged, the peak resident memory of the
process, and of our side the seconds of the step's parts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from dpo_step import TINY, Clock, config_of, dtype_of, peak_mib
from harness import sizes
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Tokenizer

EACH = sizes(8, 2)  # completions of a prompt
END = TINY["vocab_size"]  # one past the tokens that the model knows
_OF_A_DRAW, _OF_A_STEP = (
    ("prefill", "decode", "sampling", "rewards", "logps"),
    ("forward", "backward", "optimizer"),
)


@dataclass(frozen=True)
class Work:
    """Sizes of one row of the table: prompts of a step, tokens of prompt and answer, weight of the KL."""

    prompts: int
    prompt: int
    answer: int
    beta: float = 0.0


_TINY, _LONG = Work(4, 128, 64), Work(1, 2048, 64)
WORKS = sizes(
    {"tiny": _TINY, "tiny with KL": replace(_TINY, beta=0.04), "long": _LONG, "0.5b": Work(8, 512, 256)},
    {
        "tiny": Work(2, 9, 5),
        "tiny with KL": Work(2, 9, 5, 0.04),
        "long": Work(1, 40, 5),
        "0.5b": Work(2, 9, 5),
    },
)


def save_model(folder: Path, shape: str = "tiny") -> None:
    """The Llama of a shape with a tokenizer of one word a token, on the disk: TRL reads its reference from there."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    end = config_of(shape)["vocab_size"]  # one past what the model can draw; END where it is small
    words = {f"w{i}": i for i in range(end - 1)} | {"<unk>": end - 1, "<eos>": end}
    backend = Backend(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = Tokenizer(tokenizer_object=backend, eos_token="<eos>", pad_token="<unk>", padding_side="left")
    torch.manual_seed(0)
    sizes_of = LlamaConfig(**config_of(shape), bos_token_id=None, eos_token_id=None, pad_token_id=end - 1)
    model = LlamaForCausalLM(sizes_of)
    model.generation_config = GenerationConfig(pad_token_id=end - 1)
    model.to(dtype_of(shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def rows(work: Work, count: int) -> list[dict[str, str]]:
    """Prompts of random words, all different."""
    ids_NP = torch.randint(0, END - 1, (count, work.prompt), generator=torch.Generator().manual_seed(1))
    return [{"prompt": " ".join(f"w{i}" for i in ids)} for ids in ids_NP.tolist()]


def reward(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """Costs nothing, and hardly ever gives a completion its group's mean: then it would teach nothing."""
    return [sum(map(ord, completion)) % 1009 / 1009 for completion in completions]


def replayed(ids: Sequence[int], work: Work) -> list[list[int]]:
    """Completions of a prompt that depend on it alone."""
    generator = torch.Generator().manual_seed(sum(ids))
    return torch.randint(0, END - 1, (EACH, work.answer), generator=generator).tolist()


def options(work: Work, steps: int, output: str) -> dict[str, Any]:
    """What both configs take."""
    return {
        "output_dir": output,
        "per_device_train_batch_size": work.prompts * EACH,
        "num_generations": EACH,
        "max_completion_length": work.answer,
        "max_steps": steps,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "beta": work.beta,
        "loss_type": "dapo",
        "temperature": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,  # on by default on both sides, and a third more work
        "use_cpu": not torch.cuda.is_available(),
    }


def train_trl(work: Work, steps: int, output: str, replays: bool) -> tuple[list[dict[str, Any]], Clock]:
    """Run the steps in TRL; returns what it logged and the clock."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    tokenizer, clock = AutoTokenizer.from_pretrained(output), Clock()

    def replay(prompts: list[str], trainer: Any) -> dict[str, Any]:
        """TRL repeats each prompt for its completions."""
        prompt_ids = tokenizer(prompts)["input_ids"]
        answers = [replayed(ids, work)[i % EACH] for i, ids in enumerate(prompt_ids)]
        nothing = [[0.0] * work.answer for _ in prompts]
        return {"prompt_ids": prompt_ids, "completion_ids": answers, "logprobs": nothing}

    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(output, dtype="auto"), reward,
        args=GRPOConfig(**options(work, steps, output), shuffle_dataset=False),
        train_dataset=Dataset.from_list(rows(work, work.prompts * steps)), processing_class=tokenizer,
        callbacks=[clock], rollout_func=replay if replays else None,
    )  # fmt: skip
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry], clock


def parts_of(logged: dict[str, Any], wall: float) -> dict[str, float]:
    """Seconds of a step's parts, by the trainer's own clocks: each step has a draw of its own, and is logged."""
    seconds = {name: logged.get(f"seconds/{name}", 0.0) for name in (*_OF_A_DRAW, *_OF_A_STEP)}
    draw = {name: seconds[name] for name in ("prefill", "decode")}
    draw["other sampling"] = seconds["sampling"] - sum(draw.values())
    parts = draw | {name: seconds[name] for name in ("rewards", "logps", *_OF_A_STEP)}
    return parts | {"rest": wall - sum(parts.values())}


def train_ours(
    work: Work, steps: int, output: str, replays: bool, keep_cpu_memory: bool
) -> tuple[list[dict[str, Any]], Clock]:
    """The same in our trainer."""
    from alignfast import GRPOConfig, GRPOTrainer
    from alignfast.rollout import Completion, Sampling

    clock = Clock()

    class Replay:
        """An engine that gives the stored completions."""

        name, seconds = "replay", {"prefill": 0.0, "decode": 0.0}

        def generate(self, prompts: Any, sampling: Sampling, **_: Any) -> list[list[Completion]]:
            return [
                [completion_of(trainer, ids, tokens) for tokens in replayed(ids, work)] for ids in prompts
            ]

    class Replaying(GRPOTrainer):
        def before_training(self) -> None:
            super().before_training()
            if replays:
                self.engine = Replay()

    config = GRPOConfig(
        **options(work, steps, output), train_sampling_strategy="sequential", keep_cpu_memory=keep_cpu_memory
    )
    trainer = Replaying(
        output, reward, args=config, train_dataset=rows(work, work.prompts * steps), callbacks=[clock]
    )
    trainer.train()
    lines = map(json.loads, (Path(output) / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if "loss" in row], clock


def completion_of(trainer: Any, ids: Sequence[int], tokens: list[int]) -> Any:
    """Stored tokens as an engine gives them, without log-probs."""
    from alignfast.rollout import Completion

    nothing = (0.0,) * len(tokens)
    text = trainer.processing_class.decode(tokens, skip_special_tokens=True)
    return Completion(
        prompt_ids=tuple(ids), token_ids=tuple(tokens), logps=nothing, sampled_logps=nothing,
        mask=(True,) * len(tokens), finish_reason="length", text=text,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--provider", choices=["alignfast", "trl"], required=True)
    parser.add_argument("--shape", choices=sorted(WORKS), required=True)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--output", required=True)
    parser.add_argument("--keep-cpu-memory", choices=["yes", "no"], default="yes")
    parser.add_argument("--replay", choices=["yes", "no"], default="no")
    arguments = parser.parse_args()
    save_model(Path(arguments.output), arguments.shape)
    common = (WORKS[arguments.shape], arguments.steps, arguments.output, arguments.replay == "yes")
    if arguments.provider == "trl":
        logged, clock = train_trl(*common)
        parts = []
    else:
        logged, clock = train_ours(*common, keep_cpu_memory=arguments.keep_cpu_memory == "yes")
        parts = [parts_of(row, wall) for row, wall in zip(logged, clock.wall)]
    figures = {"wall": clock.wall, "cpu": clock.cpu, "peak_mib": peak_mib(), "logged": logged, "parts": parts}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
