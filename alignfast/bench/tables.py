"""A run of the benches as Markdown tables.

One table a group. Times are minima over the rounds, which other work on the machine disturbs least, then medians with the
20th and 80th percentile; whole training steps, which run once a side, stand as medians over their steps, beside the peer
under the same malloc. Then how costs grow, and what got no time and why.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from alignfast.bench import growth, results

Row = dict[str, Any]
# What the names of groups begin with, the table's title, and what the peer's row says of the sides' agreement
STEPS = (
    ("dpo step", "DPO step", ("loss_difference", "largest difference of a loss")),
    ("grpo step", "GRPO step", ("gradient_difference", "largest difference of a gradient norm, replayed")),
    ("ppo step", "PPO step beside TRL 1.12", ("difference", "largest difference of a metric, replayed")),
)


def markdown(report: Mapping[str, Any]) -> str:
    """The machine, then the groups in their order."""
    run = results.run_of(report)
    groups: dict[str, list[Row]] = {}
    for bench in report["benchmarks"]:
        groups.setdefault(bench["group"] or bench["name"], []).append(
            {**bench["extra_info"], **bench["stats"]}
        )
    parts = [machine_line(run)]
    for kind, title, checked in STEPS:
        steps = [row for name, rows in groups.items() if name.startswith(kind) for row in rows]
        if steps:
            parts.append(f"## {title}\n\n{step_table(steps, checked)}")
        if any(row.get("parts") for row in steps):
            parts.append(f"## Parts of our {title}, seconds\n\n{parts_table(steps)}")
    patched = [row for name, rows in groups.items() if name.startswith("TRL's") for row in rows]
    if patched:
        parts.append(f"## TRL's own trainers, as they come and patched\n\n{patch_table(patched)}")
    plain = run.groups
    for name, rows in groups.items():
        if "step_s_median" in rows[0]:
            continue
        of_tokens = "tokens" in rows[0]
        parts.append(
            f"## {name}\n\n{rollout_table(rows) if of_tokens else kernel_table(plain[name], run.limits)}"
        )
    if growth.sweeps(run.rows):
        parts.append(f"## How costs grow\n\n{growth_table(run)}")
    if run.left_out:
        parts.append(f"## Without a time\n\n{left_out_table(run)}")
    return "\n\n".join(parts) + "\n"


def machine_line(run: results.Run) -> str:
    """What a reader needs to place the figures."""
    machine, limits = run.machine, run.limits
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    clocks = f"; {machine['clocks']}" if machine.get("clocks") else ""
    return (
        f"{machine['gpu'] or machine['cpu']}, {machine['cores']} logical cores, {machine['threads']} threads{clocks}; "
        f"{versions}; commit {machine['commit']}; {run.date[:10]}. This machine in the same run: reading "
        f"{limits['read_gb_s']:.1f} GB/s, copying {limits['copy_gb_s']:.1f} GB/s, matrix products "
        f"{limits['gemm_gflop_s']:.0f} GFLOP/s."
    )


def kernel_table(rows: Sequence[results.Row], limits: Mapping[str, float]) -> str:
    """Providers by shape, fastest first."""
    shapes = list(dict.fromkeys(row.shape for row in rows))
    ordered = sorted(rows, key=lambda row: (shapes.index(row.shape), row.least))
    measured = any(row.peak_bytes is not None for row in rows)  # older results have no memory
    head = ["shape", "provider", "min ms", "median ms", "20 to 80 %", "floor ms", "share of the limit"]
    lines = []
    for row in ordered:
        floor = row.floor(limits)
        line = [row.shape, row.provider]
        line += [f"{row.least * 1e3:{_digits(row.least)}}", f"{row.median * 1e3:{_digits(row.median)}}"]
        line.append(f"{row.low * 1e3:{_digits(row.low)}} to {row.high * 1e3:{_digits(row.high)}}")
        line.append("" if floor is None else f"{floor * 1e3:{_digits(floor)}}")
        line.append(f"{row.info['share']:.0%}" if "share" in row.info else "")
        if measured:
            line.append(bytes_text(row.peak_bytes))
        lines.append([*line, f"{row.info['error']:.1e}" if row.info.get("error") is not None else ""])
    return table([*head, *(["peak memory"] if measured else []), "error"], lines)


def growth_table(run: results.Run) -> str:
    """The exponents of every sweep."""
    lines = []
    for sweep in growth.sweeps(run.rows):
        fits = [growth.fit(sweep, what) for what in ("time", "memory")]
        at = [row.axis[1] for row in sweep.rows if row.axis]
        grown = ["" if fit is None else f"{fit:.2f}" for fit in fits]
        last = sweep.rows[-1]
        lines.append(
            [sweep.group, sweep.provider, sweep.axis, f"{at[0]:g} to {at[-1]:g}", *grown,
             seconds_text(last.median), bytes_text(last.peak_bytes)]
        )  # fmt: skip
    head = [
        "what",
        "provider",
        "over",
        "from, to",
        "time ~ x^",
        "memory ~ x^",
        "time at the end",
        "memory at the end",
    ]
    return table(head, lines, texts=4)


def left_out_table(run: results.Run) -> str:
    """Providers without a time, each reason once."""
    why: dict[tuple[str, str, str], int] = {}
    for entry in run.left_out:
        key = (entry["provider"], entry["outcome"], entry["reason"])
        why[key] = why.get(key, 0) + 1
    return table(
        ["provider", "outcome", "why", "rows"],
        ([provider, outcome, reason, str(count)] for (provider, outcome, reason), count in why.items()),
        texts=3,
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


def patch_table(rows: Sequence[Row]) -> str:
    """A step of each of TRL's trainers after `patch_trl` and before."""
    by = {(row["trainer"], row["shape"], row["allocator"], row["provider"]): row for row in rows}
    lines = []
    for trainer, shape, allocator in dict.fromkeys(key[:3] for key in by):
        ours, theirs = (by.get((trainer, shape, allocator, side)) for side in ("patched", "trl"))
        if ours is not None and theirs is not None:
            lines.append(
                [trainer, shape, allocator]
                + [f"{row['step_s_median']:.2f} ({row['cpu_s_median']:.2f})" for row in (ours, theirs)]
                + [f"{theirs['step_s_median'] / ours['step_s_median']:.1f}"]
                + [f"{row['peak_mib'] / 1024:.2f}" for row in (ours, theirs)]
                + [f"{theirs['difference']:.1e}" if "difference" in theirs else ""]
            )
    head = [
        "trainer",
        "shape",
        "malloc",
        "patched s (CPU)",
        "TRL s (CPU)",
        "times faster",
        "patched GiB",
        "TRL GiB",
    ]
    return table([*head, "largest difference"], lines, texts=3)


def _malloc(row: Row) -> str:
    return row["allocator"] if row["provider"] == "alignfast" else "installed; ours as it comes"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 2) -> str:
    """Markdown, the first columns as text, the others as numbers."""
    lines = [head, ["---"] * texts + ["---:"] * (len(head) - texts), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


def seconds_text(seconds: float) -> str:
    """A time in the unit that suits it.

    >>> seconds_text(0.00042), seconds_text(0.042), seconds_text(4.2)
    ('420 us', '42.0 ms', '4.20 s')
    """
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def bytes_text(count: float | None) -> str:
    """Memory in the unit that suits it; empty where it is not known.

    >>> bytes_text(1536.0), bytes_text(3 * 2**30), bytes_text(None)
    ('1.5 KiB', '3.0 GiB', '')
    """
    if count is None:
        return ""
    unit = next(i for i in range(4) if count < 1024 ** (i + 1) or i == 3)
    return f"{count / 1024**unit:.{1 if unit else 0}f} {('B', 'KiB', 'MiB', 'GiB')[unit]}"


def _digits(seconds: float) -> str:
    return ".2f" if seconds >= 1e-4 else ".4f"
