"""`alignfast doctor`: health of the installation. `alignfast doctor RUN_DIR`: what a run's metrics say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from alignfast.commands.parser import parse_options

_MARKS = {"good": "[green]good[/green]", "look": "[yellow]look[/yellow]", "bad": "[red]bad[/red] "}


@dataclass(frozen=True)
class DoctorOptions:
    """What to look at."""

    run_dir: str | None = None
    """The output_dir of a training; without it, the installation."""
    as_json: bool = False
    """Print JSON."""


def run(command: str, argv: Sequence[str]) -> None:
    """Print what was found."""
    words = list(argv)
    if words and not words[0].startswith("-"):
        words[0] = f"--run_dir={words[0]}"
    (options,) = parse_options(
        command,
        words,
        DoctorOptions,
        description="`doctor` looks at the installation, `doctor RUN_DIR` at a run.",
    )
    console = Console(highlight=False)
    if options.run_dir is not None:
        _run_health(Path(options.run_dir), options.as_json, console)
        return
    from alignfast.doctor import advise, environment

    found = environment()
    advice = advise(found)
    if options.as_json:
        print(json.dumps({**found, "advice": advice}, indent=2))
        return
    _print_environment(found, console)
    for line in advice:
        console.print(f"{_MARKS['look']} {line}", soft_wrap=True)
    if not advice:
        console.print(f"{_MARKS['good']} everything that is needed is here")


def _run_health(folder: Path, as_json: bool, console: Console) -> None:
    from alignfast.findings import findings, read_run

    found = findings(*read_run(folder))
    if as_json:
        print(json.dumps([finding._asdict() for finding in found], indent=2))
        return
    for finding in found:
        console.print(f"{_MARKS[finding.level]} {finding.text}", soft_wrap=True)


def _print_environment(found: dict[str, Any], console: Console) -> None:
    from alignfast.doctor import missing_for

    gpus = found["gpus"] or ["none"]
    console.print(
        f"alignfast {found['alignfast']}, Python {found['python']}, {found['system']}", soft_wrap=True
    )
    console.print(f"CPU: {found['cpu']}\nGPU: {'; '.join(gpus)}", soft_wrap=True)
    packages = [
        f"{name} {known}" if known else f"[dim]{name} missing ({missing_for(name)})[/dim]"
        for name, known in found["packages"].items()
    ]
    console.print(", ".join(packages), soft_wrap=True)
    compiled = [f"{name} {'built' if built else 'not built'}" for name, built in found["compiled"].items()]
    console.print(f"compiled parts: {', '.join(compiled)}")
    backends = sorted(
        {name for known in found["ops"].values() for name in known},
        key=("torch", "native", "triton", "flash").index,
    )
    table = Table(title="kernels", title_justify="left")
    table.add_column("op")
    for name in backends:
        table.add_column(name)
    for op, known in found["ops"].items():
        table.add_row(op, *("[green]yes[/green]" if known.get(b) == "available" else "no" for b in backends))
    console.print(table)
    reasons = {
        f"{name}: {reason}"
        for known in found["ops"].values()
        for name, reason in known.items()
        if reason != "available"
    }
    for reason in sorted(reasons):
        console.print(f"  {reason}", soft_wrap=True, markup=False)
