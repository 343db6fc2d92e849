"""TRL 1.16's functions on logits (`trl.trainer.utils`), on our kernels: the same names, arguments and meaning.

    selective_log_softmax   log softmax(z / temperature)[index]        entropy_from_logits   -sum_v p_v log p_v

Log-probs and entropies are float32 (float64 of float64 logits) whatever the logits are; TRL's CPU path gives 16-bit
logits 16-bit results, its GPU path float32 ones as here. Only the row pass is ours: logits that stand in memory are
read twice, forward and backward, and their gradient is written once.

Letters: T rows (all leading dimensions flattened), V vocabulary, K indices a row.
Not done here: the head. Who has hidden states uses `alignfast.kernels.linear_token_logps` and never makes logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignfast.kernels.token_logps import ENTROPY, LOGPS, LSE, row_options, row_stats

_IGNORED = -100


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Log-probability of the classes that `index` names.

    Args:
        logits: (..., V), floating point.
        index: (...), one class a row, or (..., K), several.
        temperature: logits are divided by it, > 0.
        row_mask: of `index`'s shape; where it is 0 the result is 0 and the logits get no gradient. A row of several
            indices is computed wherever one of them counts.

    Returns:
        Log-probs in the shape of `index`.

    Raises:
        ValueError: shapes or temperature do not fit, or a CPU index lies outside the vocabulary.

    >>> selective_log_softmax(torch.zeros(1, 2, 4), torch.tensor([[0, 3]]))
    tensor([[-1.3863, -1.3863]])
    """
    if index.shape == logits.shape[:-1]:
        return _stats(logits, index, (), temperature, row_mask)[LOGPS].view(index.shape)
    if index.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"expected an index of shape {tuple(logits.shape[:-1])} or with one dimension more, got {tuple(index.shape)}"
        )
    _check_mask(row_mask, index)
    first = index[..., 0] if index.shape[-1] else index.new_zeros(index.shape[:-1])
    lse_T = _stats(logits, first, (), temperature, None)[LSE]
    chosen = logits.gather(-1, index).to(lse_T.dtype) / temperature
    logps = chosen - lse_T.view(*logits.shape[:-1], 1)
    return logps if row_mask is None else logps.masked_fill(row_mask == 0, 0)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropy of each row's distribution, in nats, differentiable.

    Args:
        logits: (..., V), floating point.
        chunk_size: TRL's rows at a time, > 0. Without effect: a row is read once, and nothing of width V is made.

    Returns:
        Entropies in the shape of the leading dimensions.

    >>> entropy_from_logits(torch.zeros(2, 4))
    tensor([1.3863, 1.3863])
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1, got {chunk_size}")
    any_index = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return _stats(logits, any_index, ("entropy",), 1.0, None)[ENTROPY].view(logits.shape[:-1])


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both in one pass over the logits; the entropy is that of the distribution at `temperature`.

    Args:
        logits: (..., V), floating point.
        index: (...), one class a row.
        entropy_requires_grad: False detaches the entropy.
        temperature: logits are divided by it, > 0.
        row_mask: where it is 0 both results are 0 and the logits get no gradient.

    Returns:
        (log-probs, entropies), both in the shape of `index`.

    >>> selective_log_softmax_and_entropy(torch.zeros(1, 4), torch.tensor([2]))
    (tensor([-1.3863]), tensor([1.3863]))
    """
    stats_KT = _stats(logits, index, ("entropy",), temperature, row_mask)
    entropy = stats_KT[ENTROPY].view(index.shape)
    return stats_KT[LOGPS].view(index.shape), entropy if entropy_requires_grad else entropy.detach()


def _stats(
    logits: Tensor, index: Tensor, wanted: tuple[str, ...], temperature: float, row_mask: Tensor | None
) -> Tensor:
    if index.shape != logits.shape[:-1]:
        raise ValueError(f"expected an index of shape {tuple(logits.shape[:-1])}, got {tuple(index.shape)}")
    _check_mask(row_mask, index)
    targets_T = index.reshape(-1).to(torch.int64)
    if row_mask is not None:
        targets_T = targets_T.masked_fill(row_mask.reshape(-1) == 0, _IGNORED)
    options = row_options(1.0, None, temperature, _IGNORED, wanted)
    return row_stats(logits.reshape(-1, logits.shape[-1]), targets_T, options)


def _check_mask(row_mask: Tensor | None, index: Tensor) -> None:
    if row_mask is not None and row_mask.shape != index.shape:
        raise ValueError(
            f"row_mask must be of index's shape {tuple(index.shape)}, got {tuple(row_mask.shape)}"
        )
