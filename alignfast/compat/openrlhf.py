"""OpenRLHF 0.11's advantages on our kernel: `get_advantages_and_returns`, without the class around it.

    delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lambd A_{t+1}        R_t = A_t + V_t

Read from github.com/OpenRLHF/OpenRLHF at 3c3be62, `openrlhf/trainer/ppo_utils/experience_maker.py`. A masked token is a step
without reward and of value 0, so that what stands behind it is discounted once more. Advantages and returns of masked
tokens themselves are 0 here; OpenRLHF's hold what would be discounted, and are masked where they are used.

Letters: B rows, L steps.
Not done here: whitening, which OpenRLHF does elsewhere too.
"""

from __future__ import annotations

from torch import Tensor

from alignfast.kernels import gae


def get_advantages_and_returns(
    values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of every step.

    Args:
        values: (B, L), the critic's.
        rewards: (B, L), KL penalties included.
        action_mask: (B, L), 1 where a token counts; None is everywhere.
        gamma: discount, in [0, 1].
        lambd: lambda of GAE, in [0, 1].

    Returns:
        (advantages, returns), (B, L): float32, or float64 of float64.

    Raises:
        ValueError: shapes or options do not fit.

    >>> get_advantages_and_returns(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]), None, 1.0, 0.5)
    (tensor([[0.5000, 1.0000]]), tensor([[0.5000, 1.0000]]))
    """
    return gae(rewards, values, action_mask, gamma=gamma, lam=lambd, masked="decay")
