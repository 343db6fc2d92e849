"""Rewards on a common scale while their source drifts: mean and spread by moments that forget.

    W_t = d W_{t-1} + (1 - d)                     m_t = m_{t-1} + (1 - d) / W_t (x_t - m_{t-1})
    v_t = (d W_{t-1} v_{t-1} + (1 - d) s_t) / W_t + d W_{t-1} (1 - d) / W_t^2 (x_t - m_{t-1})^2
    z   = (x - m_t) / (sqrt(v_t) + epsilon)

x_t and s_t are mean and variance of a batch, d the decay. Dividing by W_t takes out the bias towards 0 of the start.
After a shift of scale or offset, the share of the old in the moments is d^k W_t / W_{t+k} after k batches: half of it is
gone after log 2 / -log d batches, 69 at d = 0.99. The moments are those of all that went in, weighted, without a
difference of large numbers: an offset of a million costs no digits.

Letters: N completions, F sources.
Not done here: gathering over ranks; what all ranks saw must go in on each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class RunningNormaliser:
    """Puts each source of rewards on mean 0 and spread 1 of its recent past.

    Args:
        decay: what a batch leaves of the weight of those before it, in [0, 1).
        epsilon: added to the spread, > 0: rewards that are all alike become 0.

    Raises:
        ValueError: an option is out of range.

    >>> normaliser = RunningNormaliser(decay=0.5)
    >>> normaliser.normalise(torch.tensor([[1.0], [3.0]]), ["thumbs"]).flatten().tolist()
    [-1.0, 1.0]
    >>> normaliser.normalise(torch.tensor([[10.0], [30.0]]), ["thumbs"]).flatten()
    tensor([-0.3393,  1.3571])
    """

    def __init__(self, decay: float = 0.99, *, epsilon: float = 1e-8) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        if not 0 < epsilon < math.inf:
            raise ValueError(f"epsilon must be above 0, got {epsilon}")
        self.decay, self.epsilon = decay, epsilon
        self._moments: dict[str, tuple[float, float, float]] = {}  # source: (mean, variance, W)

    def normalise(self, rewards_NF: Tensor, names: Sequence[str]) -> Tensor:
        """Take a batch into the moments, then put it on their scale.

        Args:
            rewards_NF: rewards without weights, as `Scores.per_function_NF`; NaN where there is none.
            names: of the F sources; each has moments of its own.

        Returns:
            (N, F), in the type of the rewards; NaN where they are. A source without any number keeps its moments.

        Raises:
            ValueError: there is not one name for each source, or a reward is infinite.
        """
        self.update(rewards_NF, names)
        mean_F, spread_F = torch.tensor(
            [self.mean_and_std(name) for name in names], dtype=torch.float64, device=rewards_NF.device
        ).T
        return ((rewards_NF.double() - mean_F) / (spread_F + self.epsilon)).to(rewards_NF.dtype)

    def update(self, rewards_NF: Tensor, names: Sequence[str]) -> None:
        """Take a batch into the moments; see `normalise`."""
        if rewards_NF.ndim != 2 or rewards_NF.shape[1] != len(names) or len(set(names)) < len(names):
            raise ValueError(
                f"expected (N, {len(names)}) rewards for different sources {', '.join(names)}, got "
                f"{tuple(rewards_NF.shape)}"
            )
        if rewards_NF.isinf().any():
            raise ValueError("a reward is infinite; leave it out as NaN")
        for name, reward_N in zip(names, rewards_NF.detach().double().cpu().T):
            known_K = reward_N[~reward_N.isnan()]
            if len(known_K):
                self._update(name, float(known_K.mean()), float(known_K.var(correction=0)))

    def _update(self, name: str, batch_mean: float, batch_variance: float) -> None:
        mean, variance, weight = self._moments.get(name, (0.0, 0.0, 0.0))
        old, new = self.decay * weight, 1 - self.decay
        total, gap = old + new, batch_mean - mean
        self._moments[name] = (
            mean + new / total * gap,
            (old * variance + new * batch_variance) / total + old * new / total**2 * gap**2,
            total,
        )

    def mean_and_std(self, name: str) -> tuple[float, float]:
        """Mean and spread of a source's recent past; (0, 1) before its first number."""
        if name not in self._moments:
            return 0.0, 1.0
        mean, variance, _ = self._moments[name]
        return mean, math.sqrt(variance)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, as plain numbers: JSON keeps every bit of them."""
        return {
            "decay": self.decay,
            "sources": {
                name: {"mean": mean, "variance": variance, "weight": weight}
                for name, (mean, variance, weight) in self._moments.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ValueError: it was made with another decay, so that a resumed run would not equal an uninterrupted one.
        """
        if state["decay"] != self.decay:
            raise ValueError(f"the state was made with decay={state['decay']}, not {self.decay}")
        self._moments = {
            name: (float(of["mean"]), float(of["variance"]), float(of["weight"]))
            for name, of in state["sources"].items()
        }
