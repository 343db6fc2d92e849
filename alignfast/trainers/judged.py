"""What on-policy trainers measure on held-out prompts beside the rewards that they train on.

    kl        mean over tokens of log pi - log pi_ref (k1), of exp(d) - 1 - d with d = log pi_ref - log pi (k3), and of k1's
              sum over a completion: how far the policy went from its reference
    entropy   mean over tokens, of the policy's whole distribution at the sampling temperature
    distinct  distinct-1 and distinct-2 of the completions' tokens
    win rate  against the completions that the start policy drew from the same prompts and random numbers; ties count
              half, and completions of one prompt count as one cluster of Wilson's interval
    gold      rewards that are measured and never trained on: where they fall while the trained one rises, it is hacked
    others    what `compute_metrics` makes of the completions

The start policy is sampled before the first step, once; what it drew is kept with the checkpoints. Truncated sampling
(top-k, top-p, min-p) draws from another distribution than the one that log-probs are of, so that its k1 is no longer the
mean KL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from alignfast.data import PrepareReport, Tree
from alignfast.evaluation import PairwiseJudge, distinct_n, load_judge, win_rate
from alignfast.kernels import kl_penalty
from alignfast.kernels.linear_loss import Metrics, Stats
from alignfast.rewards import RewardSet
from alignfast.rewards.protocol import accepted, check_signature
from alignfast.trainers.batches import Data, content_hash, share_out
from alignfast.trainers.experience import Drawn, answer_of, describe, draw, reward_figures
from alignfast.trainers.metrics import to_json
from alignfast.trainers.reference import NoReference

if TYPE_CHECKING:
    from alignfast.trainers.on_policy import OnPolicyTrainer

EVALUATION = 1 << 60  # where the numbers of held-out samples begin
_T = TypeVar("_T")
MetricsFunction: TypeAlias = Callable[..., dict[str, float]]


class Start(NamedTuple):
    """What the start policy drew from one set of prompts, in the order of the draw."""

    scores: list[float]  # the judge's, where it scores; NaN where it has none
    texts: list[str]  # where it compares


class Judged:
    """Figures of held-out draws, and what they are compared with.

    Args:
        trainer: whose evaluations these are.
        judge: what `alignfast.evaluation.load_judge` takes, one or several reward functions; None compares by the rewards
            that are trained on.
        gold_reward_funcs: what `alignfast.rewards.load_reward` takes, one or several; None measures none.
        compute_metrics: takes prompts, completions, their rewards (NaN for none), and the rows' columns, by keyword and what
            it names of them, and returns further figures; on every rank, of all completions.
    """

    def __init__(
        self,
        trainer: OnPolicyTrainer,
        judge: Any,
        gold_reward_funcs: Any,
        compute_metrics: MetricsFunction | None = None,
    ) -> None:
        self.trainer, self.compute_metrics = trainer, compute_metrics
        self._specs = judge, gold_reward_funcs
        self._judge: PairwiseJudge | RewardSet | None = None
        self._gold: RewardSet | None = None
        self._loaded = False
        self.starts: dict[str, Start] = {}  # by the hash of the prompts
        self.trained = False  # whether the policy may be another than the start policy

    def check(self, columns: Collection[str], *, conversational: bool) -> None:
        """Look the functions up, and make sure that they can score rows of these columns.

        Raises:
            ValueError: one is unknown or needs another column.
        """
        if not self._loaded:
            (judge, gold), timeout = self._specs, self.trainer.args.reward_timeout
            self._judge = None if judge is None else load_judge(judge, timeout)
            self._gold = None if gold is None else RewardSet(gold, timeout=timeout)
            self._loaded = True
        for rewards in (self._judge, self._gold):
            if isinstance(rewards, RewardSet):
                rewards.check(columns, conversational=conversational)
        if self.compute_metrics is not None:
            try:
                check_signature(self.compute_metrics, {*columns, "rewards"})
            except ValueError as error:
                raise ValueError(f"compute_metrics is called as a reward function is: {error}") from error

    @property
    def judge_name(self) -> str:
        """By which checkpoints know it."""
        if self._judge is None:
            return ", ".join(self.trainer.rewards.names)
        return ", ".join(self._judge.names) if isinstance(self._judge, RewardSet) else self._judge.name

    @property
    def wants_reference(self) -> bool:
        """Whether the reference is wanted for evaluation alone: where asked, or where it costs no memory."""
        trainer = self.trainer
        asked = trainer.args.measure_kl
        return bool(trainer.eval_data) and (trainer.adapters_are_new if asked is None else asked)

    # The start policy

    def begin(self) -> None:
        """Draw from the start policy what it is to be remembered by. To be called on all ranks before the first step."""
        if self.trained:
            return
        if self.trainer.eval_data and self._pairwise is not None:
            self._pairwise.check()
        for data in self.trainer.eval_data.values():
            if _key(data) not in self.starts:
                self._remember(data, self._draw(data))
        self.trained = True

    def _remember(self, data: Data, drawn: list[Drawn]) -> Start:
        if self._pairwise is None:
            start = Start(self._scores(data, drawn), [])
        else:
            start = Start([], [of.completion.text for of in drawn])
        self.starts[_key(data)] = start
        return start

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        starts = {
            key: {"scores": [to_json(score) for score in start.scores], "texts": start.texts}
            for key, start in self.starts.items()
        }
        return {"judge": self.judge_name, "starts": starts}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            ValueError: another judge made it.
        """
        if state["starts"] and state["judge"] != self.judge_name:
            raise ValueError(
                f"the checkpoint's win rates are judged by {state['judge']}, this run's by {self.judge_name}: give the judge "
                "that it had, or start anew in another output_dir"
            )
        self.starts = {
            key: Start([float(score) for score in start["scores"]], start["texts"])
            for key, start in state["starts"].items()
        }
        self.trained = True

    # Figures

    def evaluate(self, data: Data) -> dict[str, float]:
        """Draw completions of held-out prompts, and say all that is measured of them. To be called on all ranks."""
        drawn = self._draw(data)
        ids = [of.completion.token_ids for of in drawn]
        figures = {
            **describe(drawn, self.trainer.rewards.names),
            **{f"distinct_{n}": distinct_n(ids, n) for n in (1, 2)},
            **token_figures(self.trainer, drawn),
            **self._gold_figures(data, drawn),
            **self._win_rate(data, drawn),
        }
        return figures | self._own_figures(data, drawn, figures)

    def _own_figures(self, data: Data, drawn: list[Drawn], taken: Collection[str]) -> dict[str, float]:
        """What `compute_metrics` says.

        Raises:
            ValueError: it is no dict of numbers, or one has a name that is taken.
        """
        if self.compute_metrics is None:
            return {}
        columns, completions = self._given(data, drawn)
        given: dict[str, Any] = {
            **columns,
            "completions": completions,
            "completion_ids": [list(of.completion.token_ids) for of in drawn],
            "sample_ids": [of.number for of in drawn],
            "trainer_state": self.trainer.state,
            "rewards": [of.reward for of in drawn],
        }
        found = self.compute_metrics(**accepted(self.compute_metrics, given))
        if not isinstance(found, dict) or not all(isinstance(value, Real) for value in found.values()):
            raise ValueError(f"compute_metrics must return a dict of numbers, got {found!r}")
        again = sorted({*found} & {*taken})
        if again:
            raise ValueError(f"compute_metrics: evaluation has a figure {again[0]!r} already; rename it")
        return {name: float(value) for name, value in found.items()}

    def _gold_figures(self, data: Data, drawn: list[Drawn]) -> dict[str, float]:
        if self._gold is None:
            return {}
        found = self._over_ranks(drawn, lambda mine: self._score(self._gold, data, mine))
        rewards_N = torch.tensor([reward for reward, _ in found], dtype=torch.float64)
        rewards_NF = torch.tensor([of_functions for _, of_functions in found], dtype=torch.float64)
        if rewards_N.isnan().all():
            self.trainer.log.warn("no completion got a gold reward: its figures are left out")
            return {}
        figures = reward_figures(rewards_N, rewards_NF, self._gold.names)
        return {f"gold/{name}": value for name, value in figures.items()}

    def _win_rate(self, data: Data, drawn: list[Drawn]) -> dict[str, float]:
        start = self.starts.get(_key(data))
        if start is None and not self.trained:
            start = self._remember(data, drawn)
        if start is None:
            self.trainer.log.warn(
                "no win rate: the start policy was not sampled on these prompts; give them as eval_dataset when the trainer "
                "is made"
            )
            return {}
        ours_N, theirs_N = map(np.array, self._sides(data, drawn, start))
        known_N = np.isfinite(ours_N) & np.isfinite(theirs_N)
        if not known_N.any():
            self.trainer.log.warn(f"no win rate: {self.judge_name} judged none of {len(drawn)} pairs")
            return {}
        groups = np.array([of.group for of in drawn])[known_N].tolist()
        rate = win_rate(ours_N[known_N], theirs_N[known_N], groups).rate
        return {
            "win_rate": rate.estimate,
            "win_rate_low": rate.low,
            "win_rate_high": rate.high,
            "unjudged": 1 - float(known_N.mean()),
        }

    # Draws and scores

    def _draw(self, data: Data) -> list[Drawn]:
        """The same random numbers each time, so that a policy that did not move draws what it drew."""
        trainer = self.trainer
        prompts = [(tree.answers[0], trainer.items[data.first + i]) for i, tree in enumerate(data.trees)]
        sampling = trainer.args.sampling(trainer.completions_in_evaluation)
        return draw(trainer, trainer.engine, trainer.rewards, prompts, sampling, EVALUATION)[0]

    @property
    def _pairwise(self) -> PairwiseJudge | None:
        """The judge, where it compares."""
        return None if isinstance(self._judge, RewardSet) else self._judge

    def _scores(self, data: Data, drawn: list[Drawn]) -> list[float]:
        """The judge's score of each completion."""
        if self._judge is None:
            return [of.reward for of in drawn]
        found = self._over_ranks(drawn, lambda mine: self._score(self._judge, data, mine))
        return [reward for reward, _ in found]

    def _score(self, rewards: Any, data: Data, drawn: list[Drawn]) -> list[tuple[float, list[float]]]:
        columns, completions = self._given(data, drawn)
        scores = rewards.score(
            columns.pop("prompts"),
            completions,
            columns,
            completion_ids=[list(of.completion.token_ids) for of in drawn],
            trainer_state=self.trainer.state,
        )
        if scores.failures:
            self.trainer.log.warn(f"left out of evaluation:\n{scores.summary()}")
        return list(zip(scores.rewards_N.tolist(), scores.per_function_NF.tolist()))

    def _sides(self, data: Data, drawn: list[Drawn], start: Start) -> tuple[list[float], list[float]]:
        """Scores of both sides of each pair; of a judge that compares, its verdict and the middle. NaN without one."""
        judge = self._pairwise
        if judge is None:
            return self._scores(data, drawn), start.scores
        texts = {id(of): text for of, text in zip(drawn, start.texts)}

        def compare(mine: list[Drawn]) -> list[float]:
            found = judge.compare(
                [self._row(data, of)["prompt"] for of in mine],
                [of.completion.text for of in mine],
                [texts[id(of)] for of in mine],
            )
            return [math.nan if verdict is None else float(verdict) for verdict in found]

        verdicts = self._over_ranks(drawn, compare)
        return verdicts, [0.5] * len(verdicts)

    def _given(self, data: Data, drawn: list[Drawn]) -> tuple[dict[str, list[Any]], list[Any]]:
        """(prompts and the rows' other columns, completions as the prompts are)."""
        rows = [self._row(data, of) for of in drawn]
        names = [name for name in (rows[0] if rows else {}) if name != "prompt"]
        columns = {name: [row.get(name) for row in rows] for name in names}
        completions = [answer_of(row, of.completion) for row, of in zip(rows, drawn)]
        return columns | {"prompts": [row["prompt"] for row in rows]}, completions

    def _row(self, data: Data, of: Drawn) -> dict[str, Any]:
        return self.trainer.items[data.first + of.group]

    def _over_ranks(self, drawn: list[Drawn], measure: Callable[[list[Drawn]], list[_T]]) -> list[_T]:
        """What `measure` says of each completion, on every rank; each measures its share of the prompts."""
        accelerator = self.trainer.accelerator
        ranks, rank = accelerator.num_processes, accelerator.process_index
        mine = [i for i, of in enumerate(drawn) if of.group % ranks == rank]
        found = list(zip(mine, measure([drawn[i] for i in mine])))
        if ranks > 1:
            found = gather_object(found)
        return [value for _, value in sorted(found, key=lambda pair: pair[0])]


