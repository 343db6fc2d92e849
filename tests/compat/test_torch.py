"""`alignfast.compat.torch` against PyTorch's own `linear_cross_entropy`: values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from alignfast.compat.torch import linear_cross_entropy

theirs = getattr(F, "linear_cross_entropy", None)
pytestmark = pytest.mark.skipif(theirs is None, reason="this PyTorch has no linear_cross_entropy (2.13 has)")
GENERATOR = torch.Generator().manual_seed(0)
INPUT, WEIGHT, BIAS, CLASS_WEIGHT = (
    torch.randn(*shape, dtype=torch.float64, generator=GENERATOR) for shape in ((7, 5), (37, 5), (37,), (37,))
)
TARGET = torch.tensor([0, 36, -100, 5, 3, -100, 9])


def run(f: Any, dtype: torch.dtype = torch.float64, bias: bool = False, **options: Any) -> list[Tensor]:
    """Value and gradients, of losses that weigh differently where there are several."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in (INPUT, WEIGHT, BIAS)]
    loss = f(leaves[0], leaves[1], TARGET, linear_bias=leaves[2] if bias else None, **options)
    (loss * torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)).sum().backward()
    return [loss.detach(), *(x.grad for x in leaves if x.grad is not None)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True}, {"weight": CLASS_WEIGHT.abs()}, {"label_smoothing": 0.2}, {"ignore_index": 5}],
    ids=["plain", "bias", "class weights", "smoothing", "ignored"],
)
def test_values_and_gradients(options: dict[str, Any], reduction: str) -> None:
    if "ignore_index" in options:
        options = {**options}
        target = TARGET.masked_fill(TARGET == -100, 5)
        ours_and_theirs = [
            run(lambda x, w, _, f=f, **o: f(x, w, target, **o), reduction=reduction, **options)
            for f in (linear_cross_entropy, theirs)
        ]
    else:
        ours_and_theirs = [run(f, reduction=reduction, **options) for f in (linear_cross_entropy, theirs)]
    for x, y in zip(*ours_and_theirs):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_row(reduction: str) -> None:
    arguments = (INPUT[0], WEIGHT, TARGET[1])
    assert theirs is not None
    torch.testing.assert_close(
        linear_cross_entropy(*arguments, reduction=reduction), theirs(*arguments, reduction=reduction)
    )


def test_nothing_counts() -> None:
    """A mean over no rows is NaN there and here."""
    target = torch.full((7,), -100)
    assert theirs is not None
    assert theirs(INPUT, WEIGHT, target).isnan()
    assert linear_cross_entropy(INPUT, WEIGHT, target).isnan()


def test_sixteen_bits_give_float32_where_theirs_stay_at_sixteen() -> None:
    ours, *grads = run(linear_cross_entropy, torch.bfloat16)
    assert ours.dtype == torch.float32
    assert all(grad.dtype == torch.bfloat16 for grad in grads)
    assert run(theirs, torch.bfloat16)[0].dtype == torch.bfloat16
    # bf16 inputs keep 3 digits
    torch.testing.assert_close(ours, run(theirs, torch.float32)[0], rtol=0.02, atol=0)


def test_options_of_chunks() -> None:
    options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=2)
    torch.testing.assert_close(
        linear_cross_entropy(INPUT, WEIGHT, TARGET, options=options), theirs(INPUT, WEIGHT, TARGET)
    )
    refused = {"allow_retain_graph": True, "chunking_method": "aspect_ratio:2", "acc_policy": "compact"}
    for name, value in refused.items():
        with pytest.raises(ValueError, match=rf"options\.{name}="):
            linear_cross_entropy(
                INPUT, WEIGHT, TARGET, options=torch.nn.LinearCrossEntropyOptions(**{name: value})
            )


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((INPUT, WEIGHT, torch.rand(7, 37)), {}, "probabilities"),
        ((INPUT, WEIGHT[:, None], TARGET), {}, "several dimensions"),
        ((INPUT, WEIGHT, TARGET), {"weight": CLASS_WEIGHT, "label_smoothing": 0.1}, "together"),
        ((INPUT, WEIGHT, TARGET), {"reduction": "median"}, "reduction"),
        ((INPUT, WEIGHT, TARGET), {"label_smoothing": 1.5}, "label_smoothing"),
    ],
)
def test_what_is_not_fused_is_refused(arguments: tuple, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        linear_cross_entropy(*arguments, **options)
