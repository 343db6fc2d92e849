"""policy_loss inside linear_loss: a whole policy step, head and loss chunk by chunk.

Letters: T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.heads import Gemms
from ops.policies import COMPILED, Tokens, needed
from torch import Tensor

from alignfast.kernels import linear_loss, policy_loss
from alignfast.kernels._policy import LOSSES

STEPS = [(name, "torch") for name in LOSSES] + [(name, "native") for name in COMPILED]


@pytest.mark.parametrize(
    "chunk_rows", [64, 20, 11], ids=["one chunk", "chunks", "sequences longer than a chunk"]
)
@pytest.mark.parametrize(("name", "backend"), STEPS)
def test_a_whole_policy_step(name: str, chunk_rows: int, backend: str) -> None:
    """Head and loss chunk by chunk equal the plain computation: loss, metrics, gradients of hidden states and head."""
    dtype = torch.float64 if backend == "torch" else torch.float32
    close = {"rtol": 1e-9, "atol": 1e-12} if backend == "torch" else {"rtol": 1e-4, "atol": 1e-6}
    tokens, generator = Tokens([12, 4, 15, 1, 8], dtype), torch.Generator().manual_seed(1)
    leaves = [torch.randn(n, 16, generator=generator).to(dtype).requires_grad_() for n in (40, 60)]
    hidden_TD, weight_VD = leaves
    targets_T = torch.randint(0, 60, (40,), generator=generator)
    logps_TV = (hidden_TD @ weight_VD.T).log_softmax(1)
    logps_T = logps_TV.gather(1, targets_T[:, None])[:, 0]
    entropy_T = -(logps_TV.exp() * logps_TV).sum(1)
    noise_T = 0.3 * torch.randn(2, 40, generator=generator)
    tokens.old_T, tokens.ref_T = logps_T.detach() + noise_T[0], logps_T.detach() + noise_T[1]
    num_items = 5 if LOSSES[name].counts == "sequences" else int(tokens.mask_T.sum())
    options = needed(name) | {"beta": 0.1, "entropy_coef": 0.01, "num_items": num_items}
    constants = tokens.tensors(logps_T)

    def loss_fn(stats: Any, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        part = {key: x_T[rows] for key, x_T in constants.items()}
        loss_T, metrics = policy_loss(
            stats.logps, **part, **options, entropy_T=stats.entropy, loss_type=name, backend=backend
        )
        return loss_T.sum(), metrics

    loss, metrics = linear_loss(
        *leaves,
        targets_T,
        loss_fn,
        stats=("logps", "entropy"),
        group_sizes=tokens.lengths,
        chunk_rows=chunk_rows,
    )
    plain_T, expected = policy_loss(
        logps_T, **constants, **options, entropy_T=entropy_T, loss_type=name, backend="torch"
    )
    torch.testing.assert_close(loss, plain_T.sum(), **close)
    assert metrics.keys() == expected.keys()
    for key, value in metrics.items():
        torch.testing.assert_close(value, expected[key], **close)
    for actual, wanted in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(plain_T.sum(), leaves)):
        torch.testing.assert_close(actual, wanted, **close)


@pytest.mark.parametrize(("name", "backend"), STEPS)
def test_a_step_is_three_gemms_of_the_head(name: str, backend: str) -> None:
    """The two of the backward pass on tokens that have a gradient alone: not masked, not clipped, of some advantage."""
    tokens, generator = Tokens([12, 4, 15, 1, 8]), torch.Generator().manual_seed(1)
    hidden_TD, weight_VD = (torch.randn(n, 16, generator=generator).requires_grad_() for n in (40, 60))
    targets_T = torch.randint(0, 60, (40,), generator=generator)
    tokens.advantages_T[12:16] = 0  # of the second completion
    num_items = 5 if LOSSES[name].counts == "sequences" else int(tokens.mask_T.sum())
    options = needed(name) | {"num_items": num_items, "loss_type": name, "backend": backend}
    constants = {key: x_T for key, x_T in tokens.tensors(tokens.logps_T).items() if key != "ref_logps_T"}
    logps_T = (hidden_TD @ weight_VD.T).log_softmax(1).gather(1, targets_T[:, None])[:, 0].detach()
    constants["old_logps_T"] = logps_T + 0.3 * torch.randn(40, generator=generator)
    logps_T.requires_grad_()
    (slope_T,) = torch.autograd.grad(policy_loss(logps_T, **constants, **options)[0].sum(), logps_T)
    active = int((slope_T != 0).sum())
    assert active < int(tokens.mask_T.sum())

    def loss_fn(stats: Any, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        part = {key: x_T[rows] for key, x_T in constants.items()}
        loss_T, metrics = policy_loss(stats.logps, **part, **options)
        return loss_T.sum(), metrics

    with Gemms() as gemms:
        linear_loss(hidden_TD, weight_VD, targets_T, loss_fn, group_sizes=tokens.lengths, chunk_rows=64)[
            0
        ].backward()
    assert gemms.shapes == [(40, 16, 60), (active, 60, 16), (60, active, 16)]


def test_on_policy_inside_linear_loss() -> None:
    """The old log-probs may be the new ones, detached within the loss."""
    hidden_TD, targets_T = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), torch.arange(9)
    advantages_T = torch.linspace(-1, 1, 9)

    def loss_fn(stats: Any, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        loss_T, metrics = policy_loss(stats.logps, stats.logps.detach(), advantages_T[rows], num_items=9)
        return loss_T.sum(), metrics

    leaf_TD = hidden_TD.requires_grad_()
    weight_VD = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    loss, metrics = linear_loss(leaf_TD, weight_VD, targets_T, loss_fn, chunk_rows=4)
    logps_T = (leaf_TD @ weight_VD.T).log_softmax(1).diagonal()
    expected_TD = torch.autograd.grad((-logps_T * advantages_T).sum() / 9, leaf_TD)[0]
    assert metrics["max_ratio"] == 1
    torch.testing.assert_close(torch.autograd.grad(loss, leaf_TD)[0], expected_TD, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("name", "backend"), [("grpo", "native"), ("dapo", "torch"), ("sapo", "torch")])
def test_a_step_compiles_into_one_graph(name: str, backend: str) -> None:
    tokens, generator = Tokens([6, 3, 4]), torch.Generator().manual_seed(0)
    leaves = [torch.randn(n, 8, generator=generator).requires_grad_() for n in (13, 20)]
    targets_T = torch.randint(0, 20, (13,), generator=generator)
    constants = tokens.tensors(tokens.logps_T)
    options = {"beta": 0.1, "entropy_coef": 0.01, "num_items": 3, "loss_type": name, "backend": backend}

    def loss_fn(stats: Any, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        part = {key: x_T[rows] for key, x_T in constants.items()}
        loss_T, metrics = policy_loss(stats.logps, **part, **options, entropy_T=stats.entropy)
        return loss_T.sum(), metrics

    def step(hidden_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return linear_loss(
            hidden_TD, weight_VD, targets_T, loss_fn, stats=("logps", "entropy"), group_sizes=(6, 3, 4), chunk_rows=9
        )  # fmt: skip

    torch._dynamo.reset()
    expected, actual = step(*leaves), torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
    assert actual[0].item() == pytest.approx(expected[0].item(), rel=1e-6)
    assert {k: v.item() for k, v in actual[1].items()} == pytest.approx(
        {k: v.item() for k, v in expected[1].items()}
    )
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss, _ in (actual, expected))):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
