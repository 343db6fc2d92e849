"""The emulated CUDA kernels as a fixture."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).parent / "emulator"))

import emulated_cuda


@pytest.fixture(params=["ascending", "descending"])
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The kernels in the place of alignfast._cpu; threads and blocks from first to last, and from last to first."""
    return emulated_cuda.install(monkeypatch, descending=request.param == "descending")
