"""The ops: each one file, one contract, proven equal on every backend. Installed as `alignfast.kernels`."""

from alignfast.kernels._backend import report
from alignfast.kernels.gae import gae
from alignfast.kernels.group_advantages import group_advantages
from alignfast.kernels.kl_divergence import kl_divergence
from alignfast.kernels.kl_penalty import kl_penalty
from alignfast.kernels.linear_kl_divergence import linear_kl_divergence
from alignfast.kernels.linear_loss import Stats, linear_loss
from alignfast.kernels.linear_token_logps import linear_token_logps
from alignfast.kernels.packed_attention import PackedLayout, packed_attention
from alignfast.kernels.paged_attention import paged_attention
from alignfast.kernels.policy_loss import policy_loss
from alignfast.kernels.preference_loss import packed_preference_loss, preference_loss
from alignfast.kernels.sample_tokens import sample_tokens
from alignfast.kernels.token_logps import token_logps

__all__ = [
    "PackedLayout",
    "Stats",
    "gae",
    "group_advantages",
    "kl_divergence",
    "kl_penalty",
    "linear_kl_divergence",
    "linear_loss",
    "linear_token_logps",
    "packed_attention",
    "packed_preference_loss",
    "paged_attention",
    "policy_loss",
    "preference_loss",
    "report",
    "sample_tokens",
    "token_logps",
]
