"""Liger 0.8's fused linear DPO on our kernels: what `compat.liger` exports.

liger_fused_linear_dpo is long: its signature is Liger's.

Letters: B rows (chosen, then rejected), N pairs, n of a chunk, L steps, P predictions, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignfast.kernels import Stats, linear_loss, linear_token_logps, preference_loss
from alignfast.kernels.linear_loss import Metrics

DPO_LOSSES = (
    "sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop",
)  # fmt: skip


def liger_fused_linear_dpo(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ref_input: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ignore_index: int = -100,
    beta: float = 0.1,
    compute_nll_loss: bool = False,
    compiled: bool = True,
    use_ref_model: bool = True,
    average_log_prob: bool = False,
    chunk_size: int = 1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
    alpha: float = 1.0,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """DPO and its relatives on hidden states, a mean over pairs.

    Args:
        _input: (B, L, D): chosen in the first half, rejected in the second.
        weight: the head, (V, D).
        target: int64 (B, L), already aligned with `_input`.
        bias: of the head.
        ref_input: the reference's hidden states, needed with `use_ref_model`.
        ref_weight: its head.
        ref_bias: its head's bias.
        ignore_index: targets that count for nothing.
        beta: weight of the implicit reward, > 0.
        compute_nll_loss: add `alpha` times the chosen's negative log-likelihood per token.
        compiled: without effect.
        use_ref_model: False sets the reference's log-probs to 0.
        average_log_prob: log-probs per token instead of sums.
        chunk_size: without effect.
        loss_type: one of `DPO_LOSSES`.
        label_smoothing: of exo_pair and robust; as in Liger, sigmoid does not read it.
        discopop_tau: temperature of discopop.
        alpha: see `compute_nll_loss`.

    Returns:
        (loss, (chosen log-probs (N,), rejected log-probs, mean chosen logit, mean rejected logit, chosen nll, chosen
        rewards, rejected rewards)); the loss alone is differentiable. Mean logits are over all positions.

    Raises:
        ValueError: shapes or options do not fit.
    """
    if loss_type not in DPO_LOSSES:
        raise ValueError(f"loss_type={loss_type!r} is not one of {', '.join(DPO_LOSSES)}")
    if target.shape != _input.shape[:2] or len(target) % 2:
        raise ValueError(
            f"expected _input (B, L, D) and target (B, L), B even, got {tuple(_input.shape)} and {tuple(target.shape)}"
        )
    if use_ref_model and (ref_input is None or ref_weight is None):
        raise ValueError("use_ref_model=True needs ref_input and ref_weight")
    num_pairs = len(target) // 2
    # chosen 0, rejected 0, ...
    order_B = torch.arange(len(target), device=target.device).view(2, -1).T.flatten()
    counts_BL = target[order_B] != ignore_index
    lengths = counts_BL.sum(1).tolist()
    target_P = target[order_B][counts_BL]

    def sums(logps_P: Tensor, first: int, last: int) -> Tensor:
        """Log-probs of each completion of some pairs, (2, n)."""
        sizes = torch.tensor(lengths[2 * first : 2 * last], device=logps_P.device)
        sums_B = torch.segment_reduce(logps_P, "sum", lengths=sizes, initial=0)
        return (sums_B / sizes if average_log_prob else sums_B).view(-1, 2).T

    refs_2N = weight.new_zeros(2, num_pairs)
    if ref_input is not None and ref_weight is not None and use_ref_model:
        with torch.no_grad():
            ref_P = linear_token_logps(ref_input[order_B][counts_BL], ref_weight, target_P, bias_V=ref_bias)
            refs_2N = sums(ref_P, 0, num_pairs)  # type: ignore[arg-type]
    smoothing = label_smoothing if loss_type in ("exo_pair", "robust") else 0.0
    options = {
        "beta": beta,
        "loss_type": loss_type,
        "label_smoothing": smoothing,
        **({"discopop_tau": discopop_tau} if loss_type == "discopop" else {}),
    }
    groups = [chosen + rejected for chosen, rejected in zip(lengths[::2], lengths[1::2])]
    pair_at = {sum(groups[:pair]): pair for pair in range(num_pairs, -1, -1)}  # empty pairs: the first wins
    num_chosen = sum(lengths[::2])

    def loss_fn(stats: Stats, rows: slice) -> tuple[Tensor, Metrics]:
        first, last = pair_at[rows.start], num_pairs if rows.stop == sum(groups) else pair_at[rows.stop]
        logps_2n = sums(stats.logps, first, last)
        ref_2n = refs_2N[:, first:last].to(logps_2n.dtype)
        loss_n, *rewards = preference_loss(*logps_2n, *ref_2n, **options)  # type: ignore[arg-type]
        loss, metrics = loss_n.sum() / num_pairs, {"nll": loss_n.new_zeros(())}
        if compute_nll_loss:
            is_chosen_P = torch.arange(2 * (last - first), device=loss_n.device) % 2 == 0
            sizes = torch.tensor(lengths[2 * first : 2 * last], device=loss_n.device)
            metrics["nll"] = -(stats.logps * is_chosen_P.repeat_interleave(sizes)).sum() / num_chosen
            loss = loss + alpha * metrics["nll"]
        for name, value_n in zip(
            ("chosen", "rejected", "chosen_reward", "rejected_reward"), (*logps_2n, *rewards)
        ):
            metrics |= {f"{name}/{first + n}": x for n, x in enumerate(value_n.unbind())}
        return loss, metrics

    loss, metrics = linear_loss(
        _input[order_B][counts_BL], weight, target_P, loss_fn, group_sizes=groups, bias_V=bias
    )
    chosen, rejected, *rewards = (
        torch.stack([metrics[f"{name}/{n}"] for n in range(num_pairs)])
        for name in ("chosen", "rejected", "chosen_reward", "rejected_reward")
    )
    logits = (_mean_logit(half, weight, bias) for half in _input.detach().chunk(2))
    return loss, (chosen, rejected, *logits, metrics["nll"], *rewards)


def _mean_logit(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The mean over positions and vocabulary, by linearity: no logits are made."""
    with torch.no_grad():
        mean = input.flatten(0, 1).mean(0) @ weight.mean(0)
        return mean if bias is None else mean + bias.mean()
