"""Losses on pairs of completions, one preferred to the other, from their summed log-probabilities.

    l = log pi(y | x) - log pi_ref(y | x)    log-ratio of a completion (reference-free losses: log pi alone)
    sigmoid: loss = -log sigmoid(beta m)     m = l_chosen - l_rejected
    dloss/dl_chosen = -beta sigmoid(-beta m) = -dloss/dl_rejected

The losses, each with its paper, stand in `_pairwise.py`; this file sums, checks and differentiates.

In the packed form the token log-probs of chosen 0, rejected 0, chosen 1, ... lie end to end. Compiled code
sums them, applies the loss and writes the gradient of every token in one launch. It knows the losses that
have a `code`; naming it for another is refused, and `auto` takes torch there.

Letters: N pairs, P tokens of all completions, M = 2N + 1 offsets.
Not done here: a mean over pairs, weights of pairs, a gradient for the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignfast.kernels._autograd import Function, only_once
from alignfast.kernels._backend import named, native_refusal, never_refuses, register, resolve, triton_refusal
from alignfast.kernels._native import launch, native_op
from alignfast.kernels._pairwise import LOSSES, Pairs, PreferenceOptions, preference_options, score


class PreferenceOutput(NamedTuple):
    """What `packed_preference_loss` gives. Only `loss_N` is differentiable, the rest is to be looked at."""

    loss_N: Tensor
    chosen_rewards_N: Tensor
    rejected_rewards_N: Tensor
    chosen_logps_N: Tensor
    rejected_logps_N: Tensor


def preference_loss(
    chosen_N: Tensor,
    rejected_N: Tensor,
    ref_chosen_N: Tensor | None = None,
    ref_rejected_N: Tensor | None = None,
    *,
    chosen_len_N: Tensor | None = None,
    rejected_len_N: Tensor | None = None,
    beta: float = 0.1,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    simpo_gamma: float = 0.5,
    discopop_tau: float = 0.05,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each pair, differentiable in the policy's log-probs.

    Args:
        chosen_N: the policy's log-probability of each chosen completion, summed over its tokens, in nats.
        rejected_N: the same of each rejected completion.
        ref_chosen_N: the reference model's; a constant. None for simpo and orpo, needed by all others.
        ref_rejected_N: the same of each rejected completion.
        chosen_len_N: tokens of each completion, needed by ipo, sigmoid_norm, simpo and orpo.
        rejected_len_N: the same of each rejected completion.
        beta: weight of the implicit reward, > 0 (tau of IPO, lambda of ORPO).
        loss_type: a name in `LOSSES`, or several whose losses are added.
        loss_weights: a factor for each name; None is 1 for each.
        label_smoothing: probability in [0, 0.5) that a label is flipped: for sigmoid, robust, aot,
            aot_unpaired and simpo, and for exo_pair, where it must be positive (its paper: 1e-3).
        simpo_gamma: target margin of simpo.
        discopop_tau: temperature of discopop's modulation, > 0.
        f_divergence_type: f-DPO, arXiv 2309.16240: reverse_kl, forward_kl, js_divergence, alpha_divergence.
            The last three only with sigmoid, hinge, ipo, robust, exo_pair, discopop and sigmoid_norm.
        f_alpha_divergence_coef: alpha of alpha_divergence; 1 is the reverse KL, 0 the forward KL.
        backend: `auto`, `torch`, `native` or `triton`; compiled ones know sigmoid, hinge, ipo and robust.

    Returns:
        (loss_N, chosen_rewards_N, rejected_rewards_N): float32, or float64 for float64 log-probs. Rewards are
        beta * log-ratio (simpo, orpo: beta * log-prob per token), without a gradient.

    Raises:
        ValueError: shapes or options do not fit, or a reference or lengths are missing or not wanted.
        RuntimeError: the named backend can't run this input or this loss.

    >>> chosen_N, rejected_N, zero_N = torch.tensor([-3.0]), torch.tensor([-5.0]), torch.zeros(1)
    >>> preference_loss(chosen_N, rejected_N, zero_N, zero_N, beta=0.5, backend="torch")
    (tensor([0.3133]), tensor([-1.5000]), tensor([-2.5000]))
    """
    options = preference_options(
        loss_type, loss_weights, beta, label_smoothing, simpo_gamma, discopop_tau, f_divergence_type,
        f_alpha_divergence_coef,
    )  # fmt: skip
    chosen_N, rejected_N = _wide(chosen_N), _wide(rejected_N)
    refs = _references(options, ref_chosen_N, ref_rejected_N, chosen_N)
    lengths = (chosen_len_N, rejected_len_N)
    _check_lengths(options, *lengths)
    _check_alike(chosen_N, rejected_N, *refs, *lengths)
    if chosen_N.dtype != rejected_N.dtype:  # 16-bit ones are float32 by now
        raise ValueError(f"chosen is {chosen_N.dtype} and rejected {rejected_N.dtype}; cast one of them")
    implementation = _implementation(options, chosen_N, backend)
    if implementation is _Torch:
        return _Torch.forward(chosen_N, rejected_N, *refs, *lengths, options)
    inputs = (chosen_N, rejected_N, *refs)
    rewards = (options.beta * (x_N - ref_N).detach() for x_N, ref_N in zip(inputs[:2], inputs[2:]))
    if LOSSES[options.names[0]].lengths:  # compiled code will see one token each, so it is given the means
        inputs = tuple(x_N / len_N.clamp(1) for x_N, len_N in zip(inputs, lengths * 2))
    logps_P = torch.stack(inputs[:2], 1).flatten()
    offsets_M = torch.arange(logps_P.shape[0] + 1, device=logps_P.device)
    out_5N, _ = _Packed.apply(logps_P, offsets_M, *inputs[2:], options, implementation)
    return out_5N[0], *rewards


