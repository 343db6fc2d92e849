"""Policy gradients on packed rows of completions: `policy_loss` as a loss for `linear_loss`, and what TRL calls its metrics.

A batch holds the predictions of completion 0, completion 1, ... end to end. Losses that look at whole sequences are
given whole ones (`policy_groups`); the others may be cut anywhere.

Letters: P predictions.
Not done here: advantages, and the log-probs of the old policy and of the reference, which the trainer brings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignfast.kernels import policy_loss
from alignfast.kernels.linear_loss import LossFn, Metrics, Stats

POLICY_STATS = ("logps", "entropy")
BY_SEQUENCE = ("grpo", "sapo", "dr_grpo")  # losses whose normaliser counts sequences
_AVERAGED = ("grpo", "sapo")  # a mean over each sequence's tokens


def policy_objective(
    lengths: Sequence[int],
    advantages_P: Tensor,
    old_logps_P: Tensor | None,
    ref_logps_P: Tensor | None = None,
    importance_weights_P: Tensor | None = None,
    *,
    num_items: int,
    **options: Any,
) -> LossFn:
    """The loss of sampled completions, for `linear_loss` with `group_sizes=policy_groups(...)`.

    Args:
        lengths: predictions of each completion.
        advantages_P: of each prediction.
        old_logps_P: log-probs under the policy that the step started from; None where that is the policy itself.
        ref_logps_P: those of the reference, where beta > 0.
        importance_weights_P: constant factors on the loss, where another engine drew the tokens.
        num_items: sequences of the whole step for the losses in `BY_SEQUENCE`, tokens for the others.
        **options: of `policy_loss`: `loss_type`, `beta`, `epsilon`, ...

    Returns:
        `loss_fn(stats, rows) -> (loss, metrics)` on the statistics `POLICY_STATS`. Metrics are sums, which
        `policy_counts` turns into means.
    """
    device = advantages_P.device
    sizes = torch.tensor(lengths, device=device)
    seq_P = torch.arange(len(sizes), device=device).repeat_interleave(sizes, output_size=len(advantages_P))

    def loss_fn(stats: Stats, rows: slice) -> tuple[Tensor, Metrics]:
        def cut(x_P: Tensor | None) -> Tensor | None:
            return None if x_P is None else x_P[rows]

        old_logps_P_ = stats.logps.detach() if old_logps_P is None else old_logps_P[rows]
        loss_P, metrics = policy_loss(
            stats.logps, old_logps_P_, advantages_P[rows], ref_logps_T=cut(ref_logps_P), seq_T=seq_P[rows],
            importance_weights_T=cut(importance_weights_P), entropy_T=stats.entropy, num_items=num_items, **options,
        )  # fmt: skip
        return loss_P.sum(), metrics

    return loss_fn


def policy_groups(lengths: Sequence[int], loss_type: str, level: str = "token") -> Sequence[int] | None:
    """Predictions that must reach the loss together: a sequence's, where the loss looks at whole ones.

    >>> policy_groups((3, 2), "grpo"), policy_groups((3, 2), "dapo"), policy_groups((3, 2), "dapo", "sequence")
    ((3, 2), None, (3, 2))
    """
    return lengths if loss_type in _AVERAGED or level == "sequence" else None


def policy_counts(names: Sequence[str], num_tokens: int, num_sequences: int, level: str) -> dict[str, int]:
    """What each summed metric of a step is divided by.

    >>> policy_counts(["kl", "ratio", "max_ratio"], 10, 2, "sequence")
    {'kl': 10, 'ratio': 2}
    """
    ratios = num_sequences if level == "sequence" else num_tokens
    means = [name for name in names if not name.startswith("max")]
    return {
        name: max(1, ratios if name.startswith(("clip_ratio", "ratio", "cispo")) else num_tokens)
        for name in means
    }
