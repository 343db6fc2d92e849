"""pytest-benchmark's JSON as Markdown tables: `python benches/tables.py results.json > results.md`.

One table a group. Times are minima over the rounds, which other work on the machine disturbs least, then medians; the
DPO steps, which run once a side, stand as medians over their steps, beside the peer under the same malloc.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]


def markdown(report: dict[str, Any]) -> str:
    """The machine, then the groups in their order."""
    machine, groups = report["machine_info"], {}
    for bench in report["benchmarks"]:
        groups.setdefault(bench["group"], []).append({**bench["extra_info"], **bench["stats"]})
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    limits = machine["limits"]
    parts = [
        f"{machine['gpu'] or machine['cpu']}, {machine['cores']} logical cores, {machine['threads']} threads; {versions}; "
        f"commit {machine['commit']}; {report['datetime'][:10]}. This machine in the same run: reading "
        f"{limits['read_gb_s']:.1f} GB/s, copying {limits['copy_gb_s']:.1f} GB/s, matrix products "
        f"{limits['gemm_gflop_s']:.0f} GFLOP/s."
    ]
    steps = [row for rows in groups.values() for row in rows if "step_s_median" in row]
    if steps:
        parts.append("## DPO step\n\n" + dpo_table(steps))
    for name, rows in groups.items():
        if "step_s_median" not in rows[0]:
            parts.append(f"## {name}\n\n{kernel_table(rows)}")
    return "\n\n".join(parts) + "\n"


def kernel_table(rows: Sequence[Row]) -> str:
    """Providers by shape, fastest first."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    ordered = sorted(rows, key=lambda row: (shapes.index(row["shape"]), row["min"]))
    return table(
        ["shape", "provider", "min ms", "median ms", "share of the limit", "error"],
        (
            [
                row["shape"],
                row["provider"],
                f"{row['min'] * 1e3:.2f}",
                f"{row['median'] * 1e3:.2f}",
                f"{row['share']:.0%}" if "share" in row else "",
                f"{row['error']:.1e}" if row.get("error") is not None else "",
            ]
            for row in ordered
        ),
    )


def dpo_table(rows: Sequence[Row]) -> str:
    """Ours beside the peer's, shape by shape."""
    by = {(row["shape"], row["allocator"], row["provider"]): row for row in rows}
    lines = []
    for shape, allocator in dict.fromkeys((row["shape"], row["allocator"]) for row in rows):
        peer = by.get((shape, allocator, "trl"))
        for name in ("alignfast", "alignfast as it comes"):
            ours = by.get((shape, allocator, name))
            if ours is None or peer is None:
                continue
            lines.append(
                [shape, allocator if name == "alignfast" else "installed; ours as it comes"]
                + [f"{row['step_s_median']:.2f} ({row['cpu_s_median']:.2f})" for row in (ours, peer)]
                + [f"{peer['step_s_median'] / ours['step_s_median']:.1f}"]
                + [f"{row['peak_mib'] / 1024:.2f}" for row in (ours, peer)]
                + [f"{peer['loss_difference']:.1e}", str(len(ours["losses"]))]
            )
    return table(
        ["shape", "malloc", "alignfast s (CPU)", "TRL s (CPU)", "times faster", "alignfast GiB", "TRL GiB",
         "largest difference of a loss", "steps"],
        lines,
    )  # fmt: skip


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown, the first two columns as text, the others as numbers."""
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        print(markdown(json.load(file)), end="")
