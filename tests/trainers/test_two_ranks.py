"""Two ranks, replicated or sharded, give one rank's losses, gradients and weights, on uneven rows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainers import two_ranks
from transformers import AutoModelForCausalLM

from alignfast.trainers.checkpoint import find_newest
from alignfast.trainers.interrupt import INTERRUPTED_EXIT_CODE

TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of all runs: ddp/ and fsdp/ by one launch of two ranks, one/ in this process."""
    root = tmp_path_factory.mktemp("ranks")
    for method in two_ranks.METHODS:
        two_ranks.run(root / "one" / method, method, fsdp=False)
    launch(root / "logs", two_ranks.__file__, str(root / "two"))
    return root


def launch(logs: Path, *words: str) -> None:
    """Start two ranks, and fail with the last words of each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    process = subprocess.run(
        # each rank's words in files of its own: one that aborts takes what is in the launcher's pipe with it
        [*command, "--redirects", "3", "--log-dir", str(logs), *words], capture_output=True, text=True, check=False,
        env={
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONFAULTHANDLER": "1",
        },
    )  # fmt: skip
    if process.returncode:
        told = [f"launcher:\n{process.stderr[-2000:]}"]
        # whose abort it was comes last: CI keeps the end of a long output
        for file in sorted(logs.rglob("std*.log"), key=lambda file: "Fatal Python error" in read_words(file)):
            told.append(f"rank {file.parent.name}, {file.stem}:\n{read_words(file)[-6000:]}")
        pytest.fail("\n\n".join(told), pytrace=False)


def read_words(file: Path) -> str:
    """What a rank said, without the list of modules that faulthandler ends with."""
    return re.sub(r"\nExtension modules: .*", "", file.read_text(errors="replace"))


def test_a_rank_that_aborts_leaves_its_last_words(tmp_path):
    script = tmp_path / "aborts.py"
    script.write_text(
        "import os, sys\n"
        "print('before the end', flush=True)\n"
        "sys.stderr.write('what went wrong\\n')\n"
        "os.abort() if os.environ['RANK'] == '0' else None\n"
    )
    with pytest.raises(pytest.fail.Exception) as failed:
        launch(tmp_path / "logs", str(script))
    told = str(failed.value)
    assert "rank 0, stderr:\nwhat went wrong\nFatal Python error: Aborted" in told
    assert "rank 0, stdout:\nbefore the end" in told
    assert "aborts.py" in told.partition("Fatal Python error")[2]  # where it was


def read(runs: Path, sharding: str, method: str, what: str, suffix: str = ""):
    folder = runs / "one" / method if sharding == "one" else runs / "two" / sharding / method
    if what == "log":
        return json.loads((folder / f"log{suffix}.json").read_text())
    return load_file(folder / f"{what}{suffix}.safetensors")


@pytest.mark.parametrize(("method", "sharding"), two_ranks.CASES)
def test_two_ranks_equal_one(runs, sharding, method):
    one, two = read(runs, "one", method, "log"), read(runs, sharding, method, "log")
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for mine, theirs in zip(one, two):
        assert mine.keys() == theirs.keys()
        for name in mine:
            if "second" not in name and "runtime" not in name:
                assert theirs[name] == pytest.approx(mine[name], abs=TOLERANCE, rel=TOLERANCE), name
    one, two = read(runs, "one", method, "gradients"), read(runs, sharding, method, "gradients")
    assert len(one) == 4
    for step in one:
        assert (one[step] - two[step]).abs().max() <= TOLERANCE
    one, two = read(runs, "one", method, "weights"), read(runs, sharding, method, "weights")
    assert one.keys() == two.keys()
    assert all((one[name] - two[name]).abs().max() <= TOLERANCE for name in one)


@pytest.mark.parametrize(
    ("method", "sharding"), [case for case in two_ranks.CASES if case[0] in two_ranks.RESUMED]
)
def test_resumed_ranks_equal_uninterrupted(runs, sharding, method):
    assert len(read(runs, sharding, method, "gradients", "-resumed")) == 2  # it ran steps 3 and 4 alone
    whole, resumed = (
        read(runs, sharding, method, "weights"),
        read(runs, sharding, method, "weights", "-resumed"),
    )
    assert all((whole[name] - resumed[name]).abs().max() <= TOLERANCE for name in whole)


@pytest.mark.parametrize("sharding", two_ranks.SHARDINGS)
@pytest.mark.parametrize("method", ["sft", "sft-tied"])
def test_a_checkpoint_of_two_ranks_loads_in_transformers(runs, sharding, method):
    weights = read(runs, sharding, method, "weights")
    model = AutoModelForCausalLM.from_pretrained(runs / "two" / sharding / method / "checkpoints" / "step-4")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(runs):
    folder = runs / "two" / "interrupted"
    told = [(folder / f"left-{rank}").read_text() for rank in (0, 1)]
    assert told == [f"{INTERRUPTED_EXIT_CODE} {folder / 'checkpoints' / 'step-2'}"] * 2
    assert find_newest(folder / "checkpoints", pytest.fail) == folder / "checkpoints" / "step-2"
