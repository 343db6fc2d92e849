"""The LM head as the fused ops need it: weight, bias, and what happens to the logits after them.

    logits = softcap * tanh(scale * (h W^T + b) / softcap)

`.weight` alone is not the head: adapters, scalings and caps stand beside it, each seen to be forgotten elsewhere.
What is read here is checked against the model's own logits before the first step (`policy.probe`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from alignfast.models.adapters import add_adapters
from alignfast.models.attention import ModelRefused


class Head(NamedTuple):
    """What turns hidden states into logits; letters: V vocabulary, D width."""

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float
    softcap: float | None


def head_of(model: PreTrainedModel) -> Head:
    """Read a causal language model's head, as of now: adapters merged, differentiable in all that trains.

    Raises:
        ModelRefused: the model has no head, or one whose weight can't be had as a floating-point matrix.
    """
    module = model.get_output_embeddings()
    if module is None:
        raise ModelRefused(
            f"{type(model).__name__} has no output embeddings; load it as a causal language model"
        )
    weight_VD, bias_V = weight_and_bias(module)
    if isinstance(weight_VD, DTensor):
        weight_VD = weight_VD.full_tensor()
    if isinstance(bias_V, DTensor):
        bias_V = bias_V.full_tensor()
    if not weight_VD.is_floating_point() or weight_VD.ndim != 2:
        raise ModelRefused(
            f"the head {type(module).__name__} holds {weight_VD.dtype} {tuple(weight_VD.shape)}, not a matrix of "
            "floating-point numbers; leave the head out of quantisation"
        )
    return Head(weight_VD, bias_V, _scale(model), _config(model, "final_logit_softcapping"))


def _config(model: PreTrainedModel, name: str) -> Any:
    return getattr(model.config.get_text_config(), name, None)


def _scale(model: PreTrainedModel) -> float:
    """The factor on the logits, under the names that models give it."""
    scale = 1.0
    multiplied, divided = _config(model, "logit_scale"), _config(model, "logits_scaling")
    if multiplied is not None:  # Cohere
        scale *= multiplied
    if divided is not None:  # Granite
        scale /= divided
    if _config(model, "lm_head_multiplier") is not None:  # Falcon-H1
        scale *= _config(model, "lm_head_multiplier")
    if _config(model, "dim_model_base") is not None:  # MiniCPM scales the head's input
        scale *= _config(model, "dim_model_base") / _config(model, "hidden_size")
    return float(scale)


def weight_and_bias(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear layer as of now: the copy that PEFT trains, adapters merged.

    Raises:
        ModelRefused: it is no linear layer, or carries adapters that can't be merged.
    """
    if hasattr(module, "modules_to_save"):  # PEFT: a head that is trained whole
        active = getattr(module, "active_adapters", None) or []
        if not active or module.disable_adapters:
            return weight_and_bias(module.original_module)
        return weight_and_bias(module.modules_to_save[active[0]])
    if hasattr(module, "base_layer"):  # PEFT: a head with adapters
        return _merged(module)
    if not isinstance(module, nn.Linear):
        raise ModelRefused(f"the head is a {type(module).__name__}, expected torch.nn.Linear")
    return module.weight, module.bias


def readout(hidden_ND: Tensor, weight_HD: Tensor, bias_H: Tensor | None) -> Tensor:
    """A small linear head's outputs (N, H), in float32 or float64: in 16 bits, also under autocast, a reward would keep three
    digits."""
    dtype = torch.promote_types(weight_HD.dtype, torch.float32)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        bias_H = None if bias_H is None else bias_H.to(dtype)
        return nn.functional.linear(hidden_ND.to(dtype), weight_HD.to(dtype), bias_H)


def _merged(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight of an adapted head with its active adapters added, differentiable in them."""
    weight_VD, bias_V = weight_and_bias(layer.base_layer)
    merged_VD = add_adapters(layer, weight_VD, "the head")
    if merged_VD is not weight_VD and layer.training:
        dropouts = [layer.lora_dropout[name] for name in layer.active_adapters]
        if any(isinstance(dropout, nn.Dropout) and dropout.p for dropout in dropouts):
            raise ModelRefused(
                "LoRA on the head drops its input, which a merged weight can't; set lora_dropout=0"
            )
    return merged_VD, bias_V
