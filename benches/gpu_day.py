"""The table at the end of a day on a GPU: `python benches/gpu_day.py OUT_DIR`, from rows.jsonl and steps.tsv in it.

Figure, floor, share, peer, verdict of the table GOALS, then every step's outcome, then every figure. Musts
and aims there are an H100's in bfloat16 at 8192 tokens, width 4096, vocabulary 128256, and say nothing of another card.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignfast.bench.results import Row, Run, run_of
from alignfast.bench.tables import kernel_table, left_out_table, seconds_text, table


class Goal(NamedTuple):
    """A row of the table."""

    what: str
    group: str
    shape: str  # what the row's shape begins with
    ours: tuple[str, ...]  # words that our provider's name has
    without: tuple[str, ...]  # and those that it has not
    must: float  # seconds; of a step the peer's time by ours, of rollouts the share of the floor's rate
    aim: float
    published: str
    more_flops: float = 1.0  # of the floor, by what the bench counted
    memory: float | None = None  # most of the peer's that a step may take


GOALS = (
    Goal("token_logps with entropy, forward", "token_logps forward with entropy", "8192 x 128256 torch.bfloat16",
         ("alignfast",), (), 0.74e-3, 0.67e-3, "QuACK, TRL: 0.67 to 0.75 ms"),
    Goal("linear_loss, forward and backward", "linear_loss forward+backward", "8192 x 4096 x 128256",
         ("alignfast",), ("logps",), 36e-3, 34.6e-3, "Liger CuTe 49 ms, QuACK 34.7 ms"),
    Goal("linear_token_logps, forward and backward", "linear_loss forward+backward", "8192 x 4096 x 128256",
         ("alignfast", "logps"), (), 48e-3, 45e-3, "Liger CuTe 49 ms", 4 / 3),
    Goal("gae 4096 x 2048", "gae", "4096 x 2048", ("alignfast",), (), 50e-6, 47e-6, "rl-triton 54 us"),
    Goal("DPO step, 0.5B", "dpo step 0.5b", "0.5b", ("alignfast",), (), 2.0, 3.0, "TRL 1.16", memory=0.5),
    Goal("GRPO step, 0.5B", "grpo step 0.5b", "0.5b", ("alignfast",), (), 2.0, 3.0, "TRL 1.16"),
    Goal("rollouts, 256 sequences, 0.5B", "rollouts", "0.5b", ("alignfast",), (), 0.6, 0.8, "vLLM"),
)  # fmt: skip


def read_rows(path: Path) -> Run | None:
    """What was measured until now; the last line may be cut off."""
    if not path.exists():
        return None
    machine: dict[str, Any] = {}
    rows, left_out = [], []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "machine_info" in entry:
            machine = entry["machine_info"]
        elif "left_out" in entry:
            left_out.append(entry["left_out"])
        else:
            rows.append(entry)
    if not machine:
        return None
    return run_of({"machine_info": machine, "datetime": "", "benchmarks": rows, "left_out": left_out})


def verdict(goal: Goal, figure: float, by_ratio: bool) -> str:
    """Against the must and the aim."""
    better = figure >= goal.aim if by_ratio else figure <= goal.aim
    enough = figure >= goal.must if by_ratio else figure <= goal.must
    return "aim met" if better else "must met" if enough else "short"


def goal_line(goal: Goal, run: Run | None) -> list[str]:
    """Figure, floor, share, peer and verdict of one goal."""
    rows = [] if run is None else [r for r in run.rows if _of(goal, r)]
    ours = [row for row in rows if _is_ours(goal, row)]
    if run is None or not ours:
        return [goal.what, "", "", "", goal.published, "not measured"]
    best = min(ours, key=lambda row: row.median)
    peers = [row for row in rows if not row.provider.startswith("alignfast")]
    peer = min(peers, key=lambda row: row.median, default=None)
    beside = goal.published if peer is None else f"{peer.provider} {seconds_text(peer.median)}"
    floor = best.floor(run.limits)
    if "step" in goal.group:
        if peer is None:
            return [goal.what, seconds_text(best.median), "", "", "not measured", "not measured"]
        ratio = peer.median / best.median
        memory = (best.peak_bytes or 0) / (peer.peak_bytes or 1)
        shown = f"{seconds_text(best.median)}, {memory:.0%} of the memory"
        said = verdict(goal, ratio, True)
        if goal.memory is not None and not memory <= goal.memory:
            said = f"short: {memory:.0%} of the memory, at most {goal.memory:.0%} are asked for"
        return [goal.what, shown, "", "", beside, f"{ratio:.1f} times: {said}"]
    floor = None if floor is None else floor * goal.more_flops
    share = None if floor is None else floor / best.median
    said = (
        verdict(goal, share or 0.0, True) if goal.group == "rollouts" else verdict(goal, best.median, False)
    )
    return [
        goal.what,
        f"{seconds_text(best.median)} ({best.provider.removeprefix('alignfast ')})",
        "" if floor is None else seconds_text(floor),
        "" if share is None else f"{share:.0%}",
        beside,
        said,
    ]


def _of(goal: Goal, row: Row) -> bool:
    return row.group.startswith(goal.group) and row.shape.startswith(goal.shape) and row.axis is None


def _is_ours(goal: Goal, row: Row) -> bool:
    words = row.provider.split()
    return all(word in words for word in goal.ours) and not any(word in words for word in goal.without)


def steps_table(path: Path) -> str:
    """What became of each step."""
    lines: Sequence[str] = path.read_text().splitlines() if path.exists() else []
    rows = [line.split("\t") for line in lines]
    return table(["step", "outcome", "seconds", "limit"], [row for row in rows if len(row) == 4])


def summary(folder: Path) -> str:
    """The whole page."""
    run = read_rows(folder / "rows.jsonl")
    head = ["what", "figure, median", "floor", "share", "peer", "verdict"]
    parts = ["# A day on a GPU"]
    if run is not None:
        limits = run.limits
        parts.append(
            f"{run.machine.get('gpu') or run.machine.get('cpu')}; {run.machine.get('clocks') or 'clocks unknown'}; commit "
            f"{run.machine.get('commit')}. In this run: reading {limits['read_gb_s']:.0f} GB/s, copying "
            f"{limits['copy_gb_s']:.0f} GB/s, matrix products {limits['gemm_gflop_s'] / 1e3:.1f} TFLOP/s."
        )
    parts.append(table(head, [goal_line(goal, run) for goal in GOALS], texts=1))
    parts.append(f"## Steps\n\n{steps_table(folder / 'steps.tsv')}")
    for group, rows in ({} if run is None else run.groups).items():
        assert run is not None
        parts.append(f"## {group}\n\n{kernel_table(rows, run.limits)}")
    if run is not None and run.left_out:
        parts.append(f"## Without a time\n\n{left_out_table(run)}")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(summary(Path(sys.argv[1])), end="")
