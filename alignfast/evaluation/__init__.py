"""What a model is worth: preference accuracy, perplexity and win rates, each with its 95 % interval."""

from alignfast.evaluation.perplexity import Perplexity, perplexity
from alignfast.evaluation.preference import PreferenceReport, preference_accuracy
from alignfast.evaluation.win_rate import WinRate, win_rate

__all__ = [
    "Perplexity",
    "PreferenceReport",
    "WinRate",
    "perplexity",
    "preference_accuracy",
    "win_rate",
]
