"""From a folder, a hub name or an object to a policy or a reward model, and its tokenizer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from alignfast.models.attention import ModelRefused
from alignfast.models.classifier import load_classifier
from alignfast.models.four_bit import FourBit, check_four_bit, keep_arithmetic
from alignfast.models.policy import Policy
from alignfast.models.reward import RewardModel


def load_policy(
    model: Any,
    *,
    layout: str = "shared",
    backend: str = "auto",
    dtype: str | torch.dtype | None = None,
    peft_config: Any = None,
    gradient_checkpointing: bool = False,
    disable_dropout: bool = True,
    trust_remote_code: bool = False,
    four_bit: FourBit | None = None,
) -> Policy:
    """A policy ready to train.

    Args:
        model: folder, hub name, transformers causal language model or PEFT model. A name of adapters gives a PEFT
            model around their base, the adapters trainable.
        layout: `shared`, `packed` or `padded`.
        backend: backend of the kernels.
        dtype: of the parameters, for a model loaded here: a torch dtype, its name, or `auto` for the file's own. None is
            float32, as in TRL.
        peft_config: a PEFT config, or a mapping of LoraConfig's options; adapters are added to the model.
        gradient_checkpointing: recompute activations in the backward pass.
        disable_dropout: set every dropout of the model to 0. Packed attention refuses dropout on its weights.
        trust_remote_code: run code that comes with the model; off unless asked for.
        four_bit: load the linear layers in 4 bits, to train adapters on; None loads them as they are.

    Raises:
        ValueError: the layout is unknown, options that concern loading come with a model object, or 4 bits without adapters
            or without bitsandbytes.
        ModelRefused: the model can't be trained this way; the message names the way out.
    """
    more = _quantised(model, peft_config, four_bit)
    model = _loaded(model, layout, dtype, lambda name, dtype: _load(name, dtype, trust_remote_code, **more))
    model = _ready(model, peft_config, "CAUSAL_LM", gradient_checkpointing, disable_dropout)
    return Policy(model, layout=layout, backend=backend)


def load_reward_model(
    model: Any,
    *,
    num_heads: int | None = None,
    layout: str = "shared",
    backend: str = "auto",
    dtype: str | torch.dtype | None = None,
    peft_config: Any = None,
    gradient_checkpointing: bool = False,
    disable_dropout: bool = True,
    trust_remote_code: bool = False,
    four_bit: FourBit | None = None,
) -> RewardModel:
    """A reward model ready to train or to score.

    Args:
        model: folder or hub name of a sequence classification model, of its adapters, or of a causal language model, which
            gets a fresh head; or a transformers sequence classification model or PEFT model.
        num_heads: rewards of an answer, each from a head of its own; None is the model's own number, 1 for a fresh head.
        layout: as of `load_policy`, like all that follows.
        backend: backend of the kernels.
        dtype: of the parameters of a model loaded here; None is float32.
        peft_config: a PEFT config, or a mapping of LoraConfig's options; the head is trained whole beside the adapters.
        gradient_checkpointing: recompute activations in the backward pass.
        disable_dropout: set every dropout of the model to 0.
        trust_remote_code: run code that comes with the model.
        four_bit: as of `load_policy`; the head stays whole.

    Raises:
        ValueError: the model has another number of heads, or a checkpoint lacks weights, its head among them; as
            `load_policy`.
        ModelRefused: the model can't be trained this way; the message names the way out.
    """
    fresh, more = [], _quantised(model, peft_config, four_bit)

    def load(name: str, dtype: str | torch.dtype) -> nn.Module:
        loaded, is_fresh = load_classifier(name, num_heads, dtype, trust_remote_code, **more)
        fresh.append(is_fresh)
        return loaded

    model = _loaded(model, layout, dtype, load)
    model = _ready(model, peft_config, "SEQ_CLS", gradient_checkpointing, disable_dropout)
    found = RewardModel(model, layout=layout, backend=backend, fresh_head=any(fresh))
    if num_heads not in (None, found.num_heads):
        raise ValueError(
            f"{type(found.base).__name__} has {found.num_heads} outputs and num_heads={num_heads}: give its own number"
        )
    return found


def _quantised(model: Any, peft_config: Any, four_bit: FourBit | None) -> dict[str, Any]:
    """What from_pretrained takes for a base in 4 bits."""
    named = isinstance(model, (str, os.PathLike))
    adapted = peft_config is not None or (
        named and four_bit is not None and find_adapter_config_file(os.path.expanduser(model)) is not None
    )
    check_four_bit(four_bit, named, adapted)
    return {} if four_bit is None else four_bit.loading()


def _loaded(model: Any, layout: str, dtype: Any, load: Callable[[str, str | torch.dtype], nn.Module]) -> Any:
    """A model object as it is, one by its name loaded."""
    if layout not in ("shared", "packed", "padded"):
        raise ValueError(f"layout must be shared, packed or padded, got {layout!r}")
    if isinstance(model, (str, os.PathLike)):
        return load(os.path.expanduser(os.fspath(model)), dtype or torch.float32)
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a model, its folder or its name on the hub, got {type(model).__name__}")
    if dtype is not None:
        raise ValueError(
            "dtype is for models loaded by name; cast the model object yourself with model.to(dtype)"
        )
    return model


def _ready(
    model: Any, peft_config: Any, task_type: str, gradient_checkpointing: bool, disable_dropout: bool
) -> Any:
    """The model with its adapters, its dropout and its checkpointing as asked for."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ModelRefused(
            f"{type(model).__name__} is an encoder-decoder; only decoder models are trained here"
        )
    if peft_config is not None:
        model = _add_adapters(model, peft_config, task_type)
    keep_arithmetic(model)
    if disable_dropout:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for name in ("attention_dropout", "attn_dropout", "dropout", "activation_dropout", "layerdrop"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)  # probabilities that layers keep as numbers
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if hasattr(model, "enable_input_require_grads") and hasattr(model, "peft_config"):
            model.enable_input_require_grads()
    return model


