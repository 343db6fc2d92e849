"""Builds csrc/cuda/ for the CPU and puts it where alignfast looks for its compiled CPU part.

So `backend="native"` on CPU tensors runs the CUDA kernels, thread by thread, and every test of an op is a test of
them. As a pytest plugin (`-p emulated_cuda`, this folder in PYTHONPATH) it does so for a whole run, with the order
of threads that ALIGNFAST_EMULATOR names: ascending or descending.

The library is kept under build/, by a hash of its sources; compiling takes some twenty seconds on two cores.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import torch
from torch import Tensor

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
NAME = "_cuda_emulated"
# The sanitizers end the process with a line that says where: a vector load off its 16 bytes, an index beyond an
# array, an offset that overflows 32 bits. Locals start as garbage, so that none is read before it is written, where
# the compiler can (GCC from 12 on); older ones build the same without it.
GARBAGE_LOCALS = "-ftrivial-auto-var-init=pattern"
FLAGS = (
    "-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fno-strict-aliasing",
    GARBAGE_LOCALS, "-fsanitize=alignment,bounds,shift,signed-integer-overflow",
    "-fno-sanitize-recover=all", f"-DALIGNFAST_MODULE={NAME}", f"-I{HERE}", f"-I{pybind11.get_include()}",
    f"-I{sysconfig.get_path('include')}",
)  # fmt: skip


def sources() -> list[Path]:
    """What is compiled: the binding, every CUDA source, and the emulator's own two."""
    kernels = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    return [ROOT / "csrc" / "module.cpp", *kernels, HERE / "emulator.cpp", HERE / "samples.cu"]


@functools.lru_cache
def flags(compiler: str) -> tuple[str, ...]:
    """`FLAGS`, as far as a compiler knows them."""
    probe = [compiler, GARBAGE_LOCALS, "-x", "c++", "-fsyntax-only", "/dev/null"]
    known = subprocess.run(probe, capture_output=True, check=False).returncode == 0
    return FLAGS if known else tuple(flag for flag in FLAGS if flag != GARBAGE_LOCALS)


def build() -> Path:
    """The emulated extension, compiled unless these very sources were before.

    Raises:
        RuntimeError: the compiler refuses a source; its words are in the message.
    """
    compiler = os.environ.get("CXX", "g++")
    headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.cuh"), *HERE.glob("*.h")]
    digest = hashlib.sha256(repr((compiler, flags(compiler), sys.version)).encode())
    for path in sorted([*sources(), *headers]):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / f"emulated-{digest.hexdigest()[:16]}"
    library = folder / f"{NAME}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    objects = [folder / f"{path.stem}.{os.getpid()}.o" for path in sources()]
    commands = [
        [compiler, *flags(compiler), "-x", "c++", "-c", str(path), "-o", str(to)]
        for path, to in zip(sources(), objects)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, commands))
    partial = folder / f"{NAME}.{os.getpid()}.so"
    _run([compiler, "-shared", *flags(compiler), *map(str, objects), "-o", str(partial)])
    partial.rename(library)  # whole or absent, should two builds run at once
    for path in objects:
        path.unlink()
    return library


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command[-5:])} failed:\n{result.stderr[-4000:]}")


def load() -> ModuleType:
    """The emulated extension as a module; loaded once a process."""
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(NAME, build())
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[NAME] = module
    return sys.modules[NAME]


def install(patch: Any, *, descending: bool = False, approximate: bool = False) -> ModuleType:
    """Put the emulated kernels in the place of alignfast._cpu, by a pytest MonkeyPatch.

    Args:
        patch: undoes it.
        descending: run blocks and threads from the last to the first.
        approximate: let mathematical functions err as a GPU's do.
    """
    module = load()
    module.__spec__ = importlib.machinery.ModuleSpec("alignfast._cpu", None)
    module.configure_emulator(descending, approximate)
    patch.setitem(sys.modules, "alignfast._cpu", module)
    op = importlib.import_module("alignfast.kernels.packed_attention")
    patch.setattr(op, "launch", _as_on_cuda(op.launch))
    return module


def _as_on_cuda(launch: Any) -> Any:
    """The one call that differs between the two modules: the CUDA backward takes delta_HT for its workspace."""

    def launch_on_cuda(function: str, *arguments: Any) -> None:
        if function == "packed_attention_slabs":
            count: Tensor = arguments[-1]
            count.fill_(1)
            return
        if function == "packed_attention_backward":
            norms_HT2: Tensor = arguments[5]
            delta_HT = torch.full(norms_HT2.shape[:2], torch.nan)
            arguments = (*arguments[:10], delta_HT, *arguments[11:])
        launch(function, *arguments)

    return launch_on_cuda


def pytest_configure() -> None:
    """As a plugin: emulate from the first test to the last."""
    import pytest

    install(pytest.MonkeyPatch(), descending=os.environ["ALIGNFAST_EMULATOR"] == "descending")
