"""Checkpoints on disk: complete or absent, damage named, nothing that matters ever deleted."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from alignfast.trainers import checkpoint

FILES = {
    "model.safetensors": b"weights" * 50,
    "optimizer.safetensors": b"moments" * 40,
    "sub/state.json": b"{}",
}


def fill(content: bytes = b""):
    def write_files(folder: Path) -> None:
        for name, data in FILES.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data + content)

    return write_files


def steps(parent: Path) -> list[int]:
    return sorted(int(folder.name.split("-")[1]) for folder in parent.glob("step-*"))


def refuse_warnings(message: str) -> None:
    raise AssertionError(message)


def test_written_is_found(tmp_path):
    for step in (1, 2, 3):
        checkpoint.write(tmp_path, step, fill())
    assert checkpoint.find_newest(tmp_path, refuse_warnings) == tmp_path / "step-3"
    assert (tmp_path / "step-3" / "sub" / "state.json").read_bytes() == b"{}"


def test_none_where_nothing_was_written(tmp_path):
    assert checkpoint.find_newest(tmp_path / "never", refuse_warnings) is None


class Killed(BaseException):
    """Stands for a process that dies: nothing of ours may catch it."""


CALLS = ("fsync", "rename", "open", "mkdir")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("step", [2, 3])  # 2: a new checkpoint; 3 exists already and is replaced
def test_death_at_every_call_leaves_a_good_checkpoint(tmp_path, monkeypatch, call, step):
    reached, fatal = 0, 0
    # die at the first such call, then at the second, ... until a whole write has none left to die at
    while True:
        parent = tmp_path / f"{fatal}"
        checkpoint.write(parent, 1, fill(b"first"))
        checkpoint.write(parent, 3, fill(b"third"))
        original, reached = getattr(os, call), 0

        def dying(*args, original=original, fatal=fatal, **kwargs):
            nonlocal reached
            if reached == fatal:
                raise Killed
            reached += 1
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, dying)
            try:
                checkpoint.write(parent, step, fill(b"new"))
                died = False
            except Killed:
                died = True
        found = checkpoint.find_newest(parent, refuse_warnings)
        assert found is not None
        data = (found / "model.safetensors").read_bytes()
        assert data in (FILES["model.safetensors"] + b"third", FILES["model.safetensors"] + b"new")
        checkpoint.write(parent, step, fill(b"again"))  # the next write of the same step works
        assert checkpoint.find_newest(parent, refuse_warnings) == parent / f"step-{step}"
        assert not [path for path in parent.iterdir() if path.name.startswith(".")]
        if not died:
            break
        fatal += 1
    assert fatal >= 1  # the call is made at all


CHILD = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from alignfast.trainers import checkpoint

parent, call, fatal = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
original, reached = getattr(os, call), 0

def dying(*args, **kwargs):
    global reached
    if reached == fatal:
        os.kill(os.getpid(), signal.SIGKILL)
    reached += 1
    return original(*args, **kwargs)

setattr(os, call, dying)
checkpoint.write(parent, 2, lambda folder: (folder / "model.safetensors").write_bytes(b"second"))
"""


@pytest.mark.parametrize(("call", "fatal"), [("fsync", 0), ("fsync", 2), ("rename", 0), ("fsync", 3)])
def test_kill_9_leaves_a_good_checkpoint(tmp_path, call, fatal):
    checkpoint.write(tmp_path, 1, fill())
    root = str(Path(checkpoint.__file__).parents[2])
    killed = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path), call, str(fatal), root], check=False)
    assert killed.returncode == -signal.SIGKILL
    found = checkpoint.find_newest(tmp_path, refuse_warnings)
    published = (call, fatal) == ("fsync", 3)  # the parent's sync comes after the rename
    assert found == tmp_path / ("step-2" if published else "step-1")


def test_every_flipped_bit_is_named_and_skipped(tmp_path):
    checkpoint.write(tmp_path, 1, fill())
    checkpoint.write(tmp_path, 2, fill())
    draw = random.Random(0)
    names = [*FILES, checkpoint.MANIFEST]
    for trial in range(200):
        file = tmp_path / "step-2" / names[trial % len(names)]
        intact = file.read_bytes()
        bit = draw.randrange(8 * len(intact))
        changed = bytearray(intact)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        said: list[str] = []
        assert checkpoint.find_newest(tmp_path, said.append) == tmp_path / "step-1"
        assert len(said) == 1
        assert str(file) in said[0]
        file.write_bytes(intact)
    assert checkpoint.find_newest(tmp_path, refuse_warnings) == tmp_path / "step-2"


@pytest.mark.parametrize("name", [*FILES, checkpoint.MANIFEST])
@pytest.mark.parametrize("damage", ["missing", "truncated", "longer"])
def test_missing_and_truncated_files_are_named(tmp_path, name, damage):
    checkpoint.write(tmp_path, 1, fill())
    file = checkpoint.write(tmp_path, 2, fill()) / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] if damage == "truncated" else file.read_bytes() + b"x")
    said: list[str] = []
    assert checkpoint.find_newest(tmp_path, said.append) == tmp_path / "step-1"
    assert str(file) in said[0]


def test_what_was_written_later_is_newer_than_a_stale_higher_step(tmp_path):
    for step in (5, 10, 6):  # a run went back to 5 and on
        checkpoint.write(tmp_path, step, fill())
    assert checkpoint.find_newest(tmp_path, refuse_warnings) == tmp_path / "step-6"
    checkpoint.rotate(tmp_path, keep=2)
    assert steps(tmp_path) == [6, 10]
    checkpoint.write(tmp_path, 7, fill())
    checkpoint.rotate(tmp_path, keep=2)
    assert steps(tmp_path) == [6, 7]


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("best", [None, 1, 3])
def test_rotation_keeps_the_newest_k_and_the_best(tmp_path, keep, best):
    for step in range(1, 7):
        checkpoint.write(tmp_path, step, fill())
        protected = [tmp_path / f"step-{best}"] if best is not None and best <= step else []
        checkpoint.rotate(tmp_path, keep, protected)
        present = steps(tmp_path)
        assert step in present
        assert best is None or best > step or best in present
        assert len(present) <= max(keep, 2 if protected else 1)
    assert checkpoint.find_newest(tmp_path, refuse_warnings) == tmp_path / "step-6"


def test_rotation_without_a_limit_deletes_nothing(tmp_path):
    for step in range(1, 5):
        checkpoint.write(tmp_path, step, fill())
        checkpoint.rotate(tmp_path, None)
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_rotation_never_counts_a_damaged_checkpoint_as_the_newest(tmp_path):
    checkpoint.write(tmp_path, 1, fill())
    (checkpoint.write(tmp_path, 2, fill()) / "model.safetensors").unlink()
    checkpoint.rotate(tmp_path, keep=1)
    assert steps(tmp_path) == [1]


def test_a_failed_write_leaves_the_others(tmp_path):
    checkpoint.write(tmp_path, 1, fill())

    def full_disk(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(tmp_path, 2, full_disk)
    assert checkpoint.find_newest(tmp_path, refuse_warnings) == tmp_path / "step-1"
    checkpoint.write(tmp_path, 2, fill())
    assert checkpoint.find_newest(tmp_path, refuse_warnings) == tmp_path / "step-2"
