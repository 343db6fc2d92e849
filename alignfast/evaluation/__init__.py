"""What a model is worth: preference and reward accuracy, perplexity and win rates, each with its 95 % interval."""

from alignfast.evaluation.calibration import Calibration, calibration
from alignfast.evaluation.perplexity import Perplexity, perplexity
from alignfast.evaluation.preference import PreferenceReport, preference_accuracy
from alignfast.evaluation.reward import RewardReport, reward_accuracy
from alignfast.evaluation.win_rate import WinRate, win_rate

__all__ = [
    "Calibration",
    "Perplexity",
    "PreferenceReport",
    "RewardReport",
    "WinRate",
    "calibration",
    "perplexity",
    "preference_accuracy",
    "reward_accuracy",
    "win_rate",
]
