"""The losses of `policy_loss`, each a few lines with its paper. This is their only definition.

    x = log pi(token) - log pi_old(token)    log-ratio; at the level of sequences its mean over the sequence's tokens
    r = exp(x)                               ratio
    A                                        advantage, times the importance weight where there is one

Ratios are held within bounds before their exponential, so that one of e^10000 is clipped, not inf * 0; nothing else is
clamped. Names that TRL 1.16 has too compute what it computes; normalisers are `policy_loss`'s own affair.

Letters: T tokens, M = T + 1 offsets, K sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from alignfast.kernels.kl_penalty import KINDS, estimate

# Rows of what an implementation adds up, csrc/policy_loss.h has their order too; the last is a maximum.
SUMS = ("kl", "low", "high", "capped", "ratio", "approx_kl/k1", "approx_kl/k3", "max_ratio")
LEVELS = ("token", "sequence")
_FAR = 80.0  # nats: e^80 is float32 yet, and the slope of sapo's sigmoid is 0 long before
_EPSILON, _SAPO_POS, _SAPO_NEG = 0.2, 1.0, 1.05


class PolicyOptions(NamedTuple):
    """The options of `policy_loss`, checked."""

    loss_type: str
    low: float  # the least ratio where A < 0
    high: float  # the largest where A > 0; of cispo wherever
    cap: float  # the largest where A < 0; inf for none
    beta: float
    kl_kind: str
    corrects_kl: bool
    by_sequence: bool
    entropy_coef: float
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    max_completion_length: int | None


class Sequences(NamedTuple):
    """Which sequence each token is of."""

    index_T: Tensor  # from 0 on, in their order
    offsets_M: Tensor  # where each starts, and T from the last one's end on
    tokens_T: Tensor  # tokens that count in the sequence of each token, at least 1
    count: Tensor  # sequences, 0-d

    def mean(self, x_T: Tensor) -> Tensor:
        """Of each token's sequence, masked tokens being 0. Sums are as in packed_preference_loss: in one order."""
        sums_T = torch.segment_reduce(x_T.double(), "sum", offsets=self.offsets_M, initial=0)
        return (sums_T[self.index_T] / self.tokens_T).to(x_T.dtype)


def sequences_of(seq_T: Tensor, mask_T: Tensor | None) -> Sequences:
    """Runs of equal numbers; no shape depends on how many there are, so that a GPU needn't be waited for."""
    num_tokens = len(seq_T)
    starts_T = torch.nn.functional.pad(seq_T[1:] != seq_T[:-1], (1, 0))[:num_tokens]
    index_T = starts_T.cumsum(0)
    ones_T = torch.ones_like(index_T)
    length_T = torch.zeros_like(index_T).scatter_add_(0, index_T, ones_T)  # of as many sequences as could be
    offsets_M = torch.nn.functional.pad(length_T.cumsum(0), (1, 0))
    tokens_T = length_T
    if mask_T is not None:
        tokens_T = torch.zeros_like(index_T).scatter_add_(0, index_T, mask_T.long())
    count = index_T[-1] + 1 if num_tokens else index_T.sum()
    return Sequences(index_T, offsets_M, tokens_T[index_T].clamp(min=1), count)


def at_most(x_T: Tensor, bound: float) -> Tensor:
    """Unlike a clamp it lets the gradient of a NaN through, so that the NaN shows."""
    return torch.where(x_T > bound, bound, x_T)


def _clipped(x_T: Tensor, advantages_T: Tensor, logps_T: Tensor, options: PolicyOptions) -> Tensor:
    """PPO's clip, arXiv 1707.06347 eq. 7: -min(r A, clip(r) A), said for either sign of A.

    The cap is c of the dual clip, arXiv 1912.09729, and delta of INTELLECT-2's two-sided clip, arXiv 2505.07291.
    """
    below_T = at_most(x_T, math.log(options.high))
    above_T = x_T if math.isinf(options.cap) else at_most(x_T, math.log(options.cap))
    if options.low > 0:
        log_low = math.log(options.low)
        above_T = torch.where(above_T < log_low, log_low, above_T)
    return -advantages_T * torch.where(advantages_T >= 0, below_T, above_T).exp()


def _cispo(x_T: Tensor, advantages_T: Tensor, logps_T: Tensor, options: PolicyOptions) -> Tensor:
    """CISPO, arXiv 2506.13585, with ScaleRL's cap, arXiv 2510.13786: the ratio is a weight without a gradient."""
    return -at_most(x_T, math.log(options.high)).exp().detach() * advantages_T * logps_T


