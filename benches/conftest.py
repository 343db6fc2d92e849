"""Puts the machine's description into pytest-benchmark's JSON, and a table of our columns under its own."""

from __future__ import annotations

from typing import Any

import harness
import pytest


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(harness.environment())


def pytest_terminal_summary(terminalreporter: Any) -> None:
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    rows = [bench for bench in getattr(session, "benchmarks", []) if bench.extra_info.get("provider")]
    if rows:
        terminalreporter.section("shares of this machine's own limits")
        for bench in rows:
            info = bench.extra_info
            share = f"{100 * info['share']:5.0f} %" if "share" in info else "      -"
            error = f"{info['error']:.1e}" if info.get("error") is not None else "-"
            terminalreporter.write_line(
                f"{bench.group or bench.name:34s} {info['shape']:28s} {info['provider']:22s} "
                f"{bench.stats.min * 1e3:10.2f} ms {share}  error {error}"
            )
