"""Direct preference optimisation on packed rows: any loss of `preference_loss`, and the chosen's likelihood.

    loss = sum over pairs of w preference_loss / pairs of the step
         - a sum over chosen tokens of logp / chosen tokens of the step

w is 1, or WPO's weight; a is the weight of "sft" in `loss_type`, 0 without it. A batch holds the predictions
of chosen 0, rejected 0, chosen 1, ... end to end, and `linear_loss` gives whole pairs to a call.

Letters: N pairs, P predictions, M = 2N + 1 offsets.
Not done here: the reference's log-probs, which the trainer brings; the router loss of a mixture of experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from alignfast.kernels import packed_preference_loss
from alignfast.kernels._pairwise import LOSSES, preference_options
from alignfast.kernels.linear_loss import LossFn, Metrics, Stats
from alignfast.kernels.preference_loss import PreferenceOutput


def dpo_loss(
    lengths: Sequence[int],
    ref_chosen_N: Tensor | None,
    ref_rejected_N: Tensor | None,
    *,
    num_pairs: int,
    num_chosen_tokens: int | None = None,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    use_weighting: bool = False,
    ld_alpha: float | None = None,
    backend: str = "auto",
    **options: Any,
) -> LossFn:
    """The loss of preference pairs, for `linear_loss` with `group_sizes=dpo_groups(lengths, loss_type)`.

    Args:
        lengths: predictions of each completion: of chosen 0, rejected 0, chosen 1, ...
        ref_chosen_N: the reference model's log-probs, summed over each chosen completion (with `ld_alpha`,
            its tokens times `ld_weights`); None for reference-free losses.
        ref_rejected_N: the same of each rejected completion.
        num_pairs: pairs of the whole step: all micro-batches, all ranks.
        num_chosen_tokens: predictions of all chosen completions of the step; needed for `sft` alone.
        loss_type: a name of `preference_loss`, or several; among several `sft` adds the chosen's negative
            log-likelihood per token, as in RPO, arXiv 2404.19733, and MPO, arXiv 2411.10442.
        loss_weights: a factor for each name; None is 1 for each.
        use_weighting: weight each pair by how likely the policy is to write it, WPO, arXiv 2406.11827 eq. 2.
        ld_alpha: weight in [0, 1] of tokens beyond the shorter completion's length, LD-DPO, arXiv 2409.06411.
        backend: of `preference_loss`.
        **options: the other options of `preference_loss`: `beta`, `label_smoothing`, ...

    Returns:
        `loss_fn(stats, rows) -> (loss, metrics)` on the statistics `dpo_stats(use_weighting)`. Metrics bear
        TRL's names and are sums, which `dpo_counts` turns into TRL's means.

    Raises:
        ValueError: an option is out of its range, or two do not go together.
    """
    sft_weight, names, weights = _without_sft(loss_type, loss_weights)
    options |= {"loss_type": names, "loss_weights": weights}
    preference_options(**options)  # a wrong option is told here, not at the first batch
    coupled = couples_batch(names)
    if len(lengths) % 2:
        raise ValueError(f"lengths come in pairs, chosen and rejected, got {len(lengths)} of them")
    if sft_weight and not num_chosen_tokens:
        raise ValueError(
            "loss_type has sft, which is a mean over the step's chosen tokens: give num_chosen_tokens"
        )
    if use_weighting and (sft_weight or coupled):
        raise ValueError(f"use_weighting weighs pairs, but {loss_type} has a loss that is not of one pair")
    offsets = (0, *accumulate(lengths))
    offsets_M, end = torch.tensor(offsets), offsets[-1]
    pair_at = {row: pair for pair, row in reversed([*enumerate(offsets[::2])])}  # empty pairs: the first wins
    per_chosen_token = sft_weight / num_chosen_tokens if sft_weight and num_chosen_tokens else 0.0
    token_weights_P = None if ld_alpha is None else ld_weights(lengths, ld_alpha)

    def loss_fn(stats: Stats, rows: slice) -> tuple[Tensor, Metrics]:
        if not {rows.start, rows.stop} <= ({0, end} if coupled else pair_at.keys()):
            raise ValueError(
                f"{rows} cuts what the loss couples: pass group_sizes=dpo_groups(lengths, loss_type)"
            )
        first, last = pair_at[rows.start], len(lengths) // 2 if rows.stop == end else pair_at[rows.stop]
        chunk_M = offsets_M[2 * first : 2 * last + 1].to(stats.logps.device, non_blocking=True) - rows.start
        logps_P = stats.logps
        if token_weights_P is not None:
            logps_P = logps_P * token_weights_P[rows].to(logps_P.device, non_blocking=True)
        refs = (None if ref_N is None else ref_N[first:last] for ref_N in (ref_chosen_N, ref_rejected_N))
        out = packed_preference_loss(logps_P, chunk_M, *refs, backend=backend, **options)
        loss_N = out.loss_N * _wpo_weights(stats, chunk_M) if use_weighting else out.loss_N
        loss = loss_N.sum() / num_pairs
        if per_chosen_token:
            loss = loss - per_chosen_token * _by_completion(stats.logps, chunk_M)[:, 0].sum()
        return loss, _metrics(out, stats, chunk_M)

    return loss_fn


def dpo_stats(use_weighting: bool = False) -> tuple[str, ...]:
    """The statistics that `dpo_loss` reads."""
    return ("logps", "entropy", "mean_logit", "is_top1") + (("sum_sq_probs",) if use_weighting else ())


def dpo_groups(lengths: Sequence[int], loss_type: str | Sequence[str]) -> tuple[int, ...]:
    """The rows that must reach the loss together: those of a pair, or of the batch if the loss couples it.

    >>> dpo_groups((3, 2, 1, 4), "sigmoid"), dpo_groups((3, 2, 1, 4), ["aot", "sft"])
    ((5, 5), (10,))
    """
    if couples_batch(loss_type):
        return (sum(lengths),)
    return tuple(chosen + rejected for chosen, rejected in zip(lengths[::2], lengths[1::2]))


def couples_batch(loss_type: str | Sequence[str]) -> bool:
    """Whether a pair's loss depends on the other pairs of its batch, so that accumulation changes it.

    Such are `aot` and `aot_unpaired`, which sort the batch.
    """
    names = (loss_type,) if isinstance(loss_type, str) else loss_type
    return any(name in LOSSES and LOSSES[name].couples_batch for name in names)


def dpo_counts(num_pairs: int, num_chosen_tokens: int, num_rejected_tokens: int) -> dict[str, int]:
    """What each summed metric is divided by, from the numbers of pairs and predictions of the whole step.

    Rewards and log-probs are means over pairs, `logits/...` over the tokens of their side,
    `mean_token_accuracy` over chosen tokens, `entropy` over all.
    """
    over_pairs = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
    counts = dict.fromkeys((*over_pairs, "logps/chosen", "logps/rejected"), num_pairs)
    counts |= {"logits/chosen": num_chosen_tokens, "logits/rejected": num_rejected_tokens}
    counts |= {"mean_token_accuracy": num_chosen_tokens, "entropy": num_chosen_tokens + num_rejected_tokens}
    return {name: max(count, 1) for name, count in counts.items()}


def ld_weights(lengths: Sequence[int], ld_alpha: float) -> Tensor:
    """LD-DPO's weight of each token: 1 up to the length of the pair's shorter completion, `ld_alpha` beyond.

    Raises:
        ValueError: `ld_alpha` is outside [0, 1].

    >>> ld_weights((3, 1), 0.5)
    tensor([1.0000, 0.5000, 0.5000, 1.0000])
    """
    if not 0 <= ld_alpha <= 1:
        raise ValueError(f"ld_alpha must lie in [0, 1], got {ld_alpha}")
    weights_P = torch.full((sum(lengths),), ld_alpha)
    start = 0
    for index, length in enumerate(lengths):
        shared = min(length, lengths[index ^ 1])  # index ^ 1: the other completion of the pair
        weights_P[start : start + shared] = 1
        start += length
    return weights_P


def _without_sft(
    loss_type: str | Sequence[str], loss_weights: Sequence[float] | None
) -> tuple[float, tuple[str, ...], tuple[float, ...]]:
    """The weight of `sft`, 0 if it is not there, and the other names with theirs."""
    names = (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)
    weights = (1.0,) * len(names) if loss_weights is None else tuple(loss_weights)
    if len(weights) != len(names):
        raise ValueError(f"loss_weights has {len(weights)} numbers for {len(names)} loss types")
    if set(names) == {"sft"}:
        raise ValueError("loss_type is sft alone, which needs no pairs: train with SFTTrainer on the chosen")
    sft_weight = sum(weight for name, weight in zip(names, weights) if name == "sft")
    others = [(name, weight) for name, weight in zip(names, weights) if name != "sft"]
    return sft_weight, tuple(name for name, _ in others), tuple(weight for _, weight in others)


def _by_completion(x_P: Tensor, offsets_M: Tensor) -> Tensor:
    """Sums over each completion, (N, 2): chosen and rejected."""
    return torch.segment_reduce(x_P, "sum", offsets=offsets_M, initial=0).view(-1, 2)


def _wpo_weights(stats: Stats, offsets_M: Tensor) -> Tensor:
    """exp of the mean of log p - log sum p^2 over a completion's tokens, times the other's; a constant.

    sum p^2 is what p is on average for a token that the policy samples: text of its own weighs about 1.
    """
    aligned_P = stats.logps.detach() - stats.sum_sq_probs.detach().log()
    tokens_N2 = offsets_M.diff().view(-1, 2).clamp(1)
    return (_by_completion(aligned_P, offsets_M) / tokens_N2).sum(1).exp()


def _metrics(out: PreferenceOutput, stats: Stats, offsets_M: Tensor) -> Metrics:
    margins_N = out.chosen_rewards_N - out.rejected_rewards_N
    chosen_logits, rejected_logits = _by_completion(stats.mean_logit, offsets_M).sum(0)
    return {
        "rewards/chosen": out.chosen_rewards_N.sum(),
        "rewards/rejected": out.rejected_rewards_N.sum(),
        "rewards/accuracies": (margins_N > 0).to(margins_N.dtype).sum(),
        "rewards/margins": margins_N.sum(),
        "logps/chosen": out.chosen_logps_N.sum(),
        "logps/rejected": out.rejected_logps_N.sum(),
        "logits/chosen": chosen_logits,
        "logits/rejected": rejected_logits,
        "entropy": stats.entropy.sum(),
        "mean_token_accuracy": _by_completion(stats.is_top1, offsets_M)[:, 0].sum(),
    }
