"""Generation: prompts in, completions out."""

from alignfast.rollout.texts import Prompt, generate_texts

__all__ = ["Prompt", "generate_texts"]
