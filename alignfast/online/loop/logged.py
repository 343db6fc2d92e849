"""Voted answers of older versions in a GRPO draw.

    weight of a token    w = min(pi now / pi then, cap)          `late_importance_sampling_*` of GRPO's options
    reward of an answer  compared: share of the others that it beat, ties a half;  thumb: 1 or 0;  rating: (v - 1) / 4
    group                what was compared with each other; thumbs and ratings: those that came one after the other

The mean of a group is its baseline. Of thumbs and ratings that came one after the other it is the mood of that period: a
shift that all of them share is gone. An answer whose tokens or log-probs are not known is left out, as is one of a version
that is too old, or too far from the policy now:

    KL(then || now) ~ mean over a version's tokens of log pi then - log pi now

Letters: N answers.
Not done here: votes that conflict with each other (each is a group of its own).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch

from alignfast.data import Tree
from alignfast.evaluation.scores import MAX_TOKENS
from alignfast.losses import importance_weights
from alignfast.models import Policy
from alignfast.online.feedback import TIE, Judged, Shown
from alignfast.rollout import Completion
from alignfast.trainers.experience import Drawn, Experience
from alignfast.trainers.grpo import GRPOTrainer

_NUMBER = 1 << 61  # where the numbers of logged answers begin, above those that are drawn


@dataclass(frozen=True)
class LoggedAnswer:
    """An answer that people voted on.

    Attributes:
        shown: the answer.
        reward: in [0, 1].
        age: versions that its own lies behind the one that serves.
    """

    shown: Shown
    reward: float
    age: int

    @property
    def logps(self) -> tuple[float, ...]:
        """Of its tokens, under what they were drawn from."""
        return self.shown.sampled_logps or self.shown.logps


def logged_groups(
    judged: Sequence[Judged], ages: Mapping[str, int], size: int
) -> tuple[list[list[LoggedAnswer]], dict[str, int]]:
    """Voted answers in groups whose members are compared.

    Args:
        judged: the votes.
        ages: of the versions whose answers may be used.
        size: most members of a group, >= 2; a larger comparison is left out.

    Returns:
        The groups; and how many votes were left out: `unknown_tokens`, `too_old`, `no_reward`, `too_many`.
    """
    left = dict.fromkeys(("unknown_tokens", "too_old", "no_reward", "too_many"), 0)
    groups: list[list[LoggedAnswer]] = []
    verdicts: list[LoggedAnswer] = []
    for one in sorted(judged, key=lambda one: one.vote.created):
        rewards = vote_rewards(one)
        why = _why_not(one, rewards, ages, size)
        if why is not None:
            left[why] += 1
            continue
        answers = [LoggedAnswer(s, rewards[s.id], ages[s.policy_version]) for s in one.answers]
        if one.vote.slot == "comparison":
            groups.append(answers)
        else:
            verdicts += answers
    groups += [verdicts[at : at + size] for at in range(0, len(verdicts), size)]
    return [group for group in groups if len({of.reward for of in group}) > 1], left


def vote_rewards(judged: Judged) -> dict[str, float]:
    """The reward of each answer that a vote is about, by id; empty for edits and hints, which say nothing of a scale.

    >>> from alignfast.online.feedback import Vote
    >>> answers = tuple(Shown(id=id, prompt="", text=id) for id in "abc")
    >>> vote_rewards(Judged(Vote(response_id="a", kind="ranking", value=["c", ["a", "b"]]), answers))
    {'c': 1.0, 'a': 0.25, 'b': 0.25}
    """
    vote = judged.vote
    if vote.kind == "thumb":
        return {shown.id: float(vote.value == "up") for shown in judged.answers}
    if vote.kind == "rating":
        return {shown.id: (vote.value - 1) / 4 for shown in judged.answers}
    if vote.slot != "comparison":
        return {}
    ids = [shown.id for shown in judged.answers]
    if vote.kind == "ranking":
        places = list(vote.value)
    else:
        places = [ids] if vote.value == TIE else [[vote.value], [id for id in ids if id != vote.value]]
    won: dict[str, float] = {id: 0.0 for place in places for id in place}
    for at, place in enumerate(places):
        for better in place:
            won[better] += sum(len(worse) for worse in places[at + 1 :])
        for one, other in combinations(place, 2):
            won[one] += 0.5
            won[other] += 0.5
    return {id: number / max(1, len(won) - 1) for id, number in won.items()}


def _why_not(judged: Judged, rewards: Mapping[str, float], ages: Mapping[str, int], size: int) -> str | None:
    if not rewards or any(shown.id not in rewards for shown in judged.answers):
        return "no_reward"
    if len(judged.answers) > size:
        return "too_many"
    if any(shown.policy_version not in ages for shown in judged.answers):
        return "too_old"
    known = all(s.prompt_ids and s.completion_ids and (s.logps or s.sampled_logps) for s in judged.answers)
    return None if known else "unknown_tokens"


def within_kl(
    groups: Sequence[list[LoggedAnswer]], policy: Policy, most: float, cap: float | None
) -> tuple[list[list[LoggedAnswer]], dict[str, Any]]:
    """Groups of versions that are near enough to a policy.

    Args:
        groups: of `logged_groups`.
        policy: now.
        most: nats a token.
        cap: of the weights whose effective sample size is told.

    Returns:
        The groups that stay; and `kl` of each version, the number of `answers` that stay, of those `too_far`, and `ess`, the
        effective sample size of the tokens' weights as a share.
    """
    answers = [of for group in groups for of in group]
    if not answers:
        return [], {"answers": 0, "too_far": 0}
    trees = [_tree(of.shown) for of in answers]
    now = [logps_P.double().cpu() for _, logps_P in policy.over(trees, MAX_TOKENS)]
    lengths = [len(of.shown.completion_ids) for of in answers]
    now_of = torch.cat(now).split(lengths)
    gaps: dict[str, list[float]] = defaultdict(list)
    for of, logps in zip(answers, now_of):
        gaps[of.shown.policy_version] += (torch.tensor(of.logps, dtype=torch.float64) - logps).tolist()
    kl = {version: math.fsum(found) / len(found) for version, found in gaps.items()}
    near = {version for version, value in kl.items() if value <= most}
    kept = [group for group in groups if all(of.shown.policy_version in near for of in group)]
    ids = {id(of) for group in kept for of in group}
    stay = [(of, logps) for of, logps in zip(answers, now_of) if id(of) in ids]
    figures: dict[str, Any] = {"kl": kl, "answers": len(stay), "too_far": len(answers) - len(stay)}
    if stay:
        weights = importance_weights(
            torch.cat([logps for _, logps in stay]),
            torch.tensor([logp for of, _ in stay for logp in of.logps], dtype=torch.float64),
            [len(logps) for _, logps in stay],
            cap=cap,
        )
        figures["ess"] = weights.metrics["sampling/importance_sampling_ratio/ess"].item()
    return kept, figures


def _tree(shown: Shown) -> Tree:
    ids = shown.completion_ids
    return Tree(shown.prompt_ids, (ids,), ((True,) * len(ids),))


class LoggedGRPOTrainer(GRPOTrainer):
    """GRPO on fresh groups and, a share with each draw, on logged ones; each of them is used once.

    Args:
        *args: as of GRPOTrainer, whose `late_max_age` is given.
        logged: groups of `num_generations` members at most; what a smaller one lacks is filled up without a reward.
        **rest: as of GRPOTrainer.
    """

    def __init__(self, *args: Any, logged: Sequence[list[LoggedAnswer]] = (), **rest: Any) -> None:
        super().__init__(*args, **rest)
        self.logged = list(logged)

    def appraise(self, drawn: list[Drawn], metrics: dict[str, float]) -> Experience:
        """Logged groups stand beside the fresh ones."""
        joined = list(self._next())
        if joined:
            metrics = {**metrics, "logged/answers": float(sum(of.reward == of.reward for of in joined))}
        return super().appraise([*drawn, *joined], metrics)

    def _next(self) -> Iterator[Drawn]:
        """The draw's share: which it is follows from the draw's number alone, so that a run goes on anywhere."""
        steps = self.plan.steps_per_draw
        number, draws = self.state.global_step // steps, -(-self.plan.num_steps // steps)
        first, last = (len(self.logged) * at // draws for at in (number, number + 1))
        for place, group in enumerate(self.logged[first:last], first):
            numbers = _NUMBER + place * self.args.num_generations
            members = [_drawn(of, numbers + i, len(self.rewards.names)) for i, of in enumerate(group)]
            filler = replace(members[0], reward=math.nan, rewards=(math.nan,) * len(members[0].rewards))
            yield from members + [filler] * (self.args.num_generations - len(members))


def _drawn(of: LoggedAnswer, number: int, functions: int) -> Drawn:
    """A logged answer as if the engine had given it; an age of 0 would leave it without a weight."""
    shown, mask = of.shown, (True,) * len(of.shown.completion_ids)
    finish: Any = shown.finish_reason if shown.finish_reason in ("stop", "length") else "length"
    completion = Completion(
        shown.prompt_ids, shown.completion_ids, of.logps, of.logps, mask, finish, shown.text
    )  # fmt: skip
    rewards = (of.reward,) * functions
    return Drawn(number, completion, rewards, of.reward, (math.nan,) * functions, number, age=of.age + 1)
