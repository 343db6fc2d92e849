"""Base weights in 4 bits under LoRA (QLoRA, arXiv 2305.14314), by bitsandbytes.

    W (out, in) -> codes of 4 bits, two in a byte, and a scale for each 64 of them; double quantisation: 8-bit scales

Linear layers of the trunk alone: embeddings, norms and the head stay as `dtype` says, and adapters are float32. The base
is frozen, and what is computed with it is of `compute_dtype`. This is what PEFT's prepare_model_for_kbit_training makes,
part by part: adapters freeze the base, the type is the user's, checkpointing is load.py's.

Not done here: training the 4-bit weights themselves (they have no gradient), sharding them, merging into them.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alignfast.models.attention import ModelRefused

QUANT_TYPES = ("nf4", "fp4")
_INSTALL = "pip install '.[qlora]' in alignfast's checkout"


class FourBit(NamedTuple):
    """How a base is quantised when it is loaded."""

    quant_type: str = "nf4"  # or fp4
    double_quant: bool = True  # the scales too
    compute_dtype: str | None = None  # of the products; None is bfloat16 on GPUs that have it, else float32

    @property
    def arithmetic(self) -> torch.dtype:
        """`compute_dtype` with its default."""
        if self.compute_dtype is not None:
            return getattr(torch, self.compute_dtype)
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has_bf16 else torch.float32

    def loading(self) -> dict[str, Any]:
        """What transformers' from_pretrained takes.

        Raises:
            ValueError: bitsandbytes is not installed.
        """
        if find_spec("bitsandbytes") is None:
            raise ValueError(f"load_in_4bit=True needs bitsandbytes, which is not installed: {_INSTALL}")
        from transformers import BitsAndBytesConfig

        return {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=self.quant_type,
                bnb_4bit_use_double_quant=self.double_quant,
                bnb_4bit_compute_dtype=self.arithmetic,
            )
        }


def check_four_bit(four_bit: FourBit | None, named: bool, has_adapters: bool) -> None:
    """Refuse what can't be, before anything is loaded.

    Args:
        four_bit: how to quantise; None for not at all.
        named: whether the model is loaded here.
        has_adapters: whether adapters will be trained.

    Raises:
        ValueError: there is nothing to train, or to quantise with, or the model is there already.
    """
    if four_bit is None:
        return
    four_bit.loading()
    if not named:
        raise ValueError(
            "load_in_4bit is for models loaded by name; load the model object yourself with a BitsAndBytesConfig"
        )
    if not has_adapters:
        raise ValueError(
            "weights of 4 bits can't be trained themselves: give peft_config (--use_peft), or a name of adapters"
        )


def keep_arithmetic(model: nn.Module) -> None:
    """On CPUs with AVX512-BF16, keep bitsandbytes from its way of inference: it computes in bfloat16 whatever the
    compute_dtype, and leaves the weights in a layout through which no gradient flows afterwards (seen in 0.50.2)."""
    name = "support_avx512bf16_for_cpu"
    for module in model.modules():
        if hasattr(module, name):
            setattr(module, name, False)


def check_trainable(model: nn.Module) -> None:
    """Refuse a quantised model object that has no adapters.

    Raises:
        ModelRefused: see above.
    """
    if has_packed_weights(model) and not hasattr(model, "peft_config"):
        raise ModelRefused(
            f"{type(model).__name__} holds quantised weights, which can't be trained themselves: give peft_config"
        )


def has_packed_weights(model: nn.Module) -> bool:
    """Whether some weights are codes: of whole numbers."""
    return any(not parameter.is_floating_point() for parameter in model.parameters())


def num_weights(parameter: Tensor) -> int:
    """Numbers that a parameter stands for: two a byte where bitsandbytes packed them."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else packed.shape.numel()


def arithmetic_of(model: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """The coarsest type that a model of parameters of `dtype` computes in: a quantised one's products have their own."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    own = getattr(config, "bnb_4bit_compute_dtype", None)
    return min(own or dtype, dtype, key=lambda kind: -torch.finfo(kind).eps)
