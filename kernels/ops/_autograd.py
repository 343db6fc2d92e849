"""What the ops share of autograd: calls that cost little, and first derivatives that say that they have no second.

`torch.func.grad` and `create_graph=True` record every backward pass; only differentiating it again must be refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Function(torch.autograd.Function):
    """torch's, with the signature of `forward` looked up once: torch asks for it at every call, some 30 us."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        forward: Any = cls.forward
        forward.__signature__ = inspect.signature(forward)


def only_once(
    op: str, gradients: Callable[..., tuple[Tensor | None, ...]], *inputs: Tensor | None
) -> tuple[Any, ...]:
    """The gradients of an op whose backward has no derivative of its own.

    Args:
        op: its name, for the error.
        gradients: computes them from the inputs; None where one is not needed.
        inputs: all that they depend on: the upstream gradient and the saved tensors.
    """
    # What is not recorded can't be differentiated; a compiled graph refuses second derivatives by itself.
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients(*inputs)
    return _Once.apply(op, gradients, *inputs)


def saved_is_ours(upstream: Tensor) -> bool:
    """Whether the backward pass that runs now may overwrite what its op saved, since nobody reads it any more.

    Not where the graph is kept for another pass, recorded or traced, nor where the upstream gradient stands for several
    (`is_grads_batched`, `torch.vmap`). Torch has no public name for these; its own compiled graphs ask the same.
    """
    functorch: Any = torch._C._functorch
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or functorch.is_functorch_wrapped_tensor(upstream)
        or functorch.is_legacy_batchedtensor(upstream)
        or torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined]
    )


class _Once(torch.autograd.Function):
    """A function of its inputs that can't be differentiated. Inside `forward` they are plain tensors, which may be
    mixed with workspaces; in a backward pass under torch.func they are not."""

    @staticmethod
    def forward(
        op: str, gradients: Callable[..., tuple[Tensor | None, ...]], *inputs: Tensor
    ) -> tuple[Any, ...]:
        return gradients(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Any, ...]) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(f"{ctx.op} has no second derivative")
