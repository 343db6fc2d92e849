"""`alignfast bench` end to end at the smallest sizes, and what it does where a kernel is wrong."""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import sides
from harness import worst

from alignfast.bench import results, suite
from alignfast.cli import main


@pytest.fixture(autouse=True)
def _no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest-benchmark measures nothing in xdist's workers, and the suite's process is none."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


def test_a_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Only the providers asked for; who is missing is named with the reason; pytest-benchmark's own options go through."""
    out, own = tmp_path / "out", tmp_path / "own.json"
    words = ["gae", "--suite", "smoke", "--providers", "torch,verl", "--output", str(out)]
    assert main(["bench", *words, f"--benchmark-json={own}"]) == 0
    report = json.loads((out / "results.json").read_text())
    assert {row["extra_info"]["provider"] for row in report["benchmarks"]} == {
        "alignfast torch",
        "alignfast torch, out=",
    }
    row = report["benchmarks"][0]["extra_info"]
    assert row["error"] < 1e-5
    assert row["peak_bytes"] > 0
    assert 0 < row["share"] < 1
    (left_out,) = report["left_out"]
    assert (left_out["provider"], left_out["outcome"]) == ("verl", "skipped")
    assert "pip install verl" in left_out["reason"]
    assert (out / "index.html").exists()
    assert json.loads(own.read_text())["benchmarks"]
    assert report["machine_info"]["limits"]["copy_gb_s"] > 0


def folder_of_benches(tmp_path: Path) -> Path:
    """What benches stand on, and none yet."""
    folder = tmp_path / "benches"
    folder.mkdir()
    for name in ("harness.py", "machine.py", "conftest.py", "plain.py"):
        shutil.copy(suite.benches_folder() / name, folder)
    return folder


def test_what_was_timed_before_ctrl_c_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both processes get the signal, as of a terminal; the row that it ends has no time and is left out."""
    folder = folder_of_benches(tmp_path)
    (folder / "bench_hours.py").write_text(
        "import os, signal\nimport pytest\nfrom harness import measure\n"
        "def stop():\n"
        "    os.kill(os.getppid(), signal.SIGINT)\n"
        "    raise KeyboardInterrupt\n"
        "@pytest.mark.parametrize('name', ['alignfast', 'slow', 'never'])\n"
        "def bench_hours(benchmark, name):\n"
        "    call = stop if name == 'slow' else lambda: sum(range(9))\n"
        "    measure(benchmark, call, provider=name, shape='1', rounds=2)\n"
    )
    monkeypatch.setattr(suite, "benches_folder", lambda: folder)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        assert main(["bench", "hours", "--suite", "smoke", "--output", str(tmp_path / "out")]) == 1
    finally:
        signal.signal(signal.SIGINT, before)
    said = capfd.readouterr()
    assert "stopped by Ctrl-C: the results are those of the rows that had ended" in said.err
    assert "[1/3] hours, alignfast, 1: " in said.out
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["extra_info"]["provider"] for row in report["benchmarks"]] == ["alignfast"]
    assert (tmp_path / "out" / "index.html").exists()


def test_no_time_for_a_wrong_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ours, then the exit code is 1; a peer that is broken is named and no more."""
    folder = folder_of_benches(tmp_path)
    (folder / "bench_wrong.py").write_text(
        "import pytest\nfrom harness import measure\n"
        "@pytest.mark.parametrize('name', ['alignfast right', 'alignfast wrong', 'broken'])\n"
        "def bench_wrong(benchmark, name):\n"
        "    error = {'alignfast right': 1e-7, 'alignfast wrong': 0.3}[name]\n"
        "    measure(benchmark, lambda: sum(range(9)), provider=name, shape='1', error=error, allowed_error=1e-6, rounds=2)\n"
    )
    monkeypatch.setattr(suite, "benches_folder", lambda: folder)
    words = ["bench", "wrong", "--suite", "smoke", "--output", str(tmp_path / "out")]
    assert main(words) == 1
    said = capfd.readouterr()
    assert "alignfast wrong is wrong by 3.0e-01 where 1.0e-06 is allowed" in said.err
    assert "peers without a time: bench_wrong[broken]: KeyError: 'broken'" in said.out
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["extra_info"]["provider"] for row in report["benchmarks"]] == ["alignfast right"]

    bench = (folder / "bench_wrong.py").read_text().replace("'alignfast wrong', ", "")
    (folder / "bench_wrong.py").write_text(bench)
    monkeypatch.chdir(tmp_path)  # pytest-benchmark breaks where its storage lies elsewhere
    stored = [f"--benchmark-storage=file://{tmp_path}/stored", "--benchmark-autosave"]
    assert main([*words, *stored]) == 0
    (folder / "bench_wrong.py").write_text(bench.replace("range(9)", "range(10**6)"))
    regressed = [*stored[:1], "--benchmark-compare", "--benchmark-compare-fail=min:100%"]
    assert main([*words, *regressed]) == 1  # the broken peer does not hide it
    assert "pytest ended with 1" in capfd.readouterr().err


@pytest.mark.parametrize("difference", [2e-4, float("nan")])
def test_sides_that_differ_are_our_fault(difference: float) -> None:
    """The comparison is made in the peer's row, after both sides have run."""
    with pytest.raises(pytest.fail.Exception) as found:
        sides.check_same("losses", difference, 1e-4)
    entry = {"bench": "b", "provider": "trl", "outcome": "failed", "reason": str(found.value)}
    ours, peers = results.Run({}, "", [], [entry]).failed
    assert (len(ours), peers) == (1, [])
    sides.check_same("losses", 9e-5, 1e-4)


def test_a_nan_is_the_largest_error() -> None:
    assert math.isnan(worst([1e-7, float("nan")]))
    assert math.isnan(worst([float("nan"), 1e-7]))
    assert worst([1e-7, 2e-7]) == 2e-7


@pytest.mark.slow
def test_an_unknown_provider_is_told_the_known(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["gae", "--suite", "smoke", "--providers", "torhc", "--output", str(tmp_path)]
    assert main(["bench", *words]) == 1
    assert "no bench here has the provider 'torhc'; there are: alignfast" in capfd.readouterr().err


def test_every_bench_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    listed = capsys.readouterr().out.split()
    assert {"gae", "growth", "linear_loss", "patch_trl", "rollout"} < set(listed)
    folder = suite.benches_folder()
    quick, full = (suite.chosen(folder, [], name) for name in ("quick", "full"))
    assert {path.stem for path in full} - {path.stem for path in quick} == {
        f"bench_{name}" for name in ("dpo_step", "grpo_step", "patch_trl", "ppo_step", "rollout", "server")
    }
