"""What votes say of rewards: thumbs and ratings with levels of their own, wins and ties.

    verdict    loss = mean over levels k of  -log sigmoid(s_k (r - c_k))      s_k = 1 where the vote is above level k, else -1
    win        loss = log(1 + exp(-d) + nu exp(-d / 2))                       d = r_better - r_worse
    tie        loss = log(1 + (exp(d / 2) + exp(-d / 2)) / nu)

A thumb has one level, a rating from 1 to 5 has four: the all-threshold loss of ordinal regression (Rennie and Srebro 2005,
eq. 13). c_k holds the voter's own offset, so that how easily somebody is pleased says nothing of the answer. Ties are
Davidson's, https://doi.org/10.1080/01621459.1970.10481082, of which nu = 0 is Bradley and Terry's model. Rankings without a
tie are `losses.reward.ranking_loss`.

Letters: N votes, K levels, H heads.
Not done here: finding c and nu (the learner, from all votes at once).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def verdict_loss(reward_NH: Tensor, above_NK: Tensor, cut_NK: Tensor) -> Tensor:
    """loss_NH of votes on single answers.

    Args:
        reward_NH: of the answer.
        above_NK: whether the vote is above each level.
        cut_NK: reward at which that is as likely as not, for this voter.

    >>> above_NK, cut_NK = torch.tensor([[True]]), torch.tensor([[0.5]])
    >>> round(verdict_loss(torch.tensor([[2.5]]), above_NK, cut_NK).item(), 4)
    0.1269
    """
    side_NK = 1 - 2 * above_NK.to(reward_NH.dtype)
    return softplus(side_NK[:, :, None] * (reward_NH[:, None] - cut_NK.to(reward_NH)[:, :, None])).mean(1)


def comparison_loss(lead_NH: Tensor, tied_N: Tensor, log_nu: float) -> Tensor:
    """loss_NH of votes on two answers.

    Args:
        lead_NH: reward of the better answer less that of the worse one; of a tie either way round.
        tied_N: which are ties.
        log_nu: how common ties are; -inf where there are none.

    Raises:
        ValueError: there is a tie, and log_nu says that there are none.

    >>> lead_NH, tied_N = torch.tensor([[2.0], [2.0]]), torch.tensor([False, True])
    >>> [round(loss, 4) for loss in comparison_loss(lead_NH, tied_N, log_nu=0.0).exp().reciprocal()[:, 0].tolist()]
    [0.6652, 0.2447]
    """
    if log_nu == -torch.inf and bool(tied_N.any()):
        raise ValueError("log_nu is -inf, under which no tie has a chance, and there is a tie")
    half_NH = lead_NH / 2
    if log_nu == -torch.inf:  # logaddexp has no gradient there
        return softplus(-lead_NH)
    # softplus of what the other two weigh by the one that came: a loss of 1e-8 is not rounded to 0
    lost_NH = torch.logaddexp(-lead_NH, log_nu - half_NH)
    apart_NH = torch.logaddexp(half_NH, -half_NH) - log_nu
    return softplus(torch.where(tied_N[:, None], apart_NH, lost_NH))
