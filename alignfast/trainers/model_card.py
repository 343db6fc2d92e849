"""README.md of a trained model, and its way to the hub."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

import alignfast
from alignfast.trainers.config import TrainerConfig

if TYPE_CHECKING:
    from alignfast.trainers.loop import Trainer

_SHOWN = (
    "learning_rate", "lr_scheduler_type", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length",
    "beta", "loss_type", "layout", "seed",
)  # fmt: skip


def model_card(trainer: Trainer) -> str:
    """Markdown with the hub's header: where the model comes from, how it was trained, what came out."""
    method, base = (
        trainer.config_class.__name__.removesuffix("Config"),
        trainer.module.base.config._name_or_path,
    )
    header = {"library_name": "transformers", "tags": ["alignfast", method.lower()]}
    if base and not Path(base).is_absolute():
        header["base_model"] = base
    options = trainer.args.to_dict()
    rows = [f"| {name} | {options[name]} |" for name in _SHOWN if name in options]
    last = next((row for row in reversed(trainer.state.log_history) if "loss" in row), {})
    figures = [f"| {name} | {value:.4g} |" for name, value in last.items() if isinstance(value, (int, float))]
    return "\n".join(
        [
            "---", yaml.safe_dump(header, sort_keys=False).strip(), "---", "",
            f"# {trainer.args.run_name or trainer.args.folder.resolve().name}", "",
            f"Trained by {method} with alignfast {alignfast.__version__}, "
            f"{trainer.state.global_step} steps" + (f", from {base}." if base else "."), "",
            "| option | value |", "| --- | --- |", *rows, "",
            *(["| last log | |", "| --- | --- |", *figures, ""] if figures else []),
            "Versions: " + ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft")) + ".",
            "",
        ]
    )  # fmt: skip


def push_folder(config: TrainerConfig) -> str:
    """Upload the output folder's model, tokenizer and card to the hub; returns the address.

    Raises:
        RuntimeError: the hub can't be reached or does not let you in.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    name = config.hub_model_id or config.folder.resolve().name
    api = HfApi(token=config.hub_token)
    try:
        repo = api.create_repo(name, private=config.hub_private_repo, exist_ok=True)
        ignored = ["checkpoints/*", "tensorboard/*", "reference/*"]
        api.upload_folder(repo_id=repo.repo_id, folder_path=config.folder, ignore_patterns=ignored)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise RuntimeError(
            f"could not push to {name} on the hub: {error}; the model lies in {config.folder}, push it from there with "
            "trainer.push_to_hub() or `hf upload`"
        ) from error
    return str(repo)
