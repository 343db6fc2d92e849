"""The tests of the ops, with the CUDA kernels in the place of the compiled CPU part.

A run of its own for each op and each order of threads: a sanitizer ends the process where a kernel does what it must
not, and this test shows its words.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import emulated_cuda
import pytest

# Left out: what asks for CPU threads or instruction sets, traces through the compiler alone, or takes minutes of
# emulation (heads 256 wide over 600 tokens). packed_attention's random inputs are in test_kernels.py,
# with a peer that rounds where tensor cores make every flash attention round.
SUITES = {
    "test_token_logps.py": ("native and not threads", 30),
    "test_token_logps_numbers.py": ("native and not threads", 4),
    "test_preference_loss.py": ("native and not threads", 2),
    "test_packed_preference_loss.py": ("native and not threads", 10),
    "test_gae.py": ("native and not threads", 25),
    "test_kl_penalty.py": ("native and not threads and not compiles", 30),
    "test_policy_loss_backends.py": ("native and not threads and not compiles", 50),
    "test_kl_divergence.py": ("native and not threads", 70),
    "test_sample_tokens.py": ("native and not threads and not many_rows and not frequencies", 55),
    "test_packed_attention.py": ("native and not threads and not any_input and not (256 and parts)", 40),
}


# Quick tests run each suite in one order of threads, in turn; all tests in both.
ORDERS = ("ascending", "descending")
RUNS = [
    pytest.param(suite, order, marks=[] if (number + place) % 2 == 0 else [pytest.mark.slow])
    for number, suite in enumerate(SUITES)
    for place, order in enumerate(ORDERS)
]


@pytest.mark.parametrize(("suite", "order"), RUNS)
def test_suite(suite: str, order: str) -> None:
    emulated_cuda.build()
    selection, at_least = SUITES[suite]
    folders = (emulated_cuda.HERE, os.environ.get("PYTHONPATH", ""))
    result = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-p", "emulated_cuda", "-q", "-x", "-p", "no:cacheprovider",
            "-k", selection, str(Path("tests") / "ops" / suite),
        ],
        cwd=emulated_cuda.ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders)), "ALIGNFAST_EMULATOR": order},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    report = result.stdout[-3000:] + result.stderr[-2000:]
    assert result.returncode == 0, report
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None, report
    assert int(passed[1]) >= at_least, report  # the selection still finds its tests
