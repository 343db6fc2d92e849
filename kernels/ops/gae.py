"""Generalised advantage estimation over ragged rows: what each token did better than the critic expected.

    delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}        R_t = A_t + V_t

(Schulman et al., arXiv 1506.02438, equations 11 and 16.) V after the last step is `bootstrap_B`, or 0.

Two conventions for tokens that the policy did not write (tool results, padding), where the mask is 0:
    skip    they are not there: V_{t+1} and A_{t+1} are those of the next token that counts (verl).
    decay   they are steps without reward and of value 0, so that each discounts once more (OpenRLHF).

Letters: B rows, L steps.
Not done here: whitening, a gradient (advantages are constants), termination in the middle of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignfast.kernels._backend import native_refusal, never_refuses, register, resolve, triton_refusal
from alignfast.kernels._native import launch, native_op
from alignfast.kernels._workspace import fresh_like

MASKED = ("skip", "decay")


def gae(
    rewards_BL: Tensor,
    values_BL: Tensor,
    mask_BL: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    masked: str = "skip",
    bootstrap_B: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of every step; constants, whatever the inputs require.

    Args:
        rewards_BL: reward of each step, KL penalties included.
        values_BL: the critic's value before each step.
        mask_BL: true (or not 0) where a step counts; None is everywhere.
        gamma: discount of a step, in [0, 1].
        lam: 0 is one-step temporal difference, 1 the whole return; in [0, 1].
        masked: `skip` or `decay`, as above.
        bootstrap_B: value after each row's last step, for rows that were cut short; None is 0.
        out: advantages and returns are written there: contiguous, in the type of the result.
        backend: `auto`, `torch`, `native` or `triton`.

    Returns:
        (advantages_BL, returns_BL): float32, or float64 for float64 values; 0 where the mask is 0.

    Raises:
        ValueError: shapes, devices or options do not fit.
        RuntimeError: the named backend can't run this input.

    >>> rewards_BL, values_BL = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.5, 0.5]])
    >>> gae(rewards_BL, values_BL, gamma=1.0, lam=0.5, backend="torch")
    (tensor([[0.1250, 0.2500, 0.5000]]), tensor([[0.6250, 0.7500, 1.0000]]))
    >>> mask_BL = torch.tensor([[True, False, True]])
    >>> gae(rewards_BL, values_BL, mask_BL, lam=0.5, masked="skip", backend="torch")[0]
    tensor([[0.2500, 0.0000, 0.5000]])
    >>> gae(rewards_BL, values_BL, mask_BL, lam=0.5, masked="decay", backend="torch")[0]
    tensor([[-0.1250,  0.0000,  0.5000]])
    """
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0 <= number <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {number}")
    if masked not in MASKED:
        raise ValueError(f"masked={masked!r} is not one of {', '.join(MASKED)}")
    rewards_BL, values_BL, mask_BL, bootstrap_B = _checked(rewards_BL, values_BL, mask_BL, bootstrap_B)
    if out is None:
        out = (fresh_like(values_BL), fresh_like(values_BL))
    else:
        _check_out(out, values_BL)
    implementation = resolve("gae", values_BL.device, values_BL.dtype, backend)
    if values_BL.numel():
        decays = masked == "decay"
        implementation.forward(rewards_BL, values_BL, mask_BL, bootstrap_B, gamma, gamma * lam, decays, *out)
    return out


