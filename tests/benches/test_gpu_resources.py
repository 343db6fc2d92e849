"""The table of what GPU kernels take: read from the compilers' listings, and of all kernels that there are."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("triton")

import gpu_resources  # noqa: E402

LISTING = """
arch = sm_80
identifier = /a/csrc/cuda/row.cu
 Function _ZN9alignfast4cuda6kernelI6__halfEEvPT_:
  REG:63 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:424
 Function _ZN9alignfast4cuda6kernelI13__nv_bfloat16EEvPT_:
  REG:60 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:424
arch = sm_90a
identifier = /a/csrc/cuda/row.cu
 Function _ZN9alignfast4cuda6kernelI6__halfEEvPT_:
  REG:62 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:600
"""


def test_a_listing_is_a_line_a_kernel() -> None:
    assert gpu_resources.table(gpu_resources.cuda_usages(LISTING)) == [
        "| source | kernel | registers, sm_80 / sm_90a | stack, bytes | shared memory, bytes |",
        "| --- | --- | ---: | ---: | ---: |",
        "| row.cu | `kernel<16 bit>` | 63 / 62 | 8 / 0 | 0 / 1,024 |",
    ]


@pytest.mark.skipif(importlib.util.find_spec("alignfast._cuda") is None, reason="built without CUDA")
def test_the_page_has_every_kernel_of_cuda() -> None:
    page = (ROOT / "docs" / "gpu-resources.md").read_text()
    wanted = {f"| {of.source} | `{of.kernel}` |" for of in gpu_resources.compiled_by_nvcc()}
    told = {f"{row.rpartition('` |')[0]}` |" for row in page.splitlines() if ".cu | " in row}
    assert told == wanted, "made by another state: python benches/gpu_resources.py > docs/gpu-resources.md"
