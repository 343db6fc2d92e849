"""Rewards that come after the step which sampled: a group waits until all of it has them, then joins the next draw.

    w = pi now(token) / pi then(token), by token or by sequence, cut at a cap     a constant factor on the token's loss

A reward function that says `LATE` is asked again before each draw, with the same row, completion and sample id. Then a
group's advantages are what they would have been: a baseline over the members whose reward came first would favour what is
quickly liked. At its last chance within `max_age` updates a group goes with what has come, and the rest is dropped and
counted. The ratio of a step is to the policy that begins it, of late completions too.

What waits is known to every rank, keyed by the number of the sample, and kept with the checkpoint.

Letters: P trained tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from alignfast.data import Batch
from alignfast.losses import importance_weights
from alignfast.rewards import LateBuffer, LateSample
from alignfast.rollout import Completion
from alignfast.trainers.experience import Drawn, Experience, describe_rewards, score

if TYPE_CHECKING:
    from alignfast.trainers.grpo import GRPOTrainer

LATE_FILE = "late.json"
_KEPT = ("sampled_logps", "mask", "finish_reason", "text")  # of a completion, beside its tokens
_SHOWN = {"mean": "late/weight", "cut": "late/cut", "ess": "late/ess"}


class LateRewards:
    """What waits for its reward.

    Args:
        trainer: whose draws these are.
        max_age: updates that a completion's policy may lie behind.
    """

    def __init__(self, trainer: GRPOTrainer, max_age: int) -> None:
        self.trainer, self.buffer = trainer, LateBuffer(max_age)

    def exchange(
        self, drawn: list[Drawn], rows: Sequence[int], step: int, metrics: dict[str, float]
    ) -> list[Drawn]:
        """Put aside the groups that wait, and bring in those that need not wait any longer. To be called on all ranks.

        Args:
            drawn: completions of the draw, groups one after the other.
            rows: of the training data, one for each group.
            step: of the policy now.
            metrics: of the draw; rewards become those of the completions that are trained on.

        Returns:
            Whole groups, those of earlier draws at the end. Where none is left, the first group that waits: without a
            reward it teaches nothing, but a step has something to compute.
        """
        n, buffer, expired = self.trainer.args.num_generations, self.buffer, self.buffer.expired
        self._ask_again()
        taught: list[Drawn] = []
        for g, row in enumerate(rows):
            group = drawn[g * n : (g + 1) * n]
            if any(of.late for of in group):
                for of in group:
                    self._add(of, row, group[0].number, step)
            else:
                taught += group
        joined = [_drawn(of, step) for of in buffer.ready(step, step + self.trainer.plan.steps_per_draw)]
        taught += joined
        used = [of for of in joined if of.reward == of.reward]
        for name in [name for name in metrics if name == "unscored" or name.startswith("reward")]:
            del metrics[name]
        if taught:
            metrics |= describe_rewards(taught, self.trainer.rewards.names)
        metrics |= {
            "late/waiting": len(buffer.waiting()),
            "late/used": len(used),
            "late/expired": buffer.expired - expired,
        }
        if used:
            metrics["late/age"] = sum(of.age for of in used) / len(used)
        return taught or [replace(of, reward=math.nan, late=True) for of in drawn[:n]]

    def weigh(self, experience: Experience, drawn: Sequence[Drawn]) -> None:
        """Put the log-probs of the policy now in the place of those of then, and weights beside them; on all ranks."""
        trainer, args = self.trainer, self.trainer.args
        rows = [i for i, of in enumerate(drawn) if of.age]
        # of another engine's tokens: of now to then already
        if not rows or "importance_weights" in experience.more:
            return
        trainer.policy.eval()  # as the engine samples

        def by_the_policy(batch: Batch) -> Tensor:
            logps_P: Tensor = trainer.policy(batch, temperature=args.temperature)
            return logps_P

        now = trainer.of_tokens(Experience([experience.trees[i] for i in rows]), by_the_policy)
        then = [experience.old_logps[i] for i in rows]
        for i, logps in zip(rows, now):
            experience.old_logps[i] = logps
        if not args.late_importance_sampling_correction:
            return
        level, mode = args.late_importance_sampling_mode.split("_")
        lengths = list(map(len, now))
        found = importance_weights(
            torch.cat(now),
            torch.cat(then),
            lengths,
            level=level,
            mode=mode,
            cap=args.late_importance_sampling_clip_max,
        )
        weights = [torch.ones(len(logps)) for logps in experience.old_logps]
        for i, weights_P in zip(rows, found.weights_P.split(lengths)):
            weights[i] = weights_P
        experience.more["importance_weights"] = weights
        for name, value in found.metrics.items():
            if name.rpartition("/")[2] in _SHOWN and "ratio" in name:
                experience.metrics[_SHOWN[name.rpartition("/")[2]]] = value.item()

    def _ask_again(self) -> None:
        """Ask for the rewards that have not come; each rank asks for its share."""
        accelerator, trainer, buffer = self.trainer.accelerator, self.trainer, self.buffer
        mine = buffer.waiting()[accelerator.process_index :: accelerator.num_processes]
        rows = [trainer.items[trainer.train_data.first + of.extra["row"]] for of in mine]
        found: list[Any] = []
        if mine:
            scores = score(
                trainer, trainer.rewards, rows, list(map(_completion, mine)), [int(of.id) for of in mine]
            )
            found = [
                (of.id, reward, _rewards(of_functions, disagreements))
                for of, reward, of_functions, disagreements, late in zip(
                    mine,
                    scores.rewards_N.tolist(),
                    scores.per_function_NF.tolist(),
                    scores.disagreement_NF.tolist(),
                    scores.late_N.tolist(),
                )
                if not late
            ]
        if accelerator.num_processes > 1:
            found = gather_object(found)
        for id, reward, extra in found:
            buffer.arrive(id, _number(reward), extra)

    def _add(self, of: Drawn, row: int, group: int, step: int) -> None:
        completion = of.completion
        kept = {name: value for name, value in asdict(completion).items() if name in _KEPT}
        sample = LateSample(
            id=of.number,
            prompt_ids=list(completion.prompt_ids),
            completion_ids=list(completion.token_ids),
            logps=list(completion.logps),
            step=step,
            extra={"row": row, **kept, **_rewards(of.rewards, of.disagreements)},
            group=group,
        )
        self.buffer.add(sample)
        if not of.late:
            self.buffer.arrive(of.number, _number(of.reward))


def _drawn(sample: LateSample, step: int) -> Drawn:
    """A sample that has waited, as if it came from the engine."""
    rewards, disagreements = (
        tuple(math.nan if value is None else value for value in sample.extra[name])
        for name in ("rewards", "disagreements")
    )
    reward = math.nan if sample.reward is None else sample.reward
    group, age = int(sample.group or 0), step - sample.step
    return Drawn(group, _completion(sample), rewards, reward, disagreements, int(sample.id), age=age)


def _completion(sample: LateSample) -> Completion:
    extra = sample.extra
    return Completion(
        tuple(sample.prompt_ids), tuple(sample.completion_ids), tuple(sample.logps), tuple(extra["sampled_logps"]),
        tuple(extra["mask"]), extra["finish_reason"], extra["text"],
    )  # fmt: skip


def _rewards(rewards: Sequence[float], disagreements: Sequence[float]) -> dict[str, Any]:
    """As JSON can hold them."""
    return {"rewards": list(map(_number, rewards)), "disagreements": list(map(_number, disagreements))}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
