"""What was sampled and what it is worth: drawn on all ranks, known to every rank, kept with the checkpoint.

Each rank samples and scores its share of the prompts; then all ranks are told everything, so that the steps which train
on it share it out like rows of a file. Samples are keyed by their numbers: how many ranks draw them changes nothing.

Letters: N completions, F reward functions.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignfast.data import PrepareReport, Tree
from alignfast.evaluation import length_figures
from alignfast.rollout import Completion, RolloutEngine, Sampling
from alignfast.rollout.prompts import end_tokens
from alignfast.trainers.batches import Data
from alignfast.trainers.rollout_func import completions_of

if TYPE_CHECKING:
    from alignfast.rewards import RewardSet, Scores
    from alignfast.trainers.on_policy import OnPolicyTrainer

_FILE = "experience.safetensors"


@dataclass(frozen=True)
class Drawn:
    """A completion and its rewards.

    Attributes:
        group: which of the draw's prompts it continues.
        completion: what the engine gave.
        rewards: of each function, without weights; NaN where there is none.
        reward: their weighted sum; NaN where there is none.
        disagreements: of each function, how unsure it is; NaN where it does not say.
        number: of the sample, its own for the whole run.
        late: whether a reward may come yet.
        age: updates of the policy since it was drawn.
    """

    group: int
    completion: Completion
    rewards: tuple[float, ...]
    reward: float
    disagreements: tuple[float, ...]
    number: int
    late: bool = False
    age: int = 0


@dataclass
class Experience:
    """Completions that steps train on; the i-th of each list belongs to the i-th completion.

    Attributes:
        trees: the prompt with the completion, each a tree of its own: packing shares the prompts again.
        advantages: of each trained token.
        old_logps: of each trained token under the policy that drew it.
        more: further numbers of each trained token, by name: the reference's log-probs, values, weights.
        metrics: of the draw, logged with each of its steps.
    """

    trees: list[Tree] = field(default_factory=list)
    advantages: list[Tensor] = field(default_factory=list)
    old_logps: list[Tensor] = field(default_factory=list)
    more: dict[str, list[Tensor]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def data(self) -> Data:
        """The trees as rows of a step."""
        return Data(self.trees, list(range(len(self.trees))), PrepareReport(), 0)

    def gather(self, name: str, rows: Sequence[int], device: torch.device) -> Tensor | None:
        """Numbers of the trained tokens of completions, end to end; None where there are none of that name."""
        if name in ("advantages", "old_logps"):
            of_rows = getattr(self, name)
        elif name in self.more:
            of_rows = self.more[name]
        else:
            return None
        return torch.cat([of_rows[row] for row in rows]).to(device, non_blocking=True)

    def save(self, folder: Path) -> None:
        """Write a file of a checkpoint."""
        tensors: dict[str, Tensor] = {
            "prompts": _flat(tree.prompt for tree in self.trees),
            "prompt_lengths": torch.tensor([len(tree.prompt) for tree in self.trees]),
            "answers": _flat(tree.answers[0] for tree in self.trees),
            "answer_lengths": torch.tensor([len(tree.answers[0]) for tree in self.trees]),
            "trained": _flat(tree.trained[0] for tree in self.trees).bool(),
            "advantages": torch.cat(self.advantages),
            "old_logps": torch.cat(self.old_logps),
            **{f"more.{name}": torch.cat(values) for name, values in self.more.items()},
            **{
                f"metric.{name}": torch.tensor(value, dtype=torch.float64)
                for name, value in self.metrics.items()
            },
        }
        save_file(tensors, folder / _FILE)

    @classmethod
    def load(cls, folder: Path) -> Experience:
        """What `save` wrote; nothing where it wrote nothing."""
        if not (folder / _FILE).exists():
            return cls()
        tensors = load_file(folder / _FILE)
        lengths = tensors["answer_lengths"].tolist()
        prompts = tensors["prompts"].split(tensors["prompt_lengths"].tolist())
        answers, trained = tensors["answers"].split(lengths), tensors["trained"].split(lengths)
        trees = [
            Tree(tuple(prompt.tolist()), (tuple(answer.tolist()),), (tuple(mask.tolist()),))
            for prompt, answer, mask in zip(prompts, answers, trained)
        ]
        sizes = [sum(tree.trained[0]) for tree in trees]
        named = {name.partition(".")[::2]: tensor for name, tensor in tensors.items() if "." in name}
        return cls(
            trees,
            list(tensors["advantages"].split(sizes)),
            list(tensors["old_logps"].split(sizes)),
            {name: list(tensor.split(sizes)) for (kind, name), tensor in named.items() if kind == "more"},
            {name: tensor.item() for (kind, name), tensor in named.items() if kind == "metric"},
        )


def _flat(rows: Any) -> Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=torch.int64)


def draw(
    trainer: OnPolicyTrainer,
    engine: RolloutEngine,
    rewards: RewardSet,
    prompts: Sequence[tuple[tuple[int, ...], dict[str, Any]]],
    sampling: Sampling,
    first_number: int,
) -> tuple[list[Drawn], dict[str, float]]:
    """Completions of prompts with their rewards, all of them on every rank; to be called on all ranks.

    Args:
        trainer: who asks.
        engine: that samples.
        rewards: that score.
        prompts: tokens and row of each.
        sampling: how to draw, n of each.
        first_number: of the first completion's random numbers; the others follow it.

    Returns:
        The completions, those of a prompt next to each other; and the seconds that sampling and scoring took, with the
        parts of sampling that the engine tells.

    Raises:
        RuntimeError: not one completion of the draw got a reward.
    """
    accelerator, n = trainer.accelerator, sampling.n
    mine = range(accelerator.process_index, len(prompts), accelerator.num_processes)
    numbers = [first_number + i * n + j for i in mine for j in range(n)]
    began = time.perf_counter()
    more: dict[str, list[Any]] = {}
    if trainer.copy is not None:
        trainer.copy.refresh()
    with accelerator.autocast():
        if trainer.rollout_func is None:
            ids = [list(prompts[i][0]) for i in mine]
            found = engine.generate(ids, sampling, sequence_ids=numbers)
            completions = [completion for group in found for completion in group]
        else:
            output = trainer.rollout_func([prompts[i][1]["prompt"] for i in mine], trainer)
            stops = end_tokens(trainer.module.base, trainer.processing_class)
            completions, more = completions_of(output, len(mine), n, trainer.processing_class, stops)
    sampled = time.perf_counter()
    scores = score(
        trainer, rewards, [prompts[i][1] for i in mine for _ in range(n)], completions, numbers, more
    )
    parts = engine.seconds if trainer.rollout_func is None else {}
    seconds = {f"seconds/{part}": value for part, value in parts.items()}
    seconds |= {"seconds/sampling": sampled - began, "seconds/rewards": time.perf_counter() - sampled}
    drawn = [
        Drawn(i, completion, tuple(of_functions), reward, tuple(disagreements), number, late)
        for i, completion, of_functions, reward, disagreements, number, late in zip(
            [i for i in mine for _ in range(n)],
            completions,
            scores.per_function_NF.tolist(),
            scores.rewards_N.tolist(),
            scores.disagreement_NF.tolist(),
            numbers,
            scores.late_N.tolist(),
        )
    ]
    if accelerator.num_processes > 1:
        drawn = gather_object(drawn)
    everything = sorted(drawn, key=lambda of: of.number)
    if everything and all(of.reward != of.reward and not of.late for of in everything):
        raise RuntimeError(
            f"none of {len(everything)} completions got a reward from {', '.join(rewards.names)}: see what is said of them "
            "above"
        )
    return everything, seconds


def score(
    trainer: OnPolicyTrainer,
    rewards: RewardSet,
    rows: Sequence[dict[str, Any]],
    completions: Sequence[Completion],
    numbers: Sequence[int],
    more: dict[str, list[Any]] | None = None,
) -> Scores:
    """Rewards of completions of these rows; what fails is told.

    Raises:
        ValueError: a reward is late, and the trainer does not wait.
    """
    scores = rewards.score(
        [row["prompt"] for row in rows],
        [answer_of(row, completion) for row, completion in zip(rows, completions)],
        {name: [row.get(name) for row in rows] for name in (rows[0] if rows else {}) if name != "prompt"}
        | (more or {}),
        completion_ids=[list(completion.token_ids) for completion in completions],
        sample_ids=list(numbers),
        trainer_state=trainer.state,
    )
    if scores.failures:
        trainer.log.warn(f"left out of training:\n{scores.summary()}")
    if scores.late_N.any() and trainer.late is None:
        raise ValueError(
            f"a reward function said LATE, and {type(trainer).__name__} does not wait: GRPOTrainer does, with "
            "late_max_age=..., the updates that a reward may take"
        )
    return scores


def answer_of(row: dict[str, Any], completion: Completion) -> Any:
    """A completion as its prompt is: text, or messages."""
    if isinstance(row["prompt"], str):
        return completion.text
    return [{"role": "assistant", "content": completion.text}]


def describe(drawn: Sequence[Drawn], names: Sequence[str]) -> dict[str, float]:
    """TRL's metrics of a draw."""
    lengths = [len(of.completion.token_ids) for of in drawn]
    figures = length_figures(lengths, [of.completion.finish_reason == "stop" for of in drawn])
    return {
        **{f"completions/{name}": value for name, value in figures.items()},
        **describe_rewards(drawn, names),
    }


