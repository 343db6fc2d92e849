"""verl 0.8's functions on our kernels: the same names, arguments and meaning.

Read from github.com/volcengine/verl at b178a3c: `verl/trainer/ppo/core_algos.py`, `verl/utils/kernel/linear_cross_entropy.py`.
Two things differ. Where the response mask is 0, advantages and returns are 0, where verl's carry on what stands behind
them. A KL estimate whose name ends in "+" has the value of the name before it and k2's gradient, as verl's text says; at that
commit verl's own raises NotImplementedError.

Letters: B rows, L steps of a response, T rows of hidden states, D width, V vocabulary.
Not done here: tensor-parallel heads; logging: metrics are plain numbers, as in verl, so the device is waited for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignfast import kernels

_SYNONYMS = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}
_FAR, _LARGEST = 20.0, 10.0  # nats, verl's clamps: of a log-ratio, and of a k3 estimate


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label, and entropy of its row, from hidden states; both differentiable.

    Args:
        hidden: (..., D).
        weight: the head, (V, D).
        labels: int64, as many as rows of `hidden`.
        temperature: divisor of the logits, > 0.
        reduction: none; sum or mean reduce the log-probs (not the entropies), and do not negate them.
        dist_process_group: must be None: the head is whole.

    Returns:
        (log-probs (T,) or (), entropies (T,)): float32, or float64 of float64.

    Raises:
        ValueError: shapes or options do not fit.

    >>> linear_cross_entropy(torch.ones(1, 2, 3), torch.zeros(4, 3), torch.tensor([[0, 3]]))
    (tensor([-1.3863, -1.3863]), tensor([1.3863, 1.3863]))
    """
    if dist_process_group is not None:
        raise ValueError(
            "a head that is cut over ranks is not fused; gather it and pass dist_process_group=None"
        )
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction={reduction!r} is not one of none, sum, mean")
    hidden_TD, labels_T = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    logps_T, entropy_T = kernels.linear_token_logps(
        hidden_TD, weight, labels_T, temperature=temperature, entropy=True
    )
    reduced = {"none": logps_T.clone, "sum": logps_T.sum, "mean": logps_T.mean}[reduction]()
    return reduced, entropy_T


