"""Puts the machine's description into pytest-benchmark's JSON, our columns under its table; lets providers be chosen.

`--providers torch,verl` keeps the rows of providers that have one of the words in their name; `--left-out FILE` writes what
got no time, with the reason. Every bench is a function whose parameter `name` or `provider` says whose code it times.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import plain
import pytest

from alignfast.bench import results

_LEFT_OUT: list[dict[str, str]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("alignfast")
    group.addoption("--providers", default="", help="comma-separated: time these alone")
    group.addoption("--left-out", default="", help="JSON file for what got no time, and why")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        config.pluginmanager.register(plain)


def provider_of(item: Any) -> str:
    """Whose code a bench times."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    return str(parameters.get("name") or parameters.get("provider") or item.name)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = [word.strip().lower() for word in config.getoption("--providers").split(",") if word.strip()]
    kept, dropped, met = [], [], set()
    for item in items:
        item.user_properties.append(("provider", provider_of(item)))
        name = provider_of(item).lower()
        words = {name, *re.split(r"[ ,=]+", name)}
        met |= words & set(wanted)
        # compiling takes longer than all the rest of the quick suite: by name alone there
        keep = words & set(wanted) if wanted else not (name == "compile" and harness.suite() == "quick")
        (kept if keep else dropped).append(item)
    unknown = [word for word in wanted if word not in met]
    if unknown:
        known = ", ".join(sorted({provider_of(item) for item in items}))
        raise pytest.UsageError(f"no bench here has the provider {unknown[0]!r}; there are: {known}")
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.fixture(autouse=True)
def rows_as_they_come(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each figure is written when it is known, so that a run that is ended keeps what it had."""
    yield
    benchmark = request.node.funcargs.get("benchmark")
    if benchmark is not None and benchmark.extra_info.get("provider"):
        harness.write_row(benchmark, request.node.nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.passed:
        return
    if report.skipped:
        reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
    else:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = str(crash.message if crash is not None else report.longrepr).removeprefix("Failed: ")
    entry = {
        "bench": report.nodeid,
        "provider": str(dict(report.user_properties).get("provider", "")),
        "outcome": report.outcome,
        "reason": " ".join(reason.split())[:400],
    }
    _LEFT_OUT.append(entry)
    harness.write_line({"left_out": entry})


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    ours, peers = results.Run({}, "", [], _LEFT_OUT).failed
    # a file that can't be imported is counted as failed too, and is nobody's row
    if session.exitstatus == pytest.ExitCode.TESTS_FAILED and not ours and session.testsfailed == len(peers):
        session.exitstatus = (
            pytest.ExitCode.OK
        )  # peers alone broke; pytest-benchmark may still find that times regressed
    path = session.config.getoption("--left-out")
    if path:
        Path(path).write_text(json.dumps(_LEFT_OUT))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(harness.environment())


def pytest_terminal_summary(terminalreporter: Any) -> None:
    session = getattr(terminalreporter.config, "_benchmarksession", None)  # none without pytest-benchmark
    rows = [bench for bench in getattr(session, "benchmarks", []) if bench.extra_info.get("provider")]
    if rows:
        terminalreporter.section("shares of this machine's own limits")
        for bench in rows:
            info = bench.extra_info
            share = f"{100 * info['share']:5.0f} %" if "share" in info else "      -"
            error = f"{info['error']:.1e}" if info.get("error") is not None else "-"
            seconds = info.get("device", {}).get("min", bench.stats.min)
            terminalreporter.write_line(
                f"{bench.group or bench.name:34s} {info['shape']:28s} {info['provider']:22s} "
                f"{seconds * 1e3:10.2f} ms {share}  error {error}"
            )
