"""Objectives as pure functions on log-probs or rewards: a trainer's options in, the loss of `linear_loss` out."""

from alignfast.losses.dpo import couples_batch, dpo_counts, dpo_groups, dpo_loss, dpo_stats, ld_weights
from alignfast.losses.feedback import comparison_loss, verdict_loss
from alignfast.losses.importance import ImportanceWeights, importance_weights
from alignfast.losses.kto import KTO_LOSSES, KTO_STATS, kto_loss, kto_metrics
from alignfast.losses.reward import (
    bootstrap_counts,
    pair_figures,
    pair_leads,
    ranking_loss,
    reward_counts,
    reward_loss,
)
from alignfast.losses.sft import SFT_STATS, sft_counts, sft_loss

__all__ = [
    "KTO_LOSSES",
    "KTO_STATS",
    "SFT_STATS",
    "ImportanceWeights",
    "bootstrap_counts",
    "comparison_loss",
    "couples_batch",
    "dpo_counts",
    "dpo_groups",
    "dpo_loss",
    "dpo_stats",
    "importance_weights",
    "kto_loss",
    "kto_metrics",
    "ld_weights",
    "pair_figures",
    "pair_leads",
    "ranking_loss",
    "reward_counts",
    "reward_loss",
    "sft_counts",
    "sft_loss",
    "verdict_loss",
]
