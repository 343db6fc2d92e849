"""The health of an installation: versions, devices, compiled parts, what each op runs on, and what to do about gaps."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import alignfast
from alignfast.kernels import report

# Package, and what it is for where it may be missing.
_NEEDED = ("torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "tokenizers", "numpy")
_OPTIONAL = {
    "triton": "GPU kernels",
    "flash-attn": "faster attention on GPUs than torch's own, and softcaps",
    "vaderSentiment": "quickstart",
    "afinn": "quickstart",
    "trl": "comparison in benchmarks",
}


def environment() -> dict[str, Any]:
    """Everything that `advise` and the command print, as plain values."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "alignfast": alignfast.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()}, {torch.backends.cpu.get_cpu_capability()}",
        "gpus": [
            f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}" for gpu in gpus
        ],
        "packages": {name: _version(name) for name in (*_NEEDED, *_OPTIONAL)},
        "compiled": {
            name: importlib.util.find_spec(f"alignfast.{name}") is not None for name in ("_cpu", "_cuda")
        },
        "ops": report(),
    }


def advise(found: dict[str, Any]) -> list[str]:
    """What is missing and how to get it; empty where nothing is.

    Args:
        found: what `environment` gave.
    """
    advice = []
    missing = [name for name in _NEEDED if found["packages"][name] is None]
    if missing:
        advice.append(f"{', '.join(missing)} missing, which alignfast needs: pip install {' '.join(missing)}")
    compilers = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
    if not found["compiled"]["_cpu"]:
        advice.append(
            "alignfast._cpu is not built, so that everything on the CPU runs on torch, several times slower: "
            + (
                "pip install . builds it"
                if compilers
                else "install a C++ compiler (g++ or clang), then pip install ."
            )
            + " in a copy of the source"
        )
    if found["gpus"] and not found["compiled"]["_cuda"]:
        advice.append(
            "there is a GPU and alignfast._cuda is not built: install CUDA's nvcc 12.4 or newer, set CUDA_HOME, then "
            "pip install . in a copy of the source"
        )
    if found["gpus"] and found["packages"]["triton"] is None:
        advice.append("there is a GPU and no triton: pip install '.[triton]' in alignfast's checkout")
    if os.environ.get("ALIGNFAST_BACKEND"):
        advice.append(f"ALIGNFAST_BACKEND={os.environ['ALIGNFAST_BACKEND']} overrides the choice of kernels")
    return advice


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def missing_for(package: str) -> str:
    """What an optional package is for."""
    return _OPTIONAL.get(package, "needed")
