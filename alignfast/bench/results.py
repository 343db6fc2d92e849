"""Rows of a run of the benches, from pytest-benchmark's JSON.

    floor = max(bytes / bandwidth, FLOPs / GEMM rate)        share = floor / seconds

Bytes and FLOPs are counted in the bench file, the rates are this machine's own, measured at the start of the same run. On a
GPU the seconds are those between two events on the device; on a CPU they are wall time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OURS = ("alignfast", "patched")  # how the names of our providers begin


@dataclass(frozen=True)
class Row:
    """One provider at one shape."""

    bench: str
    """Where it stands: file, function and parameters."""
    group: str
    """What is measured; the rows of a group are comparable."""
    provider: str
    """Whose code it is."""
    shape: str
    """Sizes, as tables show them."""
    least: float
    """Seconds of the fastest round, which other work on the machine disturbs least."""
    median: float
    """Seconds."""
    low: float
    """Seconds: the 20th percentile, or the first quartile in older results."""
    high: float
    """Seconds: the 80th percentile, or the third quartile."""
    axis: tuple[str, float] | None = None
    """What grows in a sweep, and its value in this row."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """Everything else that the bench wrote down: error, bytes, flops, peak_bytes, share, ..."""

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        """What names the row in another run: one shape may stand in several sweeps, and in several benches of a group."""
        function = self.bench.rpartition("::")[2].partition("[")[0]
        return self.group, self.provider, self.shape, function, self.axis[0] if self.axis else ""

    @property
    def peak_bytes(self) -> float | None:
        """Most memory that a call held at once beyond its inputs, or that the whole process did for a training step."""
        if self.info.get("peak_mib") is not None:
            return self.info["peak_mib"] * 2**20
        return self.info.get("peak_bytes")

    def floor(self, limits: Mapping[str, float]) -> float | None:
        """Seconds below which this machine can't do it, of what the bench counted; None where it counted nothing."""
        counted = floor_seconds(self.info, limits)
        if counted is None and "share" in self.info:  # older results kept the share alone
            return self.info["share"] * self.least
        return counted


def floor_seconds(counted: Mapping[str, Any], limits: Mapping[str, float]) -> float | None:
    """The least time of what was counted.

    Args:
        counted: `read_bytes` or `moved_bytes`, and `flops`, as far as known.
        limits: `read_gb_s`, `copy_gb_s`, `gemm_gflop_s`.

    >>> limits = {"read_gb_s": 10.0, "copy_gb_s": 8.0, "gemm_gflop_s": 100.0}
    >>> floor_seconds({"moved_bytes": 8e9, "flops": 5e10}, limits)
    1.0
    """
    times = [
        counted[name] / limits[rate] / 1e9
        for name, rate in (
            ("read_bytes", "read_gb_s"),
            ("moved_bytes", "copy_gb_s"),
            ("flops", "gemm_gflop_s"),
        )
        if counted.get(name)
    ]
    return max(times, default=None)


@dataclass(frozen=True)
class Run:
    """One run of the benches."""

    machine: Mapping[str, Any]
    date: str
    rows: Sequence[Row]
    left_out: Sequence[Mapping[str, str]]
    """What got no time: bench, provider, outcome (skipped or failed) and reason."""

    @property
    def limits(self) -> Mapping[str, float]:
        return self.machine["limits"]

    @property
    def failed(self) -> tuple[list[str], list[str]]:
        """What of ours was wrong or broke, and what of the peers; who is wrong is told by the name that a reason begins with."""
        ours: list[str] = []
        peers: list[str] = []
        for entry in self.left_out:
            if entry["outcome"] == "failed":
                kept = ours if any(entry[word].startswith(OURS) for word in ("provider", "reason")) else peers
                kept.append(f"{entry['bench'].rpartition('::')[2]}: {entry['reason']}")
        return ours, peers

    @property
    def groups(self) -> dict[str, list[Row]]:
        """Rows by what they measure, in the order of the run."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.group, []).append(row)
        return found


def read_run(path: str | Path) -> Run:
    """A run from its JSON.

    Raises:
        ValueError: the file is not one of ours.
    """
    try:
        report = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(report, dict) or not {"benchmarks", "machine_info"} <= set(report):
        raise ValueError(
            f"{path} has no benchmarks: it is to be what pytest-benchmark or `alignfast bench` wrote"
        )
    return run_of(report)


def run_of(report: Mapping[str, Any]) -> Run:
    """A run from pytest-benchmark's report."""
    rows = [_row(bench) for bench in report["benchmarks"] if bench.get("extra_info", {}).get("provider")]
    return Run(report["machine_info"], report["datetime"], rows, report.get("left_out", []))


def _row(bench: Mapping[str, Any]) -> Row:
    info, stats = dict(bench["extra_info"]), bench["stats"]
    times: list[Any]  # least, median, low, high
    device = info.get("device") or {}
    if "step_s_median" in info:  # a whole training: its steps were timed one by one
        steps = info["step_s_median"]
        times = [info["step_s_min"], steps, info.get("step_s_low", steps), info.get("step_s_high", steps)]
    elif device:
        times = [device[name] for name in ("min", "median", "low", "high")]
    else:
        times = [stats["min"], stats["median"], info.get("low", stats["q1"]), info.get("high", stats["q3"])]
    shape = str(info["shape"])
    if "allocator" in info and info["allocator"] not in bench["group"]:
        shape = f"{shape}, malloc {info['allocator']}"
    axis = info.get("axis")
    least, median, low, high = times
    return Row(
        bench["fullname"], bench["group"] or bench["name"], info["provider"], shape, least, median, low, high,
        axis=(axis[0], float(axis[1])) if axis else None, info=info,
    )  # fmt: skip
