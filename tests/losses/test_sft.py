"""SFT's losses through `linear_loss`, against cross-entropy on logits in full.

Letters: P predictions, D width, V vocabulary.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from alignfast.kernels import linear_loss
from alignfast.losses import SFT_STATS, sft_counts, sft_loss

P, D, V = 23, 8, 41
GENERATOR = torch.Generator().manual_seed(0)
HIDDEN_PD = torch.randn(P, D, generator=GENERATOR, dtype=torch.float64)
WEIGHT_VD = torch.randn(V, D, generator=GENERATOR, dtype=torch.float64)
TARGETS_P = torch.randint(0, V, (P,), generator=GENERATOR)


def run(rows: slice, loss_type: str, chunk_rows: int | None = None) -> tuple:
    """Loss, metrics and gradients of some rows as a micro-batch of a step of P tokens."""
    leaves = HIDDEN_PD[rows].clone().requires_grad_(), WEIGHT_VD.clone().requires_grad_()
    loss_fn = sft_loss(P, loss_type=loss_type)
    loss, metrics = linear_loss(*leaves, TARGETS_P[rows], loss_fn, stats=SFT_STATS, chunk_rows=chunk_rows)
    return loss, metrics, *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("chunk_rows", [None, 5])
def test_nll_is_cross_entropy(chunk_rows: int | None) -> None:
    loss, metrics, *gradients = run(slice(None), "nll", chunk_rows)
    hidden_PD, weight_VD = HIDDEN_PD.clone().requires_grad_(), WEIGHT_VD.clone().requires_grad_()
    logits_PV = hidden_PD @ weight_VD.T
    expected = cross_entropy(logits_PV, TARGETS_P)
    assert torch.allclose(loss.double(), expected, rtol=1e-12)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, (hidden_PD, weight_VD))):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-15)
    means = {name: value / sft_counts(P)[name] for name, value in metrics.items()}
    p_PV = logits_PV.detach().softmax(1)
    assert means["entropy"].item() == pytest.approx(-(p_PV * p_PV.log()).sum(1).mean().item())
    assert means["mean_token_accuracy"] == (p_PV.argmax(1) == TARGETS_P).double().mean()


def test_dft_weighs_by_a_fixed_probability() -> None:
    """Its gradient is that of nll with each token's weight p, which has no gradient of its own."""
    loss, _, dhidden_PD, _ = run(slice(None), "dft")
    hidden_PD = HIDDEN_PD.clone().requires_grad_()
    nll_P = cross_entropy(hidden_PD @ WEIGHT_VD.T, TARGETS_P, reduction="none")
    expected = ((-nll_P).exp().detach() * nll_P).mean()
    assert torch.allclose(loss.double(), expected, rtol=1e-12)
    assert torch.allclose(dhidden_PD, torch.autograd.grad(expected, hidden_PD)[0], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_micro_batches_add_up(loss_type: str) -> None:
    """Uneven ones: the normaliser is the step's, so they sum to the batch."""
    whole = run(slice(None), loss_type)
    parts = [run(rows, loss_type) for rows in (slice(0, 3), slice(3, 20), slice(20, P))]
    assert sum(part[0] for part in parts).item() == pytest.approx(whole[0].item(), rel=1e-12)
    assert torch.allclose(torch.cat([part[2] for part in parts]), whole[2], rtol=1e-12)
    assert torch.allclose(sum(part[3] for part in parts), whole[3], rtol=1e-12)
    for name, value in whole[1].items():
        assert sum(part[1][name] for part in parts).item() == pytest.approx(value.item())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="loss_type='mse' is not one of nll, dft"):
        sft_loss(5, loss_type="mse")
    with pytest.raises(ValueError, match=r"at least one token.*num_tokens=0"):
        sft_loss(0)