def packed_preference_loss(
    logps_P: Tensor,
    offsets_M: Tensor,
    ref_chosen_N: Tensor | None = None,
    ref_rejected_N: Tensor | None = None,
    *,
    backend: str = "auto",
    **options: Any,
) -> PreferenceOutput:
    """`preference_loss` of token log-probs, which are summed first: in the same launch where it is compiled.

    Args:
        logps_P: the policy's log-probability of each token of chosen 0, rejected 0, chosen 1, ... end to end.
        offsets_M: int64 start of each completion, and the end: 2N + 1 numbers from 0 to P that never fall.
            Differences are lengths. Checked on a CPU, trusted on a GPU: a look would wait for the device.
        ref_chosen_N: the reference model's sums, as in `preference_loss`.
        ref_rejected_N: the same of each rejected completion.
        backend: as in `preference_loss`.
        **options: `loss_type`, `beta` and the other options of `preference_loss`.

    Returns:
        PreferenceOutput; only its `loss_N` is differentiable, and once: there is no second derivative.

    Raises:
        ValueError: as `preference_loss`, or the offsets do not fit.
        RuntimeError: the named backend can't run this input or this loss.

    >>> logps_P, zero_N = torch.tensor([-1.0, -2.0, -5.0]), torch.zeros(1)
    >>> offsets_M = torch.tensor([0, 2, 3])
    >>> out = packed_preference_loss(logps_P, offsets_M, zero_N, zero_N, beta=0.5, backend="torch")
    >>> out.loss_N, out.chosen_logps_N
    (tensor([0.3133]), tensor([-3.]))
    """
    checked = preference_options(**options)
    logps_P = _wide(logps_P)
    _check_offsets(logps_P, offsets_M)
    refs = _references(checked, ref_chosen_N, ref_rejected_N, logps_P)
    _check_alike(offsets_M[1::2], *refs)
    implementation = _implementation(checked, logps_P, backend)
    if implementation is not _Torch:
        out_5N, _ = _Packed.apply(logps_P, offsets_M, *refs, checked, implementation)
        return PreferenceOutput(out_5N[0], *out_5N[1:].detach())
    # segment_reduce adds in one order on every device, which index_add's atomics on a GPU do not; one by one, so that
    # float32 would lose what a pairwise sum keeps
    sums = torch.segment_reduce(logps_P.double(), "sum", offsets=offsets_M, initial=0).to(logps_P.dtype)
    chosen_N, rejected_N = sums.view(-1, 2).T
    out = _Torch.forward(chosen_N, rejected_N, *refs, *offsets_M.diff().view(-1, 2).T, checked)
    return PreferenceOutput(*out, chosen_N.detach(), rejected_N.detach())


