"""Losses on pairs of completions, one preferred to the other, from their summed log-probabilities.

    l = log pi(y | x) - log pi_ref(y | x)      log-ratio of one completion (reference-free losses: log pi alone)
    h = score(l)                               l itself under the reverse KL, else f'(pi / pi_ref) of the divergence
    m = h_chosen - h_rejected                  margin; "mean" margins divide each h by its completion's length
    sigmoid:  loss = -log sigmoid(beta m)      dloss/dl_chosen = -beta sigmoid(-beta m) = -dloss/dl_rejected

The other losses stand in `LOSSES`, each a function of a few lines with its paper. This is their only definition.
All use `logsigmoid` and `expm1`, never the log of a sigmoid, so that margins of 1e4 stay finite.

The packed form takes the token log-probs laid end to end, chosen 0, rejected 0, chosen 1, ...; compiled code sums
them, applies the loss and writes the gradient of every token in the same launch. It knows the losses with a `code`.

Letters: N pairs, P tokens of all completions, M = 2N + 1 offsets, 5 the outputs in the order of PreferenceOutput.
Not done here: a mean over pairs, weights of pairs, a gradient for the reference, a second derivative of the packed
form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignfast.kernels._backend import named, native_refusal, register, resolve

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
_EXP_LIMIT = 80.0  # float32 ends at e^88.7: past this a score stays as it is and gives no gradient, as in TRL


class PreferenceOutput(NamedTuple):
    """What `packed_preference_loss` gives. Only `loss_N` is differentiable, the rest is to be looked at."""

    loss_N: Tensor
    chosen_rewards_N: Tensor
    rejected_rewards_N: Tensor
    chosen_logps_N: Tensor
    rejected_logps_N: Tensor


class PreferenceOptions(NamedTuple):
    """The options of a loss, checked."""

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
        """h per token; an empty completion counts as one token, as in TRL."""
        return self.chosen_N / self.chosen_len_N.clamp(min=1), self.rejected_N / self.rejected_len_N.clamp(min=1)

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
    """DPO, arXiv 2305.18290 eq. 7; with label smoothing cDPO (Mitchell, "A note on DPO with noisy preferences", 2023)."""
    return _smoothed(options.beta * pairs.margin_N, options.label_smoothing)


def _sigmoid_norm(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """Length-normalised DPO, Tulu 3, arXiv 2411.15124 eq. 6: margins per token."""
    return -logsigmoid(options.beta * pairs.mean_margin_N)


def _hinge(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """SLiC's hinge on the log-ratios, RSO, arXiv 2309.06657 eq. 10 (SLiC itself: arXiv 2305.10425); 1 / beta is its margin."""
    return torch.relu(1 - options.beta * pairs.margin_N)


