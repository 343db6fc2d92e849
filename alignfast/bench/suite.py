"""Runs the benches and writes what they measured: JSON, CSV, Markdown, plots, one page.

The benches are pytest functions in `benches/` of a checkout, or in the installed package beside this one; pytest-benchmark
times them in a process of its own.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import alignfast
from alignfast.bench import liger_csv, tables
from alignfast.bench.page import page
from alignfast.bench.plots import draw
from alignfast.bench.results import run_of

SUITES = ("quick", "full", "smoke")
# Whole training steps and rollouts take minutes each: the quick suite has the ops alone
_LONG = {"dpo_step", "grpo_step", "ppo_step", "patch_trl", "rollout", "server"}


def benches_folder() -> Path:
    """Where the bench files lie.

    Raises:
        ValueError: nowhere.
    """
    package = Path(alignfast.__file__).parent
    for folder in (package.parent / "benches", package / "benches"):
        if (folder / "harness.py").is_file():
            return folder
    raise ValueError(
        f"there are no benches beside {package} nor in it: install alignfast anew, or run from a checkout"
    )


def ops(folder: Path) -> list[str]:
    """What can be benched, by the names of its files."""
    return sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))


def chosen(folder: Path, names: Sequence[str], suite: str) -> list[Path]:
    """The files of the named benches; all that the suite has without a name.

    Raises:
        ValueError: a name or the suite is unknown.
    """
    if suite not in SUITES:
        raise ValueError(f"suite={suite!r} is not one of {', '.join(SUITES)}")
    known = ops(folder)
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"there is no bench {name!r}; {hint}")
    wanted = names or [name for name in known if suite != "quick" or name not in _LONG]
    return [folder / f"bench_{name}.py" for name in dict.fromkeys(wanted)]


def run_benches(
    names: Sequence[str],
    output: Path,
    *,
    suite: str = "quick",
    providers: str = "",
    flags: Sequence[str] = (),
) -> tuple[dict[str, Any], int]:
    """Run benches and write everything into a folder; stopped by Ctrl-C, what was timed until then.

    Args:
        names: of ops or steps; none for the whole suite.
        output: folder, made if it is not there; what an earlier run left of the same names is overwritten.
        suite: `quick`, `full`, or `smoke` to see that they run.
        providers: comma-separated words; a row is run whose provider's name has one of them. Empty for all.
        flags: of pytest-benchmark, each `--benchmark-...`.

    Returns:
        (the report, pytest's exit code).

    Raises:
        ValueError: a name is unknown.
        RuntimeError: pytest-benchmark is missing, or no bench got a time.
    """
    folder = benches_folder()
    files = chosen(folder, names, suite)
    for package in ("pytest", "pytest_benchmark"):
        if importlib.util.find_spec(package) is None:
            raise RuntimeError(f"{package} is not installed: pip install '.[bench]' in alignfast's checkout")
    output.mkdir(parents=True, exist_ok=True)
    json_file, left_out_file = output / "results.json", output / "left_out.json"
    for path in (json_file, left_out_file):
        path.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "pytest", "-q", "-rN", "--tb=line", "--continue-on-collection-errors",
        "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={folder}", "--import-mode=importlib",
        "-o", f"pythonpath={folder} {folder.parent / 'tests'}", "-o", "python_files=bench_*.py", "-o",
        "python_functions=bench_*", f"--benchmark-json={json_file}", "--benchmark-sort=fullname",
        "--benchmark-columns=min,median,iqr,rounds",
        f"--left-out={left_out_file}", f"--providers={providers}", *flags, *map(str, files),
    ]  # fmt: skip
    environment = {**os.environ, "ALIGNFAST_BENCH_SUITE": suite}
    with subprocess.Popen(command, env=environment) as benches:
        try:
            code = benches.wait()
        except KeyboardInterrupt:  # which they got too: pytest ends in order, with what has been timed
            code = benches.wait()
    left_out = json.loads(left_out_file.read_text()) if left_out_file.exists() else []
    left_out_file.unlink(missing_ok=True)
    if not json_file.exists() or not json_file.read_text().strip():
        reasons = "; ".join(dict.fromkeys(f"{entry['provider']}: {entry['reason']}" for entry in left_out))
        raise RuntimeError(
            f"no bench got a time (pytest ended with {code}){f': {reasons}' if reasons else ''}"
        )
    report = json.loads(json_file.read_text()) | {"left_out": left_out}
    write(report, output)
    return report, code


def write(report: Mapping[str, Any], output: Path) -> list[Path]:
    """Everything that is made of a report; returns the files, the page last."""
    output.mkdir(parents=True, exist_ok=True)
    run = run_of(report)
    texts = {
        "results.json": json.dumps(_slim(report), indent=1),
        "results.csv": liger_csv.text(run),
        "results.md": tables.markdown(report),
    }
    for name, text in texts.items():
        (output / name).write_text(text)
    plots = draw(run, output)
    (output / "index.html").write_text(page(run, plots, _embedded))
    return [*(output / name for name in texts), *(plot.path for plot in plots), output / "index.html"]


def _embedded(path: Path) -> str:
    """A plot as part of the page, which so is one file that can be sent."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _slim(report: Mapping[str, Any]) -> dict[str, Any]:
    """Without every single round's time, which pytest-benchmark keeps: megabytes of what the statistics say."""
    benchmarks = [
        {**bench, "stats": {name: value for name, value in bench["stats"].items() if name != "data"}}
        for bench in report["benchmarks"]
    ]
    return {**report, "benchmarks": benchmarks}


def merged(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Reports of one machine as one, the first one's machine and date for all.

    Raises:
        ValueError: they are of different machines.
    """
    first, *others = reports
    for other in others:
        for name in ("cpu", "gpu", "threads"):
            if other["machine_info"].get(name) != first["machine_info"].get(name):
                raise ValueError(
                    f"the results are of different machines: {name} {first['machine_info'].get(name)} and "
                    f"{other['machine_info'].get(name)}"
                )
    joined = {
        name: [row for report in reports for row in report.get(name, [])]
        for name in ("benchmarks", "left_out")
    }
    return {**first, **joined}
