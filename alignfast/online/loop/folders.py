"""Versions as folders that never change: weights, tokenizer, and a manifest of what they come from.

    output_dir/policy-3/            model and tokenizer, as save_pretrained writes them
                       manifest.json    {name, kind, parents, hash, files, run, created, config, figures}
    output_dir/.runs/RUN/           what a run is at work on; it goes when the run ends

A folder is made under .runs, synced and renamed; then the store is told. A process that dies at any moment leaves a
version whole or not there, and what it had done is found again by the run's id in the manifest.

Where votes are deleted while they are trained on, what is made of them never becomes a version: the store takes none that
has learned from what is gone, and the training begins anew without it.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignfast.online.server.versions import weights_hash
from alignfast.online.store import Store, Version
from alignfast.online.store.uses import Forgotten, Learned
from alignfast.online.store.versions import VersionKind
from alignfast.trainers import checkpoint
from alignfast.trainers.checkpoint import sha256

MANIFEST = "manifest.json"
_RUNS, _OF = ".runs", "of.json"


def work_folder(output_dir: Path, run: str) -> Path:
    """Where a run is at work."""
    return output_dir / _RUNS / run


def begin_work(folder: Path, learned: Learned, how: Mapping[str, Any]) -> bool:
    """Make the folder of a training, or find what an interrupted one has left there.

    Args:
        folder: under `work_folder`.
        learned: what it trains on.
        how: with which options, from which model, as JSON can hold it. What was left of another training (votes were
            deleted meanwhile, an option was changed) is removed.

    Returns:
        Whether there is a checkpoint to go on from.
    """
    of = json.dumps({"learned": asdict(learned), "how": how}, sort_keys=True, default=str)
    file = folder / _OF
    if folder.exists() and (not file.is_file() or file.read_text() != of):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(of)
    goes_on = checkpoint.find_newest(folder / "checkpoints", lambda text: None) is not None
    if not goes_on:  # a first one that is half written is none
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return goes_on


def learned_from(folder: Path) -> Learned:
    """What the training in a folder was begun with."""
    return Learned(**json.loads((folder / _OF).read_text())["learned"])


def clear_work(output_dir: Path, run: str) -> None:
    """Delete what a run that is over has left."""
    shutil.rmtree(work_folder(output_dir, run), ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a version's folder says of itself.

    Raises:
        ValueError: it has no manifest, or one that can't be read.
    """
    try:
        found = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no version's folder: {error}") from error
    assert isinstance(found, dict)
    return found


def made_by(folder: Path, run: str) -> dict[str, Any] | None:
    """The manifest of a version that a run has made before it was killed; None: it has not.

    Raises:
        ValueError: another run has made a folder of that name.
    """
    if not folder.exists():
        return None
    manifest = read_manifest(folder)
    if manifest["run"] != run:
        raise ValueError(
            f"{folder} is there already, made by {manifest['run']}, and the store does not know it: is it another "
            "store's folder? Give another output_dir"
        )
    return manifest


def publish(
    store: Store,
    work: Path,
    model: Path,
    output_dir: Path,
    name: str,
    kind: VersionKind,
    *,
    run: str,
    parents: Sequence[str],
    config: Mapping[str, Any],
    figures: Mapping[str, Any],
) -> Version:
    """Make a folder the version's own, and tell the store of it.

    Args:
        store: that shall know it.
        work: folder of the training, which `begin_work` made.
        model: folder in it with model and tokenizer; gone afterwards.
        output_dir: of all versions.
        name: of the version.
        kind: what it holds.
        run: that made it.
        parents: versions that it comes from.
        config: that it was made with.
        figures: that its making measured.

    Raises:
        Forgotten: votes that it has learned from were deleted; the version is gone, and must be made anew without them.
        ValueError: the name is another run's, or the model's folder holds no weights.
    """
    final = output_dir / name
    manifest = made_by(final, run)
    if manifest is None:
        for pickled in model.glob("training_args.bin"):
            pickled.unlink()
        names = sorted(str(file.relative_to(model)) for file in model.rglob("*") if file.is_file())
        manifest = {
            "name": name, "kind": kind, "parents": list(parents), "hash": weights_hash(model), "run": run,
            "created": time.time(), "files": {file: sha256(model / file) for file in names if file != MANIFEST},
            "config": dict(config), "figures": dict(figures),
        }  # fmt: skip
        (model / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        _seal(model)
        os.replace(model, final)
        _sync(output_dir)
    if name not in {version.name for version in store.versions.all()}:
        made = Version(
            name, kind, str(final), manifest["hash"], tuple(parents), time.time(), "candidate", figures=manifest["figures"]
        )  # fmt: skip
        try:
            store.publish(made, learned_from(work))
        except Forgotten:
            shutil.rmtree(final)
            raise
    return store.versions.get(name)


def _seal(folder: Path) -> None:
    """Files that nobody writes to by accident, on disk."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_file():
            path.chmod(0o444)
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
