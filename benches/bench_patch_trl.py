"""A step of each of TRL's trainers, as it comes and patched by `alignfast.patch_trl`, in processes of their own.

The same rows and options on both sides; GRPO and RLOO train on stored completions. Step times leave out start-up and the
first step. Losses and gradient norms must agree within 1e-4 (losses of GRPO are 0 at a ratio of 1, whatever the model says).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sides
from harness import need, sizes, worst
from trl_step import TRAINERS

STEPS = sizes(10, 2)
SAME = 1e-4
_RESULTS: dict[tuple[str, str, str, str], dict[str, Any]] = {}


def run(provider: str, trainer: str, shape: str, allocator: str, folder: Path) -> dict[str, Any]:
    """One process; its result is kept for the comparison at the end."""
    arguments = ("--trainer", trainer, "--shape", shape, "--steps", str(STEPS))
    result = _RESULTS[trainer, shape, allocator, provider] = sides.run(
        "trl_step.py", provider, allocator, folder, *arguments
    )
    return result


# The sides of a row run one after the other: pytest varies the topmost parameter first.
@pytest.mark.parametrize("provider", ["patched", "trl"])
@pytest.mark.parametrize("allocator", ["installed", "tuned"])
@pytest.mark.parametrize("shape", ["tiny", "long"])
@pytest.mark.parametrize("trainer", TRAINERS)
def bench_patch_trl(  # type: ignore[no-untyped-def]
    benchmark, provider: str, allocator: str, shape: str, trainer: str, tmp_path: Path
) -> None:
    need("trl")
    benchmark.group = f"TRL's {trainer} step {shape}, allocator {allocator}"
    result = benchmark.pedantic(run, args=(provider, trainer, shape, allocator, tmp_path), rounds=1)
    benchmark.extra_info.update(
        {
            "provider": provider,
            "trainer": trainer,
            "shape": shape,
            "allocator": allocator,
            "losses": result["loss"],
            **sides.step_times(result),
        }
    )
    peer = _RESULTS.get((trainer, shape, allocator, "patched"))
    if provider == "trl" and peer is not None:
        difference = worst(
            abs(x - y) / max(abs(y), 1.0)
            for name in ("loss", "grad_norm")
            for x, y in zip(peer[name], result[name], strict=True)
        )
        benchmark.extra_info["difference"] = difference
        sides.check_same("losses or gradient norms", difference, SAME)
