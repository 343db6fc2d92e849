"""`alignfast eval`: preference accuracy on pairs, perplexity on anything else; of a reward model, reward accuracy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignfast.commands.parser import parse_options

if TYPE_CHECKING:
    from alignfast.data import Rows


@dataclass(frozen=True)
class EvalOptions:
    """What is measured on what."""

    model: str
    """Folder or hub name of the model, or of adapters. A reward model is known by its class."""
    dataset: str
    """A .jsonl, .json or .parquet file, or a dataset's name. Pairs give preference accuracy (by `subset` where rows have that
    column, as RewardBench's do); texts, conversations, and prompts with completions give perplexity."""
    reference: str | None = None
    """Model that the implicit reward is measured against; for adapters, the model without them unless given."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer; the model's own unless given."""
    dataset_config: str | None = None
    """Which configuration of a dataset from the hub, where it has several."""
    split: str = "train"
    """Which part of a dataset from the hub."""
    chat: bool = False
    """Put plain prompts and answers into the chat template, as a user's and an assistant's turn: RewardBench's way."""
    beta: float = 0.1
    """Factor of the implicit reward; accuracy does not depend on it."""
    max_length: int | None = None
    """Longer sequences are cut; None cuts nothing."""
    max_tokens_per_batch: int = 4096
    """Tokens of one batch."""
    layout: str = "shared"
    """`shared`, `packed` or `padded`: all give the same figures."""
    backend: str = "auto"
    """Kernels: auto, torch, native or triton."""
    dtype: str = "auto"
    """Type of the weights: float32, bfloat16, float16, or auto for the model's own."""
    trust_remote_code: bool = False
    """Run code that a model brings with it."""
    use_cpu: bool = False
    """Stay on the CPU where there is a GPU."""
    output: str | None = None
    """Write the figures to this JSON file."""


def run(command: str, argv: Sequence[str]) -> None:
    """Measure, print a table, and write JSON where asked."""
    (options,) = parse_options(command, argv, EvalOptions)
    import torch
    from rich.console import Console

    from alignfast.data import load_rows
    from alignfast.evaluation import perplexity, preference_accuracy, reward_accuracy
    from alignfast.models import is_reward_model, load_policy, load_reward_model, load_tokenizer

    device = "cuda" if torch.cuda.is_available() and not options.use_cpu else "cpu"

    def load(name: str, how: Any = load_policy) -> Any:
        model = how(
            name, layout=options.layout, backend=options.backend, dtype=options.dtype,
            trust_remote_code=options.trust_remote_code,
        )  # fmt: skip
        return model.to(device)

    rows = load_rows(options.dataset, split=options.split, config=options.dataset_config)
    rows = as_conversations(rows) if options.chat else rows
    tokenizer = load_tokenizer(options.tokenizer, options.model, trust_remote_code=options.trust_remote_code)
    limits = {"max_length": options.max_length, "max_tokens": options.max_tokens_per_batch}
    report: Any
    if is_reward_model(options.model, options.trust_remote_code):
        if options.reference is not None:
            raise ValueError(f"a reference is for models that write; {options.model} is a reward model")
        report = reward_accuracy(load(options.model, load_reward_model), tokenizer, rows, **limits)
    elif rows.format == "preference":
        reference = None if options.reference is None else load(options.reference)
        report = preference_accuracy(
            load(options.model), tokenizer, rows, reference=reference, beta=options.beta, **limits
        )
    else:
        if options.reference is not None:
            raise ValueError(f"a reference is for pairs; {options.dataset} holds rows of {rows.format!r}")
        report = perplexity(load(options.model), tokenizer, rows, **limits)
    Console(highlight=False).print(report.table())
    if options.output is not None:
        Path(options.output).write_text(
            json.dumps({"model": options.model, **report.to_dict()}, indent=2) + "\n"
        )


def as_conversations(rows: Rows) -> Rows:
    """Plain rows with a prompt as conversations: the prompt a user's turn, each answer an assistant's.

    Raises:
        ValueError: the rows are conversations already, or have no prompt.
    """
    if rows.conversational or rows.format not in ("preference", "prompt_completion"):
        kind = (
            "conversations already" if rows.conversational else f"rows of {rows.format!r}, without a prompt"
        )
        raise ValueError(f"chat is for plain prompts and answers; {rows.name} holds {kind}")
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant", "completion": "assistant"}
    items = [
        {name: [{"role": roles[name], "content": v}] if name in roles else v for name, v in row.items()}
        for row in rows
    ]
    return replace(rows, conversational=True, items=items)
