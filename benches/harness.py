"""What every bench shares: the machine's own limits, a check before a time, and one row a measurement.

A row is a claim: time (minimum, median, 20th and 80th percentile), bytes and FLOPs counted in the bench file, the share of
the limit that this machine reached in the same run, peak memory, and the error against float64. A provider that is more
than twice as wrong as PyTorch in the same type gets no time; a peer is shown with its error, unless that is gross.

Each round is timed after a warm-up and from a cold cache: a buffer of twice the last cache's size is written before it,
outside of the time. On a CPU what moves less than 1 MB is timed warm, since that would evict the interpreter too. On a GPU
there are two times: between two events on the device, with the flush still running while the call is enqueued, so that
Python's time is not in it; and wall time from the call to the device's end, which pytest-benchmark's own columns show.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import machine
import pytest
import torch
from torch import Tensor

from alignfast.bench.results import floor_seconds
from alignfast.kernels._workspace import release_workspaces

T = TypeVar("T")

_LIMIT_BYTES = 256 << 20  # beyond every cache but the largest servers', for the bandwidths
_WARM_BELOW = 1 << 20  # bytes that a call moves, on a CPU
_MOST_FLUSHED = 512 << 20
_SLEPT_CYCLES = 1_000_000  # half a millisecond: a call's Python takes a tenth of that
GROSS = 0.05  # error of a peer, as a share of the largest value, with which its time says nothing
SUITES = ("smoke", "quick", "full")


def suite() -> str:
    """Which sizes to run at, as `ALIGNFAST_BENCH_SUITE` says: `full`; `quick`; or `smoke`, where times mean nothing."""
    named = os.environ.get("ALIGNFAST_BENCH_SUITE", "full")
    if named not in SUITES:
        raise pytest.UsageError(f"ALIGNFAST_BENCH_SUITE={named!r} is not one of {', '.join(SUITES)}")
    return named


def sizes(full: T, smallest: T, quick: T | None = None) -> T:
    """What a bench runs at in the suite of the run; the quick one takes the full sizes where it has none of its own."""
    return {"smoke": smallest, "quick": full if quick is None else quick, "full": full}[suite()]


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


def seeded(seed: int = 0) -> torch.Generator:
    """A generator of the device's own: a billion numbers take seconds on a CPU."""
    return torch.Generator(device()).manual_seed(seed)


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
    nbytes = sizes(_LIMIT_BYTES if device().type == "cpu" else 8 * _LIMIT_BYTES, 4 << 20)
    source = torch.ones(nbytes // 4, device=device())
    target = torch.empty_like(source)
    n = sizes(2048 if device().type == "cpu" else 8192, 256)
    a = torch.randn(n, n, device=device(), dtype=torch.float32 if device().type == "cpu" else torch.bfloat16)
    out = torch.empty_like(a)
    return Limits(
        read_gb_s=nbytes / best_seconds(source.sum) / 1e9,
        copy_gb_s=2 * nbytes / best_seconds(lambda: target.copy_(source)) / 1e9,
        gemm_gflop_s=2 * n**3 / best_seconds(lambda: torch.mm(a, a, out=out)) / 1e9,
    )


@cache
def _flushed() -> Tensor:
    """Memory that, once written, has taken the place of everything else in the caches."""
    if device().type == "cuda":
        size = 2 * torch.cuda.get_device_properties(device()).L2_cache_size
    else:
        size = 2 * _last_cache_bytes()
    return torch.empty(min(size, _MOST_FLUSHED), dtype=torch.uint8, device=device())


def _last_cache_bytes() -> int:
    """Of the CPU's largest cache; 32 MB where Linux does not say."""
    found = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
        if match:
            found.append(int(match.group(1)) << (10 if match.group(2) == "K" else 20))
    return max(found[1:], default=found[0])


def environment() -> dict[str, Any]:
    """Everything that a reader needs to place a figure."""
    return {**machine.described(), "suite": suite(), "limits": limits().__dict__}


def relative_error(got: Tensor, gold: Tensor) -> float:
    """Largest error as a share of the largest value."""
    return float((got.double() - gold).abs().max() / gold.abs().max().clamp(min=1e-300))


def worst(errors: Iterable[float]) -> float:
    """The largest, or NaN where there is one: `max` drops it."""
    return float(torch.tensor([*errors], dtype=torch.float64).max())


def peak_bytes(call: Callable[[], Any]) -> int | None:
    """Most memory that a call holds at once beyond what was there before: its results and all it used on the way.

    By the device's counter, or by torch's own record of every allocation on a CPU, where memory that a native kernel takes
    by itself is not seen. Our reused workspaces count, since they are given back first. None where torch has no record.
    """
    release_workspaces()
    if device().type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    results = getattr(profile.profiler, "kineto_results", None)
    if results is None:
        return None
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        held += change
        most = max(most, held)
    return most


def device_times(call: Callable[[], Any], setup: Callable[[], None] | None, rounds: int) -> dict[str, float]:
    """Seconds between two events around each call, the cache flushed before it.

    The flush and a wait are enqueued ahead of the first event and keep the device busy while the host enqueues the call: else
    the gaps of an idle stream would be timed.
    """
    pairs = []
    for _ in range(rounds):
        if setup:
            setup()
        _flushed().zero_()
        torch.cuda._sleep(_SLEPT_CYCLES)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return spread([start.elapsed_time(end) / 1e3 for start, end in pairs])


def spread(seconds: list[float]) -> dict[str, float]:
    """Least, median, 20th and 80th percentile."""
    cuts = statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else seconds * 4
    return {"min": min(seconds), "median": statistics.median(seconds), "low": cuts[0], "high": cuts[3]}


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
    axis: tuple[str, float] | None = None,
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
        allowed_error: above it the row fails instead of getting a time; infinite for a peer, which then fails above GROSS.
        read_bytes: bytes that must be read at least; set it or the next one.
        moved_bytes: bytes that must be read and written at least.
        flops: floating-point operations that must be done at least.
        tokens: drawn by a call, where that is what it is for.
        axis: what grows in a sweep, and its value here.
        setup: called before every round, outside the time.
        rounds: timed calls.
    """
    allowed = GROSS if allowed_error == float("inf") else allowed_error
    if error is not None and allowed is not None and not error <= allowed:
        pytest.fail(f"{provider} is wrong by {error:.1e} where {allowed:.1e} is allowed: no time for it")
    counted = {"read_bytes": read_bytes, "moved_bytes": moved_bytes, "flops": flops}
    cold = device().type == "cuda" or (read_bytes or moved_bytes or _WARM_BELOW) >= _WARM_BELOW
    rounds = min(rounds, sizes(rounds, 1, 20))

    def timed() -> None:
        call()
        synchronise()

    def ready() -> None:  # its result would be handed on as arguments: none here
        if setup:
            setup()
        if cold:
            _flushed().fill_(1)
        synchronise()

    benchmark.pedantic(timed, setup=ready, rounds=rounds, warmup_rounds=1)
    figures = spread(benchmark.stats.stats.sorted_data)
    row: dict[str, Any] = {
        "provider": provider,
        "shape": shape,
        "error": error,
        "cache": "cold" if cold else "warm",
    }
    row |= {name: value for name, value in counted.items() if value}
    row |= {"low": figures["low"], "high": figures["high"], "peak_bytes": peak_bytes(call)}
    if device().type == "cuda":
        row["device"] = figures = device_times(call, setup, rounds)
    seconds, floor = figures["min"], floor_seconds(counted, limits().__dict__)
    if floor:
        row["share"] = floor / seconds
    if read_bytes or moved_bytes:
        row["gb_s"] = (read_bytes or moved_bytes or 0) / seconds / 1e9
    if flops:
        row["gflop_s"] = flops / seconds / 1e9
    row |= {name: value for name, value in (("tokens", tokens), ("axis", axis)) if value}
    benchmark.extra_info.update(row)


def write_row(benchmark: Any, nodeid: str) -> None:
    """A figure as a line of JSON, by `write_line`."""
    stats = benchmark.stats.stats
    row = {
        "fullname": nodeid,
        "name": nodeid.rpartition("::")[2],
        "group": benchmark.group,
        "extra_info": benchmark.extra_info,
        "stats": {name: getattr(stats, name) for name in ("min", "median", "q1", "q3")},
    }
    write_line(row)


def write_line(entry: dict[str, Any]) -> None:
    """A line of JSON in the file that ALIGNFAST_BENCH_ROWS names, if it names one, after one that describes the machine."""
    path = os.environ.get("ALIGNFAST_BENCH_ROWS")
    if not path:
        return
    new = not Path(path).exists()
    with open(path, "a") as file:
        if new:
            file.write(json.dumps({"machine_info": environment()}) + "\n")
        file.write(json.dumps(entry) + "\n")


def need(module: str, package: str = "alignfast[bench]") -> Any:
    """A peer's module, or a skip that says what is missing."""
    try:
        return importlib.import_module(module)
    except Exception as error:
        # peers fail to import in many ways: for want of a GPU, of a library, of a version
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        missing = isinstance(error, ModuleNotFoundError)
        pytest.skip(f"{module}: {first}" + (f"; `pip install {package}`" if missing else ""))


def need_gpu(what: str) -> None:
    """Skips where there is none."""
    if device().type != "cuda":
        pytest.skip(f"{what}: there is no GPU here")


def need_memory(wanted: float) -> None:
    """Skips what the machine could not hold, with a third of its memory to spare."""
    if device().type == "cuda":
        torch.cuda.empty_cache()  # an earlier row's memory is no longer in use
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
        known = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")]
        free = max([free, *known])
    if wanted > free * 2 / 3:
        pytest.skip(f"it would take {wanted / 2**30:.0f} GiB of {free / 2**30:.0f} GiB free memory")
