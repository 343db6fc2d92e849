"""Samples that wait for a reward which comes after the step that made them, with a limit on their age.

    age = step now - step of the policy that sampled        used while age <= max_age, else dropped and counted

Samples of one group are compared with each other, so they leave together: once none of them waits any more. Where the
group would be too old at the next opportunity, it leaves with what has come: a baseline over those whose reward was quick
would otherwise favour what is quickly liked. A sample keeps the log-probs of its tokens under the policy that drew them,
so that training can weigh it by `alignfast.losses.importance_weights`. All of it is plain data and goes into a checkpoint
as JSON.

Not done here: the weights, advantages, and where rewards come from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class LateSample:
    """A completion and what training needs to know of it.

    Attributes:
        id: by which its reward will come.
        prompt_ids: token ids of the prompt.
        completion_ids: token ids of the completion.
        logps: log-prob of each of the completion's tokens when it was sampled, in nats.
        step: of the policy that sampled it.
        reward: None until it has come.
        extra: whatever else goes with it, as JSON can hold it: its columns, its text.
        group: of samples that leave together, all of one step; None: it goes alone.
        settled: whether nothing is waited for any more: its reward has come, or it was said that none will.
    """

    id: str | int
    prompt_ids: list[int]
    completion_ids: list[int]
    logps: list[float]
    step: int
    reward: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    group: str | int | None = None
    settled: bool = False


class LateBuffer:
    """Samples without their reward yet.

    Args:
        max_age: steps that a sample's policy may lie behind, >= 0.

    Attributes:
        expired: samples dropped for their age since the start, with a reward or without; also those that a group left
            behind when it could wait no longer.
        unclaimed: rewards that came for no sample here: dropped before, or never added.

    >>> buffer = LateBuffer(max_age=2)
    >>> for id, step in (("a", 0), ("b", 1), ("c", 2)):
    ...     buffer.add(LateSample(id, [5], [6, 7], [-0.5, -1.0], step))
    >>> buffer.arrive("b", 1.0), buffer.arrive("z", 1.0)
    (True, False)
    >>> [sample.id for sample in buffer.ready(step=3)], len(buffer), buffer.expired, buffer.unclaimed
    (['b'], 1, 1, 1)
    """

    def __init__(self, max_age: int) -> None:
        if max_age < 0:
            raise ValueError(f"max_age must be at least 0 steps, got {max_age}")
        self.max_age = max_age
        self.expired = self.unclaimed = 0
        self._waiting: dict[str | int, LateSample] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, sample: LateSample) -> None:
        """Keep a sample until its reward comes or its time is over.

        Raises:
            ValueError: its id waits already, or it has not one log-prob for each token.
        """
        if sample.id in self._waiting:
            raise ValueError(f"a sample with the id {sample.id!r} waits already")
        if len(sample.logps) != len(sample.completion_ids):
            raise ValueError(
                f"sample {sample.id!r} has {len(sample.completion_ids)} tokens and {len(sample.logps)} log-probs"
            )
        self._waiting[sample.id] = sample

    def arrive(self, id: str | int, reward: float | None, extra: Mapping[str, Any] | None = None) -> bool:
        """Take in a reward; the last one counts if several come.

        Args:
            id: of the sample.
            reward: None: there will be none.
            extra: what is added to the sample's own.

        Returns:
            Whether a sample waits for it.

        Raises:
            ValueError: the reward is no finite number.
        """
        if reward is not None and not math.isfinite(reward):
            raise ValueError(f"the reward of {id!r} must be a finite number, got {reward}")
        if id not in self._waiting:
            self.unclaimed += 1
            return False
        sample = self._waiting[id]
        self._waiting[id] = replace(
            sample,
            reward=None if reward is None else float(reward),
            extra={**sample.extra, **(extra or {})},
            settled=True,
        )
        return True

    def waiting(self) -> list[LateSample]:
        """Samples whose reward has not come."""
        return [sample for sample in self._waiting.values() if not sample.settled]

    def ready(self, step: int, next_step: int | None = None) -> list[LateSample]:
        """Take out the groups that have their rewards, in the order in which they were added, and drop the too old.

        Args:
            step: of the policy now.
            next_step: of the policy when this is asked next; groups that will be too old then are not held back for
                those that still wait. None: they are.

        Returns:
            Samples of groups in which a reward has come; those without one, for completeness, have None.

        Raises:
            ValueError: a sample comes from a later step.
        """
        ahead = next((sample for sample in self._waiting.values() if sample.step > step), None)
        if ahead is not None:
            raise ValueError(f"sample {ahead.id!r} was made in step {ahead.step}, and now is step {step}")
        young = {id: s for id, s in self._waiting.items() if step - s.step <= self.max_age}
        self.expired += len(self._waiting) - len(young)
        held_back = {
            _group(sample)
            for sample in young.values()
            if not sample.settled and (next_step is None or next_step - sample.step <= self.max_age)
        }
        self._waiting = {id: sample for id, sample in young.items() if _group(sample) in held_back}
        leaving = [sample for sample in young.values() if _group(sample) not in held_back]
        self.expired += sum(not sample.settled for sample in leaving)
        rewarded = {_group(sample) for sample in leaving if sample.reward is not None}
        return [sample for sample in leaving if _group(sample) in rewarded]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, as JSON can hold it."""
        return {
            "expired": self.expired,
            "unclaimed": self.unclaimed,
            "waiting": [asdict(sample) for sample in self._waiting.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; samples that are too old by another `max_age` are dropped when next asked for."""
        self.expired, self.unclaimed = state["expired"], state["unclaimed"]
        self._waiting = {sample["id"]: LateSample(**sample) for sample in state["waiting"]}


def _group(sample: LateSample) -> tuple[bool, str | int]:
    """By what a sample leaves: with its group, or alone."""
    return (False, sample.id) if sample.group is None else (True, sample.group)
