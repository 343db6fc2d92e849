"""What every bench shares: the machine's own limits, a check before a time, and one row a measurement.

A row is a claim: time (minimum, median, spread), bytes or FLOPs counted in the bench file, the share of the limit
that this machine reached in the same run, and the error against float64. A provider that is more than twice as
wrong as PyTorch in the same type gets no time.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

T = TypeVar("T")

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "trl",
    "liger-kernel",
    "flash-attn",
    "flash-attn-4",
    "alignfast",
)
_LIMIT_BYTES = 256 << 20  # beyond every cache but the largest servers', for the bandwidths


def sizes(full: T, smallest: T) -> T:
    """What a bench runs at: `smallest` where ALIGNFAST_BENCH_SMOKE is set, to see that it runs; such times mean nothing."""
    return smallest if os.environ.get("ALIGNFAST_BENCH_SMOKE") else full


def compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for the shapes that it meets: not for any shape, nor eager after too many, as earlier benches may leave
    it."""
    torch._dynamo.reset()
    return torch.compile(call, dynamic=False)


@dataclass(frozen=True)
class Limits:
    """Rates that this machine reached at the start of the run, with the threads that torch uses."""

    read_gb_s: float
    copy_gb_s: float
    gemm_gflop_s: float


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def best_seconds(call: Callable[[], Any], rounds: int = 5) -> float:
    """Least wall time of a few calls, after one to warm up."""
    call()
    times = []
    for _ in range(rounds):
        synchronise()
        start = time.perf_counter()
        call()
        synchronise()
        times.append(time.perf_counter() - start)
    return min(times)


@cache
def limits() -> Limits:
    """Measured once a run."""
    source = torch.ones(_LIMIT_BYTES // 4, device=device())
    target = torch.empty_like(source)
    n = 2048 if device().type == "cpu" else 8192
    a = torch.randn(n, n, device=device(), dtype=torch.float32 if device().type == "cpu" else torch.bfloat16)
    out = torch.empty_like(a)
    return Limits(
        read_gb_s=_LIMIT_BYTES / best_seconds(source.sum) / 1e9,
        copy_gb_s=2 * _LIMIT_BYTES / best_seconds(lambda: target.copy_(source)) / 1e9,
        gemm_gflop_s=2 * n**3 / best_seconds(lambda: torch.mm(a, a, out=out)) / 1e9,
    )


def environment() -> dict[str, Any]:
    """Everything that a reader needs to place a figure."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.stdout.strip() or None,
        "limits": limits().__dict__,
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def relative_error(got: Tensor, gold: Tensor) -> float:
    """Largest error as a share of the largest value."""
    return float((got.double() - gold).abs().max() / gold.abs().max().clamp(min=1e-300))


def measure(
    benchmark: Any,
    call: Callable[[], Any],
    *,
    provider: str,
    shape: str,
    error: float | None = None,
    allowed_error: float | None = None,
    read_bytes: float | None = None,
    moved_bytes: float | None = None,
    flops: float | None = None,
    tokens: int | None = None,
    setup: Callable[[], None] | None = None,
    rounds: int = 7,
) -> None:
    """Time `call` with pytest-benchmark and write down what the time stands against.

    Args:
        benchmark: pytest-benchmark's fixture.
        call: what is timed; it should wait for the device itself or return soon after.
        provider: whose code it is.
        shape: sizes, as the table shows them.
        error: of the result against float64.
        allowed_error: above it the row fails instead of getting a time.
        read_bytes: bytes that must be read at least; set it or one of the next two.
        moved_bytes: bytes that must be read and written at least.
        flops: floating-point operations that must be done at least.
        tokens: drawn by a call, where that is what it is for.
        setup: called before every round, outside the time.
        rounds: timed calls.
    """
    if error is not None and allowed_error is not None and not error <= allowed_error:
        pytest.fail(
            f"{provider} is wrong by {error:.1e} where {allowed_error:.1e} is allowed: no time for it"
        )

    def timed() -> None:
        call()
        synchronise()

    # pytest-benchmark hands the result of setup on as arguments: none here
    benchmark.pedantic(timed, setup=(lambda: setup()) if setup else None, rounds=rounds, warmup_rounds=1)
    seconds = benchmark.stats.stats.min
    row: dict[str, Any] = {"provider": provider, "shape": shape, "error": error}
    if read_bytes:
        row |= {"gb_s": read_bytes / seconds / 1e9, "share": read_bytes / seconds / 1e9 / limits().read_gb_s}
    if moved_bytes:
        row |= {
            "gb_s": moved_bytes / seconds / 1e9,
            "share": moved_bytes / seconds / 1e9 / limits().copy_gb_s,
        }
    if flops:
        row |= {"gflop_s": flops / seconds / 1e9, "share": flops / seconds / 1e9 / limits().gemm_gflop_s}
    if tokens:
        row["tokens"] = tokens
    benchmark.extra_info.update(row)


def need(module: str) -> Any:
    """A peer's module, or a skip that says what is missing."""
    return pytest.importorskip(module, reason=f"{module} is not installed; `pip install alignfast[bench]`")
