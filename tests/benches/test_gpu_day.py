"""benches/gpu_day.sh with steps of our own, since there is no GPU: order, limits, what it writes, and being stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_cases
import gpu_day
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benches" / "gpu_day.sh"


def start(folder: Path, steps: str, *words: str) -> subprocess.Popen[str]:
    (folder / "steps").write_text(steps)
    environment = {**os.environ, "ALIGNFAST_GPU_DAY_STEPS": str(folder / "steps"), "PYTHON": sys.executable}
    return subprocess.Popen(
        [str(SCRIPT), str(folder / "out"), *(words or ["10"])], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def outcomes(folder: Path) -> list[tuple[str, str]]:
    lines = (folder / "out" / "steps.tsv").read_text().splitlines()
    return [(line.split("\t")[0], line.split("\t")[1]) for line in lines]


def test_steps_in_their_order_whatever_becomes_of_each(tmp_path: Path) -> None:
    steps = (
        "first|9|echo said; echo 1 >> $OUT/order\nbroken|9|echo 2 >> $OUT/order; exit 3\nmissing|9|no-such-tool\n"
        "slow|1|sleep 60\nlast|9|echo 3 >> $OUT/order\n"
    )
    run = start(tmp_path, steps)
    out, _ = run.communicate(timeout=60)
    assert run.returncode == 0
    assert outcomes(tmp_path) == [
        ("first", "done"), ("broken", "failed (3)"), ("missing", "a tool is missing"), ("slow", "over its time"),
        ("last", "done"),
    ]  # fmt: skip
    assert (tmp_path / "out" / "order").read_text() == "1\n2\n3\n"
    assert (tmp_path / "out" / "01-first.log").read_text() == "said\n"
    assert "no-such-tool" in (tmp_path / "out" / "03-missing.log").read_text()
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert summary in out
    assert "| slow | over its time |" in summary


def test_steps_run_the_checkout_s_own_code_and_what_the_build_made(tmp_path: Path) -> None:
    """Without an installation; a file that one step makes is there for the next."""
    see = f"{sys.executable} -c 'import alignfast.kernels as k; print(k.__file__)'"
    made = ROOT / "alignfast" / f"made_by_{os.getpid()}.so"
    try:
        run = start(
            tmp_path, f"make|9|touch {made}\nsee|30|{see}\nfind|9|ls $OUT/site/alignfast/{made.name}\n"
        )
        run.communicate(timeout=60)
    finally:
        made.unlink(missing_ok=True)
    assert outcomes(tmp_path)[1:] == [("see", "done"), ("find", "done")]
    assert (
        str(tmp_path / "out" / "site" / "alignfast" / "kernels")
        in (tmp_path / "out" / "02-see.log").read_text()
    )


def test_limits_shrink_with_the_day(tmp_path: Path) -> None:
    """Two steps of 600 seconds in three minutes: the first half of it, the second what is left."""
    run = start(tmp_path, "a|600|true\nb|600|true\n", "3")
    run.communicate(timeout=60)
    lines = (tmp_path / "out" / "steps.tsv").read_text().splitlines()
    first, second = (int(line.split("\t")[3]) for line in lines)
    assert first == 90
    assert 175 <= second <= 180


def test_a_part_of_the_day(tmp_path: Path) -> None:
    """The steps named, in the order given; another day's figures are not written over; a slip is told."""
    steps = "a|9|true\nb|9|true\nc|9|true\n"
    run = start(tmp_path, steps, "10", "c", "a")
    run.communicate(timeout=60)
    assert run.returncode == 0
    assert outcomes(tmp_path) == [("c", "done"), ("a", "done")]
    again = start(tmp_path, steps, "10", "b")
    _, said = again.communicate(timeout=60)
    assert again.returncode == 1
    assert "figures of another day" in said
    assert outcomes(tmp_path) == [("c", "done"), ("a", "done")]
    shutil.rmtree(tmp_path / "out")
    slip = start(tmp_path, steps, "10", "d")
    _, said = slip.communicate(timeout=60)
    assert slip.returncode == 2
    assert "no step d; they are: a b c" in said


