"""A DPO step with its reference, whole: our trainer and TRL's in processes of their own, one after the other.

Each side runs twice: with malloc as it is installed, and kept from returning memory by the environment, since half of
the peer's time on a CPU is page faults. Our trainer asks malloc for the second by itself (`keep_cpu_memory`): beside the
peer under plain malloc it runs without, and a third time as it comes. Step times leave out start-up and the first step.
The loss curves must agree within 1e-4.
`ALIGNFAST_DATA` and `ALIGNFAST_BENCH_MODEL` name the data folder and the 135M model; without them that row is skipped.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import sides
import torch
from harness import need, sizes, worst
from sides import AS_IT_COMES

STEPS = sizes(20, 2)
SAME_LOSS, SAME_LOSS_BF16 = 1e-4, 2e-2
SHAPES = ["0.5b"] if torch.cuda.is_available() else ["135m", "tiny", "long"]
_RESULTS: dict[tuple[str, str, str], dict[str, Any]] = {}


def run(provider: str, shape: str, allocator: str, folder: Path) -> dict[str, Any]:
    """One process; its result is kept for the comparison at the end."""
    steps = ("--shape", shape, "--steps", str(STEPS))
    result = _RESULTS[shape, allocator, provider] = sides.run(
        "dpo_step.py", provider, allocator, folder, *steps
    )
    return result


# The sides of a row run one after the other: pytest varies the topmost parameter first.
@pytest.mark.parametrize("provider", [AS_IT_COMES, "alignfast", "trl"])
@pytest.mark.parametrize("allocator", ["installed", "tuned"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_dpo_step(benchmark, provider: str, allocator: str, shape: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    if provider == "trl":
        need("trl")
    if torch.cuda.is_available() and (allocator == "tuned" or provider == AS_IT_COMES):
        pytest.skip("malloc has no part in a step on a GPU")
    if provider == AS_IT_COMES and allocator == "tuned":
        pytest.skip("the environment does already what keep_cpu_memory does")
    if shape == "135m":
        for name in ("ALIGNFAST_DATA", "ALIGNFAST_BENCH_MODEL"):
            if name not in os.environ:
                pytest.skip(f"{name} is not set")
    benchmark.group = f"dpo step {shape}, allocator {allocator}"
    result = benchmark.pedantic(run, args=(provider, shape, allocator, tmp_path), rounds=1)
    benchmark.extra_info.update(
        {
            "provider": provider,
            "shape": shape,
            "allocator": allocator,
            "losses": result["losses"],
            **sides.step_times(result),
        }
    )
    peer = _RESULTS.get((shape, allocator, "alignfast"))
    if provider == "trl" and peer is not None:
        difference = worst(abs(x - y) for x, y in zip(peer["losses"], result["losses"], strict=True))
        benchmark.extra_info["loss_difference"] = difference
        sides.check_same("losses", difference, SAME_LOSS_BF16 if shape == "0.5b" else SAME_LOSS)
