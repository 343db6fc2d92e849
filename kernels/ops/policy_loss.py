"""Policy-gradient losses on token log-probs: PPO, GRPO and its family, GSPO, CISPO and SAPO.

    r = exp(logp - old_logp)                        ratio of a token, or of its sequence
    loss = -min(r A, clip(r) A) + beta KL(ref) - c H      the clipped ones, over a normaliser

The losses, each with its paper, stand in `_policy.py`; this file checks, normalises and differentiates.

Compiled code gives the loss, the gradient of every token and the sums of the metrics in one launch. It knows
ppo, grpo, dapo and dr_grpo with the ratio of a token and the KL estimate k3; naming it for anything else is refused,
and `auto` takes torch there.

policy_loss is long: its contract names twenty inputs.

Letters: T tokens, K sums, B blocks of tokens.
Not done here: the critic's loss, advantages, a whole-vocabulary KL, a gradient for anything but log-probs and entropy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignfast.kernels._autograd import Function, only_once
from alignfast.kernels._backend import named, native_refusal, never_refuses, register, resolve, triton_refusal
from alignfast.kernels._native import launch, native_op
from alignfast.kernels._policy import (
    LOSSES,
    SUMS,
    PolicyOptions,
    Sequences,
    define,
    policy_options,
    sequences_of,
)

BLOCK = 256  # tokens of a partial sum: kPolicyBlock of csrc/policy_loss.h


def policy_loss(
    logps_T: Tensor,
    old_logps_T: Tensor,
    advantages_T: Tensor,
    *,
    ref_logps_T: Tensor | None = None,
    mask_T: Tensor | None = None,
    seq_T: Tensor | None = None,
    num_items: float | Tensor | None = None,
    max_completion_length: int | None = None,
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    loss_type: str = "dapo",
    importance_sampling_level: str = "token",
    dual_clip: float | None = None,
    kl_kind: str = "k3",
    use_bias_correction_kl: bool = False,
    entropy_T: Tensor | None = None,
    entropy_coef: float = 0.0,
    importance_weights_T: Tensor | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    backend: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each token, differentiable in its log-prob and entropy; `loss_T.sum()` is the loss.

    It adds up over calls on whole sequences, if `num_items` is given: it counts the whole optimisation step.

    Args:
        logps_T: the policy's log-probability of each token written, in nats.
        old_logps_T: that of the policy that the step started from; `logps_T.detach()` where it is the same.
        advantages_T: of each token.
        ref_logps_T: the reference's; needed if beta > 0, else refused.
        mask_T: true (or not 0) where a token counts. Others may hold NaN, and contribute exactly nothing.
        seq_T: int64 number of each token's sequence; tokens of a sequence lie end to end (checked on a CPU). Needed
            where sequences are averaged or counted: grpo, sapo, level sequence, dr_grpo without `num_items`.
        num_items: tokens of the step that count (ppo, bnpo, dapo, cispo), or its sequences (grpo, sapo, dr_grpo);
            a number or a 0-d tensor. None: those of this call, right for a call that is the whole step.
        max_completion_length: dr_grpo divides by it, and by the sequences.
        beta: weight of the KL estimate, >= 0.
        epsilon: how far the ratio may fall below 1 where that gains.
        epsilon_high: how far it may rise; None is epsilon. Of cispo the largest ratio itself, and needed.
        delta: largest ratio where the advantage is negative, > 1 + epsilon_high; grpo, bnpo, dr_grpo, dapo.
        loss_type: ppo, grpo, bnpo, dr_grpo, dapo, cispo or sapo.
        importance_sampling_level: `token`, or `sequence` for the ratio of mean log-probs, GSPO, arXiv 2507.18071.
        dual_clip: for ppo what delta is for the others, > 1; verl's clip_ratio_c (3.0).
        kl_kind: estimate of `kl_penalty`.
        use_bias_correction_kl: multiply the estimate by the ratio, which makes its gradient that of the KL divergence
            where the tokens are the old policy's.
        entropy_T: of the policy at each token; alone it is a metric.
        entropy_coef: the loss gets -entropy_coef * entropy_T, averaged as the rest of it.
        importance_weights_T: constant >= 0 on each token's loss but for KL and entropy: the engines' mismatch.
        sapo_temperature_pos: of sapo's sigmoid where the advantage is positive, > 0.
        sapo_temperature_neg: elsewhere.
        backend: `auto`, `torch`, `native` or `triton`; what compiled ones know stands above.

    Returns:
        (loss_T, metrics): float32, or float64 for float64 log-probs; metrics 0-d and detached. All are sums over the
        tokens that count, to be divided by their number, but for `max_ratio`: `ratio`, `approx_kl/k1` and
        `approx_kl/k3` (of the old policy from the new), `kl` (as in the loss) if beta > 0, `entropy` if given, and
        what was clipped: `clip_ratio/low_mean`, `clip_ratio/high_mean`, `clip_ratio/region_mean`, with a cap
        `clip_ratio/cap_mean`, of cispo `cispo_clip_ratio`. At level `sequence` those of ratio and clip
        count each sequence once: divide by sequences.

    Raises:
        ValueError: shapes, types or options do not fit, or an option has no meaning for the loss.
        RuntimeError: the named backend can't run this input or this loss.

    >>> logps_T = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    >>> old_logps_T, advantages_T = torch.tensor([-1.0, -2.5, -0.6]), torch.tensor([1.0, 1.0, -2.0])
    >>> loss_T, metrics = policy_loss(logps_T, old_logps_T, advantages_T, backend="torch")
    >>> loss_T, metrics["clip_ratio/high_mean"]
    (tensor([-0.3333, -0.4000,  0.7368], grad_fn=<MulBackward0>), tensor(1.))
    >>> torch.autograd.grad(loss_T.sum(), logps_T)
    (tensor([-0.3333,  0.0000,  0.7368]),)
    """
    options = policy_options(
        loss_type, beta=beta, epsilon=epsilon, epsilon_high=epsilon_high, delta=delta, dual_clip=dual_clip,
        importance_sampling_level=importance_sampling_level, kl_kind=kl_kind,
        use_bias_correction_kl=use_bias_correction_kl, entropy_coef=entropy_coef,
        sapo_temperature_pos=sapo_temperature_pos, sapo_temperature_neg=sapo_temperature_neg,
        max_completion_length=max_completion_length,
    )  # fmt: skip
    constants = {
        "old_logps_T": old_logps_T, "advantages_T": advantages_T, "ref_logps_T": ref_logps_T,
        "importance_weights_T": importance_weights_T,
    }  # fmt: skip
    _check(logps_T, constants, {"mask_T": mask_T, "seq_T": seq_T, "entropy_T": entropy_T}, options)
    implementation = _implementation(options, logps_T, backend)
    logps_T = logps_T if logps_T.dtype == torch.float64 else logps_T.float()
    old_logps_T, advantages_T, ref_logps_T, importance_weights_T = (
        None if x_T is None else x_T.to(logps_T.dtype) for x_T in constants.values()
    )  # type: ignore[assignment]
    if importance_weights_T is not None:
        advantages_T = advantages_T * importance_weights_T
    mask_T = None if mask_T is None else mask_T.to(torch.bool)
    sequences = _sequences(seq_T, mask_T, num_items, options)
    scale_T = _scale(logps_T, mask_T, sequences, num_items, options)
    inputs = (logps_T, old_logps_T, advantages_T, ref_logps_T, mask_T, scale_T)
    if implementation is _Torch:
        loss_T, sums_KB = define(*inputs, sequences, options)
    else:
        loss_T, _, sums_KB = _Compiled.apply(*inputs, options, implementation)
    metrics = _metrics(sums_KB, options)
    if entropy_T is not None:
        entropy_T = entropy_T.to(logps_T.dtype)
        entropy_T = entropy_T if mask_T is None else torch.where(mask_T, entropy_T, 0)
        metrics["entropy"] = entropy_T.detach().sum()
        if entropy_coef:
            loss_T = loss_T - entropy_coef * entropy_T * scale_T
    return loss_T, metrics


