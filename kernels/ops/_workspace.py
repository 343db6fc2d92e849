"""Scratch memory that is allocated once and lent again.

On a CPU a fresh MB costs 0.35 to 0.46 ms in page faults against 0.05 ms for memory that was touched before: more
than many kernels. On a GPU torch's caching allocator does this already.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor

_FREE: dict[torch.dtype, list[Tensor]] = {}


@contextmanager
def workspace(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """An uninitialised tensor that is valid inside the `with` block alone; its memory is kept for the next call.

    >>> with workspace((2, 3), torch.float32, torch.device("cpu")) as buffer:
    ...     buffer.shape
    torch.Size([2, 3])
    """
    if device.type != "cpu" or torch.compiler.is_compiling():
        yield torch.empty(shape, dtype=dtype, device=device)
        return
    free = _FREE.setdefault(dtype, [])
    memory = free.pop() if free else torch.empty(0, dtype=dtype)  # popped, so that a nested call gets its own
    if memory.numel() < prod(shape):
        memory = torch.empty(prod(shape), dtype=dtype)
    try:
        yield memory[: prod(shape)].view(shape)
    finally:
        free.append(memory)


def release_workspaces() -> None:
    """Give the kept memory back."""
    _FREE.clear()