def _checked(
    rewards_BL: Tensor, values_BL: Tensor, mask_BL: Tensor | None, bootstrap_B: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All four as plain contiguous tensors of one floating type, the mask as bool."""
    if values_BL.ndim != 2 or rewards_BL.shape != values_BL.shape:
        raise ValueError(
            f"expected rewards and values (B, L) alike, got {tuple(rewards_BL.shape)}, {tuple(values_BL.shape)}"
        )
    B, L = values_BL.shape
    for name, x, shape in (("mask_BL", mask_BL, (B, L)), ("bootstrap_B", bootstrap_B, (B,))):
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name} must be of shape {shape}, got {tuple(x.shape)}")
    for name, x in (("rewards", rewards_BL), ("mask", mask_BL), ("bootstrap", bootstrap_B)):
        if x is not None and x.device != values_BL.device:
            raise ValueError(f"{name} are on {x.device}, values on {values_BL.device}; move one of them")
    exact = torch.float64 if torch.float64 in (values_BL.dtype, rewards_BL.dtype) else torch.float32

    def plain(x: Tensor) -> Tensor:
        return x.detach().to(exact, memory_format=torch.contiguous_format).contiguous()

    if mask_BL is None:
        mask_BL = torch.ones((1, 1), dtype=torch.bool, device=values_BL.device).expand(B, L)
    if bootstrap_B is None:
        bootstrap_B = values_BL.new_zeros(B)
    return plain(rewards_BL), plain(values_BL), mask_BL.to(torch.bool).contiguous(), plain(bootstrap_B)


def _check_out(out: tuple[Tensor, Tensor], values_BL: Tensor) -> None:
    for x_BL in out:
        if x_BL.shape != values_BL.shape or x_BL.dtype != values_BL.dtype or not x_BL.is_contiguous():
            raise ValueError(
                f"out must be two contiguous tensors of {tuple(values_BL.shape)}, {values_BL.dtype}, "
                f"got {tuple(x_BL.shape)}, {x_BL.dtype}"
            )
        if x_BL.device != values_BL.device:
            raise ValueError(f"out is on {x_BL.device}, values on {values_BL.device}; move one of them")


class _Torch:
    """The definition: every other implementation is measured against it, in float64."""

    name = "torch"
    refusal = staticmethod(never_refuses)

    @staticmethod
    def forward(
        rewards_BL: Tensor,
        values_BL: Tensor,
        mask_BL: Tensor,
        bootstrap_B: Tensor,
        gamma: float,
        decay: float,
        decays: bool,
        advantages_BL: Tensor,
        returns_BL: Tensor,
    ) -> None:
        """Fill the last two; `decay` is gamma * lam."""
        # time first, so that a step is one contiguous vector; masked numbers may be NaN and are never multiplied
        rewards_LB, values_LB = (x.masked_fill(~mask_BL, 0).T.contiguous() for x in (rewards_BL, values_BL))
        taken_LB = torch.ones_like(mask_BL.T) if decays else mask_BL.T.contiguous()
        advantages_LB = torch.empty_like(values_LB)
        advantage_B, next_B = torch.zeros_like(bootstrap_B), bootstrap_B
        for t in reversed(range(values_LB.shape[0])):
            step_B = rewards_LB[t] + gamma * next_B - values_LB[t] + decay * advantage_B
            advantage_B = torch.where(taken_LB[t], step_B, advantage_B)
            next_B = torch.where(taken_LB[t], values_LB[t], next_B)
            advantages_LB[t] = advantage_B
        returns_BL.copy_((advantages_LB + values_LB).T).masked_fill_(~mask_BL, 0)
        advantages_BL.copy_(advantages_LB.T).masked_fill_(~mask_BL, 0)


class _Native:
    """csrc/cpu/gae.cpp and csrc/cuda/gae.cu."""

    name = "native"
    refusal = staticmethod(native_refusal)

    @staticmethod
    def forward(*arguments: Any) -> None:
        torch.ops.alignfast.gae(*arguments)


@native_op(
    "gae(Tensor rewards, Tensor values, Tensor mask, Tensor bootstrap, float gamma, float decay, bool decays, "
    "Tensor(a!) advantages, Tensor(b!) returns) -> ()",
    fake=lambda *_: None,
)
def _native_forward(*arguments: Any) -> None:
    launch("gae", *arguments)


class _Triton:
    """gae_triton.py, imported on the first call: triton is optional."""

    name = "triton"
    refusal = staticmethod(triton_refusal)

    @staticmethod
    def forward(*arguments: Any) -> None:
        from alignfast.kernels import gae_triton

        gae_triton.forward(*arguments)


register("gae", _Torch, _Native, _Triton)