def describe_rewards(drawn: Sequence[Drawn], names: Sequence[str]) -> dict[str, float]:
    """Metrics of the rewards of a draw, and how unsure they are where functions tell."""
    rewards_N = torch.tensor([of.reward for of in drawn], dtype=torch.float64)
    rewards_NF = torch.tensor([of.rewards for of in drawn], dtype=torch.float64)
    disagreements_NF = torch.tensor([of.disagreements for of in drawn], dtype=torch.float64)
    unsure = {
        f"rewards/{name}/disagreement": unsure_N.nanmean().item()
        for name, unsure_N in zip(names, disagreements_NF.T)
        if not unsure_N.isnan().all()
    }
    return {**reward_figures(rewards_N, rewards_NF, names), **unsure}


def reward_figures(rewards_N: Tensor, rewards_NF: Tensor, names: Sequence[str]) -> dict[str, float]:
    """TRL's metrics of rewards, and the share of completions that have none; NaN stands for none. What there is no number
    of is left out."""
    metrics = {"unscored": rewards_N.isnan().double().mean().item()}
    of_functions = zip((f"rewards/{name}/" for name in names), rewards_NF.T)
    for x_N, mean, std in (
        (rewards_N, "reward", "reward_std"),
        *((x_N, f"{name}mean", f"{name}std") for name, x_N in of_functions),
    ):
        known_N = x_N[~x_N.isnan()]
        if len(known_N):
            metrics |= {mean: known_N.mean().item(), std: known_N.std().item() if len(known_N) > 1 else 0.0}
    return metrics
