"""The emulator runs a right kernel right, and says what is wrong with a wrong one."""

from __future__ import annotations

import struct
from pathlib import Path
from types import ModuleType

import emulated_cuda
import pytest
import torch
from torch import Tensor

import alignfast.kernels._native as native

NONE, NO_BARRIER, OVERRUN, UNREACHED, DIVERGENT, UNWRITTEN, TOO_MANY_BYTES = range(7)
EXPECTED = torch.arange(63, -1, -1).float() + sum(range(32))


def reverse(fault: int) -> Tensor:
    out = torch.full((64,), -1.0)
    native.launch("reverse", torch.arange(64).float(), out, fault)
    return out


def test_a_right_kernel(emulated: ModuleType) -> None:
    assert torch.equal(reverse(NONE), EXPECTED)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (OVERRUN, "shared memory written 0 bytes past the 256"),
        (UNREACHED, "deadlock"),
        (DIVERGENT, "threads meet from line"),
        (TOO_MANY_BYTES, "invalid launch"),
    ],
)
def test_faults_that_hang_or_corrupt(emulated: ModuleType, fault: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        reverse(fault)
    assert torch.equal(reverse(NONE), EXPECTED)  # and the next launch is as if nothing had been


def test_a_missing_barrier_is_seen(emulated: ModuleType) -> None:
    """Either half of the threads reads what the other has not written: NaN, in whichever order they run."""
    wrong = reverse(NO_BARRIER)
    assert wrong.isnan().sum() == 32
    assert not torch.equal(wrong, EXPECTED)


def test_shared_memory_starts_as_garbage(emulated: ModuleType) -> None:
    assert reverse(UNWRITTEN).isnan().all()


# What g++ 9 to 11 say of the flag that they lack.
REFUSING = """#!/bin/sh
case "$*" in *trivial-auto-var-init*) echo "error: unrecognized command line option" >&2; exit 1;; esac
"""


@pytest.mark.parametrize(("script", "known"), [(REFUSING, False), ("#!/bin/sh\n", True)])
def test_a_compiler_without_garbage_locals_builds_without_them(
    tmp_path: Path, script: str, known: bool
) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text(script)
    compiler.chmod(0o755)
    flags = emulated_cuda.flags(str(compiler))
    assert (emulated_cuda.GARBAGE_LOCALS in flags) == known
    assert set(emulated_cuda.FLAGS) - set(flags) <= {emulated_cuda.GARBAGE_LOCALS}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_conversions(emulated: ModuleType, dtype: torch.dtype) -> None:
    """Every 16-bit number to float, and floats between and on them back, to nearest even as torch does."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    numbers = bits.view(dtype)
    floats = torch.empty(numbers.shape)
    native.launch("widen", numbers, floats)
    assert torch.equal(floats.nan_to_num(nan=7), numbers.float().nan_to_num(nan=7))
    assert torch.equal(floats.isnan(), numbers.isnan())
    finite = floats[floats.isfinite()].sort().values
    halfway = (finite[1:].double() + finite[:-1].double()).float() / 2
    overflow = torch.tensor([65519.0, 65520.0, 1e38, 3.4e38, -3.4e38])
    for values in (finite, halfway, halfway.nextafter(finite[1:]), overflow):
        narrow = torch.empty(values.shape, dtype=dtype)
        native.launch("narrow", values, narrow)
        assert torch.equal(narrow.view(torch.int16), values.to(dtype).view(torch.int16))


def test_a_product_is_a_product(emulated: ModuleType) -> None:
    """The tensor-core instructions, loads and transposed loads included, against torch on small integers: exact."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        a_MK, b_KN = (
            torch.randint(-8, 9, size, generator=generator).to(dtype) for size in ((16, 16), (16, 16))
        )
        c_MN, d_MN = torch.empty(16, 16), torch.empty(16, 16)
        native.launch("product", a_MK, b_KN, b_KN.t().contiguous(), c_MN, d_MN)
        expected = a_MK.float() @ b_KN.float()
        assert torch.equal(c_MN, expected)
        assert torch.equal(d_MN, expected)


def test_sums_are_cut_off_as_tensor_cores_do(emulated: ModuleType) -> None:
    """1 + 2^-24 + ... rounds up to nearest; a tensor core drops it."""
    a_MK, b_KN = (torch.zeros(16, 16, dtype=torch.float16) for _ in range(2))
    a_MK[0, :2] = torch.tensor([1.0, 2.0**-12])
    b_KN[:2, 0] = torch.tensor([1.0, 1.5 * 2.0**-12])
    c_MN, d_MN = torch.empty(16, 16), torch.empty(16, 16)
    native.launch("product", a_MK, b_KN, b_KN.t().contiguous(), c_MN, d_MN)
    assert struct.pack("f", c_MN[0, 0].item()) == struct.pack("f", 1.0)
    assert (torch.tensor(1.0, dtype=torch.float64) + 1.5 * 2.0**-24).float() != 1.0
