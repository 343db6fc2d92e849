"""LoRA added to the weight that it adapts: W + scaling * B A, in a tensor of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from alignfast.models.attention import ModelRefused


def check_adapters(layer: Any, what: str) -> list[str]:
    """Names of a layer's adapters in force, all of them a sum of weights.

    Args:
        layer: PEFT's, around the one that holds the weight.
        what: the layer's name in an error.

    Raises:
        ModelRefused: one is of a kind that is more than that.
    """
    if layer.disable_adapters or layer.merged:
        return []
    for name in layer.active_adapters:
        if name not in {**getattr(layer, "lora_A", {}), **getattr(layer, "lora_embedding_A", {})}:
            raise ModelRefused(
                f"{what} carries an adapter {type(layer).__name__}, of which only LoRA can be merged; "
                f"leave {what} out of target_modules"
            )
        if layer.use_dora.get(name, False):
            raise ModelRefused(
                f"DoRA on {what} can't be merged step by step; leave {what} out of target_modules"
            )
        variant = getattr(layer, "lora_variant", {}).get(name)
        if variant is not None:
            raise ModelRefused(
                f"{what} carries {type(variant).__name__}, which is no sum of weights; leave {what} out of target_modules"
            )
        if layer.lora_bias.get(name, False):
            raise ModelRefused(f"a LoRA bias on {what} is not merged; set lora_bias=False")
    return list(layer.active_adapters)


def add_adapters(layer: Any, weight: Tensor, what: str) -> Tensor:
    """The weight of a layer with its adapters in force added, differentiable in both; neither is written to.

    Raises:
        ModelRefused: see `check_adapters`.
    """
    for name in check_adapters(layer, what):
        weight = weight + layer.get_delta_weight(name).to(weight.dtype)
    return weight
