"""Proximal policy optimisation: the model learns which of its tokens did better than a critic expected.

    draw     a completion of each prompt, scored by reward functions, and each of its tokens by the reference and the critic
    reward   of a token: -kl_coef KL to the reference; the last one's has the completion's score on top
    advantage, return: generalised advantage estimation (arXiv 1506.02438)
    train    passes over the draw in minibatches, each a step with clipped ratios and clipped values

The details are those of arXiv 2009.01325 and 2403.17031. A row of a step is a completion. A draw is
`steps_per_generation` micro-batches, a minibatch `gradient_accumulation_steps` of them: TRL's num_mini_batches is their
quotient. `save_model` writes the policy, and its critic in the folder `critic` beside it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from alignfast.data import Batch
from alignfast.kernels import kl_penalty
from alignfast.kernels._policy import policy_options
from alignfast.kernels.kl_penalty import KINDS
from alignfast.losses.grpo import POLICY_STATS
from alignfast.losses.ppo import (
    advantages_and_returns,
    explained_variance,
    ppo_counts,
    ppo_objective,
    token_rewards,
    value_loss,
    whiten,
)
from alignfast.models.load import load_policy
from alignfast.models.value import ActorCritic
from alignfast.trainers.batches import Counts
from alignfast.trainers.config import config
from alignfast.trainers.critic import CRITICS, load_critic_weights, make_critic, save_critic
from alignfast.trainers.experience import Drawn, Experience
from alignfast.trainers.kl_control import KLController
from alignfast.trainers.metrics import Metrics, means
from alignfast.trainers.on_policy import OnPolicyConfig, OnPolicyTrainer
from alignfast.trainers.state import read_json, write_json
from alignfast.trainers.vocabulary import check_tokenizer

_KL_CONTROL = "kl_control.json"


@config
class PPOConfig(OnPolicyConfig):
    """Options of PPOTrainer."""

    num_iterations: int = 4
    """Passes over each draw, >= 1, each in an order of its own (TRL: num_ppo_epochs)."""
    disable_dropout: bool = True
    """Set every dropout of the models to 0, so that the first ratio is 1."""
    critic: str = "own"
    """`own`: a trunk and head of its own. `shared`: a head on the policy's trunk, which then serves both."""
    critic_learning_rate: float | None = None
    """Step size of the critic's own weights; None is learning_rate."""
    vf_coef: float = 0.1
    """Weight of the critic's loss beside the policy's, > 0."""
    cliprange: float = 0.2
    """How far a ratio may fall below 1 where that gains."""
    cliprange_high: float | None = None
    """How far it may rise; None is cliprange."""
    dual_clip: float | None = None
    """Largest ratio where the advantage is negative, > 1 (arXiv 1912.09729); None for none."""
    cliprange_value: float | None = 0.2
    """How far a value may move from that of the draw before its loss stops to fall; None for any way."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus."""
    kl_coef: float = 0.05
    """Weight of the KL to the reference in the reward, at the beginning if target_kl steers it; 0 for none."""
    kl_estimator: str = "k1"
    """Estimate of the KL in the reward: k1, abs, k2 or k3. (That in the loss, by beta, is k3, with unbiased gradient.)"""
    target_kl: float | None = None
    """KL of a completion, in nats, to which kl_coef is steered (arXiv 1909.08593); None leaves kl_coef as it is."""
    kl_horizon: int = 10_000
    """Completions over which kl_coef follows."""
    gamma: float = 1.0
    """Discount of a token."""
    lam: float = 0.95
    """Of generalised advantage estimation: 0 trusts the critic, 1 the rewards."""
    whiten_rewards: bool = False
    """Put the rewards of tokens on deviation 1 over the draw; their mean stays."""
    whiten_advantages: bool = True
    """Put advantages on mean 0 and deviation 1 over the draw, all ranks of it."""
    missing_eos_penalty: float | None = None
    """Taken off the score of a completion that was cut, > 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._choose("critic", *CRITICS)
        self._choose("kl_estimator", *KINDS)
        for name in ("gamma", "lam"):
            self._require(0 <= getattr(self, name) <= 1, name, "in [0, 1]")
        self._at_least(0, "kl_coef", "critic_learning_rate")
        for name in ("vf_coef", "target_kl", "cliprange_value", "missing_eos_penalty", "kl_horizon"):
            value = getattr(self, name)
            self._require(value is None or value > 0, name, "above 0")
        self._require(self.beta == 0 or self.kl_coef == 0, "beta", "0 where kl_coef is not: one KL is enough")
        self._require(self.target_kl is None or self.kl_coef > 0, "target_kl", "None where kl_coef is 0")
        self._needs(self.kl_coef > 0, "kl_coef above 0", "kl_estimator")
        self._needs(self.target_kl is not None, "target_kl", "kl_horizon")
        policy_options(
            "ppo", **{name: value for name, value in self.loss_options.items() if name != "backend"}
        )

    @property
    def learning_rates(self) -> dict[str, float]:
        """The critic's own step size."""
        return {} if self.critic_learning_rate is None else {"critic.": self.critic_learning_rate}

    @property
    def loss_options(self) -> dict[str, Any]:
        """What `policy_loss` takes of these options."""
        names = ("beta", "dual_clip", "entropy_coef", "backend")
        return {
            **{name: getattr(self, name) for name in names},
            "epsilon": self.cliprange,
            "epsilon_high": self.cliprange_high,
            "use_bias_correction_kl": self.beta > 0,
        }


