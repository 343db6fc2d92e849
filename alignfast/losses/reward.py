"""Reward models from rankings: Plackett-Luce, of which Bradley-Terry is the case of two answers.

    loss of a row = sum over places i but the last of  -log sigmoid(r_i - m - log sum_{j > i} exp r_j)

r_1 is the best answer's reward, m a pair's margin (arXiv 2307.09288 eq. 2), 0 in rankings. It is the negative
log-likelihood of the ranking under P(i is first of those left) = exp r_i / sum_j exp r_j; written with the sigmoid, a
loss of 1e-8 is not rounded to 0. `center_rewards_coefficient` adds that times (2 mean_i r_i)^2, for two answers
(r_1 + r_2)^2, arXiv 2312.09244 eq. 2: only differences of rewards are learned otherwise.

Several heads are an ensemble: each has its own loss, and the loss is their mean; metrics are of the mean reward.

Letters: N rows, S answers of all rows, H heads, M rows of K answers and Q pairs each.
Not done here: reading rewards from a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def reward_loss(
    rewards_SH: Tensor,
    num_answers: Sequence[int],
    margins: Sequence[float] | None = None,
    *,
    num_rows: int,
    center_rewards_coefficient: float | None = None,
    weight_NH: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics of ranked answers.

    Args:
        rewards_SH: row by row, each row's answers from best to worst.
        num_answers: answers of each row, >= 2.
        margins: by how much each row's better answer should lead; rows of two answers alone have one. None is 0.
        num_rows: rows of the whole step: all micro-batches, all ranks.
        center_rewards_coefficient: how much rewards are held around 0; None is not at all.
        weight_NH: how often each row counts for each head; None is once.

    Returns:
        (loss, metrics), the metrics sums under TRL's names, which `reward_counts` turns into means: `accuracy` and
        `margin` over pairs of answers, of which a row of K has K (K - 1) / 2, `disagreement`, the heads' standard
        deviation, over answers.

    Raises:
        ValueError: a row has fewer than two answers, a margin stands in a ranking of more, or counts do not fit.

    >>> rewards_SH = torch.tensor([[1.0], [0.0], [2.0], [3.0]])
    >>> loss, metrics = reward_loss(rewards_SH, [2, 2], num_rows=2)
    >>> round(loss.item(), 4), metrics["accuracy"].item()
    (0.8133, 1.0)
    """
    margins = [0.0] * len(num_answers) if margins is None else margins
    if sum(num_answers) != len(rewards_SH) or len(margins) != len(num_answers):
        raise ValueError(
            f"expected a reward for each of {sum(num_answers)} answers and a margin for each of {len(num_answers)} rows, "
            f"got {len(rewards_SH)} and {len(margins)}"
        )
    if min(num_answers, default=2) < 2:
        raise ValueError(f"a ranking takes 2 or more answers, got {min(num_answers)}")
    if any(margin and number > 2 for margin, number in zip(margins, num_answers)):
        raise ValueError("a margin is for two answers; a ranking of more has none")
    device, loss = rewards_SH.device, rewards_SH.new_zeros(())
    starts, sums = [0, *accumulate(num_answers)], {"accuracy": loss, "margin": loss}
    for number in sorted(set(num_answers)):  # rows of one length are one tensor, without padding
        rows = [row for row, answers in enumerate(num_answers) if answers == number]
        first_M = torch.tensor([starts[row] for row in rows], device=device)
        rewards_MKH = rewards_SH[first_M[:, None] + torch.arange(number, device=device)]
        margin_M = torch.tensor([margins[row] for row in rows], device=device, dtype=rewards_SH.dtype)
        loss_MH = ranking_loss(rewards_MKH, margin_M)
        if center_rewards_coefficient is not None:
            loss_MH = loss_MH + center_rewards_coefficient * (2 * rewards_MKH.mean(1)).square()
        if weight_NH is not None:
            loss_MH = loss_MH * weight_NH[rows].to(loss_MH)
        loss = loss + loss_MH.mean(1).sum() / num_rows
        for name, value_M in pair_figures(rewards_MKH.detach().mean(-1)).items():
            sums[name] = sums[name] + value_M.sum()
    return loss, sums | _figures(rewards_SH.detach())


def ranking_loss(rewards_MKH: Tensor, margin_M: Tensor) -> Tensor:
    """loss_MH: negative log-likelihood of rankings, best first, under Plackett and Luce."""
    below_MKH = rewards_MKH[:, 1:].flip(1).logcumsumexp(1).flip(1)
    return -logsigmoid(rewards_MKH[:, :-1] - below_MKH - margin_M[:, None, None]).sum(1)


def pair_figures(rewards_MK: Tensor) -> dict[str, Tensor]:
    """Of each ranking, how many of its pairs are in the right order, a tie being half (TRL: wrong), and their summed leads.

    >>> pair_figures(torch.tensor([[3.0, 1.0, 2.0]]))
    {'accuracy': tensor([2.]), 'margin': tensor([2.])}
    """
    lead_MQ = pair_leads(rewards_MK)
    return {"accuracy": (lead_MQ.sign() + 1).sum(1) / 2, "margin": lead_MQ.sum(1)}


def pair_leads(rewards_MK: Tensor) -> Tensor:
    """lead_MQ: by how much the better answer of each of a ranking's Q pairs leads.

    >>> pair_leads(torch.tensor([[3.0, 1.0, 2.0]]))
    tensor([[ 2.,  1., -1.]])
    """
    better, worse = torch.triu_indices(rewards_MK.shape[1], rewards_MK.shape[1], 1, device=rewards_MK.device)
    return rewards_MK[:, better] - rewards_MK[:, worse]


def reward_counts(num_pairs: int, num_answers: int) -> dict[str, int]:
    """What each summed metric is divided by, from the pairs and answers of the whole step."""
    return {
        "accuracy": num_pairs,
        "margin": num_pairs,
        "mean_reward": num_answers,
        "disagreement": num_answers,
    }


def bootstrap_counts(num_rows: int, num_heads: int, seed: int) -> Tensor:
    """counts_NH: how often each of `num_heads` draws of `num_rows` rows, with replacement, took each row.

    >>> bootstrap_counts(num_rows=4, num_heads=2, seed=0).sum(0)
    tensor([4, 4])
    """
    generator = torch.Generator().manual_seed(seed)
    drawn_NH = torch.randint(num_rows, (num_rows, num_heads), generator=generator)
    return torch.zeros_like(drawn_NH).scatter_add_(0, drawn_NH, torch.ones_like(drawn_NH))


def _figures(rewards_SH: Tensor) -> dict[str, Tensor]:
    mean_S = rewards_SH.mean(1)
    figures = {"mean_reward": mean_S.sum(), "min_reward": mean_S.min(), "max_reward": mean_S.max()}
    if rewards_SH.shape[1] > 1:
        figures["disagreement"] = rewards_SH.std(1, correction=0).sum()
    return figures
