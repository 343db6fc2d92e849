"""What all tests share: Triton's interpreter where there is no GPU, the same Hypothesis cases every time, and the
instruction set that a test asks for."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by triton when it is first imported

settings.register_profile(
    "alignfast",
    max_examples=300,
    derandomize=True,
    deadline=None,
    database=None,
    # no shrinking: a case that fails by rounding alone took minutes to shrink, and grew no clearer
    phases=[Phase.explicit, Phase.generate],
)
settings.load_profile("alignfast")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "isa(name): run compiled CPU code for this instruction set")
    # Triton's interpreter computes both sides of a tl.where, also the one that overflows
    config.addinivalue_line(
        "filterwarnings", "ignore:.*encountered in:RuntimeWarning:triton.runtime.interpreter"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    marker = item.get_closest_marker("isa")
    if marker is None:
        return (yield)
    from alignfast import _cpu

    best = _cpu.isa()
    _cpu.use_isa(*marker.args)
    try:
        return (yield)
    finally:
        _cpu.use_isa(best)
