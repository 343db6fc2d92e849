"""preference_loss on every backend: packed against summed, compiled code against the definition.

Letters: N pairs, P tokens of all completions, M = 2N + 1 offsets.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import conformance as c
from ops.pairs import (
    COMPILED,
    Packed,
    Pairs,
    every_compiled_loss,
    every_loss,
    on_every_backend,
    ragged,
    smoothing_of,
)
from torch import Tensor

from alignfast.kernels import packed_preference_loss, preference_loss
from alignfast.kernels._pairwise import LOSSES


@every_loss
def test_packed_is_summed(name: str) -> None:
    """Values and gradients equal preference_loss on sums; lengths are the differences of the offsets."""
    packed = Packed([3, 5, 1, 1, 4, 2, 7, 3], torch.float64)
    tokens_N2 = packed.offsets_M.diff().view(-1, 2)
    options = {"beta": 0.3, "label_smoothing": smoothing_of(name), "loss_type": name, "backend": "torch"}
    refs = packed.refs if LOSSES[name].reference else ()
    logps_P = packed.logps_P.requires_grad_()
    out = packed_preference_loss(logps_P, packed.offsets_M, *refs, **options)
    sums_N2 = packed.sums(logps_P.detach()).requires_grad_()
    loss_N, *rewards = preference_loss(
        *sums_N2.unbind(1), *refs, chosen_len_N=tokens_N2[:, 0], rejected_len_N=tokens_N2[:, 1], **options
    )
    assert torch.allclose(out.loss_N, loss_N, rtol=1e-13)
    assert torch.allclose(torch.stack(out[1:3]), torch.stack(rewards), rtol=1e-13)
    assert torch.allclose(torch.stack(out[3:]), sums_N2.T, rtol=1e-13)
    upstream_N = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (tokens_gradient_P,) = torch.autograd.grad(out.loss_N, logps_P, upstream_N)
    (sums_gradient_N2,) = torch.autograd.grad(loss_N, sums_N2, upstream_N)
    expected_P = sums_gradient_N2.flatten().repeat_interleave(packed.offsets_M.diff())
    assert torch.allclose(tokens_gradient_P, expected_P, rtol=1e-13)
    assert not any(metric_N.requires_grad for metric_N in out[1:])


# N: 1 alone; 33, more pairs than threads with a ragged last share. Lengths: a token each, short, past a block.
@pytest.mark.parametrize(("N", "longest"), [(1, 5), (33, 1), (33, 40), (9, 1500)])
@every_compiled_loss
@on_every_backend
def test_holds(backend: str, device: str, name: str, N: int, longest: int) -> None:
    packed, crowd = Packed(ragged(N, longest)), Packed(ragged(33, longest), seed=1)
    run = lambda x_P: packed.run(x_P, name, backend)  # noqa: E731
    c.conform(run, packed.case(device, name), crowd=crowd.case(device, name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@on_every_backend
def test_16_bit_log_probs_are_read_as_float32(backend: str, device: str, dtype: torch.dtype) -> None:
    packed = Packed(ragged(33, 40), dtype)
    c.conform(lambda x_P: packed.run(x_P, "sigmoid", backend), packed.case(device, "sigmoid"))
    assert packed.run(packed.logps_P.to(device), "sigmoid", backend)[0].dtype == torch.float32


@pytest.mark.parametrize("layout", ["every second", "one token expanded", "not aligned"])
@on_every_backend
def test_strides(backend: str, device: str, layout: str) -> None:
    packed = Packed(ragged(33, 40))
    P = len(packed.logps_P)
    logps_P = {
        "every second": torch.stack((packed.logps_P, torch.full((P,), math.nan)), 1)[:, 0],
        "one token expanded": packed.logps_P[:1].expand(P),
        "not aligned": torch.cat((torch.zeros(1), packed.logps_P))[1:],
    }[layout]
    case = packed.case(device, "sigmoid", logps_P)
    c.conform(lambda x_P: packed.run(x_P, "sigmoid", backend), case)


@every_compiled_loss
@on_every_backend
def test_no_pairs(backend: str, device: str, name: str) -> None:
    packed = Packed([])
    logps_P = packed.logps_P.to(device).requires_grad_()
    out = packed.run(logps_P, name, backend)
    (gradient_P,) = torch.autograd.grad(out[0].sum(), logps_P)
    assert [len(x_N) for x_N in out] == [0] * 5
    assert len(gradient_P) == 0


@every_compiled_loss
@on_every_backend
def test_large_log_probs(backend: str, device: str, name: str) -> None:
    """Tokens down to -1e4: margins of 1e5 on either side."""
    packed = Packed(ragged(33, 9), spread=1e4)
    c.conform(lambda x_P: packed.run(x_P, name, backend), packed.case(device, name))


@every_compiled_loss
@on_every_backend
def test_infinite_and_nan_tokens_stay_in_their_pair(backend: str, device: str, name: str) -> None:
    """The chosen impossible, the rejected impossible, a NaN; every other pair is as it was."""
    packed = Packed([3] * 12)
    clean = packed.run(packed.logps_P.to(device), name, backend)
    logps_P = packed.logps_P.clone()
    logps_P[1] = logps_P[9] = -math.inf  # chosen 0, rejected 1
    logps_P[14] = math.nan  # chosen 2
    leaf_P, gold_P = logps_P.to(device).requires_grad_(), logps_P.double().requires_grad_()
    ours, gold = packed.run(leaf_P, name, backend), packed.run(gold_P, name, "torch")
    for actual_N, gold_N, clean_N in zip(ours, gold, clean):
        c.hold("value", actual_N, gold_N.float(), gold_N)
        assert torch.equal(actual_N[3:], clean_N[3:])
    (gradient_P,) = torch.autograd.grad(ours[0].sum(), leaf_P)
    assert ours[0][2].isnan()
    assert name == "hinge" or gradient_P[12:18].isnan().all()  # PyTorch's relu gives NaN the slope 1
    assert not gradient_P[18:].isnan().any()
    (gold_gradient_P,) = torch.autograd.grad(gold[0].sum(), gold_P)
    c.hold("gradient", gradient_P[:12], gold_gradient_P[:12].float(), gold_gradient_P[:12])


@on_every_backend
def test_pairs_do_not_meet(backend: str, device: str) -> None:
    """In another order the pairs give the same numbers, bit for bit."""
    packed = Packed([4, 4] * 5)
    order_N = torch.tensor([3, 0, 4, 1, 2])
    shuffled = Packed([4, 4] * 5)
    shuffled.logps_P = packed.logps_P.view(5, 8)[order_N].flatten()
    shuffled.refs = tuple(ref_N[order_N] for ref_N in packed.refs)
    one = packed.run(packed.logps_P.to(device), "sigmoid", backend)
    other = shuffled.run(shuffled.logps_P.to(device), "sigmoid", backend)
    for x_N, y_N in zip(one, other):
        assert torch.equal(x_N[order_N.to(device)], y_N)


# --- one number a completion, on every backend ---


@every_compiled_loss
@on_every_backend
def test_summed_holds(backend: str, device: str, name: str) -> None:
    """preference_loss itself, with the lengths that ipo needs, on float32."""
    pairs = Pairs(33, torch.float32)

    def run(backend: str) -> Callable[..., list[Tensor]]:
        def call(chosen_N: Tensor, rejected_N: Tensor) -> list[Tensor]:
            refs = (ref_N.to(chosen_N.device, chosen_N.dtype) for ref_N in pairs.refs)
            lengths = {side: length_N.to(chosen_N.device) for side, length_N in pairs.lengths.items()}
            options = {"label_smoothing": smoothing_of(name), "loss_type": name, "beta": 0.3}
            return [*preference_loss(chosen_N, rejected_N, *refs, **lengths, **options, backend=backend)]

        return call

    c.conform(run(backend), c.Case(run("torch"), run("torch"), [x_N.to(device) for x_N in pairs.policy]))


# --- autograd, tracing ---


@on_every_backend
def test_backward_twice(backend: str, device: str) -> None:
    packed = Packed(ragged(5, 9))
    c.assert_backward_twice(lambda x_P: packed.run(x_P, "sigmoid", backend), [packed.logps_P.to(device)])


@pytest.mark.parametrize(("backend", "device"), c.backends_for("preference_loss", only=("native", "triton")))
def test_compiled_code_has_no_second_derivative(backend: str, device: str) -> None:
    packed = Packed(ragged(5, 9))
    run = lambda x_P: packed.run(x_P, "sigmoid", backend)  # noqa: E731
    c.assert_double_backward_refused(run, [packed.logps_P.to(device)])


@every_compiled_loss
@on_every_backend
def test_inside_torch_func(backend: str, device: str, name: str) -> None:
    """linear_loss differentiates with torch.func, which records every backward pass."""
    packed = Packed(ragged(5, 9))
    logps_P = packed.logps_P.to(device)
    gradient_P, loss = torch.func.grad_and_value(lambda x_P: packed.run(x_P, name, backend)[0].sum())(logps_P)
    leaf_P = logps_P.clone().requires_grad_()
    expected = packed.run(leaf_P, name, backend)[0].sum()
    (expected_P,) = torch.autograd.grad(expected, leaf_P)
    assert torch.equal(loss, expected)
    assert torch.equal(gradient_P, expected_P)


@pytest.mark.parametrize(("backend", "device"), c.backends_for("preference_loss", only=c.FAST))
def test_compiles(backend: str, device: str) -> None:
    packed = Packed(ragged(5, 9))
    run = lambda x_P: packed.run(x_P, "sigmoid", backend)[0]  # noqa: E731
    c.assert_compiles(run, [packed.logps_P.to(device)])


@pytest.mark.parametrize(("backend", "device"), c.backends_for("preference_loss", only=("native",)))
def test_native_op_is_registered_right(backend: str, device: str) -> None:
    packed = Packed(ragged(5, 9))
    inputs = (x.to(device) for x in (packed.logps_P, packed.offsets_M, *packed.refs))
    torch.library.opcheck(torch.ops.alignfast.preference_loss, (*inputs, LOSSES["robust"].code, 0.3, 0.1))


# --- properties ---


def hold_any_batch(backend: str, device: str, data: st.DataObject) -> None:
    """Any lengths, empty ones too, any beta and spread, all compiled losses."""
    pairs = data.draw(st.lists(st.tuples(*[st.integers(0, 12)] * 2), max_size=6), "lengths")
    name = data.draw(st.sampled_from(COMPILED), "name")
    spread = data.draw(st.sampled_from([0.01, 1.0, 100.0]), "spread")
    seed, beta = data.draw(st.integers(0, 2**20), "seed"), data.draw(st.floats(0.01, 2), "beta")
    packed = Packed([length for pair in pairs for length in pair], spread=spread, seed=seed)
    crowd = Packed(ragged(33, 12), spread=spread, seed=seed)
    c.conform(
        lambda x_P: packed.run(x_P, name, backend, beta=beta),
        packed.case(device, name, beta=beta),
        crowd=crowd.case(device, name, beta=beta),
    )


@pytest.mark.parametrize(("backend", "device"), c.backends_for("preference_loss", only=c.FAST))
@given(data=st.data())
def test_any_batch(backend: str, device: str, data: st.DataObject) -> None:
    hold_any_batch(backend, device, data)


@pytest.mark.parametrize(
    ("lengths", "seed", "beta"),
    [
        ([9, 3, 2, 3, 9, 5, 0, 11, 8, 7, 0, 11], 3737, 0.1333083063364029),
        ([9, 3, 0, 11, 9, 5, 0, 11, 8, 7, 1, 5], 4096, 0.12784668371878952),
    ],
)
@on_every_backend
def test_sums_of_hundreds_of_nats(
    backend: str, device: str, lengths: list[int], seed: int, beta: float
) -> None:
    """Drawn cases in which sums in float32 were more than twice as wrong as PyTorch's."""
    packed, crowd = Packed(lengths, spread=100.0, seed=seed), Packed(ragged(33, 12), spread=100.0, seed=seed)
    c.conform(
        lambda x_P: packed.run(x_P, "sigmoid", backend, beta=beta),
        packed.case(device, "sigmoid", beta=beta),
        crowd=crowd.case(device, "sigmoid", beta=beta),
    )


@pytest.mark.parametrize(("backend", "device"), c.backends_for("preference_loss", only=c.INTERPRETED))
@settings(max_examples=40)
@given(data=st.data())
def test_any_batch_interpreted(backend: str, device: str, data: st.DataObject) -> None:
    hold_any_batch(backend, device, data)
