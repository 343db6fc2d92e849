"""Options of the learner, on one level, as a file for `alignfast online --config` has them."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Any

from peft import LoraConfig

from alignfast.online.feedback import KINDS, SAID
from alignfast.online.learning.gate import GateConfig
from alignfast.online.learning.trainer import FeedbackConfig
from alignfast.trainers.config import TrainerConfig, config
from alignfast.trainers.dpo import DPOConfig
from alignfast.trainers.grpo import GRPOConfig
from alignfast.trainers.kto import KTOConfig
from alignfast.trainers.ppo import PPOConfig

METHODS: dict[str, type[TrainerConfig]] = {
    "grpo": GRPOConfig,
    "ppo": PPOConfig,
    "dpo": DPOConfig,
    "kto": KTOConfig,
}
ON_POLICY = ("grpo", "ppo")
ANSWER_TOKENS = 256  # of a fresh answer, where nothing says otherwise
# Options that change nothing of what a policy is trained to be: all others do, those too that are yet to come.
NOT_OF_TRAINING = (
    "db", "output_dir", "min_votes", "max_wait", "poll_seconds", "judge", "task_suites", "safety_suites", "eval_prompts", "gate",
    "canary_share", "canary_margin", "canary_voters", "canary_seconds", "watch_seconds", "watch_drop",
)  # fmt: skip
# What the loop sets by itself.
_OWN = ("output_dir", "resume_from_checkpoint", "push_to_hub", "load_best_model_at_end")


@config
class OnlineConfig:
    """Options of OnlineLoop."""

    model: str | None = None
    """Folder or hub name of the start policy, for a store in which no version serves yet."""
    db: str = "sqlite:///feedback.db"
    """Database: sqlite:///FILE or postgresql://USER@HOST/NAME."""
    output_dir: str = "versions"
    """Folder of the versions' folders; the server must find them under the same path."""

    min_votes: int = 50
    """A round begins with so many votes that no reward model has learned from yet, >= 1."""
    max_wait: float | None = None
    """Or after so many seconds with any. None waits for min_votes."""
    poll_seconds: float = 5.0
    """How often the store is looked at while there is something to wait for."""
    kinds: list[str] = field(default_factory=lambda: list(SAID))
    """Kinds of votes that are learned from. Hints (`implicit`) are left out unless named."""
    votes_per_user: int | None = 100
    """Of each voter the first so many in a round, >= 1; the others count as seen. All anonymous voters are one. None: all."""
    held_out: float = 0.2
    """Share of the voters, in [0, 1), whose votes are never trained on but measured with."""
    held_out_by: str = "user"
    """What is held out whole: a `user`, or a `prompt` where few people vote."""

    reward_model: str | None = None
    """Folder or hub name that the first reward model starts from; None: the start policy with a fresh head."""
    reward_options: dict[str, Any] = field(default_factory=dict)
    """Options of the reward model's update: those of RewardConfig, and of FeedbackConfig in
    `alignfast.online.learning.trainer`."""

    method: str = "grpo"
    """`grpo` or `ppo` on fresh answers to logged prompts; `dpo` or `kto` straight from votes."""
    policy_options: dict[str, Any] = field(default_factory=dict)
    """Options of that trainer, by its own names."""
    peft: dict[str, Any] | None = None
    """LoraConfig's options: adapters are trained, on the first round added. None trains the whole model."""
    max_prompts: int = 256
    """Logged prompts of a round, the newest, >= 1."""
    max_completion_length: int | None = None
    """Tokens of a fresh answer, in training and evaluation. None: 256, or half of the model's positions where that is less."""
    kl_budget: float | None = 0.1
    """Training ends when the KL to the version that serves has reached so many nats a token. None: no budget."""
    kl_every: int = 10
    """Steps between two measurements of it."""

    logged_answers: bool | None = None
    """Let GRPO learn from the voted answers of older versions too, weighed by how likely they are now. None: with grpo."""
    max_age: int = 2
    """Answers of the version that serves and of so many before it are learned from by the policy, >= 0."""
    max_logged_kl: float = 0.5
    """Of those, versions that lie no more nats a token from the one that serves."""

    judge: str | None = None
    """What compares answers with the serving version's: `api:MODEL`, an import path, or a folder; never the reward model
    in use. None: no win rate."""
    task_suites: dict[str, str] = field(default_factory=dict)
    """Name and `package.module:function` of the operator's own suites: from a function that answers prompts to a share."""
    safety_suites: dict[str, str] = field(default_factory=dict)
    """The same for what must not fall at all."""
    eval_prompts: int = 64
    """Logged prompts on which candidate and serving version are compared, >= 1."""
    gate: dict[str, Any] = field(default_factory=dict)
    """Limits of the gate: max_kl, max_length_ratio, max_cut_rise, min_distinct_ratio, max_suite_drop, require_significant."""

    canary_share: float = 0.1
    """Share of the users who get duels of a candidate that passed the gate; 0 promotes it at once."""
    canary_margin: float = 0.0
    """How far above 1/2 the candidate's share of wins must lie, for certain."""
    canary_voters: int = 1000
    """The canary ends undecided, and is refused, after duels of so many voters."""
    canary_seconds: float = 7 * 86_400
    """Or after so many seconds."""
    watch_seconds: float = 86_400
    """A new version is watched for so long after its promotion; 0: not at all."""
    watch_drop: float = 0.0
    """It is rolled back when its satisfaction lies more than this below its predecessor's, for certain."""
    seed: int = 0
    """Of what is held out, and of fresh answers in evaluation."""

    def __post_init__(self) -> None:
        for name in (
            "min_votes",
            "max_prompts",
            "kl_every",
            "eval_prompts",
            "canary_voters",
        ):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("max_age", "max_logged_kl", "canary_seconds", "watch_seconds", "watch_drop"):
            self._require(getattr(self, name) >= 0, name, "at least 0")
        self._require(0 <= self.held_out < 1, "held_out", "in [0, 1)")
        self._require(
            0 <= self.canary_margin < 0.5, "canary_margin", "in [0, 0.5): nobody wins more than all"
        )
        for name in ("max_wait", "kl_budget"):
            value = getattr(self, name)
            self._require(value is None or value > 0, name, "above 0, or None")
        for name in ("votes_per_user", "max_completion_length"):
            value = getattr(self, name)
            self._require(
                value is None or (type(value) is int and value >= 1), name, "a whole number >= 1, or None"
            )
        self._require(self.poll_seconds > 0, "poll_seconds", "above 0")
        self._require(0 <= self.canary_share <= 1, "canary_share", "in [0, 1]")
        self._require(self.method in METHODS, "method", f"one of {', '.join(METHODS)}")
        self._require(self.held_out_by in ("user", "prompt"), "held_out_by", "user or prompt")
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        self._require(bool(self.kinds) and not unknown, "kinds", f"some of {', '.join(KINDS)}")
        self._check_method()
        both = sorted({*self.task_suites} & {*self.safety_suites})
        if both:
            raise ValueError(
                f"task_suites and safety_suites both name {', '.join(both)}: give each its own name"
            )
        for name in ("policy_options", "reward_options"):
            own = [option for option in getattr(self, name) if option in _OWN]
            if own:
                raise ValueError(f"{name}: {', '.join(own)} is set by the loop itself: leave it out")
        for name, make in (  # each tells a wrong option of its own
            ("policy_options", lambda: self.trainer_config(self.folder)),
            ("reward_options", lambda: self.feedback),
            ("gate", lambda: GateConfig(**self.gate)),
            ("peft", lambda: LoraConfig(**(self.peft or {}))),
            ("reward_options.peft", lambda: LoraConfig(**(self.feedback.peft or {}))),
        ):
            try:
                make()
            except TypeError as error:
                raise ValueError(f"{name}: {error}") from error
        if "implicit" in self.kinds and self.feedback.implicit_weight == 0:
            raise ValueError(
                "kinds names implicit, and hints weigh nothing: give reward_options.implicit_weight, or leave them out"
            )

    def _check_method(self) -> None:
        """Options that the method has no use for stay as they are."""
        for name, wanted, whose in (
            ("logged_answers", self.method == "grpo" or not self.logged_answers, "grpo"),
            ("max_logged_kl", self.uses_logged, "grpo with logged answers"),
            ("max_age", self.learns_from_votes, "dpo, kto and grpo with logged answers"),
            ("max_prompts", self.method in ON_POLICY, "grpo and ppo"),
        ):
            value, default = getattr(self, name), getattr(OnlineConfig, name)
            if not wanted and value != default:
                raise ValueError(
                    f"{name} is an option of {whose}, and method={self.method!r}: leave it out, got {value!r}"
                )

    def _require(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    @property
    def folder(self) -> Path:
        """`output_dir` as an absolute path: versions keep it."""
        return Path(self.output_dir).expanduser().resolve()

    @property
    def uses_logged(self) -> bool:
        """`logged_answers` with its default."""
        return self.method == "grpo" if self.logged_answers is None else self.logged_answers

    @property
    def learns_from_votes(self) -> bool:
        """Whether votes train the policy themselves, and not by way of the reward model alone."""
        return self.method not in ON_POLICY or self.uses_logged

    @property
    def feedback(self) -> FeedbackConfig:
        """`reward_options` with their defaults."""
        return FeedbackConfig(**self.reward_options)

    def trainer_config(
        self, folder: Path, answer_tokens: int = ANSWER_TOKENS, positions: int | None = None
    ) -> Any:
        """The config of the policy's trainer.

        Args:
            folder: of the run.
            answer_tokens: of a fresh answer, unless the trainer's own options say otherwise.
            positions: of the model, where rows are cut at the latest unless these options say otherwise; None: it has no end.

        Raises:
            ValueError, TypeError: an option of it is wrong.
        """
        options: dict[str, Any] = {
            "num_train_epochs": 1,
            "report_to": "none",
            "save_steps": 50,
            "seed": self.seed,
        }
        options |= {"save_total_limit": 1, "disable_tqdm": True}
        if self.method in ON_POLICY:
            options["max_completion_length"] = answer_tokens
        elif positions is not None:
            options["max_length"] = min(positions, TrainerConfig.max_length or positions)
        if self.method == "grpo":
            options["beta"] = 0.04
            if self.uses_logged:
                options["late_max_age"] = 0  # nothing waits; it is the weighing that is wanted
        return METHODS[self.method](**{**options, **self.policy_options, "output_dir": str(folder)})
