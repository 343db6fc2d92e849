"""What models' answers to held-out questions are worth, by the second judge, beside those of the model they came from.

    win rate = P(a model's answer scores above the fine-tuned model's), ties half
    KL       = mean over answers of log pi(answer) - log pi_sft(answer), in nats: estimated from the answers themselves

The win rate of the fine-tuned model against itself, answers drawn anew, is what no training looks like: a model beats it
where its interval lies above that one's. Answers about one thing of one place, in one seed, are a cluster of the interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from alignfast.data import Tree
from alignfast.evaluation import WinRate, win_rate
from alignfast.evaluation.scores import answer_scores
from alignfast.models import Policy, load_policy, load_tokenizer
from alignfast.quickstart import grammar
from alignfast.quickstart.grammar import Question
from alignfast.quickstart.judges import second_judge
from alignfast.quickstart.stages import ANSWER_TOKENS, SFT
from alignfast.rollout import Completion, Sampling
from alignfast.rollout.native import NativeEngine

MOST_KL = 10.0  # nats of an answer: what went further is another model, whatever it wins
Answers = list[list[Completion]]  # question by question


@dataclass(frozen=True)
class Measured:
    """Answers of one model, question by question.

    Attributes:
        scores: the second judge's of each answer.
        log_ratios: log pi - log pi_sft of each answer, in nats.
        well_formed: of each answer, whether it follows the grammar.
        seconds: that the model's training took; a mean over seeds.
    """

    scores: list[float]
    log_ratios: list[float]
    well_formed: list[bool]
    seconds: float

    @property
    def gold(self) -> float:
        """Mean score."""
        return float(np.mean(self.scores))

    @property
    def kl(self) -> float:
        """How far the model went from the fine-tuned one."""
        return float(np.mean(self.log_ratios))


@dataclass(frozen=True)
class Comparison:
    """Models on the same questions.

    Attributes:
        topics: what each answer is about.
        base: scores of the fine-tuned model's answers, which all are compared with.
        models: by name; `sft` is the fine-tuned model, asked again.
    """

    topics: list[str]
    base: list[float]
    models: dict[str, Measured]

    def rate(self, model: str) -> WinRate:
        """Against the fine-tuned model."""
        return win_rate(self.models[model].scores, self.base, self.topics)

    def beats_sft(self, model: str) -> bool:
        """Whether a model wins more often than the fine-tuned one against itself, intervals apart, and is still near it."""
        apart = self.rate(model).rate.low > self.rate(SFT).rate.high
        return apart and self.models[model].kl < MOST_KL


def together(seeds: Sequence[Comparison]) -> Comparison:
    """All seeds' answers as those of one."""

    def joined(model: str) -> Measured:
        each = [seed.models[model] for seed in seeds]
        return Measured(
            scores=[x for one in each for x in one.scores],
            log_ratios=[x for one in each for x in one.log_ratios],
            well_formed=[x for one in each for x in one.well_formed],
            seconds=float(np.mean([one.seconds for one in each])),
        )

    return Comparison(
        topics=[x for seed in seeds for x in seed.topics],
        base=[x for seed in seeds for x in seed.base],
        models={model: joined(model) for model in seeds[0].models},
    )


def ask(folder: Path, questions: Sequence[Question], number: int, seed: int) -> Answers:
    """So many answers to each question, by the model that lies in a folder."""
    engine = NativeEngine(load_policy(folder), load_tokenizer(None, folder))
    chats = [[{"role": "user", "content": question.text}] for question in questions]
    return engine.generate(chats, Sampling(max_new_tokens=ANSWER_TOKENS, n=number, seed=seed))


def measure(answers: Answers, asked: Sequence[Question], start: Policy, seconds: float) -> Measured:
    """What answers are worth; `start` is the fine-tuned model."""
    judge, drawn = second_judge(), list(chain.from_iterable(answers))
    start_N, _ = answer_scores(start, [Tree(of.prompt_ids, (of.token_ids,), (of.mask,)) for of in drawn])
    return Measured(
        scores=[judge(of.text) for of in drawn],
        log_ratios=[sum(of.logps) - float(logp) for of, logp in zip(drawn, start_N)],
        well_formed=[
            grammar.is_well_formed(question.topic, of.text)
            for question, given in zip(asked, answers)
            for of in given
        ],
        seconds=seconds,
    )
