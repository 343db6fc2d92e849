"""What trainers share that learn from completions of their own: prompts, an engine, reward functions, and draws.

    draw    completions of the next prompts, scored: one generation
    steps   `steps_per_generation / gradient_accumulation_steps` steps, `num_iterations` times over, train on it

A row of a step is a completion. What a draw is worth is the trainer's own affair: `appraise` makes the experience.

Letters: N completions, F reward functions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from alignfast.data import PROMPT_FORMATS, Batch, Prepared, PrepareReport, Rows, Tree, encode_prompts
from alignfast.rewards import RewardSet, RunningNormaliser
from alignfast.rollout import ENGINES, RolloutEngine, Sampling
from alignfast.trainers.batches import Counts, Data, Share, num_predictions, whole_on_ranks
from alignfast.trainers.config import TrainerConfig, config
from alignfast.trainers.experience import Drawn, Experience, describe, draw
from alignfast.trainers.judged import Judged, MetricsFunction
from alignfast.trainers.late import LateRewards
from alignfast.trainers.loop import Trainer
from alignfast.trainers.mismatch import MODES, correct
from alignfast.trainers.reference import FrozenModel, ReferenceOptions, make_reference
from alignfast.trainers.rollout_func import RolloutFunc
from alignfast.trainers.sampler import WholeCopy, sampler_of
from alignfast.trainers.shown import Shown
from alignfast.trainers.state import read_json, write_json

A_DRAW = 1 << 24  # numbers of one draw's samples, those of its further rounds included
_NORMALISER, _JUDGED = "reward_normaliser.json", "judged.json"


@config
class OnPolicyConfig(TrainerConfig):
    """Options of trainers that sample."""

    learning_rate: float = 1e-6
    """AdamW's step size at its highest."""
    max_length: int | None = None
    """None: prompts are never cut."""
    disable_dropout: bool = False
    """Set every dropout of the model to 0."""
    max_completion_length: int = 512
    """A completion ends here at the latest."""
    temperature: float = 1.0
    """Of the samples, > 0; log-probs are of the same temperature."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that hold this probability."""
    top_k: int = 0
    """Sample among so many likeliest tokens; 0 among all."""
    min_p: float = 0.0
    """Sample among tokens at least this share as likely as the likeliest. (TRL: None for 0.)"""
    stop: list[str] | None = None
    """Texts that end a completion, as the end token does."""
    engine: str = "native"
    """What samples: `native`, `transformers` for a model that can't be packed, or `vllm`, a server (EXPERIMENTAL)."""
    cuda_graphs: bool | None = None
    """Steps of the native engine's decoding as CUDA graphs; None: on a GPU."""
    decode_backend: str | None = None
    """Of the native engine's attention in decoding; `flash` is flash-attn 2 or 3. None: as `backend`."""
    vllm_server_base_url: str | None = None
    """Address of that server; its weights are brought up to date before each draw."""
    vllm_server_timeout: float = 240.0
    """Seconds to wait for it to come up."""
    vllm_importance_sampling_correction: bool = True
    """Weigh tokens by how much likelier they are under the policy than under the server's arithmetic."""
    vllm_importance_sampling_mode: str = "sequence_mask"
    """By `token` or `sequence`, and what becomes of weights beyond the cap: `_truncate` or `_mask`."""
    vllm_importance_sampling_clip_max: float | None = 3.0
    """The cap."""
    vllm_importance_sampling_clip_min: float | None = None
    """The least weight."""
    steps_per_generation: int | None = None
    """Micro-batches of a draw; None is gradient_accumulation_steps, of which it is a multiple."""
    num_iterations: int = 1
    """Passes over each draw, >= 1."""
    beta: float = 0.0
    """Weight of the KL to the model as it was before training; 0 needs no reference."""
    reward_weights: list[float] | None = None
    """A factor for each reward function; None is 1 for each."""
    disagreement_coef: float | None = None
    """What the spread of the heads costs, >= 0, of reward models that are ensembles; those need it."""
    reward_normalization_decay: float | None = None
    """Put each reward function on mean 0 and deviation 1 of its recent past, in [0, 1): for feedback that drifts."""
    measure_kl: bool | None = None
    """Measure the KL to that model in evaluation, also where beta is 0: True keeps a frozen copy for it if need be. None:
    where that takes no memory, with new adapters."""
    log_completions: bool = False
    """Print completions with their rewards at each log. The first few of the last draw go to samples.jsonl anyway."""
    num_completions_to_print: int | None = None
    """So many of them; None for all of the last draw."""
    mask_truncated_completions: bool = False
    """Completions that were cut carry no loss."""
    reward_timeout: float = 300.0
    """Seconds that a reward function may take."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.max_length is None, "max_length", "None: prompts are never cut")
        self._at_least(1, "num_iterations", "steps_per_generation")
        self._at_least(1, "max_completion_length", "num_completions_to_print")
        for name in ("temperature", "reward_timeout", "vllm_server_timeout"):
            self._require(getattr(self, name) > 0, name, "above 0")
        self._choose("engine", *ENGINES)
        self._needs(self.engine == "native", "engine='native'", "cuda_graphs", "decode_backend")
        self._choose("vllm_importance_sampling_mode", *MODES)
        cap, floor = self.vllm_importance_sampling_clip_max, self.vllm_importance_sampling_clip_min
        self._require(cap is None or cap > 0, "vllm_importance_sampling_clip_max", "above 0, or None")
        fits = floor is None or 0 <= floor <= (math.inf if cap is None else cap)
        self._require(fits, "vllm_importance_sampling_clip_min", "between 0 and the cap, or None")
        fits = self.engine != "vllm" or self.vllm_server_base_url is not None
        self._require(fits, "vllm_server_base_url", "given with engine='vllm'")
        self._needs(self.engine == "vllm", "engine='vllm'", "vllm_")
        self._needs(self.log_completions, "log_completions", "num_completions_to_print")
        accumulated = self.gradient_accumulation_steps
        self._require(
            self.micro_batches_per_draw % accumulated == 0,
            "steps_per_generation",
            f"a multiple of {accumulated}, the accumulation steps",
        )
        self.sampling(1)
        if self.reward_normalization_decay is not None:
            RunningNormaliser(self.reward_normalization_decay)

    @property
    def micro_batches_per_draw(self) -> int:
        """`steps_per_generation` with its default."""
        return self.steps_per_generation or self.gradient_accumulation_steps

    def sampling(self, n: int) -> Sampling:
        """How completions are drawn."""
        return Sampling(
            n=n, max_new_tokens=self.max_completion_length, temperature=self.temperature, top_p=self.top_p,
            top_k=self.top_k, min_p=self.min_p, stop=tuple(self.stop or ()),
            seed=self.seed if self.data_seed is None else self.data_seed,
        )  # fmt: skip


class OnPolicyTrainer(Trainer):
    """What GRPOTrainer and PPOTrainer have in common."""

    args: OnPolicyConfig
    formats = PROMPT_FORMATS
    engine: RolloutEngine
    copy: WholeCopy | None = None  # of the policy, for the engine, where the policy is sharded
    completions_of_each = 1  # prompt
    ref_model: Any = None  # the reference; None is the model as it was given
    late: LateRewards | None = None  # what waits for a reward that comes after its step

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        *args: Any,
        rollout_func: RolloutFunc | None = None,
        judge: Any = None,
        gold_reward_funcs: Any = None,
        compute_metrics: MetricsFunction | None = None,
        **rest: Any,
    ) -> None:
        self.judged, self.shown = Judged(self, judge, gold_reward_funcs, compute_metrics), Shown(self)
        self.reward_funcs, self.rollout_func = reward_funcs, rollout_func
        self.scorers: RewardSet | None = None
        self.items: list[dict[str, Any]] = []  # the rows of all data, by their numbers
        self.experience, self.drawn_at = Experience(), -1
        super().__init__(model, *args, **rest)
        decay = self.args.reward_normalization_decay
        self.normaliser = None if decay is None else RunningNormaliser(decay)
        self.draw_size()  # tells sizes that do not fit

    @property
    def rewards(self) -> RewardSet:
        """The reward functions, looked up before any row is read."""
        if self.scorers is None:
            args = self.args
            options = dict(timeout=args.reward_timeout, disagreement_coef=args.disagreement_coef)
            self.scorers = RewardSet(self.reward_funcs, args.reward_weights, **options)
        return self.scorers

    # What such a trainer defines

    def appraise(self, drawn: list[Drawn], metrics: dict[str, float]) -> Experience:
        """What steps train on: completions with their advantages. To be called on all ranks."""
        raise NotImplementedError

    # What the loop asks for

    def prepare(self, rows: Rows) -> Prepared:
        """Prompts, each as a text that carries no loss."""
        if self.rollout_func is None:  # which may bring columns that no one knows yet
            self.rewards.check(rows.columns, conversational=rows.conversational)
        self.judged.check(rows.columns, conversational=rows.conversational)
        prompts = encode_prompts(rows, self.processing_class)
        positions, most = self.module.positions, self.args.max_completion_length
        for index, ids in enumerate(prompts):
            if not ids:
                raise ValueError(f"{rows.where(index)}: the prompt has no token to start from")
            if positions is not None and len(ids) > positions - most:
                raise ValueError(
                    f"{rows.where(index)}: the prompt has {len(ids)} tokens, and the model's {positions} positions less "
                    f"max_completion_length={most} leave {positions - most}: shorten it, or lower max_completion_length"
                )
        del self.items[sum(len(data.trees) for data in self.all_data) :]
        self.items += rows.items
        trees = [Tree((), (tuple(ids),), ((False,) * len(ids),)) for ids in prompts]
        tokens = sum(map(len, prompts))
        largest = max(map(max, prompts), default=-1)
        report = PrepareReport(rows=len(trees), tokens=tokens, tokens_shared=tokens, largest_token_id=largest)
        return Prepared(trees, report, list(range(len(trees))))

    def draw_size(self) -> tuple[int, int]:
        """Prompts of a draw, and the steps that train on it."""
        args, ranks, n = self.args, self.accelerator.num_processes, self.completions_of_each
        rows = args.per_device_train_batch_size * args.micro_batches_per_draw * ranks
        steps = args.micro_batches_per_draw // args.gradient_accumulation_steps
        if rows % n or rows // n % steps:
            raise ValueError(
                f"a draw of {rows} completions (per_device_train_batch_size x steps_per_generation x ranks) for {steps} steps "
                f"does not divide into groups of {n} completions of a prompt: change one of them"
            )
        return rows // n, steps * args.num_iterations

    @property
    def completions_in_evaluation(self) -> int:
        """Completions of each held-out prompt."""
        return 1

    @property
    def needs_reference(self) -> bool:
        """Whether the reference's log-probs are asked for."""
        return self.args.beta > 0

    @property
    def modules_in_memory(self) -> list[nn.Module]:
        """The policy, and the reference where it is a second model."""
        return [self.module, *([self.reference.policy] if isinstance(self.reference, FrozenModel) else [])]

    def describe(self) -> str:
        """What is said before the first step."""
        args, plan = self.args, self.plan
        return (
            f"{plan.num_rows:,} prompts; {plan.num_steps:,} steps, {plan.steps_per_draw} on each draw of "
            f"{plan.rows_per_step * self.completions_of_each:,} completions ({self.completions_of_each} of each prompt, up to "
            f"{args.max_completion_length} tokens) by the {self.engine.name} engine"
        )

    def before_training(self) -> None:
        """Take the reference while the model still is it, and make the engine."""
        options = ReferenceOptions(
            needed=self.needs_reference or self.judged.wants_reference, temperature=self.args.temperature
        )
        self.reference: Any = make_reference(self, self.ref_model, options)
        self.copy, self.engine = sampler_of(self)

    # Drawing

    def rows_of(self, step: int) -> tuple[Data, list[int]]:
        """The completions of a step, drawn where it is the first of a draw."""
        if step == 0:
            self.judged.begin()
            self.shown.begin(0)
        number, place = divmod(step, self.plan.steps_per_draw)
        if number != self.drawn_at:
            self.experience, self.drawn_at = self.collect(number), number
        steps = self.plan.steps_per_draw // self.args.num_iterations
        iteration, part = divmod(place, steps)
        order, trees = self.order(number, iteration), self.experience.trees
        first, last = (len(order) * i // steps for i in (part, part + 1))
        rows = order[first : max(first + 1, last)]  # fewer completions than steps: neighbours share one
        self.step_counts = {
            "tokens": sum(sum(num_predictions(trees[row])) for row in rows),
            "sequences": len(rows),
        }
        kept = [row for row in rows if self._teaches(row)] or [rows[0]]
        return self.experience.data, whole_on_ranks(kept, self.accelerator.num_processes)

    def order(self, number: int, iteration: int) -> list[int]:
        """The completions of a draw in the order in which a pass over it takes them."""
        return list(range(len(self.experience.trees)))

    def _teaches(self, row: int) -> bool:
        """Whether a completion has a gradient."""
        return True

    def trains_on(self, of: Drawn) -> bool:
        """Whether a completion's tokens carry loss: not without a reward, of whatever kind the loss is."""
        cut = self.args.mask_truncated_completions and of.completion.finish_reason == "length"
        return not math.isnan(of.reward) and not cut

    def collect(self, number: int) -> Experience:
        """Draw completions, and say what each is worth."""
        drawn, metrics = self.sample(self.plan.rows(number * self.plan.steps_per_draw), number * A_DRAW)
        return self.appraise(drawn, {**metrics, **describe(drawn, self.rewards.names)})

    def sample(self, rows: list[int], first_number: int) -> tuple[list[Drawn], dict[str, float]]:
        """Completions of rows of the training data with their rewards, and the seconds that it took."""
        prompts = [
            (self.train_data.trees[row].answers[0], self.items[self.train_data.first + row]) for row in rows
        ]
        sampling = self.args.sampling(self.completions_of_each)
        drawn, seconds = draw(self, self.engine, self.rewards, prompts, sampling, first_number)
        if first_number % A_DRAW == 0:  # later rounds of a draw fill up what the first left
            self.shown.take(drawn, [row for _, row in prompts], self.rewards.names)
        return drawn, seconds

    def rewards_of(self, drawn: list[Drawn]) -> tuple[Tensor, Tensor]:
        """(rewards_NF, their weighted sums), on the scale of the recent past where that is asked for; NaN for none."""
        rewards_NF = torch.tensor([of.rewards for of in drawn], dtype=torch.float64)
        rewards_N = torch.tensor([of.reward for of in drawn], dtype=torch.float64)
        if self.normaliser is not None:
            rewards_NF = self.normaliser.normalise(rewards_NF, self.rewards.names)
            weights_F = torch.tensor(self.rewards.weights, dtype=torch.float64)
            rewards_N = (rewards_NF * weights_F).nansum(1).masked_fill(rewards_N.isnan(), torch.nan)
        return rewards_NF, rewards_N

    def trees_of(self, drawn: list[Drawn], metrics: dict[str, float]) -> Experience:
        """Completions with their log-probs when they were drawn, and the reference's where it is asked."""
        experience = Experience(metrics={"seconds/logps": 0.0, **metrics})
        for of in drawn:
            completion = of.completion
            trained = self.trains_on(of)
            mask = tuple(wrote and trained for wrote in completion.mask)
            experience.trees.append(Tree(completion.prompt_ids, (completion.token_ids,), (mask,)))
            logps = [logp for logp, counts in zip(completion.logps, mask) if counts]
            experience.old_logps.append(torch.tensor(logps))
        if self.engine.name == "vllm":
            correct(self, experience, drawn)
        if self.needs_reference:
            experience.more["ref_logps"] = self.of_tokens(experience, self.reference.token_logps)
        return experience

    def of_tokens(self, experience: Experience, measure: Callable[[Batch], Tensor]) -> list[Tensor]:
        """What a forward pass says of each trained token, on every rank; each computes a share of the completions."""
        accelerator, size = self.accelerator, self.args.per_device_train_batch_size
        began, ranks, number = time.perf_counter(), accelerator.num_processes, len(experience.trees)
        found: list[tuple[int, Tensor]] = []
        # an epoch's last draw may not divide by the ranks, and with fsdp all must pass as often: the first row fills up
        for first in range(accelerator.process_index, number + accelerator.process_index, size * ranks):
            mine = list(range(number))[first : first + size * ranks : ranks]
            batch = self.pack(experience.data, mine or [0])
            found += zip(batch.rows, measure(batch).float().cpu().split(batch.lengths))
        took = experience.metrics.get("seconds/logps", 0.0)
        experience.metrics["seconds/logps"] = took + time.perf_counter() - began
        if accelerator.num_processes > 1:
            found = gather_object(found)
        return [of for _, of in sorted(dict(found).items())]

    def count(self, tree: Tree) -> Counts:
        """Completions that are computed, and their tokens that carry loss: what metrics are means over. The loss is divided
        by the counts of all that was drawn for the step, also of what has no gradient and is left out."""
        return {"sequences": 1, "trained": sum(num_predictions(tree))}

    def before_step(self, data: Data, share: Share) -> None:
        """The draw's metrics, with each of its steps."""
        ranks = self.accelerator.num_processes
        self.log.meter.add(
            {name: torch.tensor(value / ranks) for name, value in self.experience.metrics.items()}
        )

    # Evaluation and checkpoints

    def evaluate_on(self, data: Data) -> dict[str, float]:
        """Rewards of held-out prompts' completions, and how those compare with the start policy's."""
        return self.judged.evaluate(data)

    def after_log(self) -> None:
        """Completions of the last draw, for people to read."""
        self.shown.tell()

    def save_more(self, folder: Path) -> None:
        """The draw that steps are in the middle of."""
        if self.experience.trees:
            self.experience.save(folder)
        if self.normaliser is not None:
            write_json(folder / _NORMALISER, self.normaliser.state_dict())
        write_json(folder / _JUDGED, {**self.judged.state(), "shown": self.shown.rows})

    def load_more(self, folder: Path) -> None:
        """Go on in the middle of a draw."""
        if self.normaliser is not None:
            self.normaliser.load_state_dict(read_json(folder / _NORMALISER))
        judged = read_json(folder / _JUDGED)
        self.judged.load(judged)
        self.shown.begin(self.state.global_step)
        self.shown.rows = judged["shown"]
        self.experience = Experience.load(folder)
        self.drawn_at = (
            (self.state.global_step - 1) // self.plan.steps_per_draw if self.experience.trees else -1
        )
