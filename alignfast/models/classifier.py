"""Folders and hub names to sequence classification models whose head was stored, or is known to be fresh.

transformers gives a checkpoint without a head a random one and goes on; a reward model that lost its head would score
at random. So the checkpoint must say what it is: a causal language model gets a fresh head, a sequence classification
model must bring its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.utils import find_adapter_config_file, logging

from alignfast.models.attention import ModelRefused
from alignfast.models.reward import HEAD


def load_classifier(
    name: str, num_heads: int | None, dtype: str | torch.dtype, trust_remote_code: bool, **more: Any
) -> tuple[nn.Module, bool]:
    """A sequence classification model, and whether its head is fresh.

    Args:
        name: folder or hub name of the model, of adapters for one, or of a causal language model.
        num_heads: outputs; None is the checkpoint's own number, 1 for a fresh head.
        dtype: of the parameters.
        trust_remote_code: run code that comes with the model.
        **more: for transformers' from_pretrained.

    Raises:
        ValueError: the checkpoint has another number of heads, or lacks weights that it should hold.
        ModelRefused: transformers has no sequence classification model of this architecture.
    """
    if find_adapter_config_file(name) is not None:
        return load_adapters(name, num_heads, dtype, trust_remote_code, **more), False
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    brings_head = _brings_head(config)
    if brings_head and num_heads not in (None, config.num_labels):
        raise ValueError(
            f"{name} has {config.num_labels} outputs and num_heads={num_heads}: give its own number, or load the language "
            "model that it came from"
        )
    config.num_labels = config.num_labels if brings_head else num_heads or 1
    try:
        with _quietly():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                name,
                config=config,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **more,
            )
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ModelRefused(
            f"transformers has no sequence classification model for {config.model_type}; take another architecture"
        ) from error
    missing = sorted(key for key in report["missing_keys"] if brings_head or not key.startswith(f"{HEAD}."))
    if missing:
        raise ValueError(
            f"{name} lacks {', '.join(missing[:3])}, without which its rewards are random: it was saved without its head, or "
            "it is no decoder with one named score"
        )
    return model, not brings_head


def is_reward_model(name: str, trust_remote_code: bool = False) -> bool:
    """Whether a folder or hub name holds a sequence classification model or adapters of one."""
    if find_adapter_config_file(name) is not None:
        from peft import PeftConfig

        return PeftConfig.from_pretrained(name).task_type == "SEQ_CLS"
    return _brings_head(AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code))


def _brings_head(config: Any) -> bool:
    return any(kind.endswith("ForSequenceClassification") for kind in config.architectures or ())


def load_adapters(
    name: str,
    num_heads: int | None,
    dtype: str | torch.dtype,
    trust_remote_code: bool,
    base: str | None = None,
    **more: Any,
) -> Any:
    """Adapters of a reward model around their base, whose own head they replace; `base` where it has moved.

    Raises:
        ValueError: they hold no head, or one of another size.
    """
    from peft import PeftConfig, PeftModel
    from peft.utils import load_peft_weights

    heads = [
        tensor.shape[0]
        for key, tensor in load_peft_weights(name, device="cpu").items()
        if f".{HEAD}." in key and key.endswith("weight") and "lora_" not in key
    ]
    if not heads:
        raise ValueError(
            f"the adapters in {name} hold no head {HEAD}: they are of another kind of model (`alignfast merge` adds those of a "
            "language model into it), or were saved without it"
        )
    if num_heads not in (None, heads[0]):
        raise ValueError(f"{name} has {heads[0]} outputs and num_heads={num_heads}: give its own number")
    base = base or PeftConfig.from_pretrained(name).base_model_name_or_path
    if not base:
        raise ValueError(
            f"the adapters in {name} do not say which model they belong to: load it yourself, and pass a PeftModel"
        )
    model, _ = load_classifier(base, heads[0], dtype, trust_remote_code, **more)
    return PeftModel.from_pretrained(model, name, is_trainable=True)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' list of weights that differ, which are looked at here."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
