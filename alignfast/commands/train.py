"""`alignfast sft | reward | dpo | kto | grpo | ppo`: train, save, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import alignfast
from alignfast.commands.parser import UsageError, parse_options
from alignfast.commands.samples import first_prompts, write_samples

if TYPE_CHECKING:
    from alignfast.data import HubDataset
    from alignfast.trainers.loop import Trainer


@dataclass(frozen=True)
class RunOptions:
    """What a run is made of: model, data, adapters."""

    model: str | None = None
    """Folder or hub name of the model. Must be given."""
    model_name_or_path: str | None = None
    """The same, under TRL's name."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer; the model's own unless given."""
    train_dataset: str | None = None
    """A .jsonl, .json or .parquet file, or a dataset's name on the hub. Must be given."""
    dataset_name: str | None = None
    """The same, under TRL's name."""
    eval_dataset: str | None = None
    """Held-out rows; evaluated every eval_steps, and at the end."""
    dataset_config: str | None = None
    """Config of datasets from the hub that have several, e.g. `main` of openai/gsm8k."""
    dataset_train_split: str = "train"
    """Split that is trained on, of a dataset from the hub."""
    dataset_test_split: str = "test"
    """Split that is held out, where eval_dataset is one from the hub."""
    use_peft: bool = False
    """Train LoRA adapters, not the weights themselves."""
    lora_r: int = 16
    """Rank of the adapters."""
    lora_alpha: int = 32
    """Scale of the adapters: they count alpha / r."""
    lora_dropout: float = 0.05
    """Share of the adapters' inputs that is dropped; 0 where disable_dropout is on."""
    lora_target_modules: str | list[str] | None = None
    """Names of the layers that get adapters, or `all-linear`. None is PEFT's choice for the model."""
    lora_modules_to_save: list[str] | None = None
    """Names of layers that are trained whole beside the adapters."""
    use_rslora: bool = False
    """Rank-stabilised LoRA: adapters count alpha / sqrt(r)."""
    use_dora: bool = False
    """Weight-decomposed LoRA."""
    sample_prompts: int | None = None
    """So many prompts of the held-out rows, or else of the training rows, are answered before and after training. None:
    3, where rows have prompts, one process trains, and the model writes."""
    resume: bool = False
    """Go on from the newest complete checkpoint of output_dir."""

    @property
    def peft_config(self) -> dict[str, Any] | None:
        """LoraConfig's options, or None where the weights themselves are trained.

        Raises:
            UsageError: adapters are described, but not asked for.
        """
        if not self.use_peft:
            for name in [field.name for field in fields(self) if field.name.startswith(("lora_", "use_"))]:
                value = getattr(self, name)
                if value != getattr(RunOptions, name):
                    raise UsageError(
                        f"{name} is for adapters, got {value!r} without --use_peft true: give that too, or leave it out"
                    )
            return None
        return {
            "r": self.lora_r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": self.lora_target_modules,
            "modules_to_save": self.lora_modules_to_save,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
        }


@dataclass(frozen=True)
class ReferenceOptions:
    """What DPO and KTO measure against."""

    ref_model: str | None = None
    """Folder or hub name of the reference; unless given, the model as it was before training."""


@dataclass(frozen=True)
class FeedbackOptions:
    """What scores the completions of trainers that sample."""

    reward_funcs: str | list[str] | None = None
    """Reward functions: `numeric` (the number that a completion ends with, against column `answer`), `exact`, `format`,
    `regex:PATTERN`, an import path `package.module:function`, or a reward model's folder. Must be given."""
    judge: str | list[str] | None = None
    """What says in evaluation how often completions beat those of the model as it was: `api:MODEL` asks that model over an
    OpenAI-compatible API (OPENAI_BASE_URL, OPENAI_API_KEY); or a reward function as above. None: the trained rewards."""
    gold_reward_funcs: str | list[str] | None = None
    """Reward functions that are measured in evaluation and never trained on: what the trained ones should stand for."""


@dataclass(frozen=True)
class CriticOptions(FeedbackOptions):
    """What scores the completions, what they are measured against, and where the critic starts."""

    value_model: str | None = None
    """Folder or hub name that the critic starts from: a reward model, a critic that was saved, or a language model. Unless
    given, a copy of the policy with a fresh head."""
    ref_model: str | None = None
    """Folder or hub name of the reference; unless given, the model as it was before training."""


_TRAINERS = {
    "sft": "SFTTrainer",
    "reward": "RewardTrainer",
    "dpo": "DPOTrainer",
    "kto": "KTOTrainer",
    "grpo": "GRPOTrainer",
    "ppo": "PPOTrainer",
}
_MORE_OPTIONS = {
    "dpo": ReferenceOptions,
    "kto": ReferenceOptions,
    "grpo": FeedbackOptions,
    "ppo": CriticOptions,
}


