"""pytest-benchmark's JSON as Markdown tables: `python benches/tables.py results.json > results.md`.

One table a group. Times are minima over the rounds, which other work on the machine disturbs least, then medians; whole
training steps, which run once a side, stand as medians over their steps, beside the peer under the same malloc.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]
# What the names of groups begin with, the table's title, and what the peer's row says of the sides' agreement
STEPS = (
    ("dpo step", "DPO step", ("loss_difference", "largest difference of a loss")),
    ("grpo step", "GRPO step", ("gradient_difference", "largest difference of a gradient norm, replayed")),
    ("ppo step", "PPO step beside TRL 1.12", ("difference", "largest difference of a metric, replayed")),
)


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
    for kind, title, checked in STEPS:
        steps = [row for name, rows in groups.items() if name.startswith(kind) for row in rows]
        if steps:
            parts.append(f"## {title}\n\n{step_table(steps, checked)}")
        if any(row.get("parts") for row in steps):
            parts.append(f"## Parts of our {title}, seconds\n\n{parts_table(steps)}")
    for name, rows in groups.items():
        if "step_s_median" not in rows[0]:
            of_tokens = "tokens" in rows[0]
            parts.append(f"## {name}\n\n{rollout_table(rows) if of_tokens else kernel_table(rows)}")
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


def rollout_table(rows: Sequence[Row]) -> str:
    """Providers by shape, fastest first, with tokens a second."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    ordered = sorted(rows, key=lambda row: (shapes.index(row["shape"]), row["min"]))
    return table(
        ["shape", "provider", "min s", "median s", "tokens/s, best", "tokens/s, median", "rounds"],
        (
            [row["shape"], row["provider"]]
            + [f"{row[name]:.2f}" for name in ("min", "median")]
            + [f"{row['tokens'] / row[name]:.0f}" for name in ("min", "median")]
            + [str(row["rounds"])]
            for row in ordered
        ),
    )


def parts_table(rows: Sequence[Row]) -> str:
    """Where the medians of our steps go."""
    ours = [row for row in rows if row.get("parts")]
    names = list(dict.fromkeys(name for row in ours for name in row["parts"]))
    return table(
        ["shape", "malloc", *names],
        (
            [row["shape"], _malloc(row)] + [f"{row['parts'].get(name, 0.0):.3f}" for name in names]
            for row in ours
        ),
    )


def step_table(rows: Sequence[Row], checked: tuple[str, str]) -> str:
    """Ours beside the peer's, shape by shape; `checked` is a column of the peer's rows, and its title."""
    by = {(row["shape"], row["allocator"], row["provider"]): row for row in rows}
    lines = []
    for shape, allocator in dict.fromkeys((row["shape"], row["allocator"]) for row in rows):
        peer = by.get((shape, allocator, "trl"))
        for name in ("alignfast", "alignfast as it comes"):
            ours = by.get((shape, allocator, name))
            if ours is None or peer is None:
                continue
            lines.append(
                [shape, _malloc(ours)]
                + [f"{row['step_s_median']:.2f} ({row['cpu_s_median']:.2f})" for row in (ours, peer)]
                + [f"{peer['step_s_median'] / ours['step_s_median']:.1f}"]
                + [f"{row['peak_mib'] / 1024:.2f}" for row in (ours, peer)]
                + [f"{peer[checked[0]]:.1e}", str(ours.get("steps") or len(ours["losses"]))]
            )
    return table(
        ["shape", "malloc", "alignfast s (CPU)", "TRL s (CPU)", "times faster", "alignfast GiB", "TRL GiB",
         checked[1], "steps"],
        lines,
    )  # fmt: skip


def _malloc(row: Row) -> str:
    return row["allocator"] if row["provider"] == "alignfast" else "installed; ours as it comes"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown, the first two columns as text, the others as numbers."""
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        print(markdown(json.load(file)), end="")
