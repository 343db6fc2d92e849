"""`alignfast bench`: each op beside its peers on this machine. `bench compare`: two runs. `bench report`: plots of results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignfast.commands.parser import UsageError, parse_options

_USAGE = "`bench [OP ...]`, `bench compare BEFORE.json AFTER.json` or `bench report RESULTS.json ...`"


@dataclass(frozen=True)
class BenchOptions:
    """What to run."""

    suite: str = "quick"
    """quick (the ops, minutes), full (sweeps, torch.compile and whole training steps, hours), smoke (does it run at all)."""
    providers: str = ""
    """Comma-separated: rows of these alone, as torch, native, triton, eager, compile, trl, liger, verl. Empty for all."""
    output: str = "alignfast-bench"
    """Folder for results.json, results.csv, results.md, plots and index.html."""
    list: bool = False
    """Print what there is to run."""


@dataclass(frozen=True)
class CompareOptions:
    """Two runs."""

    before: str
    """results.json that is the measure."""
    after: str
    """results.json that is judged."""
    fail: str | None = None
    """Largest loss of time, as 5%: beyond it, or where a row lost its time, the exit code is 1."""
    by: str = "median"
    """Which time: median or min."""


@dataclass(frozen=True)
class PlotOptions:
    """What to draw."""

    output: str = "alignfast-bench"
    """Folder for what is made."""


def run(command: str, argv: Sequence[str]) -> None:
    """Bench, compare or draw."""
    words = list(argv)
    names: list[str] = []
    while words and not words[0].startswith("-"):
        names.append(words.pop(0))
    if names[:1] == ["compare"]:
        _compare(names[1:], words)
    elif names[:1] == ["report"]:
        _report(names[1:], words)
    else:
        _bench(command, names, words)


_INTERRUPTED = 2  # pytest's exit code


def _bench(command: str, names: list[str], words: list[str]) -> None:
    flags = [word for word in words if word.startswith("--benchmark-")]
    others = [word for word in words if word not in flags]
    (options,) = parse_options(
        command,
        others,
        BenchOptions,
        description=f"{_USAGE}. Options of pytest-benchmark go through: --benchmark-compare-fail=min:5%.",
    )
    from alignfast.bench import suite
    from alignfast.bench.results import run_of

    if options.list:
        print("\n".join(suite.ops(suite.benches_folder())))
        return
    if options.suite not in suite.SUITES:
        raise UsageError(f"--suite {options.suite} is not one of {', '.join(suite.SUITES)}")
    own_json = [flag for flag in flags if flag.startswith("--benchmark-json")]
    report, code = suite.run_benches(
        names, Path(options.output), suite=options.suite, providers=options.providers,
        flags=[flag for flag in flags if flag not in own_json],
    )  # fmt: skip
    for flag in own_json:
        Path(flag.partition("=")[2]).write_text(json.dumps(report, indent=1))
    print(f"results: {Path(options.output) / 'index.html'}")
    wrong, broken_peers = run_of(report).failed
    if broken_peers:
        print(f"peers without a time: {'; '.join(broken_peers)}")
    if wrong:
        raise ValueError(f"{len(wrong)} without a time: {'; '.join(wrong)}")
    if code == _INTERRUPTED:
        raise ValueError("stopped by Ctrl-C: the results are those of the rows that had ended")
    if code:  # peers that broke are no part of it, conftest.py sees to that
        raise ValueError(f"pytest ended with {code}: what it said stands above")


def _compare(files: list[str], words: list[str]) -> None:
    if len(files) != 2:
        raise UsageError(f"`bench compare` takes two files of results, got {len(files)}")
    paths = [f"--before={files[0]}", f"--after={files[1]}"]
    (options,) = parse_options("bench compare", [*paths, *words], CompareOptions)
    from alignfast.bench import compare
    from alignfast.bench.results import read_run

    allowed = None if options.fail is None else compare.share(options.fail)
    before, after = read_run(options.before), read_run(options.after)
    found = compare.compare(before, after, options.by)
    print(compare.markdown(found, options.by))
    warning = compare.machines_differ(before, after)
    if warning:
        print(f"\n{warning}")
    wrong = [] if allowed is None else compare.failures(found, allowed)
    if wrong:
        raise ValueError(f"{len(wrong)} beyond {options.fail}: {'; '.join(wrong)}")


def _report(files: list[str], words: list[str]) -> None:
    if not files:
        raise UsageError("`bench report` takes files of results")
    (options,) = parse_options("bench report", words, PlotOptions)
    from alignfast.bench import suite
    from alignfast.bench.results import read_run

    reports: list[Any] = []
    for file in files:
        read_run(file)  # refuses what is none
        reports.append(json.loads(Path(file).read_text()))
    print(f"results: {suite.write(suite.merged(reports), Path(options.output))[-1]}")