def run(command: str, argv: Sequence[str]) -> None:
    """Train as the options say; the final model, its card and report.html lie in output_dir."""
    from alignfast.trainers.interrupt import TrainingInterrupted
    from alignfast.trainers.machine import leave_ranks

    try:
        _train(command, argv)
    except TrainingInterrupted as leaving:
        leaving.with_traceback(None)  # whose frames hold the trainer
        leave_ranks()
        raise
    leave_ranks()


def _train(command: str, argv: Sequence[str]) -> None:
    trainer_class = getattr(alignfast, _TRAINERS[command])
    classes = [
        RunOptions,
        *([_MORE_OPTIONS[command]] if command in _MORE_OPTIONS else []),
        trainer_class.config_class,
    ]
    run_options, *more, config = parse_options(command, argv, *classes)
    if more and getattr(more[0], "reward_funcs", ()) is None:
        raise UsageError("give --reward_funcs")
    parts = _parts(run_options)
    trainer: Trainer = trainer_class(args=config, **parts, **(asdict(more[0]) if more else {}))
    source = parts["eval_dataset"] or parts["train_dataset"]
    if command == "reward" and run_options.sample_prompts:
        raise UsageError("sample_prompts is for models that write; a reward model has no samples")
    number = 0 if command == "reward" else run_options.sample_prompts
    samples = first_prompts(source, number, trainer.formats, trainer.accelerator.num_processes)
    if not run_options.resume:
        write_samples(trainer, samples)
    trainer.train(resume_from_checkpoint=True if run_options.resume else None)
    write_samples(trainer, samples)
    _evaluate_at_the_end(trainer)
    trainer.save_model()
    if trainer.accelerator.is_main_process:
        from alignfast.report import write_report

        page = write_report(config.folder)
        print(f"model: {config.folder}\nreport: {page}")


def _evaluate_at_the_end(trainer: Trainer) -> None:
    """Held-out figures of the final model, unless the last step brought them, or the run had ended and goes on from there."""
    if not trainer.eval_data:
        return
    from accelerate.utils import broadcast_object_list

    from alignfast.trainers.metrics import read_metrics

    state, best = trainer.state, trainer.args.load_best_model_at_end
    step = state.best_global_step if best and state.best_global_step else state.global_step
    known = [False]
    if trainer.accelerator.is_main_process:  # the file knows what came after the last checkpoint
        rows = read_metrics(trainer.args.folder / "metrics.jsonl")
        known = [any(row["step"] == step and any(name.startswith("eval_") for name in row) for row in rows)]
    if trainer.accelerator.num_processes > 1:
        broadcast_object_list(known)
    if not known[0]:
        trainer.evaluate()


def _parts(options: RunOptions) -> dict[str, Any]:
    model = _required(options, "model", "model_name_or_path")
    train_dataset = _source(
        _required(options, "train_dataset", "dataset_name"), "dataset_train_split", options
    )
    eval_dataset = _source(options.eval_dataset, "dataset_test_split", options)
    files_alone = all(source is None or isinstance(source, str) for source in (train_dataset, eval_dataset))
    if options.dataset_config and files_alone:
        raise UsageError(
            f"dataset_config is for datasets from the hub, got {options.dataset_config!r} for files"
        )
    return {
        "model": model,
        "train_dataset": train_dataset,
        "eval_dataset": eval_dataset,
        "processing_class": options.tokenizer,
        "peft_config": options.peft_config,
    }


def _source(name: str | None, split_option: str, options: RunOptions) -> str | HubDataset | None:
    """A file's path as it is; a dataset of the hub with its config and split.

    Raises:
        UsageError: a split is given for what is no dataset of the hub.
        ValueError: there is no such file.
    """
    from alignfast.data import HubDataset
    from alignfast.data.sources import means_file

    split = getattr(options, split_option)
    if name is not None and not means_file(name):
        return HubDataset(name, options.dataset_config, split)
    if split != getattr(RunOptions, split_option):
        raise UsageError(
            f"{split_option} is for a dataset from the hub, got {split!r} for {name or 'no eval_dataset'}"
        )
    if name is not None and not Path(name).expanduser().is_file():
        raise ValueError(f"{name}: there is no such file")  # said before the model is loaded
    return name


def _required(options: RunOptions, name: str, other: str) -> str:
    """The value of an option that goes by two names.

    Raises:
        UsageError: it is given by none or both of them.
    """
    given = [value for value in (getattr(options, name), getattr(options, other)) if value is not None]
    if len(given) != 1:
        raise UsageError(
            f"give --{name}" if not given else f"{name} and {other} are the same option: give one of them"
        )
    return given[0]