def _load(name: str, dtype: str | torch.dtype, trust_remote_code: bool, **more: Any) -> nn.Module:
    adapter_config = find_adapter_config_file(name)
    loading = {"dtype": dtype, "trust_remote_code": trust_remote_code, **more}
    if adapter_config is None:
        return AutoModelForCausalLM.from_pretrained(name, **loading)
    from peft import PeftConfig, PeftModel

    # transformers would put the adapters into the base model, frozen and without a switch to turn them off.
    base = PeftConfig.from_pretrained(name).base_model_name_or_path
    model = AutoModelForCausalLM.from_pretrained(base, **loading)
    return PeftModel.from_pretrained(model, name, is_trainable=True)


def _add_adapters(model: nn.Module, peft_config: Any, task_type: str) -> nn.Module:
    from peft import LoraConfig, PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise ValueError("the model has adapters already; give peft_config, or a PEFT model, not both")
    if isinstance(peft_config, Mapping):
        peft_config = LoraConfig(**{"task_type": task_type, **peft_config})
    return get_peft_model(model, peft_config)  # type: ignore[arg-type]


def load_tokenizer(
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None,
    model: Any,
    *,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """The tokenizer itself, one by name, or the one that lies beside the model.

    Raises:
        ValueError: none was given and the model does not say where it came from, or none lies there.
    """
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    named = isinstance(model, (str, os.PathLike))
    name = tokenizer or (model if named else getattr(model.config, "_name_or_path", ""))
    if not name:
        raise ValueError(
            "the model was made in memory, so its tokenizer is unknown; pass processing_class=tokenizer"
        )
    name = os.path.expanduser(os.fspath(name))
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if not os.path.isdir(name):
            raise
        raise ValueError(
            f"{name} holds no tokenizer that can be loaded: save the model's own there, tokenizer.save_pretrained(folder)"
        ) from error
