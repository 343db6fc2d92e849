"""Draws a token from each row of logits, and says how likely it was, under all tokens and under those kept.

    x_v = z_v / temperature        p_v = exp(x_v) / sum exp x        kept: p_v >= the least p that the filters leave
    token: the first v, in the order of the vocabulary, at which the sum of the kept p passes u times their sum

u is uniform in [0, 1) and a function of (seed, sequence, position) alone, by Philox 4x32-10 (_philox.py): a sample
does not depend on the batch that it is drawn in, on its order, on threads or on the backend, and a run that resumes
draws what it would have drawn. Backends may differ where u falls within rounding of the border between two tokens.

Filters, in the order of transformers: top-k keeps the k largest; top-p, of what top-k left and renormalised, the
fewest of the likeliest whose p reach top_p; min-p what has at least min_p times the largest p. A token as likely as
the last one kept is kept too, so that the set is a function of the values (transformers: for top-k the same; for
top-p whichever of the equals its sort put first).

Letters: B rows, V vocabulary.
Not done here: penalties for repetition, options that differ between rows, a gradient (log-probs are constants).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from alignfast.kernels._backend import native_refusal, never_refuses, register, resolve, triton_refusal
from alignfast.kernels._native import launch, native_op, unit_columns
from alignfast.kernels._philox import uniform
from alignfast.kernels._workspace import workspace

_COLDEST = (
    1e-6  # of a temperature that is not 0: its inverse, and a difference of logits over it, stay in float32
)
Drawn = tuple[Tensor, Tensor, Tensor]


class SampleOptions(NamedTuple):
    """How a row is drawn from. Plain numbers, so that it crosses into compiled code as it is."""

    seed: int  # 64 bits, signed
    temperature: float
    top_k: int  # 0: all
    top_p: float  # 1: all
    floor: float  # a token is kept from the largest logit + floor on; -inf: all
    greedy: bool  # the first of the likeliest


def sample_tokens(
    logits_BV: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int,
    sequence_B: Tensor,
    position_B: Tensor,
    backend: str = "auto",
) -> Drawn:
    """One token of each row, and its log-probability before and after the filters, in nats.

    Args:
        logits_BV: float32, bfloat16, float16 or float64, any strides; never written to. -inf is never drawn.
        temperature: logits are divided by it, >= 1e-6; or 0: the largest logit is taken, the first of equal ones.
        top_k: keep the k largest, >= 0; 0 keeps all.
        top_p: keep the likeliest that together reach it, in [0, 1], at least one; 1 keeps all.
        min_p: keep what is at least that many times as likely as the likeliest, in [0, 1]; 0 keeps all.
        seed: of the random numbers, in [0, 2^64).
        sequence_B: int64, which sequence a row continues.
        position_B: int64, which token of it is drawn. With `seed` these two decide the random number.
        backend: `auto`, `torch`, `native` or `triton`.

    Returns:
        (tokens_B, logps_B, sampled_logps_B): int64, and float32 (float64 for float64 logits). logps_B is under the
        softmax of logits / temperature over all tokens, sampled_logps_B under what the filters keep, renormalised.
        At temperature 0 logps_B is under temperature 1, and sampled_logps_B is 0. A row with NaN or inf in it, or
        with nothing but -inf, has no distribution: its token is -1 and its log-probs are NaN.

    Raises:
        ValueError: shapes, types, devices or options do not fit.
        RuntimeError: the named backend can't run this input.

    >>> logits_BV = torch.tensor([[0.0, 1.0, 2.0]]).expand(5, 3)
    >>> where = {"sequence_B": torch.zeros(5, dtype=torch.int64), "position_B": torch.arange(5)}
    >>> sample_tokens(logits_BV, seed=0, **where, backend="torch")[0]
    tensor([2, 2, 0, 2, 2])
    >>> sample_tokens(logits_BV, temperature=0.0, seed=0, **where, backend="torch")[1]
    tensor([-0.4076, -0.4076, -0.4076, -0.4076, -0.4076])
    """
    _check(logits_BV, sequence_B, position_B)
    options = sample_options(temperature, top_k, top_p, min_p, seed)
    implementation = resolve("sample_tokens", logits_BV.device, logits_BV.dtype, backend)
    return implementation.forward(logits_BV.detach(), sequence_B, position_B, options)


def sample_options(temperature: float, top_k: int, top_p: float, min_p: float, seed: int) -> SampleOptions:
    """Check the options.

    Raises:
        ValueError: one is out of its range.
    """
    if temperature != 0 and not _COLDEST <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 (greedy) or a number >= {_COLDEST}, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be >= 0 (0 keeps all), got {top_k}")
    for name, share in (("top_p", top_p), ("min_p", min_p)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {share}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must lie in [0, 2^64), got {seed}")
    signed = seed - 2**64 if seed >= 2**63 else seed
    if temperature == 0:
        return SampleOptions(signed, 1.0, 0, 1.0, 0.0, True)
    floor = temperature * math.log(min_p) if min_p > 0 else -math.inf
    return SampleOptions(signed, temperature, top_k, top_p, floor, False)


def _check(logits_BV: Tensor, sequence_B: Tensor, position_B: Tensor) -> None:
    if logits_BV.ndim != 2 or logits_BV.shape[1] == 0 or not logits_BV.is_floating_point():
        raise ValueError(
            f"expected floating-point logits (B, V), V >= 1, got {logits_BV.dtype} {tuple(logits_BV.shape)}"
        )
    for name, x in (("sequence_B", sequence_B), ("position_B", position_B)):
        if x.shape != logits_BV.shape[:1] or x.dtype != torch.int64:
            raise ValueError(
                f"{name} must be int64 of shape ({logits_BV.shape[0]},), got {x.dtype} {tuple(x.shape)}"
            )
        if x.device != logits_BV.device:
            raise ValueError(f"{name} is on {x.device}, logits on {logits_BV.device}; move one of them")


def _outputs(logits_BV: Tensor) -> Drawn:
    B = logits_BV.shape[0]
    dtype = torch.float64 if logits_BV.dtype == torch.float64 else torch.float32
    tokens_B = torch.empty(B, dtype=torch.int64, device=logits_BV.device)
    return tokens_B, *(torch.empty(B, dtype=dtype, device=logits_BV.device) for _ in range(2))


class _Torch:
    """The definition: every other implementation is measured against it."""

    name = "torch"
    refusal = staticmethod(never_refuses)

    @staticmethod
    def forward(logits_BV: Tensor, sequence_B: Tensor, position_B: Tensor, options: SampleOptions) -> Drawn:
        """In float64 for every type: the sums decide which token a number u means."""
        z_BV = logits_BV.double()
        x_BV = (z_BV - z_BV.amax(1, keepdim=True)) / options.temperature
        weight_BV = x_BV.exp()
        bad_B = weight_BV.sum(1).isnan()
        kept_BV = weight_BV.masked_fill(z_BV < least_kept(z_BV, options), 0)
        cumulative_BV = kept_BV.cumsum(1)
        u_B = uniform(options.seed, sequence_B, position_B)
        if options.greedy:
            u_B = torch.zeros_like(u_B)
        passed_BV = cumulative_BV > (u_B * cumulative_BV[:, -1])[:, None]
        tokens_B1 = passed_BV.to(torch.uint8).argmax(1, keepdim=True)
        x_B = x_BV.gather(1, tokens_B1)[:, 0]
        logps_B, sampled_B = (_logp(w_BV, x_B, tokens_B1) for w_BV in (weight_BV, kept_BV))
        if options.greedy:
            sampled_B = torch.zeros_like(sampled_B)
        dtype = torch.float64 if logits_BV.dtype == torch.float64 else torch.float32
        return (
            tokens_B1[:, 0].masked_fill(bad_B, -1),
            logps_B.masked_fill(bad_B, math.nan).to(dtype),
            sampled_B.masked_fill(bad_B, math.nan).to(dtype),
        )


def least_kept(z_BV: Tensor, options: SampleOptions) -> Tensor:
    """least_B1: the smallest logit of each row that the filters leave, for float64 logits."""
    top_B1 = z_BV.amax(1, keepdim=True)
    least_B1 = top_B1 + options.floor
    if not options.top_k and options.top_p == 1:
        return least_B1
    sorted_BV = z_BV.sort(1, descending=True).values
    weight_BV = ((sorted_BV - top_B1) / options.temperature).exp()
    if options.top_k:
        kth = min(options.top_k, z_BV.shape[1]) - 1
        kth_B1 = sorted_BV[:, kth : kth + 1]
        least_B1 = torch.maximum(least_B1, kth_B1)
        weight_BV = weight_BV.masked_fill(sorted_BV < kth_B1, 0)
    if options.top_p < 1:
        cumulative_BV = weight_BV.cumsum(1)
        reaches_BV = cumulative_BV >= options.top_p * cumulative_BV[:, -1:]
        last_B1 = reaches_BV.to(torch.uint8).argmax(1, keepdim=True)
        least_B1 = torch.maximum(least_B1, sorted_BV.gather(1, last_B1))
    return least_B1


def _logp(weight_BV: Tensor, x_B: Tensor, tokens_B1: Tensor) -> Tensor:
    """Against the others' sum, the token left out, so that a log-prob near 0 keeps its digits."""
    others_B = weight_BV.scatter(1, tokens_B1, 0).sum(1).log() - x_B
    return -torch.logaddexp(torch.zeros_like(others_B), others_B)


