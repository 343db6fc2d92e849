"""Log-probability of each target under its row of logits, with the row's other statistics, in one pass.

    x_v    = softcap * tanh(scale * z_v / softcap) / temperature        (no softcap: x_v = scale * z_v / temperature)
    logp   = x_t - log sum_v exp x_v = -softplus(log sum_{v != t} exp x_v - x_t)
    H      = lse - sum_v p_v x_v                                        p_v = exp(x_v - lse)
    dlogp/dx_v = [v = t] - p_v       dH/dx_v = -p_v (x_v - lse + H)      d(sum p^2)/dx_v = 2 p_v (p_v - sum p^2)

The second form of logp is the one computed: `x_t - lse` in float32 rounds to 0 past a margin of 16.6 nats, and
trained policies have many such tokens. Its derivative at the target is `-expm1(logp)`.

Letters: T tokens (rows), V vocabulary, K the six statistics of a row, in the order of `STATS`.
Not done here: a mean over tokens, label smoothing, a second derivative.
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
from alignfast.kernels._targets import check_targets, outside
from alignfast.kernels._workspace import fresh_like

STATS = ("logps", "lse", "entropy", "mean_logit", "is_top1", "sum_sq_probs")
LOGPS, LSE, ENTROPY, MEAN_LOGIT, IS_TOP1, SUM_SQ_PROBS = range(6)


class RowOptions(NamedTuple):
    """How a row of raw logits is read. Plain numbers, so that it crosses into compiled code as it is."""

    scale: float = 1.0
    softcap: float = 0.0  # 0: none
    temperature: float = 1.0
    ignore_index: int = -100
    wanted: int = 1 << LOGPS | 1 << LSE  # bit k: statistic k of STATS; the first two always come

    def wants(self, stat: int) -> bool:
        return bool(self.wanted >> stat & 1)


def row_options(
    scale: float, softcap: float | None, temperature: float, ignore_index: int, stats: tuple[str, ...]
) -> RowOptions:
    """Check the options that all ops on logits share.

    Raises:
        ValueError: temperature or softcap is not a positive number, or a statistic is unknown.
    """
    if not temperature > 0 or math.isinf(temperature):
        raise ValueError(f"temperature must be a positive number, got {temperature}")
    if softcap is not None and (not softcap > 0 or math.isinf(softcap)):
        raise ValueError(f"softcap must be a positive number, or None for no cap, got {softcap}")
    unknown = [name for name in stats if name not in STATS]
    if unknown:
        raise ValueError(f"stats has {unknown[0]!r}; known are {', '.join(STATS)}")
    wanted = 1 << LOGPS | 1 << LSE
    for name in stats:
        wanted |= 1 << STATS.index(name)
    return RowOptions(scale, softcap or 0.0, temperature, ignore_index, wanted)


def token_logps(
    logits_TV: Tensor,
    targets_T: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of every target, in nats, and on demand the entropy of its row.

    Args:
        logits_TV: float32, bfloat16, float16 or float64, any row stride; never written to.
        targets_T: int64 class of each row, or `ignore_index`.
        temperature: logits are divided by it, > 0.
        ignore_index: rows with this target give 0 and get no gradient.
        entropy: also return the entropy of each row's distribution, differentiable.
        backend: `auto`, `torch`, `native` or `triton`.

    Returns:
        logps_T, or (logps_T, entropy_T): float32 (float64 for float64 logits).

    Raises:
        ValueError: shapes or types do not fit, temperature <= 0, or a CPU target is outside the vocabulary. On a
            GPU such a row gives NaN.
        RuntimeError: the named backend can't run this input.

    >>> logits_TV = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    >>> token_logps(logits_TV, torch.tensor([0, 1]), backend="torch")
    tensor([-0.6931, -0.1269])
    """
    _check_logits(logits_TV, targets_T)
    options = row_options(1.0, None, temperature, ignore_index, ("entropy",) if entropy else ())
    stats_KT = row_stats(logits_TV, targets_T, options, backend)
    return (stats_KT[LOGPS], stats_KT[ENTROPY]) if entropy else stats_KT[LOGPS]


def row_stats(logits_TV: Tensor, targets_T: Tensor, options: RowOptions, backend: str = "auto") -> Tensor:
    """All wanted statistics of each row, differentiable in the logits: stats_KT, zero where not wanted or ignored."""
    implementation = resolve("token_logps", logits_TV.device, logits_TV.dtype, backend)
    check_targets(targets_T, logits_TV.shape[1], options.ignore_index)
    return _RowStats.apply(logits_TV, targets_T, options, implementation)


