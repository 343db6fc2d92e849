"""`alignfast.compat.trl` against TRL's own functions: values, gradients, masks and defaults."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from alignfast.compat import trl as ours

theirs = pytest.importorskip("trl.trainer.utils", reason="TRL is not installed")


def gradient(of: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    """A function's value, and the gradient of a sum of its entries in which each weighs differently."""
    leaf = logits.clone().requires_grad_()
    value = of(leaf)
    weights = torch.linspace(0.5, 2.0, value.numel(), dtype=torch.float64).view(value.shape)
    (value.double() * weights).sum().backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def same(a: Callable[[Tensor], Tensor], b: Callable[[Tensor], Tensor], logits: Tensor) -> None:
    for x, y in zip(gradient(a, logits), gradient(b, logits)):
        torch.testing.assert_close(x, y)


# 37 columns: no multiple of any block. float64, so that the two may differ by their own rounding alone.
LOGITS = 3 * torch.randn(2, 5, 37, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
INDEX = torch.randint(37, (2, 5), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("row_mask", [None, MASK])
def test_selected_log_probs(temperature: float, row_mask: Tensor | None) -> None:
    def call(module: object) -> Callable[[Tensor], Tensor]:
        return lambda x: module.selective_log_softmax(x, INDEX, temperature, row_mask)  # type: ignore[attr-defined]

    same(call(ours), call(theirs), LOGITS)


@pytest.mark.parametrize("masked", [False, True])
def test_several_indices_a_row(masked: bool) -> None:
    index = torch.stack((INDEX, (INDEX + 3) % 37, INDEX), -1)
    row_mask = torch.stack((MASK, MASK, 1 - MASK), -1) if masked else None

    def call(module: object) -> Callable[[Tensor], Tensor]:
        return lambda x: module.selective_log_softmax(x, index, 1.3, row_mask)  # type: ignore[attr-defined]

    same(call(ours), call(theirs), LOGITS)


def test_entropy() -> None:
    same(ours.entropy_from_logits, lambda x: theirs.entropy_from_logits(x, chunk_size=3), LOGITS)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_both_in_one_pass(requires_grad: bool) -> None:
    """Also that the entropy is of the distribution at the temperature, and where it has a gradient."""

    def call(module: object) -> Callable[[Tensor], Tensor]:
        def both(x: Tensor) -> Tensor:
            f = module.selective_log_softmax_and_entropy  # type: ignore[attr-defined]
            return torch.cat(f(x, INDEX, requires_grad, temperature=0.8, row_mask=MASK))

        return both

    same(call(ours), call(theirs), LOGITS)
    logps, entropy = ours.selective_log_softmax_and_entropy(
        LOGITS.clone().requires_grad_(), INDEX, requires_grad
    )
    assert logps.requires_grad
    assert entropy.requires_grad == requires_grad


def test_sixteen_bits_give_float32_where_theirs_stay_at_sixteen() -> None:
    logits = LOGITS.bfloat16()
    value, grad = gradient(lambda x: ours.selective_log_softmax(x, INDEX), logits)
    assert value.dtype == torch.float32
    assert grad.dtype == torch.bfloat16
    assert theirs.selective_log_softmax(logits, INDEX).dtype == torch.bfloat16
    torch.testing.assert_close(value, theirs.selective_log_softmax(logits.float(), INDEX))


def test_no_rows() -> None:
    logits, index = torch.empty(0, 3, 7), torch.empty(0, 3, dtype=torch.int64)
    assert ours.selective_log_softmax(logits, index).shape == (0, 3)
    assert ours.entropy_from_logits(logits).shape == (0, 3)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="index of shape"):
        ours.selective_log_softmax(LOGITS, INDEX[:1])
    with pytest.raises(ValueError, match="row_mask must be"):
        ours.selective_log_softmax(LOGITS, INDEX, row_mask=MASK[:1])
    with pytest.raises(ValueError, match="temperature must be a positive"):
        ours.selective_log_softmax(LOGITS, INDEX, temperature=0.0)
    with pytest.raises(ValueError, match="chunk_size"):
        ours.entropy_from_logits(LOGITS, chunk_size=0)