def _sapo(x_T: Tensor, advantages_T: Tensor, logps_T: Tensor, options: PolicyOptions) -> Tensor:
    """SAPO, arXiv 2511.20347: a sigmoid of the ratio, of slope 1 at r = 1, instead of a clip."""
    temperature_T = torch.where(
        advantages_T > 0,
        torch.full_like(advantages_T, options.sapo_temperature_pos),
        options.sapo_temperature_neg,
    )
    gate_T = torch.sigmoid(temperature_T * at_most(x_T, _FAR).expm1()) * 4 / temperature_T
    return -advantages_T * gate_T


class Loss(NamedTuple):
    """A row of the table: the definition, how it is averaged, and what applies to it."""

    of: Callable[[Tensor, Tensor, Tensor, PolicyOptions], Tensor]
    counts: str = "tokens"  # what `num_items` counts: tokens or sequences
    averages: bool = False  # over each sequence's tokens, before the sequences
    compiled: bool = False


LOSSES = {
    "ppo": Loss(_clipped, compiled=True),
    "grpo": Loss(_clipped, "sequences", averages=True, compiled=True),  # arXiv 2402.03300 eq. 3
    "bnpo": Loss(_clipped),  # TRL's mean over the tokens of a micro-batch; here of the step, and so dapo
    "dr_grpo": Loss(_clipped, "sequences", compiled=True),  # arXiv 2503.20783
    "dapo": Loss(_clipped, compiled=True),  # arXiv 2503.14476
    "cispo": Loss(_cispo),
    "sapo": Loss(_sapo, "sequences", averages=True),
}
_GRPO = ("grpo", "bnpo", "dr_grpo", "dapo")
# Options that mean something for some losses only, and which
_APPLIES = {
    "epsilon": (*_GRPO, "ppo"),
    "epsilon_high": (*_GRPO, "ppo", "cispo"),
    "delta": _GRPO,
    "dual_clip": ("ppo",),
    "max_completion_length": ("dr_grpo",),
    "importance_sampling_level": (*_GRPO, "cispo", "sapo"),
    "sapo_temperature_pos": ("sapo",),
    "sapo_temperature_neg": ("sapo",),
}


