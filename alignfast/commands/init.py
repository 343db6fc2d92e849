"""`alignfast init`: a commented recipe to start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignfast.commands.parser import UsageError, parse_options
from alignfast.commands.recipes import RECIPES


@dataclass(frozen=True)
class InitOptions:
    """Which recipe, and where it goes."""

    recipe: str
    """sft, reward, dpo, dpo_lora, kto, grpo, ppo or online."""
    output: str | None = None
    """File to write; unless given, RECIPE.yaml."""
    force: bool = False
    """Write over a file that is there."""


def run(command: str, argv: Sequence[str]) -> None:
    """Write the recipe."""
    (options,) = parse_options(
        command, argv, InitOptions, positional=("recipe",), description=f"Recipes: {', '.join(RECIPES)}."
    )
    if options.recipe not in RECIPES:
        raise UsageError(f"there is no recipe {options.recipe!r}; there are {', '.join(RECIPES)}")
    file = Path(options.output or f"{options.recipe}.yaml")
    if file.exists() and not options.force:
        raise ValueError(f"{file} is there already: give another --output, or --force to write over it")
    file.write_text(RECIPES[options.recipe])
    command = options.recipe.split("_")[0]
    first = "" if command == "online" else "edit model and train_dataset, then: "
    print(f"recipe: {file}\n{first}alignfast {command} --config {file}")
