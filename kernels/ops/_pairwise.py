"""The losses of `preference_loss`, each a few lines with its paper. This is their only definition.

    l = log pi(y | x) - log pi_ref(y | x)    log-ratio of a completion (reference-free losses: log pi alone)
    h = l, or f'(exp l) of an f-divergence   its score
    m = h_chosen - h_rejected                margin; a mean margin divides each h by its completion's length

They are made of `logsigmoid` and `expm1`, never of the log of a sigmoid, so that margins of 1e4 stay finite.
Names that TRL 1.16 has too compute what it computes; but `sigmoid` obeys label smoothing, which TRL ignores.

Letter: N pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

_SIMPO_GAMMA, _DISCOPOP_TAU, _ALPHA = 0.5, 0.05, 0.5
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
# Nats a token. Here float32 last tells a probability from 1; the log-odds of 1 itself are infinite, their slope
# too, and two such completions would give inf - inf.
_CERTAIN = -(2.0**-23)
_EXP_LIMIT = 80.0  # float32 ends at e^88.7: past this a score stays as it is and gives no gradient, as in TRL


class PreferenceOptions(NamedTuple):
    """The options of `preference_loss`, checked."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    beta: float
    label_smoothing: float
    simpo_gamma: float
    discopop_tau: float
    f_divergence_type: str
    f_alpha_divergence_coef: float


class Pairs(NamedTuple):
    """What a loss is a function of."""

    chosen_N: Tensor  # h of the chosen completions
    rejected_N: Tensor
    chosen_len_N: Tensor | None
    rejected_len_N: Tensor | None
    policy_margin_N: Tensor  # log pi(chosen) - log pi(rejected)
    ref_margin_N: Tensor | None

    @property
    def margin_N(self) -> Tensor:
        return self.chosen_N - self.rejected_N

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """h per token, chosen and rejected; an empty completion counts as one token, as in TRL."""
        return self.chosen_N / self.chosen_len_N.clamp(1), self.rejected_N / self.rejected_len_N.clamp(1)

    @property
    def mean_margin_N(self) -> Tensor:
        chosen_N, rejected_N = self.means
        return chosen_N - rejected_N


def _smoothed(logits_N: Tensor, label_smoothing: float) -> Tensor:
    """Logistic loss when each label is flipped with probability `label_smoothing`."""
    loss_N = -logsigmoid(logits_N)
    if label_smoothing:
        loss_N = (1 - label_smoothing) * loss_N - label_smoothing * logsigmoid(-logits_N)
    return loss_N


