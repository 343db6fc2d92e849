"""Language models as policies and as reward models: loading, heads, adapters, packed attention."""

from alignfast.models.attention import ModelRefused
from alignfast.models.classifier import is_reward_model
from alignfast.models.load import load_policy, load_reward_model, load_tokenizer
from alignfast.models.policy import Policy
from alignfast.models.reward import RewardModel
from alignfast.models.trunk import Trunk

__all__ = [
    "ModelRefused",
    "Policy",
    "RewardModel",
    "Trunk",
    "is_reward_model",
    "load_policy",
    "load_reward_model",
    "load_tokenizer",
]
