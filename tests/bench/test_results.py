"""Rows, tables, CSV, plots and comparison of a run that was written by hand: every figure in it is known."""

from __future__ import annotations

import copy
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from alignfast.bench import compare, growth, liger_csv, plots, results, suite, tables
from alignfast.cli import main

LIMITS = {"read_gb_s": 10.0, "copy_gb_s": 8.0, "gemm_gflop_s": 100.0}
RESULTS = Path(__file__).resolve().parents[2] / "benches" / "results"


def bench(group: str, provider: str, seconds: float, shape: str = "4 x 8", **info: Any) -> dict[str, Any]:
    """One of pytest-benchmark's entries; the median is a tenth above the minimum."""
    stats = {"min": seconds, "median": 1.1 * seconds, "q1": seconds, "q3": 1.3 * seconds, "rounds": 3}
    name = f"bench_{group}[{provider}]"
    extra = {
        "provider": provider,
        "shape": shape,
        "error": 1e-7,
        "low": seconds,
        "high": 1.2 * seconds,
        **info,
    }
    return {
        "fullname": f"bench_x.py::{name}",
        "name": name,
        "group": group,
        "extra_info": extra,
        "stats": stats,
    }


def sweep(provider: str, power: float, memory: float) -> list[dict[str, Any]]:
    return [
        bench(
            "loss forward", provider, 1e-3 * (x / 1024) ** power, str(x), axis=["tokens", x],
            peak_bytes=1e6 * (x / 1024) ** memory,
        )
        for x in (1024, 2048, 4096, 8192)
    ]  # fmt: skip


@pytest.fixture
def report() -> dict[str, Any]:
    rows = [
        bench("gae", "alignfast native", 1e-3, moved_bytes=4e6, flops=2e6, share=0.5, peak_bytes=2**20),
        bench("gae", "loop", 0.1, moved_bytes=4e6, flops=2e6, share=0.005, peak_bytes=3 * 2**20),
        *sweep("alignfast native", 1, 0),
        *sweep("eager", 2, 1),
    ]
    left_out = [{"bench": "b", "provider": "verl", "outcome": "skipped", "reason": "verl: not installed"}]
    machine = {"cpu": "a CPU", "gpu": None, "cores": 2, "threads": 2, "versions": {"torch": "2"}, "commit": "abc",
               "limits": LIMITS}  # fmt: skip
    return {
        "machine_info": machine,
        "datetime": "2026-11-23T01:02:03",
        "benchmarks": rows,
        "left_out": left_out,
    }


def write(path: Path, report: dict[str, Any]) -> str:
    path.write_text(json.dumps(report))
    return str(path)


def test_the_floor_is_the_larger_of_bytes_and_flops(report: dict[str, Any]) -> None:
    row = results.run_of(report).rows[0]
    assert row.floor(LIMITS) == pytest.approx(5e-4)
    assert results.floor_seconds({"flops": 1e9, "read_bytes": 1e6}, LIMITS) == pytest.approx(1e-2)
    assert results.floor_seconds({}, LIMITS) is None


def test_a_device_s_time_stands_for_the_wall_s() -> None:
    timed = bench("gae", "a", 1.0, device={"min": 0.1, "median": 0.2, "low": 0.15, "high": 0.3})
    row = results.run_of({"machine_info": {}, "datetime": "", "benchmarks": [timed]}).rows[0]
    assert (row.least, row.median, row.low, row.high) == (0.1, 0.2, 0.15, 0.3)


def test_exponents(report: dict[str, Any]) -> None:
    found = {
        s.provider: (growth.fit(s, "time"), growth.fit(s, "memory"))
        for s in growth.sweeps(results.run_of(report).rows)
    }
    assert found == {"alignfast native": (1.0, 0.0), "eager": (2.0, 1.0)}
    # a fixed cost at small sizes is left out of the fit
    assert growth.exponent([(1, 5), (2, 5), (4, 4), (8, 8), (16, 16), (32, 32)]) == pytest.approx(1.0)
    assert growth.exponent([(1, 1)]) is None
    assert growth.exponent([(1, 0.0), (2, 1.0)]) is None


def test_markdown(report: dict[str, Any]) -> None:
    text = tables.markdown(report)
    assert (
        "| 4 x 8 | alignfast native | 1.00 | 1.10 | 1.00 to 1.20 | 0.50 | 50% | 1.0 MiB | 1.0e-07 |" in text
    )
    assert "| loss forward | eager | tokens | 1024 to 8192 | 2.00 | 1.00 | 70.4 ms | 7.6 MiB |" in text
    assert "| verl | skipped | verl: not installed | 1 |" in text


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_can_be_read(path: Path) -> None:
    report = json.loads(path.read_text())
    assert results.read_run(path).rows
    assert "##" in tables.markdown(report)


