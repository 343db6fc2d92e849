"""Generation: prompts in, completions out, by one of three engines with one interface."""

from alignfast.rollout.engines import ENGINES, make_engine
from alignfast.rollout.sampling import Completion, Prompt, RolloutEngine, Sampling

__all__ = ["ENGINES", "Completion", "Prompt", "RolloutEngine", "Sampling", "make_engine"]
