"""What a model is worth: preference and reward accuracy, perplexity, win rates, and who judges them."""

from alignfast.evaluation.calibration import Calibration, calibration
from alignfast.evaluation.judge import ApiJudge, JudgeError, PairwiseJudge, load_judge
from alignfast.evaluation.perplexity import Perplexity, perplexity
from alignfast.evaluation.preference import PreferenceReport, preference_accuracy
from alignfast.evaluation.reward import RewardReport, reward_accuracy
from alignfast.evaluation.texts import distinct_n, length_figures
from alignfast.evaluation.win_rate import WinRate, win_rate

__all__ = [
    "ApiJudge",
    "Calibration",
    "JudgeError",
    "PairwiseJudge",
    "Perplexity",
    "PreferenceReport",
    "RewardReport",
    "WinRate",
    "calibration",
    "distinct_n",
    "length_figures",
    "load_judge",
    "perplexity",
    "preference_accuracy",
    "reward_accuracy",
    "win_rate",
]
