"""Liger 0.8's fused linear losses on our kernels: classes and functional forms, the same arguments, outputs and meaning.

What the maths is stands in `alignfast.losses` and in the ops; here are Liger's names for it. `chunk_size`, `compiled` and
`accum_dtype=torch.float32` are taken and change nothing: chunks are cut by the kernels, which are compiled, and gradients
are summed in float32 (Liger's default sums them in the weight's type). Rows whose target is ignored, or whose mask is 0,
are left out of the computation. Losses are float32, or float64 of float64.

liger_fused_linear_cross_entropy is long: its signature is Liger's.

Letters: B rows, L steps, P rows of hidden states, D width, V vocabulary.
Not done here: the losses luspo and vespo, predicted tokens, class weights with smoothing: refused by name.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alignfast.compat._cross_entropy import CrossEntropy, fused_cross_entropy
from alignfast.compat._liger_dpo import DPO_LOSSES, liger_fused_linear_dpo
from alignfast.compat._liger_grpo import GRPO_LOSSES, liger_fused_linear_grpo

__all__ = [
    "CrossEntropyOutput",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearGRPOLoss",
    "liger_fused_linear_cross_entropy",
    "liger_fused_linear_dpo",
    "liger_fused_linear_grpo",
]


class CrossEntropyOutput(NamedTuple):
    """What the cross-entropy gives when more than the loss was asked for; a field that was not is None."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


def liger_fused_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    chunk_mem_const: int = 1,
) -> Tensor | CrossEntropyOutput:
    """Cross-entropy of a linear layer's outputs.

    Args:
        input: hidden states, (P, D).
        weight: the head, (V, D).
        target: int64, (P,).
        bias: of the head.
        ce_weight: weight of each class, (V,).
        ignore_index: targets that count for nothing.
        lse_square_scale: weight of the squared log-sum-exp in the loss.
        label_smoothing: share of a uniform distribution in the target.
        reduction: mean, sum or none.
        softcap: cap of the logits.
        return_z_loss: return that part of the loss too.
        accum_dtype: of the sums of gradients: None or torch.float32, which it always is.
        use_token_scaling: each row's loss times its probability, a constant.
        return_token_accuracy: return the share of rows whose target is the likeliest class.
        return_predicted_tokens: must be False.
        chunk_mem_const: without effect.

    Returns:
        The loss, or with a return option a `CrossEntropyOutput`.

    Raises:
        ValueError: shapes or options do not fit, or ask for what is not done here.

    >>> liger_fused_linear_cross_entropy(torch.ones(2, 3), torch.zeros(4, 3), torch.tensor([0, 3]))
    tensor(1.3863)
    """
    if return_predicted_tokens:
        raise ValueError(
            "return_predicted_tokens is not done here: no statistic of a row holds its likeliest class"
        )
    if accum_dtype not in (None, torch.float32):
        raise ValueError(f"accum_dtype={accum_dtype} is not obeyed: gradients are summed in float32")
    how = CrossEntropy(
        ce_weight,
        ignore_index,
        label_smoothing,
        lse_square_scale,
        softcap,
        use_token_scaling,
        return_token_accuracy,
    )
    loss, metrics = fused_cross_entropy(input, weight, target, bias, how, reduction)
    if not return_z_loss and not return_token_accuracy:
        return loss
    accuracy = None
    if return_token_accuracy:
        accuracy = metrics["accuracy"]
        accuracy = accuracy if reduction == "none" else accuracy / (target != ignore_index).sum()
    return CrossEntropyOutput(loss, metrics["z_loss"] if return_z_loss else None, accuracy)


class LigerFusedLinearDPOLoss(nn.Module):
    """`liger_fused_linear_dpo` with its options kept; they are documented there."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__()
        _known(loss_type, DPO_LOSSES)
        self.options: dict[str, Any] = {
            "ignore_index": ignore_index, "beta": beta, "alpha": alpha, "compute_nll_loss": compute_nll_loss,
            "compiled": compiled, "use_ref_model": use_ref_model, "average_log_prob": average_log_prob,
            "chunk_size": chunk_size, "loss_type": loss_type, "label_smoothing": label_smoothing,
            "discopop_tau": discopop_tau,
        }  # fmt: skip

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The head comes first, as in Liger."""
        return liger_fused_linear_dpo(
            _input, lin_weight, target, bias, ref_input, ref_weight, ref_bias, **self.options
        )


class LigerFusedLinearGRPOLoss(nn.Module):
    """`liger_fused_linear_grpo` with its options kept; they are documented there."""

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        _known(loss_type, GRPO_LOSSES)
        self.options: dict[str, Any] = {
            "beta": beta, "compiled": compiled, "use_ref_model": use_ref_model, "chunk_size": chunk_size,
            "epsilon_low": epsilon_low, "epsilon_high": epsilon_high, "loss_type": loss_type,
            "max_completion_length": max_completion_length, "importance_sampling_level": importance_sampling_level,
            "sapo_temperature_pos": sapo_temperature_pos, "sapo_temperature_neg": sapo_temperature_neg,
            "temperature": temperature, "delta": delta, "use_bias_correction_kl": use_bias_correction_kl,
            "vespo_k_pos": vespo_k_pos, "vespo_lambda_pos": vespo_lambda_pos, "vespo_k_neg": vespo_k_neg,
            "vespo_lambda_neg": vespo_lambda_neg,
        }  # fmt: skip

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Any = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The hidden states come first, as in Liger."""
        return liger_fused_linear_grpo(
            _input, lin_weight, selected_token_ids, attention_mask, advantages, bias, ref_per_token_logps,
            old_per_token_logps, ref_input, ref_weight, ref_bias, vllm_is_ratio=vllm_is_ratio,
            num_items_in_batch=num_items_in_batch, **self.options,
        )  # fmt: skip


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """`liger_fused_linear_cross_entropy` with its options kept; they are documented there."""

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "ce_weight": ce_weight, "ignore_index": ignore_index, "lse_square_scale": lse_square_scale,
            "label_smoothing": label_smoothing, "reduction": reduction, "softcap": softcap,
            "return_z_loss": return_z_loss, "accum_dtype": accum_dtype, "use_token_scaling": use_token_scaling,
            "return_token_accuracy": return_token_accuracy, "return_predicted_tokens": return_predicted_tokens,
        }  # fmt: skip

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        """The head comes first, as in Liger."""
        return liger_fused_linear_cross_entropy(_input, lin_weight, target, bias, **self.options)


def _known(loss_type: str, names: tuple[str, ...]) -> None:
    if loss_type not in names:
        raise ValueError(f"loss_type={loss_type!r} is not one of {', '.join(names)}")
