"""A GRPO step with its sampling, whole: our trainer and TRL's in processes of their own, one after the other.

Fresh prompts each step, 8 completions of 64 tokens each, a reward that costs nothing. Each side runs under the malloc of
bench_dpo_step.py, both ways, ours a third time as it comes. Step times leave out start-up and the first step. Samples differ
between the sides; so each shape first runs a few steps of both on the same stored completions (TRL's `rollout_func`),
whose gradient norms and entropies must agree within 1e-4 of themselves (losses would prove nothing: at a ratio of 1 they
are 0 whatever the model says). The parts of our steps come with their times.
"""

from __future__ import annotations

import statistics
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import sides
import torch
from grpo_step import WORKS
from harness import need, sizes, worst
from sides import AS_IT_COMES

STEPS = sizes(6, 2)
REPLAYED_STEPS = 3
SAME, SAME_BF16 = 1e-4, 5e-2
SHAPES = ["0.5b"] if torch.cuda.is_available() else [shape for shape in WORKS if shape != "0.5b"]


def run(provider: str, shape: str, allocator: str, folder: Path) -> dict[str, Any]:
    return sides.run("grpo_step.py", provider, allocator, folder, "--shape", shape, "--steps", str(STEPS))


@cache
def difference(shape: str) -> float:
    """Largest difference of the two sides' gradient norms and entropies on the same completions, as a share."""
    logged = []
    for provider in ("alignfast", "trl"):
        more = ("--shape", shape, "--steps", str(REPLAYED_STEPS), "--replay", "yes")
        with TemporaryDirectory() as folder:
            logged.append(sides.run("grpo_step.py", provider, "tuned", Path(folder), *more)["logged"])
    assert [len(rows) for rows in logged] == [REPLAYED_STEPS] * 2
    pairs = [(a[name], b[name]) for a, b in zip(*logged) for name in ("grad_norm", "entropy")]
    return worst(abs(ours - theirs) / theirs for ours, theirs in pairs)


# The sides of a row run one after the other: pytest varies the topmost parameter first.
@pytest.mark.parametrize("provider", [AS_IT_COMES, "alignfast", "trl"])
@pytest.mark.parametrize("allocator", ["installed", "tuned"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_grpo_step(benchmark, provider: str, allocator: str, shape: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    if provider == "trl":
        need("trl")
    if torch.cuda.is_available() and (allocator == "tuned" or provider == AS_IT_COMES):
        pytest.skip("malloc has no part in a step on a GPU")
    if provider == AS_IT_COMES and allocator == "tuned":
        pytest.skip("the environment does already what keep_cpu_memory does")
    benchmark.group = f"grpo step {shape}, allocator {allocator}"
    result = benchmark.pedantic(run, args=(provider, shape, allocator, tmp_path), rounds=1)
    logged, parts = result["logged"][1:], result["parts"][1:]
    lengths = [row["completions/mean_length"] for row in logged]
    assert lengths == [WORKS[shape].answer] * len(lengths)  # nothing ended early
    benchmark.extra_info.update(
        {
            "provider": provider,
            "shape": shape,
            "allocator": allocator,
            "steps": len(result["wall"]),
            "parts": {name: statistics.median(row[name] for row in parts) for name in (parts or [{}])[0]},
            **sides.step_times(result),
        }
    )
    if provider == "trl":  # after our own rows, which a peer that breaks shall not cost
        differs = benchmark.extra_info["gradient_difference"] = difference(shape)
        sides.check_same("gradient norms or entropies", differs, SAME_BF16 if shape == "0.5b" else SAME)