def _check(
    logps_T: Tensor,
    constants: dict[str, Tensor | None],
    others: dict[str, Tensor | None],
    options: PolicyOptions,
) -> None:
    if not logps_T.is_floating_point() or logps_T.ndim != 1:
        raise ValueError(
            f"expected floating-point log-probs in one dimension, got {logps_T.dtype} {tuple(logps_T.shape)}"
        )
    for name, x_T in (constants | others).items():
        if x_T is not None and (x_T.shape != logps_T.shape or x_T.device != logps_T.device):
            raise ValueError(
                f"{name} must be like logps_T, {tuple(logps_T.shape)} on {logps_T.device}, "
                f"got {tuple(x_T.shape)} on {x_T.device}"
            )
    for name, x_T in constants.items():
        if x_T is not None and x_T.requires_grad:
            raise ValueError(f"{name} is a constant, but requires a gradient; detach it")
    if options.beta and constants["ref_logps_T"] is None:
        raise ValueError(f"beta={options.beta} needs ref_logps_T")
    if not options.beta and constants["ref_logps_T"] is not None:
        raise ValueError("beta is 0, so that nothing would use ref_logps_T; leave it out")
    if options.entropy_coef and others["entropy_T"] is None:
        raise ValueError(f"entropy_coef={options.entropy_coef} needs entropy_T")


