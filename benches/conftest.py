"""Puts the machine's description into pytest-benchmark's JSON, our columns under its table; lets providers be chosen, and
says each figure when it is known: a suite of hours must tell where it is.

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
    config.pluginmanager.register(Progress(config))


class Progress:
    """A line for each row in place of pytest's dots."""

    def __init__(self, config: pytest.Config) -> None:
        self._config, self._number, self._all, self._said = config, 0, 0, ""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._all = len(session.items)

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        return (report.outcome, "", "") if report.when == "call" or not report.passed else None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        told = dict(report.user_properties)
        if not report.passed:
            bench = report.nodeid.partition("::")[2].partition("[")[0].removeprefix("bench_")
            self._said = f"{bench}, {told.get('provider')}: {report.outcome}, {reason_of(report)}"
        elif report.when == "teardown" and "row" in told:
            self._said = str(told["row"])

    def pytest_runtest_logfinish(self) -> None:
        self._number += 1
        reporter: Any = self._config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write_line(f"[{self._number}/{self._all}] {self._said}")
            self._said = ""


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
    benchmark = (request.node.funcargs or {}).get("benchmark")  # none where Ctrl-C ended it
    if benchmark is not None and benchmark.extra_info.get("provider"):
        harness.write_row(benchmark, request.node.nodeid)
        info = benchmark.extra_info
        seconds = info.get("device", {}).get("min", benchmark.stats.stats.min)
        what = benchmark.group or request.node.name.partition("[")[0].removeprefix("bench_")
        said = f"{what}, {info['provider']}, {info['shape']}: {1e3 * seconds:,.3f} ms"
        request.node.user_properties.append(("row", said))


def reason_of(report: pytest.TestReport) -> str:
    """Why there is no time."""
    if report.skipped:
        reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
    else:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = str(crash.message if crash is not None else report.longrepr).removeprefix("Failed: ")
    return " ".join(reason.split())[:400]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.passed:
        return
    entry = {
        "bench": report.nodeid,
        "provider": str(dict(report.user_properties).get("provider", "")),
        "outcome": report.outcome,
        "reason": reason_of(report),
    }
    _LEFT_OUT.append(entry)
    harness.write_line({"left_out": entry})


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    timed = getattr(session.config, "_benchmarksession", None)
    if timed is not None:  # the row that Ctrl-C ended may have no round, which pytest-benchmark can't write
        timed.benchmarks[:] = [bench for bench in timed.benchmarks if bench.stats.data]
    ours, peers = results.Run({}, "", [], _LEFT_OUT).failed
    # a file that can't be imported is counted as failed too, and is nobody's row
    if session.exitstatus == pytest.ExitCode.TESTS_FAILED and not ours and session.testsfailed == len(peers):
        # peers alone broke; pytest-benchmark may still find that times regressed
        session.exitstatus = pytest.ExitCode.OK
    path = session.config.getoption("--left-out")
    if path:
        Path(path).write_text(json.dumps(_LEFT_OUT))
    yield


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
