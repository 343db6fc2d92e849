"""The life of a checkpoint on disk: whole or not there, every file hashed, the newest good one found again.

    write    .tmp-step-N/  files, fsync each, manifest.json last  ->  fsync folder, rename to step-N/, fsync parent
    find     newest complete one by the order of writing; a damaged one is named and the one before it taken
    rotate   after a write: keep the newest k and the best, drop the rest

manifest.json holds the size and SHA-256 of every file, a serial number that grows with each write, and a digest of
itself. The serial, not the step, says which is newest: after going back to an earlier step, what was written later
counts. Nothing here reads what the files hold, nor uses anything outside the standard library.

One process writes a folder of checkpoints at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_TEMPORARY, _REPLACED = ".tmp-", ".replaced-"


class DamagedCheckpoint(RuntimeError):
    """A checkpoint that is not what was written; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest is in order.

    Attributes:
        path: its folder, `step-N`.
        serial: grows with every write to the parent folder.
        files: size in bytes and SHA-256 of each file.
    """

    path: Path
    serial: int
    files: dict[str, tuple[int, str]]

    def check_sizes(self) -> None:
        """Raise `DamagedCheckpoint` unless every file is there in its full size. Reads no contents."""
        for name, (size, _) in self.files.items():
            file = self.path / name
            if not file.is_file():
                raise DamagedCheckpoint(f"{file} is missing")
            if file.stat().st_size != size:
                raise DamagedCheckpoint(f"{file} has {file.stat().st_size} bytes, {size} were written")

    def check_contents(self) -> None:
        """Raise `DamagedCheckpoint` unless every file is, byte for byte, the one written."""
        self.check_sizes()
        for name, (_, digest) in self.files.items():
            if sha256(self.path / name) != digest:
                raise DamagedCheckpoint(f"{self.path / name} was changed: its SHA-256 is not the manifest's")


def sha256(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write(parent: Path, step: int, fill: Callable[[Path], None]) -> Path:
    """Write the checkpoint of a step, or nothing at all.

    A process that dies at any moment leaves the checkpoints that were there, and perhaps a folder under a temporary
    name, which the next write removes. A `step-N` that exists is replaced.

    Args:
        parent: folder of all checkpoints of the run.
        step: the N of `step-N`.
        fill: writes the files into the folder that it is given.

    Returns:
        The finished folder.
    """
    temporary = begin(parent, step)
    fill(temporary)
    return finish(temporary)


def temporary_folder(parent: Path, step: int) -> Path:
    """Where the files of a step's checkpoint are written before they are complete."""
    return parent / f"{_TEMPORARY}step-{step}"


def begin(parent: Path, step: int) -> Path:
    """Remove what an interrupted write left, and make the temporary folder that `finish` publishes."""
    parent.mkdir(parents=True, exist_ok=True)
    recover(parent)
    for left in parent.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(left)
    temporary = temporary_folder(parent, step)
    temporary.mkdir()
    return temporary


def finish(temporary: Path) -> Path:
    """Hash and sync all files of a temporary folder and rename it to its final name."""
    parent = temporary.parent
    final = parent / temporary.name.removeprefix(_TEMPORARY)
    names = sorted(str(file.relative_to(temporary)) for file in temporary.rglob("*") if file.is_file())
    files = {name: [(temporary / name).stat().st_size, sha256(temporary / name)] for name in names}
    body = {"serial": 1 + max((c.serial for c in in_order(parent)), default=0), "files": files}
    (temporary / MANIFEST).write_text(json.dumps({**body, "digest": _digest(body)}, separators=(",", ":")))
    for name in [*names, MANIFEST]:
        _sync(temporary / name)
    for folder in sorted({(temporary / name).parent for name in [*names, MANIFEST]}):
        _sync(folder)
    replaced = parent / f"{_REPLACED}{final.name}"
    if final.exists():
        os.rename(final, replaced)
    os.rename(temporary, final)
    _sync(parent)
    if replaced.exists():
        shutil.rmtree(replaced)
    return final


def recover(parent: Path) -> None:
    """Give back its name to a checkpoint whose replacement was cut short between the two renames."""
    for replaced in parent.glob(f"{_REPLACED}*"):
        final = parent / replaced.name.removeprefix(_REPLACED)
        if final.exists():
            shutil.rmtree(replaced)
        else:
            os.rename(replaced, final)


def find_newest(parent: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint of a run, or None.

    Every file's hash is checked. A damaged checkpoint is named to `warn`, with the file, and the one written before
    it is tried.
    """
    recover(parent)
    readable = {}
    for folder in parent.glob("step-*"):
        try:
            readable[folder] = read_manifest(folder)
        except DamagedCheckpoint as damage:
            warn(f"skipping a damaged checkpoint: {damage}")
    for checkpoint in sorted(readable.values(), key=lambda c: c.serial, reverse=True):
        try:
            checkpoint.check_contents()
        except DamagedCheckpoint as damage:
            warn(f"skipping a damaged checkpoint: {damage}")
        else:
            return checkpoint.path
    return None


def rotate(parent: Path, keep: int | None, protected: Iterable[Path] = ()) -> None:
    """Delete old checkpoints, after a new one is complete.

    Args:
        parent: folder of all checkpoints.
        keep: how many to keep, the newest and `protected` among them; None deletes nothing.
        protected: folders that stay whatever their age: the best one.
    """
    if keep is None:
        return
    ordered = [checkpoint.path for checkpoint in in_order(parent)]
    kept = {path for path in (*ordered[-1:], *protected) if path.exists()}
    for path in reversed(ordered):
        if len(kept) < keep:
            kept.add(path)
    for path in parent.glob("step-*"):
        if path not in kept:
            shutil.rmtree(path)
    _sync(parent)


def in_order(parent: Path) -> list[Checkpoint]:
    """Checkpoints that have all their files in full size, oldest first; contents are not read."""
    complete = []
    for folder in parent.glob("step-*"):
        try:
            checkpoint = read_manifest(folder)
            checkpoint.check_sizes()
        except DamagedCheckpoint:
            continue  # named when a run goes on from here; of no use to anything else
        complete.append(checkpoint)
    return sorted(complete, key=lambda checkpoint: checkpoint.serial)


def read_manifest(folder: Path) -> Checkpoint:
    """The checkpoint in a folder.

    Raises:
        DamagedCheckpoint: its manifest is missing or was changed.
    """
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
        body = {"serial": manifest["serial"], "files": manifest["files"]}
        intact = manifest["digest"] == _digest(body)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{file} is missing: the checkpoint was never finished") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{file} can't be read: {error}") from None
    if not intact:
        raise DamagedCheckpoint(f"{file} was changed: its digest does not fit")
    files = {name: (size, digest) for name, (size, digest) in body["files"].items()}
    return Checkpoint(folder, body["serial"], files)


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file's or folder's contents are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
