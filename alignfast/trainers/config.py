"""Options that all trainers share, with the names, meanings and defaults of TRL 1.16 wherever it has the option.

Where a default differs from TRL's, the option's text says so. Not here: options of one trainer (they stand beside
it), and those of TRL that are refused (refused.py).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from typing_extensions import dataclass_transform

from alignfast.models.four_bit import QUANT_TYPES, FourBit
from alignfast.trainers.refused import option_names, refuse_unknown

DEFAULT_OUTPUT_DIR = "trainer_output"
C = TypeVar("C", bound=type)


@dataclass_transform(frozen_default=True)
def config(cls: C) -> C:
    """A frozen dataclass whose constructor says more about an option that it doesn't have."""
    made: Any = dataclass(frozen=True)(cls)
    construct = made.__init__

    @functools.wraps(construct)
    def checked(self: Any, *args: Any, **options: Any) -> None:
        refuse_unknown(cls.__name__, option_names(cls), options)
        construct(self, *args, **options)

    made.__init__ = checked
    return made


@config
class TrainerConfig:
    """What every trainer takes. Intervals in steps may be a share of the run, as a number below 1."""

    output_dir: str | None = None
    """Folder of the run: config, metrics, checkpoints. None is `trainer_output`, as TRL's users know it."""

    _: KW_ONLY

    per_device_train_batch_size: int = 8
    """Rows of one micro-batch on each rank, >= 1."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of one step, >= 1. The loss is normalised over the whole step, so 8 x 1 equals 1 x 8 (but for what
    is defined on a batch: the `aot` losses, which sort it, and a mixture's router loss)."""
    max_tokens_per_batch: int | None = None
    """Cuts micro-batches by tokens instead of rows. Rows of a step, and so the result, stay the same, but for what is
    defined on a batch. A row above it is refused when it is read."""
    per_device_eval_batch_size: int = 8
    """Rows of one batch of evaluation on each rank, >= 1."""
    num_train_epochs: float = 3.0
    """Passes over the data, > 0; unused where max_steps is given."""
    max_steps: int = -1
    """Steps of the whole run; -1 goes by num_train_epochs."""
    dataloader_drop_last: bool = False
    """Leave out an epoch's last rows where they don't fill a step."""
    train_sampling_strategy: str = "random"
    """`random`, drawn anew each epoch from the seed, or `sequential`."""

    learning_rate: float = 5e-5
    """AdamW's step size at its highest."""
    lr_scheduler_type: str = "linear"
    """Any name of transformers' get_scheduler: linear, cosine, constant, constant_with_warmup, ..."""
    lr_scheduler_kwargs: dict[str, Any] | None = None
    """Further arguments of that schedule."""
    warmup_steps: float = 0
    """Steps over which the learning rate rises from 0."""
    optim: str = "adamw_torch_fused"
    """`adamw_torch_fused` or `adamw_torch`: torch's AdamW with its step in one kernel or in several."""
    weight_decay: float = 0.0
    """AdamW's decay of weights; norms and biases are left out."""
    adam_beta1: float = 0.9
    """Decay of the gradient's running mean."""
    adam_beta2: float = 0.999
    """Decay of the gradient's running square."""
    adam_epsilon: float = 1e-8
    """Added to the denominator."""
    max_grad_norm: float = 1.0
    """The step's gradient is scaled down to this norm; 0 leaves it."""

    max_length: int | None = 1024
    """Tokens of a sequence, prompt and completion; longer ones are cut. None cuts nothing."""
    truncation_mode: str = "keep_start"
    """Which end stays when a sequence is cut: `keep_start` or `keep_end`."""
    truncation_modes: ClassVar[tuple[str, ...]] = ("keep_start", "keep_end")
    layout: str = "shared"
    """`shared`: prompts are computed once for all their answers. `packed`: no padding. `padded`: as others do it. All
    give the same losses, but for a mixture's router loss, which counts the tokens that were computed."""
    backend: str = "auto"
    """Kernels: `auto`, `torch`, `native` or `triton`."""

    bf16: bool | None = None
    """Mixed precision in bfloat16. None: on GPUs that have it, unless fp16. On CPUs with instructions for it (avx512_bf16,
    amx_bf16) about 1.5 times as fast as float32, on others slower. (TRL: on every CPU by default.)"""
    fp16: bool = False
    """Mixed precision in float16, with loss scaling."""
    dtype: str | None = None
    """Type of the parameters: float32, bfloat16, float16, auto. None: float32 for a path, a given model's own."""
    load_in_4bit: bool = False
    """Load the linear layers of a model by name in 4 bits, to train LoRA on (QLoRA); needs bitsandbytes. A reference or
    critic of its own is loaded whole."""
    bnb_4bit_quant_type: str = "nf4"
    """Codes of 4 bits: `nf4` or `fp4`."""
    use_bnb_nested_quant: bool = True
    """Quantise the scales too. (TRL's default: False.)"""
    bnb_4bit_compute_dtype: str | None = None
    """Type of the products with 4-bit weights; None: bfloat16 on GPUs that have it, else float32. (TRL: dtype.)"""
    gradient_checkpointing: bool = True
    """Compute activations again in the backward pass: less memory for about a quarter more work."""
    disable_dropout: bool = True
    """Set every dropout of the model to 0."""
    router_aux_loss_coef: float | None = None
    """Weight of a mixture of experts' balancing loss. None: the model's own; 0: none."""
    trust_remote_code: bool = False
    """Run code that a model brings with it."""

    use_cpu: bool = False
    """Stay on the CPU where there is a GPU."""
    fsdp: bool = False
    """Shard parameters, gradients and optimizer over the ranks (FSDP2), one unit per decoder layer."""
    keep_cpu_memory: bool = True
    """On Linux CPUs, have malloc keep freed memory: a fresh MB costs 0.4 ms in page faults. Process-wide, for good."""

    logging_steps: float = 10
    """Steps between two logged lines."""
    logging_strategy: str = "steps"
    """`steps`, `epoch` or `no`."""
    logging_first_step: bool = False
    """Also log step 1."""
    report_to: str | list[str] = "tensorboard"
    """`tensorboard`, `wandb`, another tracker of accelerate, several, or `none`. (TRL's default: `none`.)"""
    run_name: str | None = None
    """Name of the run for trackers; None is the output folder's."""
    disable_tqdm: bool = False
    """No progress bar: plain lines, as on anything that is no terminal."""

    eval_strategy: str | None = None
    """`steps`, `epoch` or `no`. None: `steps` where eval_steps is given. (TRL: `no`.)"""
    eval_steps: float | None = None
    """Steps between two evaluations; None is logging_steps."""
    eval_delay: float = 0
    """Steps (or epochs) before the first evaluation."""
    eval_on_start: bool = False
    """Also evaluate before the first step."""

    save_strategy: str = "steps"
    """`steps`, `epoch`, `best` (at every evaluation that is the best so far) or `no`."""
    save_steps: float = 500
    """Steps between two checkpoints; `steps` also saves at the end."""
    save_total_limit: int | None = None
    """Checkpoints kept, the newest; the best one always is. None keeps all."""
    load_best_model_at_end: bool = False
    """Put back the weights of the best evaluation when training ends; every evaluation that is the best is saved."""
    metric_for_best_model: str | None = None
    """Metric that says which is best, with or without `eval_`; None is `loss`."""
    greater_is_better: bool | None = None
    """Direction of that metric; None: greater, unless its name ends in `loss`."""
    resume_from_checkpoint: str | bool | None = None
    """True: go on from the newest complete checkpoint of output_dir. A path: from that one."""

    push_to_hub: bool = False
    """Push model, tokenizer and card when training has ended."""
    hub_model_id: str | None = None
    """Repository to push to; None is the output folder's name."""
    hub_token: str | None = None
    """Token for the hub; None is the one you are logged in with."""
    hub_private_repo: bool | None = None
    """Make the repository private."""

    seed: int = 42
    """Seed of dropout, of new LoRA weights, and of the order of rows unless data_seed is given."""
    data_seed: int | None = None
    """Seed of the order of rows."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            self._require(not (isinstance(value, float) and math.isnan(value)), name, "a number")
        if self.output_dir is not None:
            object.__setattr__(self, "output_dir", os.path.expanduser(os.fspath(self.output_dir)))
        object.__setattr__(self, "resume_from_checkpoint", resume_option(self.resume_from_checkpoint))
        self._at_least(
            1, "per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size"
        )
        for name in ("max_length", "max_tokens_per_batch", "save_total_limit"):
            value = getattr(self, name)
            self._require(value is None or value >= 1, name, "at least 1, or None")
        self._at_least(0, "learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "eval_delay")
        weight = self.router_aux_loss_coef
        self._require(weight is None or weight >= 0, "router_aux_loss_coef", "at least 0, or None")
        for name in ("logging_steps", "save_steps", "eval_steps"):
            value = getattr(self, name)
            self._require(value is None or value > 0, name, "above 0")
        self._require(
            self.max_steps == -1 or self.max_steps >= 1, "max_steps", "at least 1, or -1 for epochs"
        )
        self._require(self.num_train_epochs > 0, "num_train_epochs", "above 0")
        self._choose("layout", "shared", "packed", "padded")
        self._choose("truncation_mode", *self.truncation_modes)
        self._choose("train_sampling_strategy", "random", "sequential")
        self._choose("optim", "adamw_torch_fused", "adamw_torch")
        self._choose("logging_strategy", "steps", "epoch", "no")
        self._choose("eval_strategy", "steps", "epoch", "no", None)
        self._choose("save_strategy", "steps", "epoch", "best", "no")
        self._choose("dtype", "float32", "bfloat16", "float16", "auto", None)
        self._choose("bnb_4bit_quant_type", *QUANT_TYPES)
        self._choose("bnb_4bit_compute_dtype", "float32", "bfloat16", "float16", None)
        self._needs(self.load_in_4bit, "load_in_4bit", "bnb_4bit_", "use_bnb_nested_quant")
        self._require(not (self.load_in_4bit and self.fsdp), "fsdp", "off where load_in_4bit is on")
        self._require(not (self.bf16 and self.fp16), "bf16", "off where fp16 is on")
        if self.eval_strategy is None:
            object.__setattr__(self, "eval_strategy", "no" if self.eval_steps is None else "steps")
        if self.load_best_model_at_end or self.save_strategy == "best":
            self._require(
                self.eval_strategy != "no", "eval_strategy", "`steps` or `epoch` to know the best model"
            )

    def _require(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    def _at_least(self, least: float, *names: str) -> None:
        """None is for options whose default it is."""
        for name in names:
            value, default = getattr(self, name), getattr(type(self), name)
            self._require(default is None if value is None else value >= least, name, f"at least {least}")

    def _choose(self, name: str, *choices: str | None) -> None:
        self._require(getattr(self, name) in choices, name, "one of " + ", ".join(map(str, choices)))

    def _needs(self, holds: bool, what: str, *prefixes: str) -> None:
        """Refuse options, whose names begin so, that shape what another one switches on, where that is off."""
        for name in option_names(type(self)):
            value = getattr(self, name)
            if not holds and name.startswith(prefixes) and value != getattr(type(self), name):
                raise ValueError(
                    f"{name}={value!r} has no meaning without {what}: set that too, or leave it out"
                )

    @property
    def folder(self) -> Path:
        """`output_dir` as a path, with its default."""
        return Path(self.output_dir or DEFAULT_OUTPUT_DIR)

    @property
    def best_metric(self) -> tuple[str, bool]:
        """(name with `eval_`, whether greater is better) of the metric that says which model is best."""
        name = self.metric_for_best_model or "loss"
        greater = not name.endswith("loss") if self.greater_is_better is None else self.greater_is_better
        return name if name.startswith("eval_") else f"eval_{name}", greater

    @property
    def learning_rates(self) -> dict[str, float]:
        """Step sizes of the parameters whose names begin so, where it is not `learning_rate`."""
        return {}

    @property
    def loading(self) -> dict[str, Any]:
        """What loading a model takes of these options."""
        names = (
            "layout",
            "backend",
            "dtype",
            "gradient_checkpointing",
            "disable_dropout",
            "trust_remote_code",
        )
        four_bit = FourBit(self.bnb_4bit_quant_type, self.use_bnb_nested_quant, self.bnb_4bit_compute_dtype)
        return {
            **{name: getattr(self, name) for name in names},
            "four_bit": four_bit if self.load_in_4bit else None,
        }

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values, the hub's token masked."""
        options = dataclasses.asdict(self)
        if self.hub_token is not None:
            options["hub_token"] = "<hub_token>"
        return options

    def to_json_string(self) -> str:
        """The options as JSON: what callbacks written for transformers ask for."""
        return json.dumps(self.to_dict(), indent=2)

    def to_yaml(self) -> str:
        """The options as a config file that would give them again."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


Config = TypeVar("Config", bound=TrainerConfig)


def resolve_config(config_class: type[Config], args: TrainerConfig | None, options: dict[str, Any]) -> Config:
    """The trainer's config, from `args=Config(...)` or from options given to the trainer itself.

    Raises:
        TypeError: both are given, `args` is of another trainer, or an option is unknown.
    """
    refuse_unknown(config_class.__name__, option_names(config_class), options)
    if args is None:
        return config_class(**options)
    if options:
        raise TypeError(
            f"give options in args or to the trainer, not both: got args and {', '.join(options)}"
        )
    if not isinstance(args, config_class):
        raise TypeError(f"args must be a {config_class.__name__}, got {type(args).__name__}")
    return args


def steps_of(interval: float, num_steps: int) -> int:
    """An interval in steps; below 1 it is a share of the run.

    >>> steps_of(10, 1000), steps_of(0.25, 1000)
    (10, 250)
    """
    return max(1, round(interval * num_steps)) if interval < 1 else int(interval)


def resume_option(value: Any) -> str | bool | None:
    """`resume_from_checkpoint` as a path, True, False or None, from whatever a user or a command line says.

    >>> resume_option("true"), resume_option("False"), resume_option("runs/dpo")
    (True, False, 'runs/dpo')
    """
    if value is None or isinstance(value, bool):
        return value
    path = os.path.expanduser(os.fspath(value))
    return {"true": True, "false": False}.get(path.lower(), path)


def one_of(name: str, value: Any, other_name: str, other: Any) -> Any:
    """The one that was given of two spellings of an argument."""
    if value is not None and other is not None:
        raise TypeError(f"{name} and {other_name} are the same: give one of them")
    return other if value is None else value
