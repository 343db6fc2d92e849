"""How far each row of logits is from a reference's: the divergence of the two whole distributions, in one pass.

    p = softmax(x), q = softmax(y)      x = logits / temperature, y = reference / temperature; m = (p + q) / 2
    forward    KL(q || p) = sum_v q_v (log q_v - log p_v)           d/dx_v = p_v - q_v
    reverse    KL(p || q) = sum_v p_v (log p_v - log q_v)           d/dx_v = p_v (log p_v - log q_v - KL)
    js         (KL(p || m) + KL(q || m)) / 2                        d/dx_v = p_v (log (p_v / m_v) - KL(p || m)) / 2

The names are distillation's (GKD, Agarwal et al., arXiv 2306.13649): forward weighs by the reference (TRL's `beta=0`),
reverse by the policy (`beta=1`; the KL of RLHF), js is `beta=0.5`. No factor of temperature^2.

With d = x - max x, e = exp d and S = sum e of each row, KL(a || b) = sum e_a (d_a - d_b) / S_a + log (S_b / S_a): one
walk over both rows, the sums rescaled where a larger maximum comes. js needs p and q themselves, a second walk.

Letters: T rows, V vocabulary, K what the backward pass needs of a row, in the order of `_STATS`.
Not done here: other mixtures than one half, a mean over tokens, a gradient of the reference, a second derivative.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignfast.kernels._autograd import Function, only_once
from alignfast.kernels._backend import native_refusal, never_refuses, register, resolve, triton_refusal
from alignfast.kernels._native import launch, native_op, unit_columns
from alignfast.kernels._rows import from_the_top, transform
from alignfast.kernels._workspace import fresh_like
from alignfast.kernels.token_logps import row_options

KINDS = ("forward", "reverse", "js")
FORWARD, REVERSE, JS = range(3)
# The divergence; the largest x (compiled: what x is a multiple of) and the sum of e of the policy, and of the
# reference; KL(p || m), of js alone.
_STATS = ("divergence", "top", "exps", "ref_top", "ref_exps", "own")
DIVERGENCE, TOP, EXPS, REF_TOP, REF_EXPS, OWN = range(6)


class KlOptions(NamedTuple):
    """Which divergence, and how logits are read. Plain numbers, so that it crosses into compiled code as it is."""

    kind: int
    scale: float = 1.0
    softcap: float = 0.0  # 0: none
    temperature: float = 1.0


def kl_options(kind: str, scale: float, softcap: float | None, temperature: float) -> KlOptions:
    """Check the options.

    Raises:
        ValueError: the kind is unknown, or temperature or softcap is not a positive number.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}")
    rows = row_options(scale, softcap, temperature, -100, ())
    return KlOptions(KINDS.index(kind), rows.scale, rows.softcap, rows.temperature)


def kl_divergence(
    logits_TV: Tensor,
    ref_logits_TV: Tensor,
    *,
    kind: str = "forward",
    temperature: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Divergence of every row's distribution from its reference, in nats, over the whole vocabulary.

    Args:
        logits_TV: the policy's: float32, bfloat16, float16 or float64, any row stride; never written to.
        ref_logits_TV: the reference's, of the same shape and type; a constant.
        kind: `forward` is KL(reference || policy), `reverse` KL(policy || reference), `js` Jensen and Shannon's.
        temperature: both are divided by it, > 0.
        backend: `auto`, `torch`, `native` or `triton`.

    Returns:
        kl_T: float32 (float64 for float64 logits), differentiable in `logits_TV`. A class that is -inf in both rows
        counts for nothing. Where only the distribution that is not the weight rules a class out (forward: the policy,
        reverse: the reference) it is inf; such a row's gradient is p - q (forward) or NaN (reverse); js stays finite.
        A row with NaN or inf, or with nothing but -inf, gives NaN. Rounding may leave -1e-7 for 0; equal rows give 0.

    Raises:
        ValueError: shapes, types, devices or options do not fit, or the reference requires a gradient.
        RuntimeError: the named backend can't run this input.

    >>> logits_TV, ref_logits_TV = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 1.0]]).log()
    >>> kl_divergence(logits_TV, ref_logits_TV, kind="forward", backend="torch")  # 3/4 log(3/2) + 1/4 log(1/2)
    tensor([0.1308])
    >>> kl_divergence(logits_TV, ref_logits_TV, kind="reverse", backend="torch")  # 1/2 log(2/3) + 1/2 log 2
    tensor([0.1438])
    """
    _check(logits_TV, ref_logits_TV)
    options = kl_options(kind, 1.0, None, temperature)
    implementation = resolve("kl_divergence", logits_TV.device, logits_TV.dtype, backend)
    return row_divergence(logits_TV, ref_logits_TV, options, implementation)[DIVERGENCE]


def row_divergence(
    logits_TV: Tensor, ref_logits_TV: Tensor, options: KlOptions, implementation: Any
) -> Tensor:
    """stats_KT, of which the divergence is differentiable in the policy's logits."""
    return _RowDivergence.apply(logits_TV, ref_logits_TV, options, implementation)


