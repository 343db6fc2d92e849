"""A PPO step with its sampling, whole: our trainer and TRL's in processes of their own, one after the other.

A step is a draw: 32 prompts of 128 tokens, a completion of 64 tokens each, a reward model and a critic as large as the
policy, and four passes over the draw. Step times leave out start-up and the first step. Samples differ between the sides;
so both first run a few steps on the same stored completions, after which policy and critic have moved a dozen times: what
they log of losses, KL, scores, values and ratios must agree within 1e-4.

TRL has had no PPOTrainer since 1.13. `ALIGNFAST_TRL_PPO` names a folder with the last one:
`pip install --no-deps --target FOLDER trl==1.12.0`; without it the bench is skipped.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import sides
from harness import sizes, worst
from ppo_step import PASSES
from sides import AS_IT_COMES

STEPS = sizes(4, 2)
REPLAYED_STEPS = 3
SAME = 1e-4
COMPARED = (
    "objective/kl", "objective/scores", "objective/entropy", "objective/non_score_reward", "policy/approxkl_avg",
    "policy/clipfrac_avg", "policy/entropy_avg", "loss/policy_avg", "loss/value_avg", "val/clipfrac_avg", "val/ratio",
)  # fmt: skip


def run(provider: str, allocator: str, folder: Path, *more: str) -> dict[str, Any]:
    path = os.pathsep.join(filter(None, (os.environ["ALIGNFAST_TRL_PPO"], os.environ.get("PYTHONPATH"))))
    variables = {"PYTHONPATH": path, "TRL_EXPERIMENTAL_SILENCE": "1"}
    return sides.run("ppo_step.py", provider, allocator, folder, *more, variables=variables)


@cache
def difference() -> float:
    """Largest difference of a metric on the same completions; ours is the mean over the passes, as TRL logs it."""
    logged = []
    for provider in ("alignfast", "trl"):
        with TemporaryDirectory() as folder:
            more = ("--steps", str(REPLAYED_STEPS), "--replay", "yes")
            logged.append(run(provider, "tuned", Path(folder), *more)["logged"])
    ours, theirs = logged
    assert len(ours) == PASSES * len(theirs) == PASSES * REPLAYED_STEPS
    return worst(
        abs(sum(row[name] for row in ours[PASSES * i : PASSES * (i + 1)]) / PASSES - one[name])
        for i, one in enumerate(theirs)
        for name in COMPARED
    )


@pytest.mark.parametrize("provider", [AS_IT_COMES, "alignfast", "trl"])
@pytest.mark.parametrize("allocator", ["installed", "tuned"])
def bench_ppo_step(benchmark, provider: str, allocator: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    if "ALIGNFAST_TRL_PPO" not in os.environ:
        pytest.skip("ALIGNFAST_TRL_PPO names no folder with TRL 1.12")
    if provider == AS_IT_COMES and allocator == "tuned":
        pytest.skip("the environment does already what keep_cpu_memory does")
    benchmark.group = f"ppo step tiny, allocator {allocator}"
    arguments = (provider, allocator, tmp_path, "--steps", str(STEPS))
    result = benchmark.pedantic(run, args=arguments, rounds=1)
    benchmark.extra_info.update(
        {
            "provider": provider,
            "shape": "tiny",
            "allocator": allocator,
            "steps": len(result["wall"]),
            **sides.step_times(result),
        }
    )
    if provider == "trl":  # after our own rows, which a peer that breaks shall not cost
        differs = benchmark.extra_info["difference"] = difference()
        sides.check_same("metrics", differs, SAME)