def _wide(x: Tensor) -> Tensor:
    if not x.is_floating_point() or x.ndim != 1:
        raise ValueError(
            f"expected floating-point log-probs in one dimension, got {x.dtype} of shape {tuple(x.shape)}"
        )
    return x if x.dtype == torch.float64 else x.float()


def _references(
    options: PreferenceOptions, ref_chosen_N: Tensor | None, ref_rejected_N: Tensor | None, logps: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The reference's log-probs in the policy's type, or None twice: as the losses want it, or refused."""
    given = [ref is not None for ref in (ref_chosen_N, ref_rejected_N)]
    for name in options.names:
        if LOSSES[name].reference and not all(given):
            raise ValueError(
                f"{name} needs ref_chosen_N and ref_rejected_N; reference-free are simpo and orpo"
            )
        if not LOSSES[name].reference and any(given):
            raise ValueError(f"{name} is reference-free, but got reference log-probs; leave them out")
    if ref_chosen_N is None or ref_rejected_N is None:
        return None, None
    if ref_chosen_N.requires_grad or ref_rejected_N.requires_grad:
        raise ValueError("reference log-probs are constants, but they require a gradient; detach them")
    return ref_chosen_N.to(logps.dtype), ref_rejected_N.to(logps.dtype)


def _check_lengths(options: PreferenceOptions, *lengths: Tensor | None) -> None:
    for name in options.names:
        if LOSSES[name].lengths and any(length_N is None for length_N in lengths):
            raise ValueError(f"{name} averages over tokens; give chosen_len_N and rejected_len_N")


def _check_alike(first_N: Tensor, *others_N: Tensor | None) -> None:
    for other_N in others_N:
        if other_N is not None and (other_N.shape != first_N.shape or other_N.device != first_N.device):
            raise ValueError(
                "expected one number a pair, all on one device, got "
                f"{tuple(first_N.shape)} on {first_N.device} and {tuple(other_N.shape)} on {other_N.device}"
            )


def _check_offsets(logps_P: Tensor, offsets_M: Tensor) -> None:
    if offsets_M.ndim != 1 or offsets_M.dtype != torch.int64 or offsets_M.shape[0] % 2 == 0:
        raise ValueError(
            f"offsets must be int64, 2 * pairs + 1 of them, got {offsets_M.dtype} {tuple(offsets_M.shape)}"
        )
    if offsets_M.device != logps_P.device:
        raise ValueError(
            f"log-probs are on {logps_P.device}, offsets on {offsets_M.device}; move one of them"
        )
    if offsets_M.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = (int(offsets_M[0]), int(offsets_M[-1]))
        if ends != (0, logps_P.shape[0]) or (offsets_M.diff() < 0).any():
            raise ValueError(
                f"offsets must rise from 0 to {logps_P.shape[0]}, the number of tokens, got {offsets_M}"
            )


def _implementation(options: PreferenceOptions, logps: Tensor, backend: str) -> Any:
    """`resolve`, and the refusal of losses that compiled code does not know."""
    backend = named(backend)
    known = LOSSES[options.names[0]].code is not None and options.weights == (1.0,)
    if known and options.f_divergence_type == "reverse_kl":
        return resolve("preference_loss", logps.device, logps.dtype, backend)
    if backend not in ("auto", "torch"):
        raise RuntimeError(
            f"preference_loss has no {backend} code for {' + '.join(options.names)}: compiled code knows "
            "sigmoid, hinge, ipo and robust, alone, with weight 1 and the reverse KL; pass backend='torch'"
        )
    return _Torch


class _Packed(Function):
    """A compiled implementation: the tokens' gradients come with the loss, the backward pass scales them.

    Of out_5N only the row of the losses has a gradient; callers detach the others.
    """

    @staticmethod
    def forward(
        logps_P: Tensor,
        offsets_M: Tensor,
        ref_chosen_N: Tensor,
        ref_rejected_N: Tensor,
        options: PreferenceOptions,
        implementation: Any,
    ) -> tuple[Tensor, Tensor]:
        return implementation.forward(
            *(x.contiguous() for x in (logps_P, offsets_M, ref_chosen_N, ref_rejected_N)),
            LOSSES[options.names[0]].code, options.beta, options.label_smoothing,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        logps_P, offsets_M, *_ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(logps_P, offsets_M, output[1])

    @staticmethod
    def backward(ctx: Any, dout_5N: Tensor, _: Any) -> tuple[Tensor | None, ...]:

        def gradients(dloss_N: Tensor, logps_P: Tensor, offsets_M: Tensor, dlogps_P: Tensor) -> tuple[Tensor]:
            tokens_N = offsets_M[2::2] - offsets_M[:-1:2]
            return (dlogps_P * dloss_N.repeat_interleave(tokens_N, output_size=dlogps_P.shape[0]),)

        gradient = only_once("compiled preference_loss", gradients, dout_5N[0], *ctx.saved_tensors)
        return *gradient, None, None, None, None, None


class _Torch:
    """The definition: every other implementation is measured against it, in float64."""

    name = "torch"
    refusal = staticmethod(never_refuses)

    @staticmethod
    def forward(
        chosen_N: Tensor,
        rejected_N: Tensor,
        ref_chosen_N: Tensor | None,
        ref_rejected_N: Tensor | None,
        chosen_len_N: Tensor | None,
        rejected_len_N: Tensor | None,
        options: PreferenceOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss_N, chosen_rewards_N, rejected_rewards_N) of the summed log-probs."""
        ratios = (chosen_N, rejected_N)
        if ref_chosen_N is not None:
            ratios = (chosen_N - ref_chosen_N, rejected_N - ref_rejected_N)
        pairs = Pairs(
            *(score(ratio_N, options) for ratio_N in ratios), chosen_len_N, rejected_len_N,
            policy_margin_N=chosen_N - rejected_N,
            ref_margin_N=None if ref_chosen_N is None else ref_chosen_N - ref_rejected_N,
        )  # fmt: skip
        loss_N = sum(
            weight * LOSSES[name].of(pairs, options) for name, weight in zip(options.names, options.weights)
        )
        rewarded = ratios if ref_chosen_N is not None else pairs.means
        return loss_N, *(options.beta * x_N.detach() for x_N in rewarded)


class _Native:
    """csrc/cpu/preference_loss.cpp and csrc/cuda/preference_loss.cu.

    forward(logps_P, offsets_M, ref_chosen_N, ref_rejected_N, code, beta, label_smoothing)
        -> (out_5N, dlogps_P)

    All are float32 and contiguous but for the int64 offsets. out_5N is in the order of PreferenceOutput,
    dlogps_P the gradient of the losses' sum.
    """

    name = "native"
    refusal = staticmethod(native_refusal)

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.alignfast.preference_loss(*inputs)


@native_op(
    "preference_loss(Tensor logps, Tensor offsets, Tensor ref_chosen, Tensor ref_rejected, int code, float beta, "
    "float label_smoothing) -> (Tensor, Tensor)",
    fake=lambda logps, offsets, ref_chosen, *_: (
        logps.new_empty((5, ref_chosen.shape[0])),
        torch.empty_like(logps),
    ),
)
def _native_forward(
    logps_P: Tensor,
    offsets_M: Tensor,
    ref_chosen_N: Tensor,
    ref_rejected_N: Tensor,
    code: int,
    beta: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    out_5N = logps_P.new_empty((5, ref_chosen_N.shape[0]))
    dlogps_P = torch.empty_like(logps_P)
    launch(
        "preference_loss", logps_P, offsets_M, ref_chosen_N, ref_rejected_N, code, beta, label_smoothing,
        out_5N, dlogps_P,
    )  # fmt: skip
    return out_5N, dlogps_P


class _Triton:
    """preference_loss_triton.py, imported on the first call: triton is optional. Its forward is `_Native`'s."""

    name = "triton"
    refusal = staticmethod(triton_refusal)

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        from alignfast.kernels import preference_loss_triton

        return preference_loss_triton.forward(*inputs)


register("preference_loss", _Torch, _Native, _Triton)
