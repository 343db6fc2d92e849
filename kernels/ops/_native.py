"""From tensors to compiled code: alignfast._cpu and alignfast._cuda, reached through torch.library.

An op's file names its torch operator once and calls the compiled function of that name in it:

    @native_op("gae(Tensor rewards, float gamma) -> Tensor", fake=torch.empty_like)
    def _native_gae(rewards_BL: Tensor, gamma: float) -> Tensor:
        out_BL = torch.empty_like(rewards_BL)
        launch("gae", rewards_BL, gamma, out_BL)
        return out_BL

after which `torch.ops.alignfast.gae` serves CPU and CUDA tensors, and torch.compile sees one opaque node.

The convention, the same for both modules (csrc/export.h is its other half): `launch` passes the arguments in
order, a number as it is, a tensor of N dimensions as 2 + 2 N integers (address, `DTYPES` code, sizes, strides in
elements), which C++ receives as `Tensor<N>`; then, last, the number of threads on a CPU, or the address of the
current stream on a GPU. Functions return nothing: outputs are allocated here and passed.

Importing this file needs no compiled part; calling an op does, and `native_refusal` says so before.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor

DTYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int64: 3,
    torch.int32: 4,
    torch.bool: 5,
}
_LIBRARY = torch.library.Library("alignfast", "DEF")
_F = TypeVar("_F", bound=Callable[..., Any])


def native_op(schema: str, fake: Callable[..., Any]) -> Callable[[_F], _F]:
    """Register the decorated function as `torch.ops.alignfast.<name>` for CPU and CUDA tensors.

    Args:
        schema: name, typed arguments and result, as torch.library spells them; `Tensor(a!)` is written to.
        fake: the same arguments to an output without data, for tracing.
    """
    name = schema[: schema.index("(")]

    def decorate(function: _F) -> _F:
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, function, "CPU")
        _LIBRARY.impl(name, function, "CUDA")
        torch.library.register_fake(f"alignfast::{name}", fake, lib=_LIBRARY)
        return function

    return decorate


def launch(function: str, *arguments: Tensor | float) -> None:
    """Call a compiled function; the first tensor's device says in which module."""
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    flat: list[float] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            flat += (argument.data_ptr(), DTYPES[argument.dtype], *argument.shape, *argument.stride())
        else:
            flat.append(argument)
    if device.type == "cpu":
        getattr(import_module("alignfast._cpu"), function)(*flat, torch.get_num_threads())
        return
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        getattr(import_module("alignfast._cuda"), function)(*flat, stream)


def unit_columns(x: Tensor) -> Tensor:
    """`x` itself if neighbours in the last dimension are neighbours in memory, else a copy that is so."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
