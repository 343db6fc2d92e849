"""The quickstart itself: for each seed fine-tune, sample, vote, align, and measure on questions held out from all of it.

    win rate after  = P(the aligned model's answer scores above the fine-tuned model's), ties half
    win rate before = the same for a second answer of the fine-tuned model: what no training looks like

Both by the second judge. Seeds are three trainings of their own: other weights, text, questions held out and votes.
Intervals of all seeds together take the answers about one thing of one place, in one seed, as a cluster.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignfast.evaluation import WinRate, win_rate
from alignfast.models.policy import Policy
from alignfast.quickstart import grammar
from alignfast.quickstart.grammar import Question
from alignfast.quickstart.judges import second_judge, simulated_user, vote
from alignfast.quickstart.model import make_model, make_tokenizer
from alignfast.rollout import Sampling
from alignfast.rollout.native import NativeEngine
from alignfast.trainers.dpo import DPOConfig, DPOTrainer
from alignfast.trainers.sft import SFTConfig, SFTTrainer

Say = Callable[[str], None]
_DPO_BATCH = 16
_ANSWER_TOKENS = 56  # the grammar's longest answer has 48


@dataclass(frozen=True)
class Sizes:
    """How much of everything; what is not here stands in the config of each training."""

    hidden_size: int = 128
    """Width of the Llama."""
    sft_rows: int = 18_000
    """Answers of the grammar to learn from."""
    pairs: int = 1000
    """Questions whose two answers are put to the vote."""
    held_out: int = 150
    """Questions to measure on."""
    samples: int = 2
    """Answers to each of those."""


@dataclass(frozen=True)
class Measured:
    """Answers to the held-out questions, question by question, and what they say of one seed.

    Attributes:
        seed: of everything drawn.
        topics: what each comparison is about.
        before: second judge's scores of the fine-tuned model's answers.
        again: of as many further answers of that model.
        after: of the aligned model's answers.
        well_formed: share of answers that follow the grammar, before and after.
        samples: question, answer before and answer after, of the first held-out questions.
        pairs: votes that were trained on.
    """

    seed: int
    topics: list[str]
    before: list[float]
    again: list[float]
    after: list[float]
    well_formed: tuple[float, float]
    samples: list[tuple[str, str, str]]
    pairs: int

    @property
    def rates(self) -> tuple[WinRate, WinRate]:
        """(before, after) against the fine-tuned model."""
        return win_rate(self.again, self.before, self.topics), win_rate(self.after, self.before, self.topics)


def run_seed(seed: int, folder: Path, sizes: Sizes, say: Say) -> Measured:
    """One whole passage; models, data and metrics are left in the folder.

    Raises:
        RuntimeError: the judges' packages are not installed.
        ValueError: the user was indifferent to every pair of answers, or a size is below 1.
    """
    if min(vars(sizes).values()) < 1:
        raise ValueError(f"sizes must be at least 1, got {sizes}")
    rng = random.Random(seed)
    train, held_out = grammar.questions(seed)
    rng.shuffle(train)
    rng.shuffle(held_out)
    asked = held_out[: sizes.held_out]
    model, tokenizer = _fine_tune(seed, folder, train, rng, sizes)
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{parameters:,} parameters fine-tuned on {sizes.sft_rows:,} answers")
    before, again = (_answers(model, tokenizer, asked, sizes.samples, 10 * seed + i) for i in range(2))
    questions = [train[i % len(train)] for i in range(sizes.pairs)]
    drawn = _answers(model, tokenizer, questions, 2, 10 * seed + 2)
    rows = vote([q.text for q in questions], drawn, simulated_user(), rng)
    say(f"{len(rows):,} votes of the simulated user on {len(questions):,} pairs of answers")
    if not rows:
        raise ValueError(f"the simulated user was indifferent to all {sizes.pairs} pairs; raise pairs")
    _align(seed, folder, model, tokenizer, rows)
    say("aligned with the votes by DPO")
    after = _answers(model, tokenizer, asked, sizes.samples, 10 * seed + 3)
    measured = _measure(seed, asked, before, again, after, len(rows))
    steps = -(-len(rows) // _DPO_BATCH)
    samples = [
        {"step": step, "prompt": prompt, "completion": text}
        for prompt, *texts in measured.samples
        for step, text in zip((0, steps), texts)
    ]
    _write_jsonl(folder / "dpo" / "samples.jsonl", samples)
    return measured


def _fine_tune(
    seed: int, folder: Path, questions: Sequence[Question], rng: random.Random, sizes: Sizes
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    rows = []
    for i in range(sizes.sft_rows):
        question = questions[i % len(questions)]
        answer = grammar.answer(question.topic, rng)
        rows.append({"prompt": question.text, "completion": answer})
    tokenizer = make_tokenizer(text for row in rows for text in row.values())
    model = make_model(tokenizer, seed, sizes.hidden_size)
    chats = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in rows
    ]
    _write_jsonl(folder / "sft.jsonl", chats)
    args = SFTConfig(
        output_dir=str(folder / "sft"),
        num_train_epochs=1,
        per_device_train_batch_size=16,
        learning_rate=4e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        adam_beta2=0.95,
        seed=seed,
        **_quiet(),
    )
    trainer = SFTTrainer(model, args=args, train_dataset=chats, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return model, tokenizer


def _align(
    seed: int,
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
) -> None:
    _write_jsonl(folder / "pairs.jsonl", rows)
    args = DPOConfig(
        output_dir=str(folder / "dpo"),
        num_train_epochs=1,
        per_device_train_batch_size=_DPO_BATCH,
        learning_rate=3e-4,
        warmup_steps=5,
        beta=0.1,
        precompute_ref_log_probs=True,
        seed=seed,
        **_quiet(),
    )
    trainer = DPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()


def _quiet() -> dict[str, Any]:
    return {
        "gradient_checkpointing": False,  # the model is small: memory is no matter
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 0.05,
        "use_cpu": True,  # the same figures with and without a GPU
    }


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    number: int,
    seed: int,
) -> list[list[str]]:
    chats = [[{"role": "user", "content": question.text}] for question in questions]
    sampling = Sampling(max_new_tokens=_ANSWER_TOKENS, n=number, seed=seed)
    found = NativeEngine(Policy(model), tokenizer).generate(chats, sampling)
    return [[completion.text for completion in completions] for completions in found]


def _measure(
    seed: int,
    asked: Sequence[Question],
    before: list[list[str]],
    again: list[list[str]],
    after: list[list[str]],
    pairs: int,
) -> Measured:
    judge = second_judge()
    scores = [[judge(text) for texts in answers for text in texts] for answers in (before, again, after)]
    well_formed = [
        [
            grammar.is_well_formed(question.topic, text)
            for question, texts in zip(asked, answers)
            for text in texts
        ]
        for answers in (before, after)
    ]
    return Measured(
        seed,
        [f"{seed}: {question.topic}" for question, texts in zip(asked, before) for _ in texts],
        before=scores[0],
        again=scores[1],
        after=scores[2],
        well_formed=(_mean(well_formed[0]), _mean(well_formed[1])),
        samples=[(q.text, one[0], other[0]) for q, one, other in zip(asked, before, after)][:8],
        pairs=pairs,
    )


def together(seeds: Sequence[Measured]) -> tuple[WinRate, WinRate]:
    """(before, after) over all seeds' comparisons."""
    joined = replace(
        seeds[0],
        topics=[topic for one in seeds for topic in one.topics],
        before=[score for one in seeds for score in one.before],
        again=[score for one in seeds for score in one.again],
        after=[score for one in seeds for score in one.after],
    )
    return joined.rates


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def _write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
