"""Which implementation of an op runs. A named backend is obeyed or refused, never swapped in silence.

An implementation is a class with `name` and `refusal(device, dtype) -> str | None`: None where it can run,
else the reason and the remedy in words. An op lists its implementations in `register`; that is all a new
backend needs.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any, Protocol

import torch

BACKENDS = ("auto", "torch", "native", "triton", "flash")  # `flash`, a library, has paged_attention alone
# The order in which `auto` asks, by device type. On a GPU Triton comes first: it is what has been tuned there.
_PREFERENCE = {"cpu": ("native", "torch"), "cuda": ("triton", "native", "torch")}
_OPS: dict[str, dict[str, Any]] = {}


class Implementation(Protocol):
    """What `resolve` needs to know of an implementation; the calls themselves are the op's own affair."""

    name: str

    @staticmethod
    def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
        """None where this implementation can run, else why not and what to do."""


def register(op: str, *implementations: Any) -> None:
    """Make the implementations of an op known to `resolve` and `report`."""
    _OPS[op] = {implementation.name: implementation for implementation in implementations}


def named(backend: str) -> str:
    """The backend asked for: the argument, or what ALIGNFAST_BACKEND puts in the place of `auto`.

    Raises:
        ValueError: the name is none of `BACKENDS`.
    """
    if backend == "auto":
        backend = os.environ.get("ALIGNFAST_BACKEND", "auto")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    return backend


def resolve(op: str, device: torch.device, dtype: torch.dtype, backend: str = "auto") -> Any:
    """The implementation of `op` for tensors of this device and dtype.

    Args:
        op: name under which the op was registered.
        device: where the inputs are.
        dtype: type of the main input.
        backend: `auto`, or the one that must be used. `ALIGNFAST_BACKEND` in the environment replaces `auto`.

    Raises:
        ValueError: the name is none of `BACKENDS`.
        RuntimeError: the named backend can't run this input; the message says why and what to do.
    """
    backend = named(backend)
    known = _OPS[op]
    if backend != "auto":
        if backend not in known:
            raise RuntimeError(f"{op} has no {backend} implementation; it has {', '.join(known)}")
        reason = known[backend].refusal(device, dtype)
        if reason is not None:
            raise RuntimeError(f"{op} can't run with backend={backend!r}: {reason}")
        return known[backend]
    for name in _PREFERENCE.get(device.type, ("torch",)):
        if name in known and known[name].refusal(device, dtype) is None:
            return known[name]
    raise RuntimeError(f"{op} has no implementation for {device} and {dtype}")  # torch takes everything


def report() -> dict[str, dict[str, str]]:
    """For each op and backend: "available", or why it is not, on the best device of this machine.

    >>> from alignfast.kernels import report
    >>> report()["token_logps"]["torch"]
    'available'
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {op: {name: _state(known[name], device) for name in known} for op, known in _OPS.items()}


def _state(implementation: Any, device: torch.device) -> str:
    reasons = [implementation.refusal(device, dtype) for dtype in (torch.float32, torch.bfloat16)]
    return "available" if None in reasons else str(reasons[0])


def never_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """A definition in PyTorch takes every device and type."""
    return None


def native_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why compiled code can't take such tensors, shared by every op's native implementation."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"compiled kernels take float32, bfloat16 and float16, got {dtype}; pass backend='torch'"
    if device.type == "cpu":
        if importlib.util.find_spec("alignfast._cpu") is None:
            return "alignfast._cpu is not built; `pip install .` builds it, `alignfast doctor` says what is missing"
        return None
    if device.type == "cuda":
        if importlib.util.find_spec("alignfast._cuda") is None:
            return "alignfast._cuda is not built; `pip install .` builds it where nvcc 12.4 or newer is found"
        return None
    return f"compiled kernels run on cpu and cuda, got {device.type}; pass backend='torch'"


def triton_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why Triton can't take such tensors, shared by every op's Triton implementation."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"Triton kernels take float32, bfloat16 and float16, got {dtype}; pass backend='torch'"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install triton`"
    if device.type == "cuda":
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"Triton needs a CUDA tensor, got {device.type}; pass backend='native', or set TRITON_INTERPRET=1 to test"
