"""The quickstart itself, one seed of it: fine-tune, vote, learn the votes as a reward, align in three ways, measure.

    sft -> two answers to each question -> votes -> reward model
                                             |          |
                                            dpo      ppo, grpo      each from sft, and each asked the held-out questions

Who votes does not measure, and what is measured on was not trained on. Seeds are trainings of their own: other weights,
text, questions held out and votes.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from alignfast.data.intervals import Interval
from alignfast.models import load_policy
from alignfast.quickstart import grammar
from alignfast.quickstart.grammar import Question
from alignfast.quickstart.judges import second_judge, simulated_user, vote
from alignfast.quickstart.measure import Answers, Comparison, ask, measure
from alignfast.quickstart.stages import GROUP, METHODS, REWARD, SFT, Material, Rows, fine_tune, learn_votes
from alignfast.trainers.metrics import read_metrics

Say = Callable[[str], None]
Samples = list[tuple[str, dict[str, str]]]  # a question, and a text by each model's name
_T = TypeVar("_T")
_HELD_OUT_VOTES = 0.1  # share of the votes that the reward model is measured on
_MEASURED_EARLY = 100  # held-out questions that PPO and GRPO answer while they train
_SHOWN = 8  # questions whose answers are kept as texts


@dataclass(frozen=True)
class Sizes:
    """How much of everything; what is not here stands in the config of each training."""

    hidden_size: int = 128
    """Width of the Llama."""
    sft_rows: int = 18_000
    """Answers of the grammar to learn from."""
    pairs: int = 1100
    """Questions whose two answers are put to the vote."""
    draws: int = 25
    """How often PPO, and GRPO, draw answers and learn from them."""
    completions: int = 128
    """Answers of a draw, a multiple of 16: a step learns from a half, and GRPO compares 8 to a question."""
    held_out: int = 150
    """Questions to measure on."""
    samples: int = 2
    """Answers to each of those."""

    def check(self) -> None:
        """Raise ValueError unless there can be such a passage."""
        if min(vars(self).values()) < 1 or self.completions % (2 * GROUP):
            raise ValueError(
                f"sizes must be at least 1, and completions a multiple of {2 * GROUP}; got {self}"
            )


@dataclass(frozen=True)
class Passage:
    """One seed from beginning to end.

    Attributes:
        seed: of everything drawn.
        comparison: of its models on its held-out questions.
        votes: pairs that were trained on.
        reward_accuracy: of the reward model on held-out votes, a tenth of which are flipped too.
        reward_seconds: that its training took.
        samples: the first held-out questions, each with the first answer of every model.
    """

    seed: int
    comparison: Comparison
    votes: int
    reward_accuracy: Interval
    reward_seconds: float
    samples: Samples


def run_seed(seed: int, folder: Path, sizes: Sizes, say: Say) -> Passage:
    """One whole passage; models, data and metrics are left in the folder.

    Raises:
        RuntimeError: the judges' packages are not installed.
        ValueError: the user was indifferent to all pairs of answers but one, or a size makes no sense.
    """
    sizes.check()
    rng = random.Random(seed)
    train, held_out = grammar.questions(seed)
    rng.shuffle(train)
    rng.shuffle(held_out)
    asked = held_out[: sizes.held_out]
    seconds = {}

    rows = answered_by_the_grammar(train, rng, sizes.sft_rows)
    _write_jsonl(folder / "sft.jsonl", rows)
    _, seconds[SFT] = _timed(lambda: fine_tune(rows, sizes.hidden_size, folder, seed))
    say(f"SFT on {len(rows):,} answers: {seconds[SFT]:.0f} s")

    votes, unseen = _votes(seed, folder, train, rng, sizes)
    accuracy, seconds[REWARD] = _timed(lambda: learn_votes(votes, unseen, folder, seed))
    say(
        f"reward model of {len(votes):,} votes, right about {accuracy.estimate:.0%} of others: {seconds[REWARD]:.0f} s"
    )

    material = Material(
        folder=folder,
        votes=votes,
        prompts=_prompts(train),
        held_out=_prompts(asked[:_MEASURED_EARLY]),
        draws=sizes.draws,
        completions=sizes.completions,
        seed=seed,
    )
    for name, align in METHODS.items():
        _, seconds[name] = _timed(partial(align, material))
        say(f"{name.upper()}: {seconds[name]:.0f} s")

    answers = {
        name: ask(folder / name, asked, sizes.samples, 10 * seed + i)
        for i, name in enumerate((SFT, *METHODS))
    }
    base = ask(folder / SFT, asked, sizes.samples, 10 * seed + len(answers))
    samples = [
        (question.text, {name: given[i][0].text for name, given in answers.items()})
        for i, question in enumerate(asked[:_SHOWN])
    ]
    for name in METHODS:
        _add_samples(folder, name, samples)
    return Passage(
        seed=seed,
        comparison=_compared(seed, folder, asked, base, answers, seconds),
        votes=len(votes),
        reward_accuracy=accuracy,
        reward_seconds=seconds[REWARD],
        samples=samples,
    )


def answered_by_the_grammar(questions: Sequence[Question], rng: random.Random, number: int) -> Rows:
    """So many rows for SFT: the questions in turn, each answered as the grammar's people do."""
    asked = [questions[i % len(questions)] for i in range(number)]
    return [
        {
            "prompt": [{"role": "user", "content": question.text}],
            "completion": [{"role": "assistant", "content": grammar.answer(question.topic, rng)}],
        }
        for question in asked
    ]