def test_liger_s_columns(report: dict[str, Any]) -> None:
    lines = list(csv.DictReader(io.StringIO(liger_csv.text(results.run_of(report)))))
    assert tuple(lines[0]) == liger_csv.COLUMNS
    assert [line["metric_name"] for line in lines[:2]] == ["speed", "memory"]
    assert float(lines[0]["y_value_50"]) == pytest.approx(1.1)
    assert float(lines[1]["y_value_50"]) == 1.0
    last = lines[-2]
    assert (last["kernel_name"], last["kernel_operation_mode"]) == ("loss", "forward")
    assert (last["x_name"], float(last["x_value"])) == ("tokens", 8192)


def test_everything_is_written(report: dict[str, Any], tmp_path: Path) -> None:
    written = suite.write(report, tmp_path)
    names = {path.name for path in written}
    assert {
        "results.json",
        "results.csv",
        "results.md",
        "roofline.png",
        "time-gae.png",
        "memory-gae.png",
    } < names
    assert {"growth-loss-forward-over-tokens-time.png", "growth-loss-forward-over-tokens-memory.png"} < names
    assert all(path.stat().st_size for path in written)
    page = written[-1].read_text()
    assert page.count("data:image/png;base64,") == len([name for name in names if name.endswith(".png")])
    assert "verl: not installed" in page
    assert results.read_run(tmp_path / "results.json").rows == results.run_of(report).rows


def test_peers_keep_their_colour(report: dict[str, Any]) -> None:
    rows = results.run_of(report).rows
    assert plots.palette(rows)["eager"] == plots.palette(rows[::-1])["eager"]
    assert len(set(plots.palette(rows).values())) == 3


def test_reports_of_one_machine_are_joined(report: dict[str, Any]) -> None:
    other = copy.deepcopy(report)
    assert len(suite.merged([report, other])["benchmarks"]) == 2 * len(report["benchmarks"])
    other["machine_info"]["threads"] = 1
    with pytest.raises(ValueError, match="threads 2 and 1"):
        suite.merged([report, other])


@pytest.mark.parametrize(("slower", "code"), [(1.04, 0), (1.06, 1)])
def test_compare_fails_beyond_what_is_allowed(
    report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], slower: float, code: int
) -> None:
    after = copy.deepcopy(report)
    for name in ("min", "median"):
        after["benchmarks"][0]["stats"][name] *= slower
    files = [write(tmp_path / "a.json", report), write(tmp_path / "b.json", after)]
    assert main(["bench", "compare", *files, "--fail", "5%"]) == code
    said = capsys.readouterr()
    assert f"{slower - 1:+.1%}" in said.out
    assert ("gae, 4 x 8, alignfast native: +6.0%" in said.err) == bool(code)
    assert main(["bench", "compare", *files]) == 0


def test_a_row_that_lost_its_time_is_a_failure(
    report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kernel that became wrong gets no time; a group that was not run is nobody's fault."""
    after = copy.deepcopy(report)
    del after["benchmarks"][0]
    files = [write(tmp_path / "a.json", report), write(tmp_path / "b.json", after)]
    assert main(["bench", "compare", *files, "--fail", "0.5"]) == 1
    assert "alignfast native: no time in the second run" in capsys.readouterr().err
    after["benchmarks"] = [row for row in after["benchmarks"] if row["group"] != "gae"]
    write(tmp_path / "b.json", after)
    assert main(["bench", "compare", *files, "--fail", "0.5"]) == 0
    wrong = {"bench": "b", "provider": "alignfast native", "outcome": "failed", "reason": "it is wrong by 1"}
    after["left_out"] = [wrong, {**wrong, "provider": "trl", "reason": "it broke"}]
    write(tmp_path / "b.json", after)
    capsys.readouterr()
    assert main(["bench", "compare", *files, "--fail", "0.5"]) == 1
    said = capsys.readouterr().err
    assert "1 beyond" in said
    assert "b: it is wrong by 1" in said


def test_one_shape_in_two_sweeps_is_two_rows(report: dict[str, Any], tmp_path: Path) -> None:
    """Compared each with its own: the slower one is found."""
    for axis, after in (("tokens", 1e-3), ("vocabulary", 9e-3)):
        report["benchmarks"].append(bench("loss", "eager", after, axis=[axis, 8]))
    slower = copy.deepcopy(report)
    stats = slower["benchmarks"][-2]["stats"]
    stats.update({name: 3 * value for name, value in stats.items()})
    found = compare.compare(results.run_of(report), results.run_of(slower))
    assert [round(change.ratio) for change in found.changes if change.ratio > 2] == [3]


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["compare", "a.json"], 2, "two files"),
        (["compare", "a.json", "a.json", "--fail", "much"], 1, "5% or 0.05"),
        (["compare", "a.json", "a.json", "--by", "mean"], 1, "median, min"),
        (["compare", "a.json", "other.json"], 1, "no benchmarks"),
        (["report"], 2, "files of results"),
        (["gea"], 1, "did you mean 'gae'"),
        (["--suite", "long"], 2, "quick, full, smoke"),
    ],
)
def test_what_can_not_be_meant(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], code: int, part: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.json", report)
    (tmp_path / "other.json").write_text("{}")
    assert main(["bench", *words]) == code
    assert part in capsys.readouterr().err


def test_report_draws_results_anew(
    report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.json", report)
    assert main(["bench", "report", file, "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "index.html").exists()