def _implementation(options: PolicyOptions, logps_T: Tensor, backend: str) -> Any:
    """`resolve`, and the refusal of what compiled code does not know."""
    backend = named(backend)
    unknown = [
        words
        for words, is_asked in (
            (options.loss_type, not LOSSES[options.loss_type].compiled),
            ("importance_sampling_level='sequence'", options.by_sequence),
            (f"kl_kind={options.kl_kind!r}", options.kl_kind != "k3"),
        )
        if is_asked
    ]
    if not unknown:
        return resolve("policy_loss", logps_T.device, logps_T.dtype, backend)
    if backend not in ("auto", "torch"):
        raise RuntimeError(
            f"policy_loss has no {backend} code for {' with '.join(unknown)}: compiled code knows ppo, grpo, dapo and "
            "dr_grpo, with the ratio of a token and the KL estimate k3; pass backend='torch'"
        )
    return _Torch


def _sequences(
    seq_T: Tensor | None, mask_T: Tensor | None, num_items: float | Tensor | None, options: PolicyOptions
) -> Sequences | None:
    """The tokens' sequences, where the loss wants to know them."""
    loss = LOSSES[options.loss_type]
    wanted = loss.averages or options.by_sequence
    counted = loss.counts == "sequences" and num_items is None
    if seq_T is None:
        if wanted or counted:
            what = "seq_T" if wanted else "num_items, or seq_T to count them"
            raise ValueError(f"{options.loss_type} averages over sequences; give {what}")
        return None
    if seq_T.dtype != torch.int64:
        raise ValueError(f"seq_T must be int64, got {seq_T.dtype}")
    if seq_T.device.type == "cpu" and not torch.compiler.is_compiling():
        # numbers that never fall need no sorting to be checked
        scattered = (seq_T.diff() < 0).any() and len(seq_T.unique_consecutive()) != len(seq_T.unique())
        if scattered:
            raise ValueError(f"tokens of a sequence must lie end to end, got seq_T = {seq_T}")
    return sequences_of(seq_T, mask_T) if wanted or counted else None


def _scale(
    logps_T: Tensor,
    mask_T: Tensor | None,
    sequences: Sequences | None,
    num_items: float | Tensor | None,
    options: PolicyOptions,
) -> Tensor:
    """What each token's loss is multiplied by: one over the normaliser; a number for all is expanded."""
    loss = LOSSES[options.loss_type]
    if num_items is None and loss.counts == "sequences":
        assert sequences is not None
        num_items = sequences.count.clamp(min=1)
    elif num_items is None:
        num_items = max(len(logps_T), 1) if mask_T is None else mask_T.sum().clamp(min=1)
    elif not isinstance(num_items, Tensor) and not num_items > 0:
        raise ValueError(
            f"num_items counts the {loss.counts} of the whole step, so it is > 0, got {num_items}"
        )
    elif isinstance(num_items, Tensor) and num_items.ndim:
        raise ValueError(f"num_items must be a number or a 0-d tensor, got shape {tuple(num_items.shape)}")
    if isinstance(num_items, Tensor):
        scale = num_items.to(logps_T.device, logps_T.dtype, non_blocking=True).reciprocal()
    else:
        scale = logps_T.new_full((), 1 / num_items)
    if options.max_completion_length is not None:
        scale = scale / options.max_completion_length
    if loss.averages:
        assert sequences is not None
        return scale / sequences.tokens_T
    return scale.expand(len(logps_T))