def token_figures(trainer: OnPolicyTrainer, drawn: Sequence[Drawn]) -> dict[str, float]:
    """Entropy, and the KL to the reference where there is one, by the policy's own forward. To be called on all ranks."""
    args, accelerator, reference = trainer.args, trainer.accelerator, trainer.reference
    completions = [of.completion for of in drawn]
    trees = [Tree(of.prompt_ids, (of.token_ids,), (of.mask,)) for of in completions]
    data = Data(trees, list(range(len(trees))), PrepareReport(), 0)
    share = share_out(
        data, range(len(trees)), args.per_device_eval_batch_size, args, accelerator, trainer.count
    )
    names = ("entropy",) if isinstance(reference, NoReference) else ("entropy", "kl", "kl_k3")
    sums = torch.zeros(len(names), dtype=torch.float64, device=accelerator.device)
    training = trainer.module.training
    trainer.policy.eval()
    with torch.no_grad(), trainer.module.attached():
        for i, run in enumerate(share.runs):
            batch = trainer.pack(data, run)
            ref_logps_P = None if len(names) == 1 else reference.token_logps(batch)
            _, found = trainer.policy(
                batch, _measuring(ref_logps_P, args.backend), stats=("logps", "entropy"), router_weight=0.0,
                temperature=args.temperature,
            )  # fmt: skip
            if i < share.num_real:
                sums += torch.stack([found[name] for name in names])
    trainer.policy.train(training)
    totals = dict(zip(names, accelerator.reduce(sums, "sum").tolist()))
    tokens = max(1, share.counts["trained"])
    figures = {name: total / tokens for name, total in totals.items()}
    return figures if "kl" not in totals else {**figures, "kl_sequence": totals["kl"] / len(trees)}


def _measuring(ref_logps_P: Tensor | None, backend: str) -> Callable[[Stats, slice], tuple[Tensor, Metrics]]:
    """A loss of 0 that sums what is measured: a `loss_fn` gets the statistics without their gradient's cost."""

    def loss_fn(stats: Stats, rows: slice) -> tuple[Tensor, Metrics]:
        sums = {"entropy": stats.entropy.double().sum()}
        if ref_logps_P is not None:
            for name, kind in (("kl", "k1"), ("kl_k3", "k3")):
                kl_N = kl_penalty(stats.logps, ref_logps_P[rows], kind=kind, backend=backend)
                sums[name] = kl_N.double().sum()
        return stats.logps.new_zeros(()), sums

    return loss_fn


def _key(data: Data) -> str:
    return content_hash(data.trees)