class _Native:
    """csrc/cpu/sample_tokens.cpp and csrc/cuda/sample_tokens.cu."""

    name = "native"
    refusal = staticmethod(native_refusal)

    @staticmethod
    def forward(logits_BV: Tensor, sequence_B: Tensor, position_B: Tensor, options: SampleOptions) -> Drawn:
        return torch.ops.alignfast.sample_tokens(logits_BV, sequence_B, position_B, *options)


@native_op(
    "sample_tokens(Tensor logits, Tensor sequence, Tensor position, int seed, float temperature, int top_k, "
    "float top_p, float floor, bool greedy) -> (Tensor, Tensor, Tensor)",
    fake=lambda logits, *_: _outputs(logits),
)
def _native_forward(logits_BV: Tensor, sequence_B: Tensor, position_B: Tensor, *options: float) -> Drawn:
    drawn = _outputs(logits_BV)
    # csrc/cpu/ keeps a row's candidates and the sums of its blocks there; a GPU's rows need none
    threads = torch.get_num_threads() if logits_BV.device.type == "cpu" else 0
    with workspace((threads, 4 * logits_BV.shape[1] + 1024), torch.float32, logits_BV.device) as scratch:
        launch("sample_tokens", unit_columns(logits_BV), sequence_B, position_B, *options, *drawn, scratch)
    return drawn


class _Triton:
    """sample_tokens_triton.py, imported on the first call: triton is optional."""

    name = "triton"
    refusal = staticmethod(triton_refusal)

    @staticmethod
    def forward(logits_BV: Tensor, sequence_B: Tensor, position_B: Tensor, options: SampleOptions) -> Drawn:
        from alignfast.kernels import sample_tokens_triton

        return sample_tokens_triton.forward(logits_BV, sequence_B, position_B, options)


register("sample_tokens", _Torch, _Native, _Triton)
