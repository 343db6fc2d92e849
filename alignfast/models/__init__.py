"""Language models as policies: loading, heads, adapters, packed attention."""

from alignfast.models.attention import ModelRefused
from alignfast.models.load import load_policy, load_tokenizer
from alignfast.models.policy import Policy

__all__ = ["ModelRefused", "Policy", "load_policy", "load_tokenizer"]
