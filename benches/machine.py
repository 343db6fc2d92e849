"""What machine a bench ran on, with which packages, from which commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "nvidia-cutlass-dsl",
    "flash-attn", "flash-attn-4", "vllm", "verl", "openrlhf", "alignfast",
)  # fmt: skip


def described() -> dict[str, Any]:
    """CPU, GPU, clocks, versions, commit and variables, as plain values."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
        "clocks": _clocks(),
        "load": os.getloadavg()[0],
        "variables": {
            name: Path(value).name
            if os.sep in value
            else value  # whose folders these are is nobody's business
            for name, value in sorted(os.environ.items())
            if name.startswith(("MALLOC_", "OMP_", "ALIGNFAST_B"))
        },
    }


def _commit() -> str | None:
    """Of the checkout that the benches lie in, with a plus where it was changed since."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        return f"{commit}{'+' if git('status', '--porcelain', '-uno') else ''}" if commit else None
    except OSError:  # no git
        return None


def _clocks() -> str | None:
    """Clock rates, driver and power limit as they are at the start."""
    if torch.cuda.is_available():
        wanted = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,driver_version"
        command = ["nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError:
            return None
        if done.returncode:
            return None
        sm, most, memory, power, driver = (word.strip() for word in done.stdout.splitlines()[0].split(","))
        return f"SM {sm} of {most}, memory {memory}, {power}, driver {driver}, CUDA {torch.version.cuda}"
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return None
    rates = [float(rate) for rate in re.findall(r"^cpu MHz\s*: ([\d.]+)", cpuinfo.read_text(), re.MULTILINE)]
    return f"{max(rates):.0f} MHz" if rates else None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