class PPOTrainer(OnPolicyTrainer):
    """Learn from rewards of the model's own completions, with a critic.

    Args:
        model: as of every trainer.
        reward_funcs: one or several of what `alignfast.rewards.load_reward` takes: a function
            `(prompts, completions, **columns) -> list[float | None]`, `numeric`, `exact`, an import path, a reward model's
            folder.
        args: as of every trainer, like what follows. Rows have a `prompt`; their other columns go to the functions.
        value_model: where the critic starts: a reward model or a language model, as a folder, a hub name or (a reward model)
            an object, trained as it is given; for critic='shared' the folder `critic` of an earlier run. None: a copy of the
            policy, with adapters if that has some, and a head that says 0.
        ref_model: the reference; None is the model as it was given.

    Raises:
        ValueError: critic and policy do not fit, or a checkpoint lacks its head; as every trainer.

    >>> rows = [{"prompt": "2 + 2 =", "answer": "4"}]
    >>> trainer = PPOTrainer("my-model", "numeric", train_dataset=rows, max_steps=100)  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    """

    args: PPOConfig
    config_class: ClassVar[type[PPOConfig]] = PPOConfig
    module: ActorCritic

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: PPOConfig | None = None,
        *more: Any,
        value_model: Any = None,
        ref_model: Any = None,
        **rest: Any,
    ) -> None:
        self.value_model, self.ref_model = value_model, ref_model
        super().__init__(model, reward_funcs, args, *more, **rest)
        args = self.args
        self.kl_control = KLController(args.kl_coef, args.target_kl, args.kl_horizon)
        if isinstance(value_model, (str, os.PathLike)):
            check_tokenizer(
                value_model,
                self.processing_class,
                what="the critic",
                option="value_model",
                trust_remote_code=args.trust_remote_code,
            )
        if ref_model is not None and not self.needs_reference:
            raise ValueError("kl_coef and beta are 0, so no reference is used: leave ref_model out")

    def load(self, model: Any, peft_config: Any) -> ActorCritic:
        """The policy and its critic."""
        policy = load_policy(model, peft_config=peft_config, **self.args.loading)
        return ActorCritic(
            policy, make_critic(policy, self.args, self.value_model, adapters_are_new=peft_config is not None)
        )

    @property
    def needs_reference(self) -> bool:
        """Whether the reference's log-probs are asked for."""
        return self.args.beta > 0 or self.args.kl_coef > 0

    def order(self, number: int, iteration: int) -> list[int]:
        """Shuffled anew for each pass, by the seed."""
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        shuffled = np.random.default_rng((seed, number, iteration)).permutation(len(self.experience.trees))
        return shuffled.tolist()

    # Draws

    def appraise(self, drawn: list[Drawn], metrics: dict[str, float]) -> Experience:
        """Rewards of tokens, then advantages and returns."""
        args, experience = self.args, self.trees_of(drawn, metrics)
        values = experience.more["values"] = self.of_tokens(experience, self._values)
        refs = experience.more.get("ref_logps", experience.old_logps)  # without a reference the KL is 0
        if not args.beta:
            experience.more.pop("ref_logps", None)
        pairs, coef = list(zip(experience.old_logps, refs)), self.kl_control.coef
        penalties = [coef * kl_penalty(old_L, ref_L, kind=args.kl_estimator) for old_L, ref_L in pairs]
        scores = self.scores(drawn)
        rewards = token_rewards(scores, penalties)
        if args.whiten_rewards:
            rewards = whiten(rewards, shift_mean=False)
        advantages, returns = advantages_and_returns(rewards, values, gamma=args.gamma, lam=args.lam)
        experience.more["returns"] = returns
        experience.advantages = whiten(advantages) if args.whiten_advantages else advantages
        taught = [i for i, value_L in enumerate(values) if len(value_L)]
        number = max(1, len(taught))
        non_score = -sum(penalties[i].sum().item() for i in taught) / number
        score = sum(scores[i] for i in taught) / number
        experience.metrics |= {
            "objective/entropy": -sum(experience.old_logps[i].sum().item() for i in taught) / number,
            "objective/non_score_reward": non_score,
            "objective/rlhf_reward": non_score + score,
            "objective/scores": score,
            "val/explained_variance": explained_variance(values, returns),
        }
        if self.needs_reference:
            kl = sum((pairs[i][0] - pairs[i][1]).sum().item() for i in taught) / number
            experience.metrics |= {"objective/kl": kl, "objective/kl_coef": coef}
            if taught:
                self.kl_control.update(kl, len(taught))
        return experience

    def scores(self, drawn: list[Drawn]) -> list[float]:
        """Rewards of completions, less the penalty of those that were cut."""
        penalty = self.args.missing_eos_penalty or 0.0
        rewards_N = self.rewards_of(drawn)[1].tolist()
        return [
            reward - penalty * (of.completion.finish_reason == "length")
            for of, reward in zip(drawn, rewards_N)
        ]

    def _values(self, batch: Batch) -> Tensor:
        """values_P of the critic as it is, in evaluation mode."""
        training = self.module.training
        self.module.eval()
        with self.accelerator.autocast():
            values_P = self.module.values(batch)
        self.module.train(training)
        return values_P

    # Steps

    def compute_loss(self, batch: Batch, counts: Counts, router_weight: float) -> tuple[Tensor, Metrics]:
        """The policy's and the critic's loss, means over the step's tokens."""
        args, experience, device = self.args, self.experience, batch.source_P.device
        num_items = max(1, self.step_counts["tokens"])
        names = ("advantages", "old_logps", "ref_logps", "importance_weights", "values", "returns")
        found = {name: experience.gather(name, batch.rows, device) for name in names}
        assert found["advantages"] is not None
        # a draw of one step is trained on by the policy that drew it: its own log-probs give a ratio of exactly 1
        is_old = self.plan.steps_per_draw > 1
        loss_fn = ppo_objective(
            batch.lengths,
            found["advantages"],
            found["old_logps"] if is_old else None,
            found["ref_logps"],
            found["importance_weights"],
            num_items=num_items,
            **args.loss_options,
        )

        def value_fn(values_P: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            old_values_P, returns_P = found["values"], found["returns"]
            assert old_values_P is not None
            assert returns_P is not None
            return value_loss(
                values_P, old_values_P, returns_P,
                num_items=num_items, vf_coef=args.vf_coef, cliprange_value=args.cliprange_value,
            )  # fmt: skip

        loss, sums = self.policy(
            batch, loss_fn, value_fn=value_fn, stats=POLICY_STATS, router_weight=router_weight,
            temperature=args.temperature,
        )  # fmt: skip
        return loss, means(sums, ppo_counts(list(sums), counts["trained"]))

    # Checkpoints

    def write_model(self, folder: Path) -> None:
        """Write the policy, and its critic beside it."""
        super().write_model(folder)
        save_critic(self.module.critic, folder, self.accelerator.is_main_process)

    def save_more(self, folder: Path) -> None:
        """The draw, and the weight of the KL."""
        super().save_more(folder)
        write_json(folder / _KL_CONTROL, self.kl_control.state_dict())

    def load_more(self, folder: Path) -> None:
        """The draw, the weight of the KL, and the critic."""
        super().load_more(folder)
        self.kl_control.load_state_dict(read_json(folder / _KL_CONTROL))
        load_critic_weights(self.module.critic, folder)
