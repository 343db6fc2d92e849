"""What a round knows, as JSON in the store's row of its run: after a kill, all that is needed to go on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

# In order. A round that is refused, or that has nothing to learn from, ends earlier.
STAGES = ("collect", "reward", "policy", "evaluate", "gate", "canary", "promote", "watch")


class NothingToLearn(ValueError):
    """The round's votes give a stage nothing to train on, or to measure with."""


@dataclass
class Round:
    """One round of the learner. Each stage fills in what the later ones read.

    Attributes:
        number: of the round, from 1; its versions are named by it.
        serving: version that served when the round began: what the candidate is trained from and compared with.
        votes: ids of what it learns from.
        held_out: ids of what it measures with.
        beyond: ids of votes beyond what one voter may give in a round: seen, and no more.
        reward: version of its reward model.
        policy: version that it proposes.
        figures: of the candidate.
        accepted: what the gate said; None: nothing yet.
        since: when the canary, then the watch, began.
        outcome: in words, once the round is over.
        folder: of the versions, in which its models are made.
    """

    number: int
    serving: str
    votes: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    beyond: list[str] = field(default_factory=list)
    reward: str | None = None
    policy: str | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    accepted: bool | None = None
    since: float | None = None
    outcome: str | None = None
    folder: str = ""

    @property
    def reward_name(self) -> str:
        """Name of the reward model that the round makes."""
        return f"reward-{self.number}"

    @property
    def policy_name(self) -> str:
        """Name of the policy that the round makes."""
        return f"policy-{self.number}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Round:
        """What `to_dict` gave.

        Raises:
            ValueError: another version of alignfast wrote it.
        """
        known = {one.name for one in fields(cls)}
        if set(state) - known or not {"number", "serving"} <= set(state):
            raise ValueError(
                f"the store holds an unfinished round that this alignfast can't read ({', '.join(sorted(state))}): finish "
                "it with the version that began it"
            )
        return cls(**state)
