"""`alignfast quickstart`: from nothing to an aligned model in minutes on a CPU, without a download."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignfast.commands.parser import parse_options


@dataclass(frozen=True)
class QuickstartOptions:
    """Where it goes and how often it is repeated."""

    output: str = "quickstart"
    """Folder for models, data, metrics, quickstart.json, quickstart.png and report.html."""
    seeds: int = 3
    """Trainings from scratch, each with weights, text, questions and votes of its own."""


def run(command: str, argv: Sequence[str]) -> None:
    """Train, measure, show, and say what comes next."""
    from rich.console import Console

    from alignfast.quickstart.page import write_page
    from alignfast.quickstart.run import Sizes
    from alignfast.quickstart.seeds import run_seeds
    from alignfast.quickstart.summary import show

    options, sizes = parse_options(command, argv, QuickstartOptions, Sizes)
    sizes.check()
    if options.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {options.seeds}")
    folder, console, began = Path(options.output), Console(highlight=False), time.time()
    console.print(
        "A small Llama and its tokenizer are made from text that a grammar writes and fine-tuned on it. A simulated user votes "
        "on its answers; a reward model learns from the votes. Then DPO (from the votes), PPO and GRPO (from the reward model) "
        f"align it: {options.seeds} times from scratch. Details go to {folder}/seed-*/log.txt.\n",
        soft_wrap=True,
    )
    passages = run_seeds(options.seeds, folder, sizes, began)
    console.print()
    seconds = time.time() - began
    show(passages, folder, sizes, seconds, console)
    write_page(folder / "report.html", passages, folder, seconds)
    console.print(
        f"\nreport: {folder}/report.html, figures: {folder}/quickstart.json, plot: {folder}/quickstart.png"
    )
    console.print(
        f"talk to it: alignfast generate --model {folder}/seed-0/grpo --prompt 'How was the soup at the harbour cafe?'",
        soft_wrap=True,
    )
    console.print("Next, with a model of your own, and pairs or a reward:", style="bold")
    console.print("alignfast dpo --model YOURS --train_dataset YOUR_PAIRS.jsonl", soft_wrap=True)
    console.print(
        "alignfast grpo --model YOURS --train_dataset YOUR_PROMPTS.jsonl --reward_funcs YOURS", soft_wrap=True
    )
