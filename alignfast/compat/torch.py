"""`torch.nn.functional.linear_cross_entropy` of PyTorch 2.13 on our kernels: its signature, its meaning.

    linear_cross_entropy(x, W, target) = cross_entropy(x W^T + b, target)

PyTorch's makes the logits unless `options` asks for chunks; this one never does, and its scalar losses have their gradient
when they are returned. Results are float32 (float64 of float64) where PyTorch's have the input's type.

Letters: T rows, D width, V classes.
Not done here: targets that are probabilities, losses of several dimensions, class weights with smoothing: refused.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import Tensor

from alignfast.compat._cross_entropy import CrossEntropy, fused_cross_entropy


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    """Cross-entropy of a linear layer's outputs.

    Args:
        input: (T, D), or (D,) for one row.
        linear_weight: (V, D).
        target: int64 classes, (T,) or ().
        linear_bias: (V,).
        weight: weight of each class, (V,).
        reduction: mean, sum or none; a mean divides by the targets' weights.
        ignore_index: targets that count for nothing; None is -100.
        label_smoothing: share of a uniform distribution in the target, in [0, 1].
        options: None, or a `torch.nn.LinearCrossEntropyOptions`: its `batch_chunk_size` is obeyed, and as chunks are the
            rule here and gradients summed in float32, its other fields must be left at their defaults.

    Returns:
        A scalar, or with reduction none a loss of each row.

    Raises:
        ValueError: shapes or options do not fit, or ask for what is not done here.

    >>> linear_cross_entropy(torch.ones(2, 3), torch.zeros(4, 3), torch.tensor([0, 3]))
    tensor(1.3863)
    """
    if linear_weight.ndim != 2 or input.ndim not in (1, 2):
        raise ValueError(
            "expected input (T, D) or (D,) and linear_weight (V, D), got "
            f"{tuple(input.shape)} and {tuple(linear_weight.shape)}; losses of several dimensions are not fused"
        )
    if target.is_floating_point():
        raise ValueError(f"targets must be int64 classes, got {target.dtype}: probabilities are not fused")
    single = input.ndim == 1
    how = CrossEntropy(
        class_weight_V=weight,
        ignore_index=-100 if ignore_index is None else ignore_index,
        label_smoothing=label_smoothing,
        chunk_rows=_chunk_rows(options),
    )
    rows = (input[None], target.reshape(-1)) if single else (input, target)
    loss, _ = fused_cross_entropy(rows[0], linear_weight, rows[1], linear_bias, how, reduction)
    return loss[0] if single and reduction == "none" else loss


def _chunk_rows(options: Any) -> int | None:
    if options is None:
        return None
    for field in fields(options):
        value = getattr(options, field.name)
        # None, PyTorch's word where batch_chunk_size is given
        allowed = (None, "auto") if field.name == "chunking_method" else (field.default,)
        if field.name != "batch_chunk_size" and value not in allowed:
            raise ValueError(
                f"options.{field.name}={value!r} is not obeyed here; leave it at {field.default!r}"
            )
    return options.batch_chunk_size
