"""A run in the columns of Liger's benchmark CSV, so that what plots theirs plots ours.

Times are in ms, memory in MB, as there. `x_value` is the swept size, or the shape's text where nothing is swept. The last
column is Liger's for its own version; here it holds alignfast's.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from alignfast.bench.results import Row, Run

COLUMNS = (
    "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit", "x_name", "x_label", "x_value",
    "y_value_50", "y_value_20", "y_value_80", "extra_benchmark_config_str", "gpu_name", "timestamp", "liger_version",
)  # fmt: skip
# What a group's name may end in: Liger's mode
MODES = {"forward+backward": "full", "forward": "forward"}
_KEPT = ("error", "share", "cache", "read_bytes", "moved_bytes", "flops", "allocator")


def text(run: Run) -> str:
    """The whole file."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in run.rows:
        writer.writerows(lines(row, run))
    return stream.getvalue()


def lines(row: Row, run: Run) -> Iterator[dict[str, Any]]:
    """One line for the time, one for the memory where it is known."""
    name, mode = row.group, "full"
    for ending, known in MODES.items():
        if ending in name:
            name, mode = name.replace(ending, "").replace("  ", " ").strip(" ,"), known
            break
    axis, value = row.axis or ("shape", row.shape)
    versions = run.machine.get("versions", {})
    common = {
        "kernel_name": name,
        "kernel_provider": row.provider,
        "kernel_operation_mode": mode,
        "x_name": axis,
        "x_label": axis,
        "x_value": value,
        "extra_benchmark_config_str": json.dumps(
            {"shape": row.shape} | {key: row.info[key] for key in _KEPT if row.info.get(key) is not None}
        ),
        "gpu_name": run.machine.get("gpu") or run.machine.get("cpu"),
        "timestamp": run.date[:19].replace("T", " "),
        "liger_version": f"alignfast {versions.get('alignfast')}",
    }
    times = {"y_value_50": row.median * 1e3, "y_value_20": row.low * 1e3, "y_value_80": row.high * 1e3}
    yield {**common, "metric_name": "speed", "metric_unit": "ms", **times}
    if row.peak_bytes is not None:
        memory = dict.fromkeys(times, row.peak_bytes / 2**20)
        yield {**common, "metric_name": "memory", "metric_unit": "MB", **memory}