def _check_logits(logits_TV: Tensor, targets_T: Tensor) -> None:
    if logits_TV.ndim != 2 or targets_T.shape != logits_TV.shape[:1]:
        raise ValueError(
            f"expected logits of shape (T, V) and targets of shape (T,), got {tuple(logits_TV.shape)} and "
            f"{tuple(targets_T.shape)}; flatten batch and time first"
        )
    if not logits_TV.is_floating_point() or targets_T.dtype != torch.int64:
        raise ValueError(
            f"expected floating-point logits and int64 targets, got {logits_TV.dtype} and {targets_T.dtype}"
        )
    if logits_TV.device != targets_T.device:
        raise ValueError(f"logits are on {logits_TV.device}, targets on {targets_T.device}; move one of them")


class _RowStats(Function):
    @staticmethod
    def forward(logits_TV: Tensor, targets_T: Tensor, options: RowOptions, implementation: Any) -> Tensor:
        return implementation.forward(logits_TV, targets_T, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        logits_TV, targets_T, ctx.options, ctx.implementation = inputs
        ctx.save_for_backward(logits_TV, targets_T, output)

    @staticmethod
    def backward(ctx: Any, dstats_KT: Tensor) -> tuple[Tensor, None, None, None]:
        options, implementation = ctx.options, ctx.implementation

        def gradients(
            dstats_KT: Tensor, logits_TV: Tensor, targets_T: Tensor, stats_KT: Tensor
        ) -> tuple[Tensor]:
            dlogits_TV = fresh_like(logits_TV)
            implementation.backward(logits_TV, targets_T, stats_KT, dstats_KT, options, dlogits_TV)
            return (dlogits_TV,)

        return *only_once("token_logps", gradients, dstats_KT, *ctx.saved_tensors), None, None, None


class _Torch:
    """The definition: every other implementation is measured against it, in float64."""

    name = "torch"
    refusal = staticmethod(never_refuses)

    @staticmethod
    def forward(logits_TV: Tensor, targets_T: Tensor, options: RowOptions) -> Tensor:
        x_TV, _ = _transform(logits_TV, options)
        vocabulary = x_TV.shape[1]
        ignored_T = targets_T == options.ignore_index
        bad_T = outside(targets_T, vocabulary, options.ignore_index)
        index_T1 = targets_T.masked_fill(ignored_T | bad_T, 0)[:, None]
        x_T = x_TV.gather(1, index_T1)[:, 0]
        d_TV, top_T1 = from_the_top(x_TV)
        d_T = d_TV.gather(1, index_T1)[:, 0]
        others_T = d_TV.scatter(1, index_T1, -math.inf).logsumexp(1)
        zero_T = torch.zeros_like(x_T)
        logps_T = -torch.logaddexp(zero_T, others_T - d_T)
        log_sum_T = torch.logaddexp(others_T, d_T)
        lse_T = top_T1[:, 0] + log_sum_T
        entropy_T = mean_T = top1_T = squares_T = zero_T
        if options.wants(ENTROPY) or options.wants(SUM_SQ_PROBS):
            logp_TV = d_TV - log_sum_T[:, None]
            p_TV = logp_TV.exp()
        if options.wants(ENTROPY):
            entropy_T = -(p_TV * logp_TV.masked_fill(logp_TV == -math.inf, 0)).sum(1)
        if options.wants(MEAN_LOGIT):
            mean_T = x_TV.mean(1)
        if options.wants(IS_TOP1):
            top1_T = (x_T >= x_TV.amax(1)).to(x_TV.dtype)
        if options.wants(SUM_SQ_PROBS):
            squares_T = p_TV.square().sum(1)
        stats_KT = torch.stack((logps_T, lse_T, entropy_T, mean_T, top1_T, squares_T))
        return stats_KT.masked_fill(bad_T, math.nan).masked_fill(ignored_T, 0)

    @staticmethod
    def backward(
        logits_TV: Tensor,
        targets_T: Tensor,
        stats_KT: Tensor,
        dstats_KT: Tensor,
        options: RowOptions,
        out_TV: Tensor,
    ) -> None:
        """Write the gradient of the raw logits into `out_TV`, which may be `logits_TV` itself."""
        x_TV, slope_TV = _transform(logits_TV, options)
        ignored_T = targets_T == options.ignore_index
        bad_T = outside(targets_T, x_TV.shape[1], options.ignore_index)
        index_T1 = targets_T.masked_fill(ignored_T | bad_T, 0)[:, None]
        dlogps_T, dlse_T, dentropy_T, dmean_T, _, dsquares_T = dstats_KT.to(x_TV.dtype)
        d_TV, _ = from_the_top(x_TV)
        logp_TV = d_TV - d_TV.logsumexp(1, keepdim=True)
        p_TV = logp_TV.exp()
        dx_TV = p_TV * (dlse_T - dlogps_T)[:, None]
        at_target_T1 = p_TV.gather(1, index_T1) * dlse_T[:, None]
        dx_TV.scatter_(1, index_T1, at_target_T1 - (dlogps_T * torch.expm1(stats_KT[LOGPS]))[:, None])
        if options.wants(ENTROPY):
            excess_TV = (logp_TV + stats_KT[ENTROPY, :, None]).masked_fill(logp_TV == -math.inf, 0)
            dx_TV -= dentropy_T[:, None] * p_TV * excess_TV
        if options.wants(MEAN_LOGIT):
            dx_TV += dmean_T[:, None] / x_TV.shape[1]
        if options.wants(SUM_SQ_PROBS):
            dx_TV += 2 * dsquares_T[:, None] * p_TV * (p_TV - stats_KT[SUM_SQ_PROBS, :, None])
        dx_TV *= slope_TV
        dx_TV.masked_fill_(bad_T[:, None], math.nan).masked_fill_(ignored_T[:, None], 0)
        out_TV.copy_(dx_TV)


def _transform(logits_TV: Tensor, options: RowOptions) -> tuple[Tensor, Tensor | float]:
    """x of the module's head, and dx/dz."""
    return transform(logits_TV, options.scale, options.softcap, options.temperature)


class _Native:
    """csrc/cpu/token_logps.cpp and csrc/cuda/token_logps.cu."""

    name = "native"
    refusal = staticmethod(native_refusal)

    @staticmethod
    def forward(logits_TV: Tensor, targets_T: Tensor, options: RowOptions) -> Tensor:
        return torch.ops.alignfast.token_logps_forward(logits_TV, targets_T, *options)

    @staticmethod
    def backward(
        logits_TV: Tensor,
        targets_T: Tensor,
        stats_KT: Tensor,
        dstats_KT: Tensor,
        options: RowOptions,
        out_TV: Tensor,
    ) -> None:
        torch.ops.alignfast.token_logps_backward(logits_TV, targets_T, stats_KT, dstats_KT, *options, out_TV)


@native_op(
    "token_logps_forward(Tensor logits, Tensor targets, float scale, float softcap, float temperature, "
    "int ignore_index, int wanted) -> Tensor",
    fake=lambda logits, *_: logits.new_empty((len(STATS), logits.shape[0]), dtype=torch.float32),
)
def _native_forward(logits_TV: Tensor, targets_T: Tensor, *options: float) -> Tensor:
    stats_KT = logits_TV.new_empty((len(STATS), logits_TV.shape[0]), dtype=torch.float32)
    launch("token_logps_forward", unit_columns(logits_TV), targets_T, *options, stats_KT)
    return stats_KT


@native_op(
    "token_logps_backward(Tensor logits, Tensor targets, Tensor stats, Tensor dstats, float scale, "
    "float softcap, float temperature, int ignore_index, int wanted, Tensor(a!) out) -> ()",
    fake=lambda *_: None,
)
def _native_backward(
    logits_TV: Tensor,
    targets_T: Tensor,
    stats_KT: Tensor,
    dstats_KT: Tensor,
    *options_and_out: Any,
) -> None:
    launch("token_logps_backward", unit_columns(logits_TV), targets_T, stats_KT, dstats_KT, *options_and_out)


class _Triton:
    """token_logps_triton.py, imported on the first call: triton is optional."""

    name = "triton"
    refusal = staticmethod(triton_refusal)

    @staticmethod
    def forward(logits_TV: Tensor, targets_T: Tensor, options: RowOptions) -> Tensor:
        from alignfast.kernels import token_logps_triton

        return token_logps_triton.forward(logits_TV, targets_T, options)

    @staticmethod
    def backward(
        logits_TV: Tensor,
        targets_T: Tensor,
        stats_KT: Tensor,
        dstats_KT: Tensor,
        options: RowOptions,
        out_TV: Tensor,
    ) -> None:
        from alignfast.kernels import token_logps_triton

        token_logps_triton.backward(logits_TV, targets_T, stats_KT, dstats_KT, options, out_TV)


register("token_logps", _Torch, _Native, _Triton)
