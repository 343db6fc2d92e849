"""Fast, exact trainers and kernels for aligning language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignfast.compat.patch import patch_trl, unpatch_trl
    from alignfast.models.fuse import fuse, unfuse
    from alignfast.online.loop import OnlineConfig, OnlineLoop
    from alignfast.trainers.dpo import DPOConfig, DPOTrainer
    from alignfast.trainers.grpo import GRPOConfig, GRPOTrainer
    from alignfast.trainers.kto import KTOConfig, KTOTrainer
    from alignfast.trainers.ppo import PPOConfig, PPOTrainer
    from alignfast.trainers.ppo_step import ppo_step
    from alignfast.trainers.reward import RewardConfig, RewardTrainer
    from alignfast.trainers.sft import SFTConfig, SFTTrainer

__version__ = "0.1.0"
__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "OnlineConfig",
    "OnlineLoop",
    "PPOConfig",
    "PPOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "__version__",
    "fuse",
    "patch_trl",
    "ppo_step",
    "unfuse",
    "unpatch_trl",
]

# Loaded on first use: transformers takes seconds to import, and `alignfast.kernels` does without it.
_HOMES = {
    "DPOConfig": "alignfast.trainers.dpo",
    "DPOTrainer": "alignfast.trainers.dpo",
    "GRPOConfig": "alignfast.trainers.grpo",
    "GRPOTrainer": "alignfast.trainers.grpo",
    "KTOConfig": "alignfast.trainers.kto",
    "KTOTrainer": "alignfast.trainers.kto",
    "OnlineConfig": "alignfast.online.loop",
    "OnlineLoop": "alignfast.online.loop",
    "PPOConfig": "alignfast.trainers.ppo",
    "PPOTrainer": "alignfast.trainers.ppo",
    "RewardConfig": "alignfast.trainers.reward",
    "RewardTrainer": "alignfast.trainers.reward",
    "SFTConfig": "alignfast.trainers.sft",
    "SFTTrainer": "alignfast.trainers.sft",
    "fuse": "alignfast.models.fuse",
    "patch_trl": "alignfast.compat.patch",
    "ppo_step": "alignfast.trainers.ppo_step",
    "unfuse": "alignfast.models.fuse",
    "unpatch_trl": "alignfast.compat.patch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'alignfast' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
