"""The engines by their names."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from alignfast.models.policy import Policy
from alignfast.rollout.sampling import RolloutEngine

ENGINES = ("native", "transformers")


def make_engine(
    name: str, policy: Policy, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> RolloutEngine:
    """An engine for a policy.

    Args:
        name: `native` (packed prompts and a paged cache: see `NativeEngine`) or `transformers` (`model.generate`).
        policy: the model.
        tokenizer: its tokenizer.
        **options: of the engine's class.

    Raises:
        ValueError: the name is none of `ENGINES`.
    """
    if name == "native":
        from alignfast.rollout.native import NativeEngine

        return NativeEngine(policy, tokenizer, **options)
    if name == "transformers":
        from alignfast.rollout.reference import TransformersEngine

        return TransformersEngine(policy.model, tokenizer, **options)
    raise ValueError(f"engine={name!r} is not one of {', '.join(ENGINES)}")