def _votes(
    seed: int, folder: Path, questions: Sequence[Question], rng: random.Random, sizes: Sizes
) -> tuple[Rows, Rows]:
    """Votes on answers of the fine-tuned model: (to train on, to hold out)."""
    put = [questions[i % len(questions)] for i in range(sizes.pairs)]
    drawn = ask(folder / SFT, put, 2, 10 * seed + 9)
    texts = [[one.text, other.text] for one, other in drawn]
    rows = vote([question.text for question in put], texts, simulated_user(), rng)
    if len(rows) < 2:
        raise ValueError(
            f"the simulated user saw a difference in {len(rows)} of {len(put)} pairs, and it takes 2: raise pairs"
        )
    unseen = max(1, round(_HELD_OUT_VOTES * len(rows)))
    _write_jsonl(folder / "pairs.jsonl", rows[unseen:])
    _write_jsonl(folder / "pairs_held_out.jsonl", rows[:unseen])
    return rows[unseen:], rows[:unseen]


def _compared(
    seed: int,
    folder: Path,
    asked: Sequence[Question],
    base: Answers,
    answers: dict[str, Answers],
    seconds: dict[str, float],
) -> Comparison:
    start = load_policy(folder / SFT)
    judge = second_judge()
    return Comparison(
        topics=[f"{seed}: {question.topic}" for question, given in zip(asked, base) for _ in given],
        base=[judge(of.text) for given in base for of in given],
        models={name: measure(given, asked, start, seconds[name]) for name, given in answers.items()},
    )


def _add_samples(folder: Path, name: str, samples: Samples) -> None:
    """Answers before and after a method's training into its samples.jsonl, for the report of that run alone."""
    last = read_metrics(folder / name / "metrics.jsonl")[-1]["step"]
    with (folder / name / "samples.jsonl").open("a") as lines:
        for question, answers in samples:
            for step, text in ((0, answers[SFT]), (last, answers[name])):
                row = {"step": step, "prompt": question, "completion": text}
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def _prompts(questions: Sequence[Question]) -> Rows:
    return [{"prompt": [{"role": "user", "content": question.text}]} for question in questions]


def _timed(work: Callable[[], _T]) -> tuple[_T, float]:
    began = time.perf_counter()
    return work(), time.perf_counter() - began


def _write_jsonl(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