def compute_gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Whitened advantages, and returns; masked tokens are not there (observations, padding).

    Args:
        token_level_rewards: (B, L).
        values: (B, L), the critic's.
        response_mask: (B, L), 1 where the policy wrote.
        gamma: discount, in [0, 1].
        lam: as in GAE, in [0, 1].

    Returns:
        (advantages, returns), (B, L): of the tokens that count the advantages have mean 0 and variance 1.

    Raises:
        ValueError: shapes do not fit, or fewer than two tokens count.

    >>> rewards = torch.tensor([[0.0, 1.0]])
    >>> compute_gae_advantage_return(rewards, torch.zeros(1, 2), torch.ones(1, 2), 1.0, 0.5)
    (tensor([[-0.7071,  0.7071]]), tensor([[0.5000, 1.0000]]))
    """
    mask_BL = response_mask.to(torch.bool)
    advantages_BL, returns_BL = kernels.gae(
        token_level_rewards, values, mask_BL, gamma=float(gamma), lam=float(lam)
    )
    counted = advantages_BL[mask_BL]
    if len(counted) < 2:
        raise ValueError(f"whitening takes two tokens that count at least, got {len(counted)}")
    whitened_BL = (advantages_BL - counted.mean()) * torch.rsqrt(counted.var() + 1e-8)
    return torch.where(mask_BL, whitened_BL, 0), returns_BL


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """An estimate of the KL divergence from the reference at each token.

    Args:
        logprob: the policy's, any shape.
        ref_logprob: the reference's, alike.
        kl_penalty: kl or k1, abs, mse or k2, low_var_kl or k3 (the difference held within 20 nats, the estimate
            within 10); with "+" behind it, the gradient is that of k2.

    Returns:
        The estimates, in the same shape: float32, or float64 of float64.

    Raises:
        ValueError: the name is unknown (verl: NotImplementedError); `full` takes logits: `kernels.kl_divergence` does that.

    >>> kl_penalty(torch.tensor([-1.0]), torch.tensor([-1.5]), "low_var_kl")
    tensor([0.1065])
    """
    name = kl_penalty.removesuffix("+")
    kind = _SYNONYMS.get(name, name)
    if kind not in ("k1", "abs", "k2", "k3"):
        raise ValueError(
            f"kl_penalty={kl_penalty!r} is not one of kl, k1, abs, mse, k2, low_var_kl, k3, or one with +"
        )
    reference = ref_logprob.detach()
    if kl_penalty.endswith("+") and kind != "k2":
        value = _estimate(logprob.detach(), reference, kind)
        k2 = kernels.kl_penalty(logprob, reference, kind="k2")
        return k2 - k2.detach() + value
    return _estimate(logprob, reference, kind)


def _estimate(logprob: Tensor, reference: Tensor, kind: str) -> Tensor:
    if kind != "k3":
        return kernels.kl_penalty(logprob, reference, kind=kind)
    difference = (logprob - reference).clamp(-_FAR, _FAR)
    return kernels.kl_penalty(difference, torch.zeros_like(difference), kind="k3").clamp(max=_LARGEST)


def agg_loss(
    loss_mat: Tensor,
    loss_mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> Tensor:
    """A loss of one number from that of each token.

    Args:
        loss_mat: (B, L).
        loss_mask: (B, L), 1 where a token counts; what stands elsewhere has no say, NaN neither.
        loss_agg_mode: token-mean; seq-mean-token-sum and seq-mean-token-mean, over the sequences that have a token; or
            seq-mean-token-sum-norm, the sum over `loss_scale_factor`.
        dp_size: ranks, by which the loss is multiplied since they average their gradients; not in the last mode.
        batch_num_tokens: tokens of the whole batch; None counts those here.
        global_batch_size: sequences of the whole batch; None counts those here.
        loss_scale_factor: None is L.

    Raises:
        ValueError: the mode is unknown.

    >>> loss, mask = torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([[1, 1], [1, 0]])
    >>> agg_loss(loss, mask, "token-mean"), agg_loss(loss, mask, "seq-mean-token-mean")
    (tensor(3.), tensor(3.5000))
    """
    mask_BL = loss_mask.to(torch.bool)
    sums_B, tokens_B = torch.where(mask_BL, loss_mat, 0).sum(-1), mask_BL.sum(-1)
    if loss_agg_mode == "seq-mean-token-sum-norm":
        return sums_B.sum() / (mask_BL.shape[-1] if loss_scale_factor is None else loss_scale_factor)
    if loss_agg_mode == "token-mean":
        count: Any = tokens_B.sum() if batch_num_tokens is None else batch_num_tokens
        return sums_B.sum() / count * dp_size
    if loss_agg_mode not in ("seq-mean-token-sum", "seq-mean-token-mean"):
        raise ValueError(
            f"loss_agg_mode={loss_agg_mode!r} is not one of token-mean, seq-mean-token-sum, seq-mean-token-mean, "
            "seq-mean-token-sum-norm"
        )
    if loss_agg_mode == "seq-mean-token-mean":
        sums_B = sums_B / tokens_B.clamp(1)
    count = (tokens_B > 0).sum() if global_batch_size is None else global_batch_size
    return sums_B.sum() / count * dp_size


def compute_policy_loss_vanilla(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """PPO's clipped loss with the dual clip, and verl's metrics.

    Args:
        old_log_prob: (B, L), of the policy that the step started from.
        log_prob: (B, L), differentiable.
        advantages: (B, L).
        response_mask: (B, L), 1 where a token counts.
        loss_agg_mode: see `agg_loss`.
        config: an `ActorConfig` or what has its `clip_ratio`, `clip_ratio_low`, `clip_ratio_high` (None: clip_ratio),
            `get("clip_ratio_c", 3.0)` and `global_batch_info`, the keywords of `agg_loss`.
        rollout_is_weights: (B, L), constant factors >= 0 on the loss.

    Returns:
        (loss, metrics): `actor/pg_clipfrac`, `actor/ppo_kl`, `actor/pg_clipfrac_lower`, means over tokens.

    Raises:
        ValueError: there is no config, or shapes or options do not fit.
    """
    if config is None:
        raise ValueError(
            "compute_policy_loss_vanilla reads clip_ratio and global_batch_info from config; pass one"
        )
    low, high = config.clip_ratio_low, config.clip_ratio_high
    mask_T = response_mask.reshape(-1).to(torch.bool)
    old_T = old_log_prob.detach().reshape(-1)
    logps_T = old_T + (log_prob.reshape(-1) - old_T).clamp(-_FAR, _FAR)
    weights_T = None if rollout_is_weights is None else rollout_is_weights.detach().reshape(-1)
    loss_T, sums = kernels.policy_loss(
        logps_T, old_T, advantages.detach().reshape(-1), mask_T=mask_T, num_items=1.0, loss_type="ppo",
        epsilon=config.clip_ratio if low is None else low, epsilon_high=config.clip_ratio if high is None else high,
        dual_clip=config.get("clip_ratio_c", 3.0), importance_weights_T=weights_T,
    )  # fmt: skip
    loss = agg_loss(loss_T.view(log_prob.shape), response_mask, loss_agg_mode, **config.global_batch_info)
    count = mask_T.sum().clamp(1)
    names = {
        "actor/pg_clipfrac": "clip_ratio/region_mean",
        "actor/ppo_kl": "approx_kl/k1",
        "actor/pg_clipfrac_lower": "clip_ratio/cap_mean",
    }
    return loss, {theirs: float(sums[ours] / count) for theirs, ours in names.items()}
