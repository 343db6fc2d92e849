"""What a completion is worth: reward functions, verifiers, reward models, and what becomes of late or shifting rewards."""

from alignfast.rewards.answers import final_number
from alignfast.rewards.late import LateBuffer, LateSample
from alignfast.rewards.load import load_reward
from alignfast.rewards.model import ClassifierScorer, ModelReward, Scorer
from alignfast.rewards.normalise import RunningNormaliser
from alignfast.rewards.protocol import LATE, Estimate, RewardFunction
from alignfast.rewards.score import Failure, RewardSet, Scores
from alignfast.rewards.tasks import ReasoningGym, arithmetic, reasoning_gym_rows
from alignfast.rewards.verifiers import Exact, Format, Numeric, Regex

__all__ = [
    "LATE",
    "ClassifierScorer",
    "Estimate",
    "Exact",
    "Failure",
    "Format",
    "LateBuffer",
    "LateSample",
    "ModelReward",
    "Numeric",
    "ReasoningGym",
    "Regex",
    "RewardFunction",
    "RewardSet",
    "RunningNormaliser",
    "Scorer",
    "Scores",
    "arithmetic",
    "final_number",
    "load_reward",
    "reasoning_gym_rows",
]
