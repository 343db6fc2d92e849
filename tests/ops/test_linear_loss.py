"""`linear_loss`: every sentence of its contract.

Letters: T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.heads import HEAD, D, Inputs, T, V, assert_close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from alignfast.kernels import Stats, linear_loss, linear_token_logps


# 7 leaves ragged chunks; groups of 5, 20 and 12 rows in tiles of 9 need the two-pass way; 64 holds all at once
@pytest.mark.parametrize(
    "plan",
    [
        {},
        {"chunk_rows": 7},
        {"group_sizes": [5, 20, 12], "chunk_rows": 9},
        {"group_sizes": [T], "chunk_rows": 64},
    ],
)
@pytest.mark.parametrize("head", [{}, HEAD])
def test_values_and_gradients(plan: dict, head: dict) -> None:
    inputs = Inputs()
    expected_T = inputs.expected(**head)
    expected = (expected_T * inputs.advantage_T).sum()
    loss, metrics = linear_loss(
        inputs.hidden_TD,
        inputs.weight_VD,
        inputs.targets_T,
        inputs.loss_fn,
        bias_V=inputs.bias_V,
        **plan,
        **head,
    )
    assert_close((loss,), (expected,))
    assert_close((metrics["sum"], metrics["max_logp"], metrics["min_logp"]),
                 (expected_T.sum(), expected_T.max(), expected_T.min()))  # fmt: skip
    upstream = 3.5  # not 1: the gradients are known before it is
    assert_close(
        torch.autograd.grad(upstream * loss, inputs.leaves),
        torch.autograd.grad(upstream * expected, inputs.leaves),
    )


@pytest.mark.parametrize("field", ["lse", "entropy", "mean_logit", "sum_sq_probs"])
def test_every_statistic_is_differentiable(field: str) -> None:
    inputs = Inputs()
    logits_TV = inputs.hidden_TD @ inputs.weight_VD.T + inputs.bias_V
    p_TV = logits_TV.softmax(1)
    value_T = {
        "lse": logits_TV.logsumexp(1),
        "entropy": -(p_TV * p_TV.log()).sum(1),
        "mean_logit": logits_TV.mean(1),
        "sum_sq_probs": p_TV.square().sum(1),
    }[field]
    kept_T = (inputs.targets_T != -100) * inputs.advantage_T
    loss, _ = linear_loss(
        inputs.hidden_TD,
        inputs.weight_VD,
        inputs.targets_T,
        lambda stats, rows: ((getattr(stats, field) * inputs.advantage_T[rows]).sum(), {}),
        stats=(field,),
        bias_V=inputs.bias_V,
        chunk_rows=10,
    )
    assert_close(
        torch.autograd.grad(loss, inputs.leaves), torch.autograd.grad((value_T * kept_T).sum(), inputs.leaves)
    )


def test_statistics_on_demand() -> None:
    inputs = Inputs()
    seen: list[Stats] = []

    def loss_fn(stats: Stats, rows: slice) -> tuple[Tensor, dict]:
        seen.append(stats)
        return stats.logps.sum(), {"top1": stats.is_top1.sum()}

    _, metrics = linear_loss(
        inputs.hidden_TD,
        inputs.weight_VD,
        inputs.targets_T,
        loss_fn,
        stats=("logps", "is_top1"),
        bias_V=inputs.bias_V,
    )
    assert seen[0].entropy is None
    assert seen[0].lse is None
    logits_TV = inputs.hidden_TD @ inputs.weight_VD.T + inputs.bias_V
    assert metrics["top1"] == (logits_TV.argmax(1) == inputs.targets_T).sum()
    with pytest.raises(ValueError, match="'surprise'; known are logps"):
        linear_loss(inputs.hidden_TD, inputs.weight_VD, inputs.targets_T, loss_fn, stats=("surprise",))


def test_groups_reach_the_loss_whole() -> None:
    inputs = Inputs()
    sizes, calls = [5, 0, 20, 4, 8], []

    def loss_fn(stats: Stats, rows: slice) -> tuple[Tensor, dict]:
        calls.append((rows.start, rows.stop, len(stats.logps)))
        return stats.logps.sum(), {}

    linear_loss(
        inputs.hidden_TD, inputs.weight_VD, inputs.targets_T, loss_fn, group_sizes=sizes, chunk_rows=12
    )
    assert calls == [(0, 5, 5), (5, 25, 20), (25, 37, 12)]
    for wrong in ([5, 5], [40, -3]):
        with pytest.raises(ValueError, match="sum to the 37 rows"):
            linear_loss(inputs.hidden_TD, inputs.weight_VD, inputs.targets_T, loss_fn, group_sizes=wrong)


def test_a_loss_that_couples_tokens_is_the_same_in_two_passes() -> None:
    inputs = Inputs()

    def loss_fn(stats: Stats, rows: slice) -> tuple[Tensor, dict]:
        return stats.logps.sum().square() / 100, {}

    results = []
    for chunk_rows in (64, 5):
        loss, _ = linear_loss(
            inputs.hidden_TD,
            inputs.weight_VD,
            inputs.targets_T,
            loss_fn,
            group_sizes=[T],
            chunk_rows=chunk_rows,
        )
        results.append((loss, *torch.autograd.grad(loss, inputs.leaves[:2])))
    assert_close(results[1], results[0])


@pytest.mark.parametrize("frozen", [False, True], ids=["", "all else frozen"])
def test_captured_gradients_are_refused(frozen: bool) -> None:
    inputs = Inputs()
    arguments = *(x.detach() if frozen else x for x in inputs.leaves[:2]), inputs.targets_T
    captured = torch.ones((), requires_grad=True, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="captured a tensor that requires a gradient"):
        linear_loss(*arguments, lambda s, rows: (s.logps.sum() * captured, {}))
    linear_loss(*arguments, lambda s, rows: (s.logps.sum() * captured.detach(), {}))
    with torch.no_grad():  # an evaluation, where nothing gets a gradient
        linear_loss(*arguments, lambda s, rows: (s.logps.sum() * captured, {}))


def test_second_derivative_is_refused() -> None:
    inputs = Inputs()
    arguments = (inputs.hidden_TD, inputs.weight_VD, inputs.targets_T)
    for op, value in (
        ("linear_loss", linear_loss(*arguments, inputs.loss_fn)[0]),
        ("linear_token_logps", linear_token_logps(*arguments).sum()),
    ):
        # recorded, which is no crime
        first = torch.autograd.grad(value, inputs.hidden_TD, create_graph=True)[0]
        with pytest.raises(RuntimeError, match=f"{op} has no second derivative"):
            torch.autograd.grad(first.sum(), inputs.weight_VD)


def test_first_derivatives_work_under_torch_func() -> None:
    inputs = Inputs()
    hidden_TD, weight_VD = (x.detach() for x in inputs.leaves[:2])
    got = torch.func.grad(lambda h: linear_token_logps(h, weight_VD, inputs.targets_T).sum())(hidden_TD)
    logps_T = linear_token_logps(inputs.hidden_TD, weight_VD, inputs.targets_T)
    assert_close((got,), torch.autograd.grad(logps_T.sum(), inputs.hidden_TD))


def test_backward_twice_gives_the_same() -> None:
    inputs = Inputs()
    loss, _ = linear_loss(inputs.hidden_TD, inputs.weight_VD, inputs.targets_T, inputs.loss_fn, chunk_rows=10)
    first = torch.autograd.grad(loss, inputs.leaves[:2], retain_graph=True)
    second = torch.autograd.grad(loss, inputs.leaves[:2])
    assert all(torch.equal(x, y) for x, y in zip(first, second))


def test_gradients_of_several_upstreams_at_once() -> None:
    inputs = Inputs()
    upstream_2 = torch.tensor([1.0, -2.0], dtype=torch.float64)

    def loss() -> Tensor:
        return linear_loss(inputs.hidden_TD, inputs.weight_VD, inputs.targets_T, inputs.loss_fn)[0]

    def gradient(loss: Tensor, upstream: Tensor, **options: bool) -> Tensor:
        return torch.autograd.grad(loss, inputs.hidden_TD, upstream.to(loss.dtype), **options)[0]

    expected_2TD = torch.stack([gradient(loss(), one) for one in upstream_2])
    assert torch.equal(gradient(loss(), upstream_2, is_grads_batched=True), expected_2TD)
    assert torch.equal(torch.vmap(gradient, (None, 0))(loss(), upstream_2), expected_2TD)


def test_the_weights_gradient_is_held_once() -> None:
    """What the walk summed is what `weight.grad` is in the end; a graph that is kept must keep its own."""
    inputs = Inputs()
    arguments = (inputs.hidden_TD, inputs.weight_VD, inputs.targets_T, inputs.loss_fn)
    for kept in (False, True):
        loss, _ = linear_loss(*arguments)
        summed = loss.grad_fn.saved_tensors[4]  # type: ignore[union-attr]
        place = summed.data_ptr()
        del summed
        inputs.weight_VD.grad = None
        (3 * loss).backward(retain_graph=kept)
        assert (inputs.weight_VD.grad.data_ptr() == place) is not kept


def test_gradients_add_up_over_calls_in_flight() -> None:
    """Two losses formed before either backward: the lent workspaces must not be shared between them."""
    inputs = Inputs()
    arguments = (inputs.hidden_TD, inputs.weight_VD, inputs.targets_T)
    alone, _ = linear_loss(*arguments, inputs.loss_fn)
    expected = torch.autograd.grad(alone, inputs.leaves[:2])
    first, _ = linear_loss(*arguments, inputs.loss_fn)
    second, _ = linear_loss(*arguments, lambda s, rows: (2 * inputs.loss_fn(s, rows)[0], {}))
    got = torch.autograd.grad(first + second, inputs.leaves[:2])
    assert_close(got, tuple(3 * x for x in expected))


def test_a_loss_may_call_the_head_itself() -> None:
    inputs = Inputs()
    arguments = (inputs.hidden_TD, inputs.weight_VD, inputs.targets_T)
    with torch.no_grad():
        reference_T = linear_token_logps(*arguments)

    def loss_fn(stats: Stats, rows: slice) -> tuple[Tensor, dict]:
        with torch.no_grad():
            again_T = linear_token_logps(*(x.detach() for x in arguments[:2]), arguments[2])
        return (stats.logps * (1 + again_T[rows])).sum(), {}

    loss, _ = linear_loss(*arguments, loss_fn, chunk_rows=10)
    expected, _ = linear_loss(*arguments, lambda s, rows: ((s.logps * (1 + reference_T[rows])).sum(), {}))
    assert_close((loss,), (expected,))


@pytest.mark.parametrize("tokens", [0, 4])
def test_no_tokens_and_all_ignored(tokens: int) -> None:
    inputs = Inputs()
    targets_T = torch.full((tokens,), -100)
    loss, metrics = linear_loss(
        inputs.hidden_TD[:tokens],
        inputs.weight_VD,
        targets_T,
        lambda s, rows: (s.logps.sum(), {"n": s.logps.sum()}),
    )
    loss.backward()
    assert loss == 0
    assert metrics["n"] == 0
    assert not inputs.hidden_TD.grad.any()
    assert not inputs.weight_VD.grad.any()


def test_inputs_are_never_written_to() -> None:
    inputs = Inputs()
    before = [x.detach().clone() for x in (*inputs.leaves, inputs.targets_T)]
    loss, _ = linear_loss(
        inputs.hidden_TD,
        inputs.weight_VD,
        inputs.targets_T,
        inputs.loss_fn,
        bias_V=inputs.bias_V,
        chunk_rows=10,
    )
    loss.backward()
    linear_token_logps(
        inputs.hidden_TD, inputs.weight_VD, inputs.targets_T, bias_V=inputs.bias_V
    ).sum().backward()
    assert all(torch.equal(x, y) for x, y in zip(before, (*inputs.leaves, inputs.targets_T)))


def test_autocast_casts_the_head_once() -> None:
    inputs = Inputs(torch.float32)
    casts = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ == "_to_copy" and result.shape == (V, D):
                casts.append(result.dtype)
            return result

    with Casts(), torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear_loss(
            inputs.hidden_TD, inputs.weight_VD, inputs.targets_T, inputs.loss_fn, chunk_rows=5
        )
    # once to autocast's type and, on a CPU, once to the float32 that its GEMMs run in
    assert casts == [torch.bfloat16, torch.float32]
    loss.backward()
    assert inputs.weight_VD.grad.dtype == torch.float32


def test_compiles_into_one_graph() -> None:
    inputs = Inputs(torch.float32)

    def call(hidden_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
        loss, metrics = linear_loss(
            hidden_TD,
            weight_VD,
            inputs.targets_T,
            lambda s, rows: (s.logps.sum(), {"sum": s.logps.sum()}),
            chunk_rows=16,
        )
        return loss + linear_token_logps(hidden_TD, weight_VD, inputs.targets_T).sum(), metrics["sum"]

    expected, _ = call(*inputs.leaves[:2])
    gradients = torch.autograd.grad(expected, inputs.leaves[:2])
    got, _ = torch.compile(call, fullgraph=True)(*inputs.leaves[:2])
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, inputs.leaves[:2]), gradients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_TD": torch.zeros(T, D + 1)}, r"expected hidden \(T, D\) and weight \(V, D\)"),
        ({"targets_T": torch.zeros(T, dtype=torch.int32)}, "expected int64 targets"),
        ({"weight_VD": torch.zeros(V, D, dtype=torch.float32)}, "cast one of them"),
        ({"targets_T": torch.full((T,), V)}, rf"must lie in \[0, {V}\)"),
        ({"bias_V": torch.zeros(3)}, "expected a bias of shape"),
        ({"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        ({"softcap": -1.0}, "softcap must be a positive number"),
        ({"backend": "cuda"}, "is not one of auto, torch, native, triton"),
    ],
)
def test_bad_input_says_what_came(change: dict, message: str) -> None:
    inputs = Inputs()
    arguments: dict[str, Any] = {
        "hidden_TD": inputs.hidden_TD,
        "weight_VD": inputs.weight_VD,
        "targets_T": inputs.targets_T,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        linear_token_logps(**arguments)
    with pytest.raises(ValueError, match=message):
        linear_loss(**arguments, loss_fn=inputs.loss_fn)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda s: (s.logps, {}), r"'loss' came with shape \(37,\): sum a vector"),
        (lambda s: (0.0, {}), "'loss' came with a float: sum a vector, make a number a tensor"),
        (lambda s: (s.logps.sum(), {"logps": s.logps}), r"'logps' came with shape \(37,\)"),
        (lambda s: (s.logps.sum(), {"tokens": 37.0}), "'tokens' came with a float"),
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_what_a_loss_returns_are_scalars(returned: Any, message: str, frozen: bool) -> None:
    inputs = Inputs()
    leaves = [x.detach() if frozen else x for x in inputs.leaves[:2]]
    with pytest.raises(ValueError, match=f"0-d loss and a dict of 0-d metrics.*{message}"):
        linear_loss(*leaves, inputs.targets_T, lambda s, rows: returned(s))


def test_no_statistics_are_refused() -> None:
    inputs = Inputs()
    with pytest.raises(ValueError, match=r"stats is empty.*name one of logps, lse"):
        linear_loss(inputs.hidden_TD, inputs.weight_VD, inputs.targets_T, inputs.loss_fn, stats=())