def _ipo(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """IPO, arXiv 2310.12036 eq. 17, beta being its tau; per token, the form its authors ran (TRL 1.16)."""
    return (pairs.mean_margin_N - 1 / (2 * options.beta)).square()


def _exo_pair(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """EXO-pref, arXiv 2402.00856 eq. 16: the reverse KL of the policy's pair to (1 - eps, eps), eps = label smoothing."""
    logits_N, eps = options.beta * pairs.margin_N, options.label_smoothing
    log_win_N, log_lose_N = logsigmoid(logits_N), logsigmoid(-logits_N)
    return log_win_N.exp() * (log_win_N - math.log1p(-eps)) + log_lose_N.exp() * (log_lose_N - math.log(eps))


def _nca_pair(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """NCA for pairs, arXiv 2402.05369 eq. 15: raises the chosen, lowers both a little."""
    chosen_N, rejected_N = options.beta * pairs.chosen_N, options.beta * pairs.rejected_N
    return -logsigmoid(chosen_N) - 0.5 * logsigmoid(-chosen_N) - 0.5 * logsigmoid(-rejected_N)


def _robust(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """Robust DPO, arXiv 2403.00409 eq. 12: unbiased when labels are flipped with probability label_smoothing."""
    logits_N, eps = options.beta * pairs.margin_N, options.label_smoothing
    return (eps * logsigmoid(-logits_N) - (1 - eps) * logsigmoid(logits_N)) / (1 - 2 * eps)


def _bco_pair(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """BCO, arXiv 2404.04656 eq. 7, with its reward shift delta = 0, as TRL's DPO has it: no running mean."""
    return -logsigmoid(options.beta * pairs.chosen_N) - logsigmoid(-options.beta * pairs.rejected_N)


def _sppo_hard(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """SPPO, arXiv 2405.00675 eq. 4.7, the winner's probability set to 1 and the loser's to 0."""
    target = 0.5 / options.beta
    return (pairs.chosen_N - target).square() + (pairs.rejected_N + target).square()


def _aot(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """AOT paired, arXiv 2406.05882 eq. 9: sorted policy margins against sorted reference margins.

    Entry i is of the i-th smallest margins, not of pair i.
    """
    margin_N = pairs.policy_margin_N.sort().values - pairs.ref_margin_N.sort().values
    return _smoothed(options.beta * margin_N, options.label_smoothing)


def _aot_unpaired(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """AOT unpaired, arXiv 2406.05882 eq. 7: sorted log-ratios of the chosen against those of the rejected."""
    margin_N = pairs.chosen_N.sort().values - pairs.rejected_N.sort().values
    return _smoothed(options.beta * margin_N, options.label_smoothing)


def _apo_zero(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """APO-zero, arXiv 2408.06266 eq. 7: for chosen answers better than the model's own; raises them, lowers the rejected."""
    return torch.sigmoid(-options.beta * pairs.chosen_N) + torch.sigmoid(options.beta * pairs.rejected_N)


def _apo_down(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """APO-down, arXiv 2408.06266 eq. 8: for chosen answers worse than the model's own; lowers both, the rejected more."""
    return torch.sigmoid(options.beta * pairs.chosen_N) + torch.sigmoid(-options.beta * pairs.margin_N)


def _discopop(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """DiscoPOP's log-ratio modulated loss, arXiv 2406.08414 eq. 5: from logistic to exponential as the margin grows.

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
    """ORPO's odds-ratio term, arXiv 2403.07691 eq. 7, beta being its lambda; eq. 6 adds the chosen's NLL (`sft`)."""
    chosen_N, rejected_N = pairs.means
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
    by_margin: bool = False  # of the scores' difference alone: the condition for f-divergences other than reverse KL
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
        label_smoothing: probability in [0, 0.5) that a label is flipped, for sigmoid, robust, aot, aot_unpaired,
            simpo; and exo_pair, where it must be positive (its paper: 1e-3).
        simpo_gamma: target margin of simpo.
        discopop_tau: temperature of discopop's modulation, > 0.
        f_divergence_type: f-DPO, arXiv 2309.16240: reverse_kl, forward_kl, js_divergence or alpha_divergence. Other
            than reverse_kl only with losses of the margin: sigmoid, hinge, ipo, robust, exo_pair, discopop, sigmoid_norm.
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
    options = _checked(
        loss_type, loss_weights, beta, label_smoothing, simpo_gamma, discopop_tau, f_divergence_type,
        f_alpha_divergence_coef,
    )  # fmt: skip
    chosen_N, rejected_N = _wide(chosen_N), _wide(rejected_N)
    refs = _references(options, ref_chosen_N, ref_rejected_N, chosen_N)
    lengths = _lengths(options, chosen_len_N, rejected_len_N)
    _check_alike(chosen_N, rejected_N, *refs, *lengths)
    implementation = _implementation(options, chosen_N, backend)
    if implementation is _Torch:
        return _Torch.forward(chosen_N, rejected_N, *refs, *lengths, options)
    *_, chosen_rewards_N, rejected_rewards_N = _rewards(chosen_N, rejected_N, *refs, *lengths, options)
    if LOSSES[options.names[0]].lengths:  # compiled code takes lengths from offsets, so it is given the means
        inputs = (chosen_N, rejected_N, *refs)
        chosen_N, rejected_N, *refs = (x / n.clamp(min=1) for x, n in zip(inputs, lengths * 2))
    logps_P = torch.stack((chosen_N, rejected_N), 1).flatten()
    offsets_M = torch.arange(logps_P.shape[0] + 1, device=logps_P.device)
    loss_N, _, _ = _Packed.apply(logps_P, offsets_M, *refs, options, implementation)
    return loss_N, chosen_rewards_N, rejected_rewards_N