def _sigmoid(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """DPO, arXiv 2305.18290 eq. 7; with label smoothing cDPO (Mitchell, "DPO with noisy preferences")."""
    return _smoothed(options.beta * pairs.margin_N, options.label_smoothing)


def _sigmoid_norm(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """Length-normalised DPO, Tulu 3, arXiv 2411.15124 section 5: margins per token."""
    return -logsigmoid(options.beta * pairs.mean_margin_N)


def _hinge(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """SLiC's hinge (arXiv 2305.10425) on log-ratios, as in RSO, arXiv 2309.06657; 1 / beta is its margin."""
    return torch.relu(1 - options.beta * pairs.margin_N)


def _ipo(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """IPO, arXiv 2310.12036 eq. 17, beta being its tau; per token, the form its authors ran (TRL 1.16)."""
    return (pairs.mean_margin_N - 1 / (2 * options.beta)).square()


def _exo_pair(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """EXO-pref, arXiv 2402.00856 eq. 16: reverse KL of the policy's pair to (1 - eps, eps)."""
    logits_N, eps = options.beta * pairs.margin_N, options.label_smoothing
    log_win_N, log_lose_N = logsigmoid(logits_N), logsigmoid(-logits_N)
    return log_win_N.exp() * (log_win_N - math.log1p(-eps)) + log_lose_N.exp() * (log_lose_N - math.log(eps))


def _nca_pair(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """NCA for pairs, arXiv 2402.05369 section 4.1: absolute likelihoods, so that the chosen does not sink."""
    chosen_N, rejected_N = options.beta * pairs.chosen_N, options.beta * pairs.rejected_N
    return -logsigmoid(chosen_N) - 0.5 * logsigmoid(-chosen_N) - 0.5 * logsigmoid(-rejected_N)


def _robust(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """Robust DPO, arXiv 2403.00409 section 3.1: unbiased where labels are flipped that often."""
    logits_N, eps = options.beta * pairs.margin_N, options.label_smoothing
    return (eps * logsigmoid(-logits_N) - (1 - eps) * logsigmoid(logits_N)) / (1 - 2 * eps)


def _bco_pair(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """BCO, arXiv 2404.04656 section 4, its reward shift delta being 0, as in TRL's DPO: no running mean."""
    return -logsigmoid(options.beta * pairs.chosen_N) - logsigmoid(-options.beta * pairs.rejected_N)


def _sppo_hard(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """SPPO, arXiv 2405.00675 eq. 4.7, the winner's probability set to 1 and the loser's to 0."""
    target = 0.5 / options.beta
    return (pairs.chosen_N - target).square() + (pairs.rejected_N + target).square()


def _aot(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """AOT paired, arXiv 2406.05882 section 3: sorted policy margins against sorted reference margins.

    Entry i is of the i-th smallest margins, not of pair i.
    """
    margin_N = pairs.policy_margin_N.sort().values - pairs.ref_margin_N.sort().values
    return _smoothed(options.beta * margin_N, options.label_smoothing)


def _aot_unpaired(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """AOT unpaired, arXiv 2406.05882 section 3: sorted log-ratios, chosen against rejected."""
    margin_N = pairs.chosen_N.sort().values - pairs.rejected_N.sort().values
    return _smoothed(options.beta * margin_N, options.label_smoothing)


def _apo_zero(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """APO-zero, arXiv 2408.06266 eq. 7: the chosen better than the model; raises it, lowers the rejected."""
    return torch.sigmoid(-options.beta * pairs.chosen_N) + torch.sigmoid(options.beta * pairs.rejected_N)


def _apo_down(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """APO-down, arXiv 2408.06266 eq. 8: the chosen worse than the model; lowers both, the rejected more."""
    return torch.sigmoid(options.beta * pairs.chosen_N) + torch.sigmoid(-options.beta * pairs.margin_N)


def _discopop(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """DiscoPOP, arXiv 2406.08414 eq. 5: from logistic to exponential as the margin grows.

    The exponential and its weight are one exponent: apart they give inf * 0 below a margin of -88.
    """
    logits_N = options.beta * pairs.margin_N
    modulation_N = logits_N / options.discopop_tau
    exponential_N = (logsigmoid(modulation_N) - logits_N).exp()
    return torch.sigmoid(-modulation_N) * -logsigmoid(logits_N) + exponential_N


def _simpo(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """SimPO, arXiv 2405.14734 eq. 6: log-probs per token, no reference, a target margin simpo_gamma."""
    return _smoothed(options.beta * pairs.mean_margin_N - options.simpo_gamma, options.label_smoothing)


def _orpo(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """ORPO's odds-ratio term, arXiv 2403.07691 eq. 7, beta its lambda; eq. 6 adds the chosen's NLL.

    A completion of probability 1, to float32's digits, counts as odds of 2^23 to 1 and gets no gradient.
    """
    chosen_N, rejected_N = (mean_N.clamp(max=_CERTAIN) for mean_N in pairs.means)
    log_odds_N = chosen_N - torch.log(-torch.expm1(chosen_N))
    rejected_log_odds_N = rejected_N - torch.log(-torch.expm1(rejected_N))
    return -options.beta * logsigmoid(log_odds_N - rejected_log_odds_N)


class Loss(NamedTuple):
    """A row of the table: the definition, and what it asks of its inputs."""

    of: Callable[[Pairs, PreferenceOptions], Tensor]
    code: int | None = None  # its number in compiled code, csrc/preference_loss.h
    reference: bool = True  # False: reference-free, by its paper
    lengths: bool = False  # averages over tokens
    smooths: bool = False  # uses label_smoothing
    by_margin: bool = False  # of h_chosen - h_rejected alone, what f-divergences need
    couples_batch: bool = False  # a pair's loss depends on the other pairs


LOSSES = {
    "sigmoid": Loss(_sigmoid, code=0, smooths=True, by_margin=True),
    "hinge": Loss(_hinge, code=1, by_margin=True),
    "ipo": Loss(_ipo, code=2, lengths=True, by_margin=True),
    "robust": Loss(_robust, code=3, smooths=True, by_margin=True),
    "exo_pair": Loss(_exo_pair, smooths=True, by_margin=True),
    "nca_pair": Loss(_nca_pair),
    "bco_pair": Loss(_bco_pair),
    "sppo_hard": Loss(_sppo_hard),
    "aot": Loss(_aot, smooths=True, couples_batch=True),
    "aot_unpaired": Loss(_aot_unpaired, smooths=True, couples_batch=True),
    "apo_zero": Loss(_apo_zero),
    "apo_down": Loss(_apo_down),
    "discopop": Loss(_discopop, by_margin=True),
    "sigmoid_norm": Loss(_sigmoid_norm, lengths=True, by_margin=True),
    "simpo": Loss(_simpo, reference=False, lengths=True, smooths=True),
    "orpo": Loss(_orpo, reference=False, lengths=True),
}


def preference_options(
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    simpo_gamma: float = _SIMPO_GAMMA,
    discopop_tau: float = _DISCOPOP_TAU,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = _ALPHA,
) -> PreferenceOptions:
    """Check the options of `preference_loss`, where they are described.

    Raises:
        ValueError: a name is unknown, a number out of its range, two options do not go together, or one has no meaning
            for the loss.
    """
    names = (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)
    weights = (1.0,) * len(names) if loss_weights is None else tuple(loss_weights)
    if not names or not set(names) <= set(LOSSES):
        raise ValueError(f"loss_type is {loss_type!r}; known are {', '.join(LOSSES)}")
    if len(weights) != len(names):
        raise ValueError(f"loss_weights has {len(weights)} numbers for {len(names)} loss types")
    if not beta > 0 or not discopop_tau > 0:
        raise ValueError(f"beta and discopop_tau must be positive, got {beta} and {discopop_tau}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing, the chance of a flipped label, must lie in [0, 0.5), got {label_smoothing}"
        )
    if label_smoothing and not any(LOSSES[name].smooths for name in names):
        raise ValueError(
            f"label_smoothing={label_smoothing} has no meaning for {' + '.join(names)}; leave it at 0"
        )
    if "exo_pair" in names and not label_smoothing:
        raise ValueError(
            "exo_pair needs label_smoothing > 0, since it takes its logarithm; its paper uses 1e-3"
        )
    if f_divergence_type not in F_DIVERGENCES:
        raise ValueError(f"f_divergence_type={f_divergence_type!r} is not one of {', '.join(F_DIVERGENCES)}")
    if f_divergence_type != "reverse_kl" and not all(LOSSES[name].by_margin for name in names):
        # a score is known up to a term of the prompt, which only the difference of two scores cancels
        raise ValueError(
            f"{' + '.join(names)} is no loss of the margin alone, so f_divergence_type must be reverse_kl"
        )
    for name, changed, applies in (
        ("simpo_gamma", simpo_gamma != _SIMPO_GAMMA, "simpo"),
        ("discopop_tau", discopop_tau != _DISCOPOP_TAU, "discopop"),
        ("f_alpha_divergence_coef", f_alpha_divergence_coef != _ALPHA, "alpha_divergence"),
    ):
        if changed and applies not in (*names, f_divergence_type):
            raise ValueError(f"{name} has no meaning for {' + '.join(names)}, only for {applies}")
    return PreferenceOptions(
        names,
        weights,
        beta,
        label_smoothing,
        simpo_gamma,
        discopop_tau,
        f_divergence_type,
        f_alpha_divergence_coef,
    )


def score(ratio_N: Tensor, options: PreferenceOptions) -> Tensor:
    """f'(t) at t = exp(ratio): (t^(alpha - 1) - 1) / (alpha - 1), which is log t at alpha = 1."""
    if options.f_divergence_type == "js_divergence":
        return math.log(2) + logsigmoid(ratio_N)
    alpha = {"reverse_kl": 1.0, "forward_kl": 0.0}.get(
        options.f_divergence_type, options.f_alpha_divergence_coef
    )
    if abs(alpha - 1) < 1e-6:
        return ratio_N
    return ((alpha - 1) * ratio_N).clamp(max=_EXP_LIMIT).expm1() / (alpha - 1)
