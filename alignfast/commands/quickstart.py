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

    from alignfast.quickstart.run import Sizes, run_seed
    from alignfast.quickstart.summary import show

    options, sizes = parse_options(command, argv, QuickstartOptions, Sizes)
    if options.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {options.seeds}")
    folder, console, began = Path(options.output), Console(highlight=False), time.perf_counter()

    def say(text: str) -> None:
        console.print(f"[bold]{time.perf_counter() - began:4.0f} s[/bold]  {text}", soft_wrap=True)

    say(
        "A small Llama and its tokenizer are made from text that a grammar writes, fine-tuned on it, then aligned with the "
        "votes of a simulated user."
    )
    seeds = [run_seed(seed, folder / f"seed-{seed}", sizes, say) for seed in range(options.seeds)]
    show(seeds, folder, sizes, time.perf_counter() - began, console)
    console.print(
        f"\nreport: {folder}/report.html, figures: {folder}/quickstart.json, plot: {folder}/quickstart.png"
    )
    console.print(
        f"talk to it: alignfast generate --model {folder}/seed-0/dpo --prompt 'How was the soup at the harbour cafe?'",
        soft_wrap=True,
    )
    console.print("Next, with a model and pairs of your own:", style="bold")
    console.print("alignfast dpo --model YOURS --train_dataset YOURS.jsonl", soft_wrap=True)
