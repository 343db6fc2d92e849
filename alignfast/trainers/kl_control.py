"""The weight of the KL penalty: fixed, or steered towards a KL that is asked for."""

from __future__ import annotations

from typing import Any

_LARGEST_ERROR = 0.2


class KLController:
    """Ziegler et al., arXiv 1909.08593 section 2.2: after N completions of mean KL k

        coef <- coef (1 + clip(k / target - 1, -0.2, 0.2) N / horizon)

    Args:
        coef: the weight to begin with.
        target: the KL of a completion to steer to, in nats; None leaves the weight as it is.
        horizon: completions, over which the weight follows.

    >>> control = KLController(0.1, target=6.0, horizon=1000)
    >>> control.update(12.0, 100)
    >>> round(control.coef, 6)
    0.102
    """

    def __init__(self, coef: float, target: float | None, horizon: int) -> None:
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl: float, number: int) -> None:
        """Take in the mean KL of so many completions."""
        if self.target is None:
            return
        error = min(max(kl / self.target - 1, -_LARGEST_ERROR), _LARGEST_ERROR)
        self.coef *= 1 + error * number / self.horizon

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.coef = state["coef"]
