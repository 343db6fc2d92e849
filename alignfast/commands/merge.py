"""`alignfast merge`: LoRA adapters added into the weights of their model, which then loads without PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alignfast.commands.parser import parse_options


@dataclass(frozen=True)
class MergeOptions:
    """What to merge."""

    adapter: str
    """Folder of the adapters; it names the model they belong to."""
    output: str
    """Folder for the merged model."""
    base_model: str | None = None
    """Folder or hub name of the model under the adapters, where it has moved since."""
    dtype: str = "auto"
    """Type of the merged weights: float32, bfloat16, float16, or auto for the model's own."""
    trust_remote_code: bool = False
    """Run code that a model brings with it."""


def run(command: str, argv: Sequence[str]) -> None:
    """Merge, and save model and tokenizer."""
    (options,) = parse_options(command, argv, MergeOptions, positional=("adapter", "output"))
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from alignfast.models.classifier import load_adapters

    base = options.base_model or PeftConfig.from_pretrained(options.adapter).base_model_name_or_path
    if not base:
        raise ValueError(f"{options.adapter} does not say which model it belongs to: give --base_model")
    trust = options.trust_remote_code
    if PeftConfig.from_pretrained(options.adapter).task_type == "SEQ_CLS":
        adapted = load_adapters(options.adapter, None, options.dtype, trust, base)
    else:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=options.dtype, trust_remote_code=trust)
        adapted = PeftModel.from_pretrained(model, options.adapter)
    merged = adapted.merge_and_unload(safe_merge=True)
    merged.save_pretrained(options.output)
    AutoTokenizer.from_pretrained(options.adapter, trust_remote_code=trust).save_pretrained(options.output)
    print(f"merged model: {options.output}")
