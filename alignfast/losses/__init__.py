"""Objectives as pure functions on log-probs: a trainer's options in, the loss of `linear_loss` out."""

from alignfast.losses.dpo import couples_batch, dpo_counts, dpo_groups, dpo_loss, dpo_stats, ld_weights
from alignfast.losses.importance import ImportanceWeights, importance_weights
from alignfast.losses.kto import KTO_LOSSES, KTO_STATS, kto_loss, kto_metrics
from alignfast.losses.sft import SFT_STATS, sft_counts, sft_loss

__all__ = [
    "KTO_LOSSES",
    "KTO_STATS",
    "SFT_STATS",
    "ImportanceWeights",
    "couples_batch",
    "dpo_counts",
    "dpo_groups",
    "dpo_loss",
    "dpo_stats",
    "importance_weights",
    "kto_loss",
    "kto_metrics",
    "ld_weights",
    "sft_counts",
    "sft_loss",
]