def policy_options(
    loss_type: str = "dapo",
    *,
    beta: float = 0.0,
    epsilon: float = _EPSILON,
    epsilon_high: float | None = None,
    delta: float | None = None,
    importance_sampling_level: str = "token",
    dual_clip: float | None = None,
    kl_kind: str = "k3",
    use_bias_correction_kl: bool = False,
    entropy_coef: float = 0.0,
    sapo_temperature_pos: float = _SAPO_POS,
    sapo_temperature_neg: float = _SAPO_NEG,
    max_completion_length: int | None = None,
) -> PolicyOptions:
    """Check the options of `policy_loss`, where they are described.

    Raises:
        ValueError: a name is unknown, a number out of its range, or an option has no meaning for the loss.
    """
    if loss_type not in LOSSES:
        raise ValueError(f"loss_type is {loss_type!r}; known are {', '.join(LOSSES)}")
    for name, value, known in (
        ("importance_sampling_level", importance_sampling_level, LEVELS),
        ("kl_kind", kl_kind, KINDS),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")
    changed = {
        "epsilon": epsilon != _EPSILON,
        "epsilon_high": epsilon_high is not None,
        "delta": delta is not None,
        "dual_clip": dual_clip is not None,
        "max_completion_length": max_completion_length is not None,
        "importance_sampling_level": importance_sampling_level != "token",
        "sapo_temperature_pos": sapo_temperature_pos != _SAPO_POS,
        "sapo_temperature_neg": sapo_temperature_neg != _SAPO_NEG,
    }
    for name, applies in _APPLIES.items():
        if changed[name] and loss_type not in applies:
            raise ValueError(f"{name} has no meaning for {loss_type}, only for {', '.join(applies)}")
    if not beta and (use_bias_correction_kl or kl_kind != "k3"):
        raise ValueError("beta is 0: there is no KL term for kl_kind or use_bias_correction_kl to shape")
    low, high, cap = _bounds(loss_type, epsilon, epsilon_high, delta, dual_clip)
    if not math.isfinite(beta) or beta < 0 or not math.isfinite(entropy_coef):
        raise ValueError(f"beta must be >= 0 and entropy_coef finite, got {beta} and {entropy_coef}")
    if not (sapo_temperature_pos > 0 and sapo_temperature_neg > 0):
        raise ValueError(f"temperatures must be > 0, got {sapo_temperature_pos} and {sapo_temperature_neg}")
    if loss_type == "dr_grpo" and (max_completion_length is None or max_completion_length < 1):
        raise ValueError(
            f"dr_grpo divides by max_completion_length, which must be >= 1, got {max_completion_length}"
        )
    return PolicyOptions(
        loss_type, low, high, cap, beta, kl_kind, use_bias_correction_kl, importance_sampling_level == "sequence",
        entropy_coef, sapo_temperature_pos, sapo_temperature_neg, max_completion_length,
    )  # fmt: skip


def _bounds(
    loss_type: str, epsilon: float, epsilon_high: float | None, delta: float | None, dual_clip: float | None
) -> tuple[float, float, float]:
    """(low, high, cap) of the ratio."""
    if loss_type == "sapo":
        return 0.0, math.inf, math.inf
    if loss_type == "cispo":
        if epsilon_high is None or not epsilon_high > 0:
            raise ValueError(
                "cispo needs epsilon_high > 0, the largest ratio itself (ScaleRL's epsilon_max, 5.0), "
                f"got {epsilon_high}"
            )
        return 0.0, epsilon_high, math.inf
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    if not 0 <= epsilon <= 1 or not 0 <= epsilon_high < math.inf:
        raise ValueError(
            f"epsilon must lie in [0, 1] and epsilon_high be >= 0, got {epsilon}, {epsilon_high}"
        )
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(
            f"dual_clip, the largest ratio where the advantage is negative, must be > 1, got {dual_clip}"
        )
    if delta is not None and not delta > 1 + epsilon_high:
        raise ValueError(
            f"delta, the largest ratio where the advantage is negative, must be > 1 + epsilon_high = {1 + epsilon_high}, "
            f"got {delta}"
        )
    cap = math.inf if delta is None else delta
    return 1 - epsilon, 1 + epsilon_high, cap if dual_clip is None else dual_clip


def define(
    logps_T: Tensor,
    old_logps_T: Tensor,
    advantages_T: Tensor,
    ref_logps_T: Tensor | None,
    mask_T: Tensor | None,
    scale_T: Tensor,
    sequences: Sequences | None,
    options: PolicyOptions,
) -> tuple[Tensor, Tensor]:
    """(loss_T, sums_KT): each token's loss, and what it adds to `SUMS`."""

    def kept(x_T: Tensor) -> Tensor:  # masked numbers may be NaN or inf, so they go before anything else
        return x_T if mask_T is None else torch.where(mask_T, x_T, 0)

    token_x_T, advantages_T = kept(logps_T - old_logps_T), kept(advantages_T)
    x_T = token_x_T
    if options.by_sequence:
        assert sequences is not None
        x_T = kept(sequences.mean(token_x_T))
    loss_T = LOSSES[options.loss_type].of(x_T, advantages_T, kept(logps_T), options)
    kl_T = torch.zeros_like(loss_T)
    if ref_logps_T is not None:
        kl_T = estimate(kept(ref_logps_T - logps_T), options.kl_kind)
        if options.corrects_kl:
            kl_T = kl_T * x_T.exp()
        loss_T = loss_T + options.beta * kl_T
    sums_KT = _sums(kl_T.detach(), token_x_T.detach(), x_T.detach(), advantages_T, options)
    if options.by_sequence:  # each sequence once
        sums_KT[1:5] /= sequences.tokens_T
    return loss_T * scale_T, sums_KT if mask_T is None else sums_KT * mask_T


def _sums(
    kl_T: Tensor, token_x_T: Tensor, x_T: Tensor, advantages_T: Tensor, options: PolicyOptions
) -> Tensor:
    """`SUMS` of each token, finite where masked numbers were made 0."""
    down_T, ratio_T = advantages_T < 0, x_T.exp()
    low_T = down_T & (x_T < (math.log(options.low) if options.low else -math.inf))
    high_T = (advantages_T > 0) & (x_T > math.log(options.high))
    capped_T = down_T & (x_T > math.log(options.cap))
    flags = (flag_T.to(x_T.dtype) for flag_T in (low_T, high_T, capped_T))
    return torch.stack((kl_T, *flags, ratio_T, estimate(token_x_T, "k1"), estimate(token_x_T, "k3"), ratio_T))