def _check(logits_TV: Tensor, ref_logits_TV: Tensor) -> None:
    if logits_TV.ndim != 2 or logits_TV.shape != ref_logits_TV.shape or logits_TV.shape[1] == 0:
        raise ValueError(
            f"expected logits and reference (T, V) alike, V >= 1, got {tuple(logits_TV.shape)} and "
            f"{tuple(ref_logits_TV.shape)}; flatten batch and time first"
        )
    if not logits_TV.is_floating_point() or logits_TV.dtype != ref_logits_TV.dtype:
        raise ValueError(
            f"expected floating-point logits of one type, got {logits_TV.dtype} and {ref_logits_TV.dtype}; cast one"
        )
    if logits_TV.device != ref_logits_TV.device:
        raise ValueError(
            f"logits are on {logits_TV.device}, the reference on {ref_logits_TV.device}; move one of them"
        )
    refuse_gradient("ref_logits_TV", ref_logits_TV)


def refuse_gradient(name: str, reference: Tensor | None) -> None:
    """A reference is a constant.

    Raises:
        ValueError: it requires a gradient, which it would silently not get.
    """
    if reference is not None and reference.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, but the reference is a constant here; detach it")


class _RowDivergence(Function):
    @staticmethod
    def forward(logits_TV: Tensor, ref_logits_TV: Tensor, options: KlOptions, implementation: Any) -> Tensor:
        return implementation.forward(logits_TV, ref_logits_TV, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        logits_TV, ref_logits_TV, ctx.options, ctx.implementation = inputs
        ctx.save_for_backward(logits_TV, ref_logits_TV, output)

    @staticmethod
    def backward(ctx: Any, dstats_KT: Tensor) -> tuple[Tensor, None, None, None]:
        options, implementation = ctx.options, ctx.implementation

        def gradients(
            dstats_KT: Tensor, logits_TV: Tensor, ref_logits_TV: Tensor, stats_KT: Tensor
        ) -> tuple[Tensor]:
            dlogits_TV = fresh_like(logits_TV)
            dkl_T = dstats_KT[DIVERGENCE]
            implementation.backward(logits_TV, ref_logits_TV, stats_KT, dkl_T, options, dlogits_TV)
            return (dlogits_TV,)

        return *only_once("kl_divergence", gradients, dstats_KT, *ctx.saved_tensors), None, None, None


class _Torch:
    """The definition: every other implementation is measured against it, in float64."""

    name = "torch"
    refusal = staticmethod(never_refuses)

    @staticmethod
    def forward(logits_TV: Tensor, ref_logits_TV: Tensor, options: KlOptions) -> Tensor:
        logp_TV, top_T, exps_T = _logp(logits_TV, options)
        logq_TV, ref_top_T, ref_exps_T = _logp(ref_logits_TV, options)
        own_T = torch.zeros_like(top_T)
        if options.kind == FORWARD:
            kl_T = _kl(logq_TV, logp_TV)
        elif options.kind == REVERSE:
            kl_T = _kl(logp_TV, logq_TV)
        else:
            logm_TV = torch.logaddexp(logp_TV, logq_TV) - math.log(2)
            own_T = _kl(logp_TV, logm_TV)
            kl_T = (own_T + _kl(logq_TV, logm_TV)) / 2
        return torch.stack((kl_T, top_T, exps_T, ref_top_T, ref_exps_T, own_T))

    @staticmethod
    def backward(
        logits_TV: Tensor,
        ref_logits_TV: Tensor,
        stats_KT: Tensor,
        dkl_T: Tensor,
        options: KlOptions,
        out_TV: Tensor,
    ) -> None:
        """Write the gradient of the policy's raw logits into `out_TV`, which may be `logits_TV` itself."""
        _, slope_TV = transform(logits_TV, *options[1:])
        logp_TV, _, _ = _logp(logits_TV, options)
        logq_TV, _, _ = _logp(ref_logits_TV, options)
        kl_T1 = stats_KT[DIVERGENCE, :, None]
        if options.kind == FORWARD:
            dx_TV = logp_TV.exp() - logq_TV.exp()
        elif options.kind == REVERSE:
            dx_TV = _weighted(logp_TV, logp_TV - logq_TV - kl_T1)
            dx_TV = dx_TV.masked_fill(kl_T1.isinf(), math.nan)
        else:
            logm_TV = torch.logaddexp(logp_TV, logq_TV) - math.log(2)
            dx_TV = _weighted(logp_TV, logp_TV - logm_TV - stats_KT[OWN, :, None]) / 2
        dx_TV = dx_TV.masked_fill(kl_T1.isnan(), math.nan) * dkl_T.to(dx_TV.dtype)[:, None] * slope_TV
        out_TV.copy_(dx_TV.masked_fill((dkl_T == 0)[:, None], 0))


def _logp(logits_TV: Tensor, options: KlOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, the largest x and the sum of e."""
    x_TV, _ = transform(logits_TV, *options[1:])
    d_TV, top_T1 = from_the_top(x_TV)
    exps_T1 = d_TV.exp().sum(1, keepdim=True)
    return d_TV - exps_T1.log(), top_T1[:, 0], exps_T1[:, 0]


def _weighted(log_TV: Tensor, x_TV: Tensor) -> Tensor:
    """exp(log) times x, and 0 where the first is 0, whatever the second."""
    return (log_TV.exp() * x_TV).masked_fill(log_TV == -math.inf, 0)


def _kl(loga_TV: Tensor, logb_TV: Tensor) -> Tensor:
    terms_TV = _weighted(loga_TV, loga_TV - logb_TV)
    # also where a is so small that it is 0 in this type, and 0 * inf NaN
    return terms_TV.masked_fill((logb_TV == -math.inf) & (loga_TV > -math.inf), math.inf).sum(1)


class _Native:
    """csrc/cpu/kl_divergence.cpp and csrc/cuda/kl_divergence.cu."""

    name = "native"
    refusal = staticmethod(native_refusal)

    @staticmethod
    def forward(logits_TV: Tensor, ref_logits_TV: Tensor, options: KlOptions) -> Tensor:
        return torch.ops.alignfast.kl_divergence_forward(logits_TV, ref_logits_TV, *options)

    @staticmethod
    def backward(
        logits_TV: Tensor,
        ref_logits_TV: Tensor,
        stats_KT: Tensor,
        dkl_T: Tensor,
        options: KlOptions,
        out_TV: Tensor,
    ) -> None:
        torch.ops.alignfast.kl_divergence_backward(
            logits_TV, ref_logits_TV, stats_KT, dkl_T, *options, out_TV
        )


@native_op(
    "kl_divergence_forward(Tensor logits, Tensor ref_logits, int kind, float scale, float softcap, "
    "float temperature) -> Tensor",
    fake=lambda logits, *_: logits.new_empty((len(_STATS), logits.shape[0]), dtype=torch.float32),
)
def _native_forward(logits_TV: Tensor, ref_logits_TV: Tensor, *options: float) -> Tensor:
    stats_KT = logits_TV.new_empty((len(_STATS), logits_TV.shape[0]), dtype=torch.float32)
    launch("kl_divergence_forward", unit_columns(logits_TV), unit_columns(ref_logits_TV), *options, stats_KT)
    return stats_KT


@native_op(
    "kl_divergence_backward(Tensor logits, Tensor ref_logits, Tensor stats, Tensor dkl, int kind, float scale, "
    "float softcap, float temperature, Tensor(a!) out) -> ()",
    fake=lambda *_: None,
)
def _native_backward(logits_TV: Tensor, ref_logits_TV: Tensor, *others: Any) -> None:
    launch("kl_divergence_backward", unit_columns(logits_TV), unit_columns(ref_logits_TV), *others)


class _Triton:
    """kl_divergence_triton.py, imported on the first call: triton is optional."""

    name = "triton"
    refusal = staticmethod(triton_refusal)

    @staticmethod
    def forward(logits_TV: Tensor, ref_logits_TV: Tensor, options: KlOptions) -> Tensor:
        from alignfast.kernels import kl_divergence_triton

        return kl_divergence_triton.forward(logits_TV, ref_logits_TV, options)

    @staticmethod
    def backward(
        logits_TV: Tensor,
        ref_logits_TV: Tensor,
        stats_KT: Tensor,
        dkl_T: Tensor,
        options: KlOptions,
        out_TV: Tensor,
    ) -> None:
        from alignfast.kernels import kl_divergence_triton

        kl_divergence_triton.backward(logits_TV, ref_logits_TV, stats_KT, dkl_T, options, out_TV)


register("kl_divergence", _Torch, _Native, _Triton)