def test_stopped_at_any_minute(tmp_path: Path) -> None:
    """What was done stands in the summary, and the step in progress ends too."""
    run = start(tmp_path, "a|9|true\nb|60|echo $$ > $OUT/pid; sleep 60\n")
    deadline = time.monotonic() + 30
    while not (tmp_path / "out" / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    pid = int((tmp_path / "out" / "pid").read_text())
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=30)
    assert run.returncode == 130
    assert outcomes(tmp_path) == [("a", "done"), ("b", "stopped")]
    assert "| b | stopped |" in (tmp_path / "out" / "summary.md").read_text()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "ALIGNFAST_GPU_DAY_STEPS"}
    environment["PATH"] = "/usr/bin:/bin"
    if shutil.which("nvidia-smi", path=environment["PATH"]):
        pytest.skip("there is a GPU")
    done = subprocess.run([str(SCRIPT), str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no NVIDIA GPU" in done.stderr
    for words in ([], [str(tmp_path), "0"], [str(tmp_path), "soon"]):
        assert subprocess.run([str(SCRIPT), *words], capture_output=True).returncode == 2


@pytest.mark.slow
def test_figures_come_one_by_one_without_pytest_benchmark(tmp_path: Path) -> None:
    """A bench as the script runs it, from the checkout alone, on a machine whose pytest has no plugin for it."""
    bench = (
        f"{sys.executable} -m pytest -q -p no:benchmark -p no:cacheprovider -c /dev/null --rootdir=$ROOT/benches "
        "--import-mode=importlib -o pythonpath=$ROOT/benches -o python_files=bench_*.py -o python_functions=bench_* "
        "--providers loop,torch $ROOT/benches/bench_gae.py"
    )
    run = start(tmp_path, f"gae|60|ALIGNFAST_BENCH_SUITE=smoke {bench}\n")
    run.communicate(timeout=120)
    assert outcomes(tmp_path) == [("gae", "done")], (tmp_path / "out" / "01-gae.log").read_text()
    machine, *rows = map(json.loads, (tmp_path / "out" / "rows.jsonl").read_text().splitlines())
    assert machine["machine_info"]["limits"]["read_gb_s"] > 0
    assert [row["extra_info"]["provider"] for row in rows] == [
        "alignfast torch",
        "alignfast torch, out=",
        "loop",
    ]
    assert "| 8 x 32 | loop |" in (tmp_path / "out" / "summary.md").read_text()


def row(group: str, provider: str, shape: str, seconds: float, **info: float) -> str:
    stats = {"min": seconds, "median": seconds, "q1": seconds, "q3": seconds}
    extra = {"provider": provider, "shape": shape, "low": seconds, "high": seconds, **info}
    return json.dumps({"fullname": "x", "name": "x", "group": group, "extra_info": extra, "stats": stats})


def test_verdicts(tmp_path: Path) -> None:
    limits = {"read_gb_s": 3000.0, "copy_gb_s": 3000.0, "gemm_gflop_s": 8e5}
    head, logps = "8192 x 4096 x 128256", "8192 x 128256 torch.bfloat16"
    flops = 6.0 * 8192 * 4096 * 128_256
    lines = [
        json.dumps({"machine_info": {"gpu": "a GPU", "clocks": None, "commit": "abc", "limits": limits}}),
        row("token_logps forward with entropy", "alignfast triton", logps, 0.7e-3, read_bytes=2.1e9),
        row("token_logps forward with entropy", "trl", logps, 0.9e-3, read_bytes=2.1e9),
        row("linear_loss forward+backward", "alignfast native", head, 34e-3, flops=flops),
        row("linear_loss forward+backward", "alignfast logps native", head, 60e-3, flops=flops),
        row("gae", "alignfast triton", "512 x 1024", 1e-5),
        row("rollouts", "alignfast native", "0.5b, 32 x 8", 2.0, read_bytes=4.2e12),
        '{"cut off',
    ]
    lines.insert(
        3,
        json.dumps(
            {"left_out": {"bench": "b", "provider": "quack", "outcome": "skipped", "reason": "absent"}}
        ),
    )
    lines += [
        "",
        row("dpo step 0.5b", "alignfast", "0.5b", 1.0, peak_mib=600),
        row("dpo step 0.5b", "trl", "0.5b", 4.0, peak_mib=1000),
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    table = gpu_day.summary(tmp_path).splitlines()
    assert "| quack | skipped | absent | 1 |" in table
    found = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in table if line.startswith("| ")}
    assert found["token_logps with entropy, forward"] == [
        "700 us (triton)", "700 us", "100%", "trl 900 us", "must met |",
    ]  # fmt: skip
    assert found["linear_loss, forward and backward"][-1] == "aim met |"
    assert found["linear_token_logps, forward and backward"][0] == "60.0 ms (logps native)"
    assert found["linear_token_logps, forward and backward"][-1] == "short |"
    assert found["linear_token_logps, forward and backward"][2] == "72%"
    assert found["gae 4096 x 2048"][-1] == "not measured |"
    assert found["DPO step, 0.5B"][-1] == "4.0 times: short: 60% of the memory, at most 50% are asked for |"
    assert found["rollouts, 256 sequences, 0.5B"][-3:] == ["70%", "vLLM", "must met |"]


def test_steps_of_training_are_judged_by_their_ratio() -> None:
    goal = next(goal for goal in gpu_day.GOALS if goal.what.startswith("DPO"))
    assert [gpu_day.verdict(goal, ratio, True) for ratio in (1.9, 2.0, 3.1)] == [
        "short",
        "must met",
        "aim met",
    ]


@pytest.mark.parametrize(
    "words", [["small", "--backend", "native"], ["large", "--elements", "70000", "--backend", "torch"]]
)
def test_cases(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_cases.py", *words])
    with pytest.raises(SystemExit) as leave:
        gpu_cases.main()
    said = capsys.readouterr().out
    assert leave.value.code == 0, said
    assert all(line.startswith("right") for line in said.splitlines())


def test_nothing_to_try_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a build that failed: nothing was checked."""
    monkeypatch.setattr(gpu_cases, "chosen", lambda backend: [])
    assert gpu_cases.run("small", "native", 10) == 1


def test_failures_are_told_when_they_happen(tmp_path: Path) -> None:
    """A step that is ended at its limit keeps what had failed before, with the reason."""
    (tmp_path / "test_it.py").write_text(
        "import time\ndef test_a():\n    assert 2 == 3\ndef test_b():\n    time.sleep(60)\n"
    )
    tests = f"{sys.executable} -m pytest -q -p at_once -p no:cacheprovider -c /dev/null {tmp_path}/test_it.py"
    run = start(tmp_path, f"tests|8|{tests}\n")
    run.communicate(timeout=60)
    assert outcomes(tmp_path) == [("tests", "over its time")]
    assert "assert 2 == 3" in (tmp_path / "out" / "01-tests.log").read_text()


def test_a_wrong_kernel_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(gpu_cases.CASES, "gae", ((lambda backend, elements: 0.5,), 1.0))
    monkeypatch.setattr(
        gpu_cases, "chosen", lambda backend: [("gae", gpu_cases.CASES["gae"][0][0], "torch", 1.0)]
    )
    assert gpu_cases.run("small", None, 10) == 1
    assert capsys.readouterr().out.startswith("FAILED")