def _metrics(sums_KB: Tensor, options: PolicyOptions) -> dict[str, Tensor]:
    """Named totals of partial sums; which there are depends on the options alone."""
    if not sums_KB.shape[1]:
        sums_KB = sums_KB.new_zeros(len(SUMS), 1)
    kl, low, high, capped, ratio, k1, k3 = sums_KB[:-1].sum(1).unbind()
    metrics = {"ratio": ratio, "approx_kl/k1": k1, "approx_kl/k3": k3, "max_ratio": sums_KB[-1].amax()}
    if options.beta:
        metrics["kl"] = kl
    if options.loss_type == "cispo":
        metrics["cispo_clip_ratio"] = high
    elif options.loss_type != "sapo":
        metrics |= {
            "clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low + high,
        }  # fmt: skip
        if options.cap != float("inf"):
            metrics["clip_ratio/cap_mean"] = capped
    return metrics


class _Compiled(Function):
    """A compiled implementation: the tokens' gradients come with the loss, the backward pass scales them."""

    @staticmethod
    def forward(
        logps_T: Tensor,
        old_logps_T: Tensor,
        advantages_T: Tensor,
        ref_logps_T: Tensor | None,
        mask_T: Tensor | None,
        scale_T: Tensor,
        options: PolicyOptions,
        implementation: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors = (
            None if x_T is None else x_T.contiguous()
            for x_T in (logps_T, old_logps_T, advantages_T, ref_logps_T, mask_T)
        )
        return implementation.forward(
            *tensors, scale_T, options.low, options.high, options.cap, options.beta, options.corrects_kl
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.set_materialize_grads(False)  # else zeros are made for the outputs without a gradient
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, dloss_T: Tensor, *_: Any) -> tuple[Tensor | None, ...]:

        def gradients(dloss_T: Tensor, dlogps_T: Tensor) -> tuple[Tensor]:
            return (dlogps_T * dloss_T,)

        gradient = only_once("compiled policy_loss", gradients, dloss_T, *ctx.saved_tensors)
        return *gradient, None, None, None, None, None, None, None


class _Torch:
    """The definition, `_policy.define`: every other implementation is measured against it, in float64."""

    name = "torch"
    refusal = staticmethod(never_refuses)


class _Native:
    """csrc/cpu/policy_loss.cpp and csrc/cuda/policy_loss.cu.

    forward(logps_T, old_logps_T, advantages_T, ref_logps_T, mask_T, scale_T, low, high, cap, beta, corrects_kl)
        -> (loss_T, dlogps_T, sums_KB)

    All are contiguous but for the scale, which may be one number expanded; float32 but for the mask of bool. Reference
    and mask may be None. dlogps_T is the gradient of the loss, sums_KB holds `SUMS` of each block of tokens.
    """

    name = "native"
    refusal = staticmethod(native_refusal)

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.alignfast.policy_loss(*inputs)


def outputs_like(logps_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what a compiled forward writes; one block at least, whose sums are 0 where there is no token."""
    num_blocks = max(1, (logps_T.shape[0] + BLOCK - 1) // BLOCK)
    return torch.empty_like(logps_T), torch.empty_like(logps_T), logps_T.new_empty((len(SUMS), num_blocks))


@native_op(
    "policy_loss(Tensor logps, Tensor old_logps, Tensor advantages, Tensor? ref_logps, Tensor? mask, Tensor scale, "
    "float low, float high, float cap, float beta, bool corrects_kl) -> (Tensor, Tensor, Tensor)",
    fake=lambda logps, *_: outputs_like(logps),
)
def _native_forward(
    logps_T: Tensor,
    old_logps_T: Tensor,
    advantages_T: Tensor,
    ref_logps_T: Tensor | None,
    mask_T: Tensor | None,
    scale_T: Tensor,
    *numbers: float,
) -> tuple[Tensor, Tensor, Tensor]:
    nothing = logps_T.new_empty(0)
    outputs = outputs_like(logps_T)
    launch(
        "policy_loss", logps_T, old_logps_T, advantages_T, nothing if ref_logps_T is None else ref_logps_T,
        nothing if mask_T is None else mask_T, scale_T, *numbers, *outputs,
    )  # fmt: skip
    return outputs


class _Triton:
    """policy_loss_triton.py, imported on the first call: triton is optional. Its forward is `_Native`'s."""

    name = "triton"
    refusal = staticmethod(triton_refusal)

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        from alignfast.kernels import policy_loss_triton

        return policy_loss_triton.forward(*inputs)


register("policy_loss", _Torch, _Native, _Triton)
