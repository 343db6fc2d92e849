"""Whole training steps of two trainers, ours and a peer's: a process for each side, one after the other, under the same malloc."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

# What keeps glibc from giving memory back, and so from faulting it in again
TUNED = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "20000000000",
    "MALLOC_TOP_PAD_": "1000000000",
}
AS_IT_COMES = "alignfast as it comes"  # our trainer with `keep_cpu_memory`, its default


def run(
    script: str,
    provider: str,
    allocator: str,
    folder: Path,
    *more: str,
    variables: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What one process of a script beside this file prints as its last line.

    Args:
        script: file name.
        provider: `alignfast`, which then runs without `keep_cpu_memory`, `AS_IT_COMES`, or the peer.
        allocator: `installed` or `tuned`.
        folder: for what the run writes.
        *more: further arguments of the script.
        variables: of the environment, for this script alone.
    """
    command = [
        sys.executable, str(Path(__file__).with_name(script)), "--provider", provider.split()[0],
        "--output", str(folder), "--keep-cpu-memory", "yes" if provider == AS_IT_COMES else "no", *more,
    ]  # fmt: skip
    environment = {**os.environ, **(TUNED if allocator == "tuned" else {}), **(variables or {})}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check_same(what: str, difference: float, most: float) -> None:
    """Fail in our name where the sides computed different things, whichever side's row it is found in; NaN is different."""
    if not difference <= most:
        pytest.fail(
            f"alignfast's {what} and the peer's differ by {difference:.1e}, more than {most:.0e}: no time for it"
        )


def step_times(result: dict[str, Any]) -> dict[str, float]:
    """Figures of a step, the first left out."""
    wall, cpu = result["wall"][1:], result["cpu"][1:]
    return {
        "step_s_min": min(wall),
        "step_s_median": statistics.median(wall),
        "cpu_s_median": statistics.median(cpu),
        "peak_mib": result["peak_mib"],
    }
