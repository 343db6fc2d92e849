"""Group relative policy optimisation: the model learns which of its own answers to a prompt were better than the others.

    draw     G completions of each prompt, scored by reward functions
    advantage of a completion: its reward less the mean of its group, by the group's spread (arXiv 2402.03300 section 4.1)
    train    steps on the draw, each a policy-gradient step with clipped ratios

Names and defaults are TRL 1.16's; a row of a step is a completion. A draw is one step unless `steps_per_generation` or
`num_iterations` say otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from alignfast.data import Batch
from alignfast.kernels import group_advantages
from alignfast.kernels._policy import policy_options
from alignfast.losses.grpo import BY_SEQUENCE, POLICY_STATS, policy_counts, policy_groups, policy_objective
from alignfast.trainers.batches import Counts
from alignfast.trainers.config import config
from alignfast.trainers.experience import Drawn, Experience, describe
from alignfast.trainers.late import LATE_FILE, LateRewards
from alignfast.trainers.metrics import Metrics, means
from alignfast.trainers.mismatch import MODES
from alignfast.trainers.on_policy import A_DRAW, OnPolicyConfig, OnPolicyTrainer
from alignfast.trainers.state import read_json, write_json


@config
class GRPOConfig(OnPolicyConfig):
    """Options of GRPOTrainer."""

    num_generations: int = 8
    """Completions of each prompt, >= 2; rows of a draw are a multiple of it."""
    num_generations_eval: int | None = None
    """The same in evaluation; None is num_generations."""
    epsilon: float = 0.2
    """How far a ratio may fall below 1."""
    epsilon_high: float | None = None
    """How far it may rise; None is epsilon. Of cispo the largest ratio, and needed."""
    delta: float | None = None
    """Largest ratio where the advantage is negative; None for none."""
    loss_type: str = "dapo"
    """A loss of `alignfast.kernels.policy_loss`: grpo, bnpo, dr_grpo, dapo, cispo, sapo or ppo."""
    importance_sampling_level: str = "token"
    """`token`, or `sequence` for the ratio of mean log-probs (GSPO, arXiv 2507.18071)."""
    use_bias_correction_kl: bool = True
    """Multiply the KL estimate by the ratio, which makes its gradient that of the KL divergence."""
    sapo_temperature_pos: float = 1.0
    """Of sapo's sigmoid where the advantage is positive."""
    sapo_temperature_neg: float = 1.05
    """Elsewhere."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus."""
    scale_rewards: str = "group"
    """Divide advantages by the deviation of the `group`, the `batch`, or by `none` (Dr. GRPO)."""
    multi_objective_aggregation: str = "sum_then_normalize"
    """`sum_then_normalize`: rewards are added, then compared. `normalize_then_sum`: each is compared by itself."""
    dynamic_sampling_rounds: int = 0
    """Draw again, up to so many times, for prompts whose rewards are all alike (DAPO, arXiv 2503.14476)."""
    late_max_age: int | None = None
    """Wait so many updates, >= 0, for a reward function that says `LATE`; its group joins the next draw. None: no wait."""
    late_importance_sampling_correction: bool = True
    """Weigh late completions by how much likelier they are now than when they were drawn."""
    late_importance_sampling_mode: str = "token_truncate"
    """By `token` or `sequence`, and what becomes of weights beyond the cap: `_truncate` or `_mask`."""
    late_importance_sampling_clip_max: float | None = 3.0
    """The cap, > 0; None for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(
            self.num_generations >= 2, "num_generations", "at least 2: a group compares its members"
        )
        asked = self.num_generations_eval
        self._require(asked is None or asked >= 1, "num_generations_eval", "at least 1, or None")
        self._require(self.dynamic_sampling_rounds >= 0, "dynamic_sampling_rounds", "at least 0")
        self._choose("scale_rewards", "group", "batch", "none")
        self._choose("late_importance_sampling_mode", *MODES)
        cap = self.late_importance_sampling_clip_max
        self._require(cap is None or cap > 0, "late_importance_sampling_clip_max", "above 0, or None")
        self._require(
            self.late_max_age is None or self.late_max_age >= 0, "late_max_age", "at least 0, or None"
        )
        waits_for_it = self.late_max_age is None or self.engine != "vllm"
        self._require(
            waits_for_it, "late_max_age", "None with engine='vllm', whose own weights it does not join yet"
        )
        self._choose("multi_objective_aggregation", "sum_then_normalize", "normalize_then_sum")
        options = {name: value for name, value in self.loss_options.items() if name != "backend"}
        policy_options(**options)  # tells a wrong option

    @property
    def loss_options(self) -> dict[str, Any]:
        """What `policy_loss` takes of these options."""
        names = (
            "loss_type", "beta", "epsilon", "epsilon_high", "delta", "importance_sampling_level", "entropy_coef",
            "sapo_temperature_pos", "sapo_temperature_neg", "backend",
        )  # fmt: skip
        length = self.max_completion_length if self.loss_type == "dr_grpo" else None
        corrects = self.use_bias_correction_kl and self.beta > 0
        return {
            **{name: getattr(self, name) for name in names},
            "max_completion_length": length,
            "use_bias_correction_kl": corrects,
        }


class GRPOTrainer(OnPolicyTrainer):
    """Learn from rewards of the model's own completions.

    Args:
        model: as of every trainer.
        reward_funcs: one or several of what `alignfast.rewards.load_reward` takes: a function
            `(prompts, completions, **columns) -> list[float | None]`, `numeric`, `exact`, an import path, a reward model's
            folder.
        args: as of every trainer, like all that follows. Rows have a `prompt`; their other columns go to the functions.
        rollout_func: TRL's hook: makes the completions in the engine's place (`alignfast.trainers.rollout_func`).
        judge: what says how often held-out completions beat the start policy's: `api:MODEL`, an object with `compare`, or
            what scores, as reward_funcs; None takes reward_funcs.
        gold_reward_funcs: as reward_funcs, measured on held-out prompts and never trained on.
        compute_metrics: figures of your own of held-out completions: called as a reward function is, with their `rewards`
            beside, it returns a dict of numbers.

    >>> rows = [{"prompt": "2 + 2 =", "answer": "4"}]
    >>> trainer = GRPOTrainer("my-model", "numeric", train_dataset=rows, max_steps=100)  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    """

    args: GRPOConfig
    config_class: ClassVar[type[GRPOConfig]] = GRPOConfig

    def __init__(
        self, model: Any, reward_funcs: Any, args: GRPOConfig | None = None, *more: Any, **rest: Any
    ) -> None:
        super().__init__(model, reward_funcs, args, *more, **rest)
        if self.args.late_max_age is not None:
            if self.rollout_func is not None:
                raise ValueError(
                    "late_max_age waits for no completions of a rollout_func: leave one of them out"
                )
            self.late = LateRewards(self, self.args.late_max_age)

    @property
    def completions_of_each(self) -> int:  # type: ignore[override]
        """Completions of each prompt."""
        return self.args.num_generations

    @property
    def completions_in_evaluation(self) -> int:
        """Completions of each held-out prompt."""
        return self.args.num_generations_eval or self.args.num_generations

    def _teaches(self, row: int) -> bool:
        """Whether a completion has a gradient: with an advantage of 0, only a KL or entropy term gives it one."""
        terms = self.args.beta or self.args.entropy_coef
        return bool(terms) or bool((self.experience.advantages[row] != 0).any())

    def collect(self, number: int) -> Experience:
        """Draw completions, and say what each is worth."""
        args, n = self.args, self.args.num_generations
        rows = self.plan.rows(number * self.plan.steps_per_draw)
        drawn, metrics = self.sample(rows, number * A_DRAW)
        row_of = list(rows)  # of each group
        for again in range(args.dynamic_sampling_rounds):
            groups = [drawn[g * n : (g + 1) * n] for g in range(len(rows))]
            alike = [
                g
                for g, group in enumerate(groups)
                if _is_flat([of.reward for of in group]) and not any(of.late for of in group)
            ]
            if not alike:
                break
            others = np.random.default_rng((args.seed, number, again)).permutation(len(self.train_data.trees))
            fresh = [int(row) for row in others if row not in rows][: len(alike)]
            found, seconds = self.sample(fresh, number * A_DRAW + (again + 1) * len(rows) * n)
            for place, g in enumerate(alike[: len(fresh)]):
                drawn[g * n : (g + 1) * n] = found[place * n : (place + 1) * n]
                row_of[g] = fresh[place]
            for name, value in {**seconds, "resampled_groups": float(len(fresh))}.items():
                metrics[name] = metrics.get(name, 0.0) + value
        metrics |= describe(drawn, self.rewards.names)
        if self.late is not None:
            drawn = self.late.exchange(drawn, row_of, number * self.plan.steps_per_draw, metrics)
        return self.appraise(drawn, metrics)

    def appraise(self, drawn: list[Drawn], metrics: dict[str, float]) -> Experience:
        """Every token of a completion has its advantage."""
        advantages_N, flat = self.advantages(drawn)
        experience = self.trees_of(drawn, {**metrics, "frac_reward_zero_std": flat})
        if self.late is not None:
            self.late.weigh(experience, drawn)
        experience.advantages = [
            torch.full((len(logps),), advantage)
            for logps, advantage in zip(experience.old_logps, advantages_N.tolist())
        ]
        return experience

    def advantages(self, drawn: list[Drawn]) -> tuple[Tensor, float]:
        """(advantages_N, share of groups whose rewards are all alike)."""
        args = self.args
        group_N = torch.arange(len(drawn)) // args.num_generations
        rewards_NF, rewards_N = self.rewards_of(drawn)
        weights_F = torch.tensor(self.rewards.weights, dtype=torch.float64)
        groups_GN = rewards_N.view(-1, args.num_generations).tolist()
        flat = sum(map(_is_flat, groups_GN)) / len(groups_GN)
        if args.multi_objective_aggregation == "normalize_then_sum":
            compared = [group_advantages(x_N, group_N) for x_N in rewards_NF.T]
            summed_N = (torch.stack(compared, 1) * weights_F).sum(1).masked_fill(rewards_N.isnan(), torch.nan)
            return group_advantages(summed_N, torch.zeros_like(group_N)), flat
        return group_advantages(rewards_N, group_N, scale=args.scale_rewards), flat

    def compute_loss(self, batch: Batch, counts: Counts, router_weight: float) -> tuple[Tensor, Metrics]:
        """The policy's loss, divided by the step's tokens or sequences."""
        args, experience, level = self.args, self.experience, self.args.importance_sampling_level
        tokens, sequences = self.step_counts["tokens"], self.step_counts["sequences"]
        device = batch.source_P.device
        advantages_P = experience.gather("advantages", batch.rows, device)
        assert advantages_P is not None
        # a draw of one step is trained on by the policy that drew it: its own log-probs give a ratio of exactly 1
        is_old = self.plan.steps_per_draw > 1
        loss_fn = policy_objective(
            batch.lengths,
            advantages_P,
            experience.gather("old_logps", batch.rows, device) if is_old else None,
            experience.gather("ref_logps", batch.rows, device),
            experience.gather("importance_weights", batch.rows, device),
            num_items=max(1, sequences if args.loss_type in BY_SEQUENCE else tokens),
            **args.loss_options,
        )
        loss, sums = self.policy(
            batch,
            loss_fn,
            stats=POLICY_STATS,
            group_sizes=policy_groups(batch.lengths, args.loss_type, level),
            router_weight=router_weight,
            temperature=args.temperature,
        )
        return loss, means(sums, policy_counts(list(sums), counts["trained"], counts["sequences"], level))

    def save_more(self, folder: Path) -> None:
        """The draw, and what waits."""
        super().save_more(folder)
        if self.late is not None:
            write_json(folder / LATE_FILE, self.late.buffer.state_dict())

    def load_more(self, folder: Path) -> None:
        """The draw, and what waits."""
        super().load_more(folder)
        if self.late is not None:
            self.late.buffer.load_state_dict(read_json(folder / LATE_FILE))


def _is_flat(rewards: list[float]) -> bool:
    """Whether a group's rewards are all alike, so that nothing is to be learned from it."""
    known = [reward for reward in rewards if reward == reward]
    return len(set(known)) <= 1
