"""Liger 0.8's fused linear GRPO on our kernels: what `compat.liger` exports.

liger_fused_linear_grpo is long: its signature is Liger's.

Letters: B rows, L steps, P predictions, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignfast.kernels import Stats, linear_loss, linear_token_logps
from alignfast.kernels._policy import sequences_of
from alignfast.kernels.linear_loss import Metrics
from alignfast.losses.grpo import policy_groups, policy_objective

GRPO_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")


def liger_fused_linear_grpo(
    _input: Tensor,
    weight: Tensor,
    selected_token_ids: Tensor,
    attention_mask: Tensor,
    advantages: Tensor,
    bias: Tensor | None = None,
    ref_per_token_logps: Tensor | None = None,
    old_per_token_logps: Tensor | None = None,
    ref_input: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    beta: float = 0.04,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    temperature: float = 1.0,
    compiled: bool = True,
    use_ref_model: bool = True,
    chunk_size: int = 1,
    vllm_is_ratio: Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    num_items_in_batch: Any = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """GRPO and its relatives on hidden states.

    Args:
        _input: (B, L, D), of the positions that predict `selected_token_ids`.
        weight: the head, (V, D).
        selected_token_ids: int64 (B, L).
        attention_mask: (B, L), 1 where a token counts.
        advantages: (B,).
        bias: of the head.
        ref_per_token_logps: (B, L), the reference's; or give its hidden states:
        old_per_token_logps: (B, L), of the policy that sampled; None is the policy itself.
        ref_input: (B, L, D).
        ref_weight: the reference's head.
        ref_bias: its head's bias.
        beta: weight of the KL estimate; 0.04, where TRL's is 0.
        epsilon_low: how far the ratio may fall below 1.
        epsilon_high: how far it may rise; of cispo the largest ratio itself.
        loss_type: one of `GRPO_LOSSES`.
        max_completion_length: of dr_grpo.
        importance_sampling_level: token or sequence.
        sapo_temperature_pos: of sapo, where the advantage is positive.
        sapo_temperature_neg: elsewhere.
        temperature: divisor of the logits.
        compiled: without effect.
        use_ref_model: False takes the policy itself for the reference: a KL estimate of 0 without a gradient.
        chunk_size: without effect.
        vllm_is_ratio: (B,), (B, 1) or (B, L): constant factors on the loss, but for the KL estimate.
        delta: largest ratio where the advantage is negative, > 1 + epsilon_high.
        use_bias_correction_kl: multiply the KL estimate by the ratio.
        vespo_k_pos: of vespo, which is refused; so the three behind it.
        vespo_lambda_pos: see there.
        vespo_k_neg: see there.
        vespo_lambda_neg: see there.
        num_items_in_batch: tokens of the whole batch, for dapo and cispo; None counts those here, over all ranks.

    Returns:
        (loss, (KL estimate per token where beta is not 0, share of clipped tokens)).

    Raises:
        ValueError: shapes or options do not fit, or the loss is not done here.
    """
    if loss_type not in GRPO_LOSSES:
        raise ValueError(f"loss_type={loss_type!r} is not one of {', '.join(GRPO_LOSSES)}")
    by_sequence = importance_sampling_level == "sequence"
    if by_sequence and loss_type in ("cispo", "sapo"):
        raise ValueError(f"{loss_type} has the ratio of a token; set importance_sampling_level='token'")
    counts_BL = attention_mask != 0
    lengths, target_P = counts_BL.sum(1).tolist(), selected_token_ids[counts_BL]

    def picked(x: Tensor | None) -> Tensor | None:
        """Of each prediction: what is given for each token, or for each row."""
        if x is None:
            return None
        return (x if x.ndim == 2 else x[:, None]).detach().expand(counts_BL.shape)[counts_BL]

    if ref_per_token_logps is None and ref_input is not None and use_ref_model and ref_weight is not None:
        with torch.no_grad():
            ref_P = linear_token_logps(
                ref_input[counts_BL], ref_weight, target_P, bias_V=ref_bias, temperature=temperature
            )
    else:
        ref_P = picked(ref_per_token_logps) if use_ref_model else None  # type: ignore[assignment]
    if use_ref_model and beta and ref_P is None:
        raise ValueError("use_ref_model=True needs ref_per_token_logps, or ref_input and ref_weight")
    advantages_P, old_P = picked(advantages), picked(old_per_token_logps)
    assert advantages_P is not None
    options: dict[str, Any] = {"importance_sampling_level": importance_sampling_level, "loss_type": loss_type}
    options["beta"] = beta if ref_P is not None else 0.0
    if options["beta"]:
        options["use_bias_correction_kl"] = use_bias_correction_kl
    if loss_type == "sapo":
        options |= {
            "sapo_temperature_pos": sapo_temperature_pos,
            "sapo_temperature_neg": sapo_temperature_neg,
        }
    else:
        options |= {"epsilon_high": epsilon_high} | ({} if loss_type == "cispo" else {"epsilon": epsilon_low})
    if loss_type == "dr_grpo":
        options["max_completion_length"] = max_completion_length
    if delta is not None:
        options["delta"] = delta
    objective = policy_objective(
        lengths, advantages_P, old_P, ref_P if options["beta"] else None, picked(vllm_is_ratio),  # type: ignore[arg-type]
        num_items=_items(counts_BL, loss_type, num_items_in_batch), **options,  # type: ignore[arg-type]
    )  # fmt: skip
    sizes = torch.tensor(lengths, device=counts_BL.device)
    seq_P = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)

    def loss_fn(stats: Stats, rows: slice) -> tuple[Tensor, Metrics]:
        loss, metrics = objective(stats, rows)
        difference_P = torch.zeros_like(stats.logps) if old_P is None else stats.logps.detach() - old_P[rows]
        if by_sequence:
            difference_P = sequences_of(seq_P[rows], None).mean(difference_P)
        clipped_P = _is_clipped(difference_P, advantages_P[rows], loss_type, epsilon_low, epsilon_high)
        return loss, {
            "clipped": clipped_P.to(loss.dtype).sum(),
            "kl": metrics.get("kl", torch.zeros_like(loss)),
        }

    loss, sums = linear_loss(
        _input[counts_BL], weight, target_P, loss_fn, stats=("logps", "entropy"),
        group_sizes=policy_groups(lengths, loss_type, importance_sampling_level), bias_V=bias, temperature=temperature,
    )  # fmt: skip
    means = [sums[name] / counts_BL.sum().clamp(1) for name in ("kl", "clipped")]
    return loss, tuple(means if beta else means[1:])


def _is_clipped(
    difference_P: Tensor, advantages_P: Tensor, loss_type: str, epsilon_low: float, epsilon_high: float
) -> Tensor:
    ratio_P = difference_P.exp()
    if loss_type == "sapo":
        return torch.zeros_like(ratio_P)
    if loss_type == "cispo":
        return (ratio_P > epsilon_high) & (advantages_P > 0)
    return ((ratio_P < 1 - epsilon_low) & (advantages_P < 0)) | (
        (ratio_P > 1 + epsilon_high) & (advantages_P > 0)
    )


def _items(counts_BL: Tensor, loss_type: str, num_items_in_batch: Any) -> Tensor:
    """What the loss is divided by, dr_grpo's length aside."""
    if loss_type in ("grpo", "sapo", "dr_grpo"):
        return torch.tensor(float(len(counts_BL)), device=counts_BL.device)
    tokens = counts_BL.sum().float()
    if loss_type == "bnpo":
        return tokens.clamp(1)
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if num_items_in_batch is not None:
        tokens = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=counts_BL.device)
    elif ranks > 1:
        torch.distributed.all_reduce(tokens)
    return (tokens / ranks).clamp(1)
