"""Estimates of how far a policy is from its reference, from the log-probs of the tokens that were written.

    d = log pi_ref(token) - log pi(token)
    k1 = -d        abs = |d|        k2 = d^2 / 2        k3 = exp(d) - 1 - d

(J. Schulman, "Approximating KL divergence", joschu.net/blog/kl-approx.html, 2020.) Over tokens of the policy k1 and k3
have the mean KL(pi || pi_ref); k3 is never negative. What a loss follows is the mean gradient, another matter: that of
k1 is 0, of k2 that of KL(pi || pi_ref), of k3 that of KL(pi_ref || pi).

Nothing is clamped: where the reference finds a token 89 nats likelier than the policy did, k3 in float32 is inf.

Not done here: a divergence over the whole vocabulary, a gradient for the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignfast.kernels._autograd import Function, only_once
from alignfast.kernels._backend import named, native_refusal, never_refuses, register, resolve, triton_refusal
from alignfast.kernels._native import launch, native_op

KINDS = ("k1", "abs", "k2", "k3")  # their places are their numbers in compiled code, csrc/kl.h


def kl_penalty(logps: Tensor, ref_logps: Tensor, *, kind: str = "k1", backend: str = "auto") -> Tensor:
    """One estimate a token, differentiable in the policy's log-probs.

    Args:
        logps: the policy's log-probability of each token, in nats; any shape.
        ref_logps: the reference's; a constant of the same shape.
        kind: `k1`, `abs`, `k2` or `k3`, as above.
        backend: `auto`, `torch`, `native` or `triton`; `auto` compiles k3 alone: the others are one or two operations of
            PyTorch, which no call of ours is quicker than.

    Returns:
        The estimates in the same shape: float32, or float64 for float64 log-probs. k3 is exact to the last digits
        where the two nearly agree, though a difference of its terms would have none there. Compiled code has no
        second derivative.

    Raises:
        ValueError: shapes, devices or types do not fit, the kind is unknown, or the reference wants a gradient.
        RuntimeError: the named backend can't run this input.

    >>> logps, ref_logps = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    >>> kl_penalty(logps, ref_logps, backend="torch")
    tensor([ 0.5000, -1.0000])
    >>> kl_penalty(logps, ref_logps, kind="k3", backend="torch")
    tensor([0.1065, 0.7183])
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}")
    if logps.shape != ref_logps.shape or logps.device != ref_logps.device:
        raise ValueError(
            "expected log-probs and reference log-probs alike, got "
            f"{tuple(logps.shape)} on {logps.device} and {tuple(ref_logps.shape)} on {ref_logps.device}"
        )
    if not logps.is_floating_point() or not ref_logps.is_floating_point():
        raise ValueError(f"expected floating-point log-probs, got {logps.dtype} and {ref_logps.dtype}")
    if ref_logps.requires_grad:
        raise ValueError("reference log-probs are constants, but they require a gradient; detach them")
    logps = logps if logps.dtype == torch.float64 else logps.float()
    ref_logps = ref_logps.to(logps.dtype)
    backend = named(backend)
    if backend == "auto" and kind != "k3":
        backend = "torch"
    implementation = resolve("kl_penalty", logps.device, logps.dtype, backend)
    if implementation is _Torch:
        return _Torch.forward(logps, ref_logps, kind)
    return _Compiled.apply(logps.contiguous(), ref_logps.contiguous(), KINDS.index(kind), implementation)


def estimate(d: Tensor, kind: str) -> Tensor:
    """The estimator of differences d, reference minus policy: its only definition."""
    if kind == "k1":
        return -d
    if kind == "abs":
        return d.abs()
    return d.square() / 2 if kind == "k2" else _K3.apply(d)


class _K3(Function):
    """exp(d) - 1 - d, and its derivative exp(d) - 1.

    In double, and near 0 as a series: the difference has an error of 1e-16 d there, the value is d^2 / 2. At 1e-5 the
    two meet within 2e-11 of the value, far below the last digit of float32.
    """

    @staticmethod
    def forward(d: Tensor) -> Tensor:
        wide = d.double()
        near = wide * wide * (0.5 + wide / 6)
        return torch.where(wide.abs() < 1e-5, near, wide.expm1() - wide).to(d.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dk3: Tensor) -> Tensor:
        (d,) = ctx.saved_tensors
        return dk3 * d.expm1()


class _Compiled(Function):
    """A compiled implementation; its slopes are computed when they are wanted, which penalties in rewards never do."""

    @staticmethod
    def forward(logps: Tensor, ref_logps: Tensor, code: int, implementation: Any) -> Tensor:
        return implementation.forward(logps, ref_logps, code, False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        logps, ref_logps, ctx.code, ctx.implementation = inputs
        ctx.save_for_backward(logps, ref_logps)

    @staticmethod
    def backward(ctx: Any, dkl: Tensor) -> tuple[Tensor | None, ...]:

        def gradients(dkl: Tensor, logps: Tensor, ref_logps: Tensor) -> tuple[Tensor]:
            return (dkl * ctx.implementation.forward(logps, ref_logps, ctx.code, True),)

        return *only_once("compiled kl_penalty", gradients, dkl, *ctx.saved_tensors), None, None, None


class _Torch:
    """The definition: every other implementation is measured against it, in float64."""

    name = "torch"
    refusal = staticmethod(never_refuses)

    @staticmethod
    def forward(logps: Tensor, ref_logps: Tensor, kind: str) -> Tensor:
        return estimate(ref_logps - logps, kind)


class _Native:
    """csrc/cpu/kl_penalty.cpp and csrc/cuda/kl_penalty.cu.

    forward(logps, ref_logps, code, slope) -> the estimates, or their derivatives by the policy's log-probs. All are
    float32 and contiguous.
    """

    name = "native"
    refusal = staticmethod(native_refusal)

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return torch.ops.alignfast.kl_penalty(*inputs)


@native_op(
    "kl_penalty(Tensor logps, Tensor ref_logps, int code, bool slope) -> Tensor",
    fake=lambda logps, *_: torch.empty_like(logps),
)
def _native_forward(logps: Tensor, ref_logps: Tensor, code: int, slope: bool) -> Tensor:
    out = torch.empty_like(logps)
    launch("kl_penalty", logps.view(-1), ref_logps.view(-1), code, slope, out.view(-1))
    return out


class _Triton:
    """kl_penalty_triton.py, imported on the first call: triton is optional. Its forward is `_Native`'s."""

    name = "triton"
    refusal = staticmethod(triton_refusal)

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        from alignfast.kernels import kl_penalty_triton

        return kl_penalty_triton.forward(*inputs)


register("kl_penalty", _Torch, _Native, _Triton)
