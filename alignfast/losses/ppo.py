"""PPO for completions: rewards of tokens, what they are worth, and the losses of policy and critic.

    r_t = -kl_coef KL_t                       and the score on top at the last token
    A, R = GAE(r, V)                          V after the last token is 0
    loss of the critic = 1/2 max((V - R)^2, (V_old + clip(V - V_old) - R)^2)

(Stiennon et al., arXiv 2009.01325; the clipped value loss is that of OpenAI's baselines. The policy's loss is
`policy_loss`, type ppo.) A completion is a tensor of its trained tokens here, so that no token of padding exists: whatever
the pad token is, the score lands on the last token that the policy wrote.

Letters: P predictions, L tokens of the longest completion, N completions.
Not done here: log-probs and values, which models bring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from alignfast.kernels import gae
from alignfast.kernels.linear_loss import LossFn, Metrics, Stats
from alignfast.losses.grpo import policy_objective

# Names of policy_loss's metrics, as PPO's users know them
_NAMES = {
    "clip_ratio/region_mean": "policy/clipfrac_avg",
    "entropy": "policy/entropy_avg",
    "ratio": "val/ratio",
    "max_ratio": "max_ratio",
    "kl": "kl",
}
_WHOLE = ("loss/policy_avg", "loss/value_avg")  # divided by the step's tokens already


def token_rewards(scores: Sequence[float], penalties: Sequence[Tensor]) -> list[Tensor]:
    """Rewards of tokens: minus the penalty of each, and the completion's score on top at the last one.

    Args:
        scores: of each completion.
        penalties: of each of its tokens, >= 0 tokens.

    >>> token_rewards([1.0, 2.0], [torch.tensor([0.5, 0.0, 0.25]), torch.zeros(0)])
    [tensor([-0.5000, -0.0000,  0.7500]), tensor([])]
    """
    rewards = []
    for score, penalty_L in zip(scores, penalties):
        reward_L = -penalty_L
        reward_L[-1:] += score
        rewards.append(reward_L)
    return rewards


def advantages_and_returns(
    rewards: Sequence[Tensor], values: Sequence[Tensor], *, gamma: float, lam: float, backend: str = "auto"
) -> tuple[list[Tensor], list[Tensor]]:
    """GAE of completions of different lengths, each for itself; after its last token nothing is worth anything.

    >>> advantages_and_returns([torch.tensor([0.0, 1.0])], [torch.tensor([0.5, 0.5])], gamma=1.0, lam=1.0)
    ([tensor([0.5000, 0.5000])], [tensor([1., 1.])])
    """
    lengths = [len(value_L) for value_L in values]
    mask_NL = torch.arange(max(lengths, default=0)) < torch.tensor(lengths)[:, None]
    rewards_NL, values_NL = (pad_sequence(list(x), batch_first=True) for x in (rewards, values))
    found = gae(rewards_NL, values_NL, mask_NL, gamma=gamma, lam=lam, backend=backend)
    advantages, returns = ([row_L[:n] for row_L, n in zip(x_NL, lengths)] for x_NL in found)
    return advantages, returns


def whiten(rows: Sequence[Tensor], shift_mean: bool = True) -> list[Tensor]:
    """All numbers on deviation 1 and mean 0, or on their own mean as before; fewer than two stay as they are.

    >>> whiten([torch.tensor([1.0, 2.0]), torch.tensor([3.0])])
    [tensor([-1.,  0.]), tensor([1.])]
    """
    lengths = [len(row_L) for row_L in rows]
    x_P = torch.cat(list(rows))
    if len(x_P) < 2:
        return list(rows)
    wide_P = x_P.double()
    mean = wide_P.mean()
    white_P = (wide_P - mean) * torch.rsqrt(wide_P.var() + 1e-8) + (0 if shift_mean else mean)
    return list(white_P.to(x_P.dtype).split(lengths))


def explained_variance(values: Sequence[Tensor], returns: Sequence[Tensor]) -> float:
    """1 - var(R - V) / var(R): 1 for a critic that knows, 0 for one that says a constant; 0 where returns are alike.

    >>> explained_variance([torch.tensor([1.0, 2.0])], [torch.tensor([2.0, 3.0])])
    1.0
    """
    values_P, returns_P = torch.cat(list(values)).double(), torch.cat(list(returns)).double()
    if len(returns_P) < 2 or not returns_P.var() > 0:
        return 0.0
    return (1 - (returns_P - values_P).var() / returns_P.var()).item()


def value_loss(
    values_P: Tensor,
    old_values_P: Tensor,
    returns_P: Tensor,
    *,
    num_items: int,
    vf_coef: float = 1.0,
    cliprange_value: float | None = None,
) -> tuple[Tensor, Metrics]:
    """The critic's loss, additive over batches.

    Args:
        values_P: of each prediction, by the critic that is trained.
        old_values_P: by the critic when the completions were drawn.
        returns_P: what it should have said.
        num_items: predictions of the whole step.
        vf_coef: factor on the loss.
        cliprange_value: how far a value may move from the old one before its loss stops to fall; None: any way.

    Returns:
        (loss, metrics): `loss/value_avg` without the factor, and `val/clipfrac_avg`, a sum that `ppo_counts` makes a mean.

    >>> loss, metrics = value_loss(
    ...     torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), num_items=1, cliprange_value=0.2)
    >>> round(loss.item(), 4), metrics["val/clipfrac_avg"].item()
    (0.32, 1.0)
    """
    loss_P = (values_P - returns_P).square()
    clipped = torch.zeros_like(loss_P)
    if cliprange_value is not None:
        # not old + clip(V - old), whose rounding would count values as clipped that are not
        near_P = values_P.clamp(old_values_P - cliprange_value, old_values_P + cliprange_value)
        far_P = (near_P - returns_P).square()
        clipped = (far_P > loss_P).to(loss_P.dtype)
        loss_P = torch.maximum(loss_P, far_P)
    loss = loss_P.sum() / (2 * num_items)
    return vf_coef * loss, {"loss/value_avg": loss.detach(), "val/clipfrac_avg": clipped.sum()}


def ppo_objective(
    lengths: Sequence[int],
    advantages_P: Tensor,
    old_logps_P: Tensor | None,
    ref_logps_P: Tensor | None = None,
    importance_weights_P: Tensor | None = None,
    *,
    num_items: int,
    **options: Any,
) -> LossFn:
    """The policy's loss for `linear_loss`, on the statistics `POLICY_STATS`, with PPO's names for its metrics.

    Args:
        lengths: predictions of each completion.
        advantages_P: of each prediction.
        old_logps_P: log-probs under the policy that drew; None where that is the policy itself.
        ref_logps_P: those of the reference, where beta > 0.
        importance_weights_P: constant factors on the loss, where another engine drew the tokens.
        num_items: predictions of the whole step.
        **options: of `policy_loss`, but for its loss_type.

    Returns:
        `loss_fn(stats, rows) -> (loss, metrics)`. `policy/approxkl_avg` is the mean of (log r)^2 / 2, `val/ratio_var` that
        of (r - 1)^2: the mean of r is 1 where the old policy drew. Sums, which `ppo_counts` turns into means.
    """
    objective = policy_objective(
        lengths, advantages_P, old_logps_P, ref_logps_P, importance_weights_P,
        num_items=num_items, loss_type="ppo", **options,
    )  # fmt: skip

    def loss_fn(stats: Stats, rows: slice) -> tuple[Tensor, Metrics]:
        loss, sums = objective(stats, rows)
        logps_P = stats.logps.detach()
        x_P = torch.zeros_like(logps_P) if old_logps_P is None else logps_P - old_logps_P[rows]
        metrics = {_NAMES[name]: value for name, value in sums.items() if name in _NAMES}
        metrics["loss/policy_avg"] = loss.detach()
        metrics["policy/approxkl_avg"] = x_P.square().sum() / 2
        metrics["val/ratio_var"] = x_P.expm1().square().sum()
        return loss, metrics

    return loss_fn


def ppo_counts(names: Sequence[str], num_tokens: int) -> dict[str, int]:
    """What each summed metric of a step is divided by.

    >>> ppo_counts(["val/ratio", "loss/value_avg", "max_ratio"], 10)
    {'val/ratio': 10}
    """
    return {name: max(1, num_tokens) for name in names if name not in _WHOLE and not name.startswith("max")}
