"""What the tests of the ops leave open for the CUDA kernels: order, borders, the functions of a GPU, tensor cores.

Letters: T tokens, V vocabulary, H query heads, K key heads, E head width.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import emulated_cuda
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops import attention as a
from ops import conformance as c
from torch import Tensor

from alignfast.kernels import PackedLayout, packed_attention
from alignfast.kernels.token_logps import STATS, RowOptions, _Native, _Torch, row_options

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHARED = PackedLayout((70, 3), ((20, 9), (5,)))  # over a tile of 64 rows


def rows(T: int, V: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits_TV = (3 * torch.randn(T, V, generator=generator)).to(dtype)
    return logits_TV, torch.randint(0, V, (T,), generator=generator)


def statistics_and_gradient(logits_TV: Tensor, targets_T: Tensor, options: RowOptions) -> list[Tensor]:
    stats_KT = _Native.forward(logits_TV, targets_T, options)
    dstats_KT = torch.randn(stats_KT.shape, generator=torch.Generator().manual_seed(1))
    dlogits_TV = torch.full_like(logits_TV, math.nan)
    _Native.backward(logits_TV, targets_T, stats_KT, dstats_KT, options, dlogits_TV)
    return [stats_KT, dlogits_TV]


def attend(leaves: list[Tensor], layout: PackedLayout, **options: Any) -> list[Tensor]:
    run = lambda *x: packed_attention(*x, layout, backend="native", **options)  # noqa: E731
    return c.values_and_gradients(
        run, leaves, c.random_like(run(*(x.clone().requires_grad_() for x in leaves)), 1)
    )


# V: a row of one warp, and one of a block with a ragged tail. Each kernel in both orders: threads and blocks that
# raced would differ.
@pytest.mark.parametrize("V", [300, 5003])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_do_not_depend_on_the_order_of_threads(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, V: int
) -> None:
    inputs = (*rows(5, V, dtype), row_options(1.0, None, 0.7, -100, STATS))
    emulated_cuda.install(monkeypatch)
    ascending = statistics_and_gradient(*inputs)
    emulated_cuda.install(monkeypatch, descending=True)
    for one, other in zip(ascending, statistics_and_gradient(*inputs)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("E", [40, 130])  # one launch for dkey and dvalue, and one for each
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_does_not_depend_on_the_order_of_threads(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, E: int
) -> None:
    leaves = a.inputs(SHARED.num_tokens, (2, 1, E), dtype)
    emulated_cuda.install(monkeypatch)
    ascending = attend(leaves, SHARED, window=50)
    emulated_cuda.install(monkeypatch, descending=True)
    for one, other in zip(ascending, attend(leaves, SHARED, window=50)):
        assert torch.equal(one, other)


# Off: elements before the row within its 16 bytes, none to all of a vector but one.
@pytest.mark.parametrize("off", [0, 1, 4, 7])
@pytest.mark.parametrize("V", [5, 64, 1037])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_outside_a_row_is_read_into_it_or_written(
    emulated: ModuleType, dtype: torch.dtype, V: int, off: int
) -> None:
    logits_TV, targets_T = rows(3, V, dtype)
    options = row_options(1.0, None, 1.0, -100, STATS)
    expected = statistics_and_gradient(logits_TV, targets_T, options)
    bordered_TV = torch.full((3, V + 2 * 16 + off), math.nan, dtype=dtype)
    inner_TV = bordered_TV[:, 16 + off : 16 + off + V].copy_(logits_TV)
    stats_KT = _Native.forward(inner_TV, targets_T, options)
    dstats_KT = torch.randn(stats_KT.shape, generator=torch.Generator().manual_seed(1))
    _Native.backward(inner_TV, targets_T, stats_KT, dstats_KT, options, inner_TV)
    assert torch.equal(stats_KT, expected[0])  # the same bits, however the row lies
    assert torch.equal(inner_TV, expected[1])
    outside = torch.ones_like(bordered_TV, dtype=torch.bool)
    outside[:, 16 + off : 16 + off + V] = False
    assert bordered_TV[outside].isnan().all()


def test_rows_without_a_gradient_are_not_read(emulated: ModuleType) -> None:
    """NaN logits under no upstream gradient: zeros. linear_loss drops such rows by that."""
    logits_TV = torch.full((3, 2000), math.nan)
    stats_KT, dlogits_TV = torch.zeros(6, 3), torch.full((3, 2000), 7.0)
    options = row_options(1.0, None, 1.0, -100, ("logps",))
    targets_T = torch.tensor([0, -100, 5000])
    _Native.backward(logits_TV, targets_T, stats_KT, torch.zeros(6, 3), options, dlogits_TV)
    assert not dlogits_TV[:2].any()
    assert dlogits_TV[2].isnan().all()  # a target outside the vocabulary always shows


@pytest.mark.parametrize("V", [300, 5003])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_functions_of_a_gpu(monkeypatch: pytest.MonkeyPatch, softcap: float | None, V: int) -> None:
    """With functions that err by a GPU's bounds, not by a CPU's half unit: within 4 times what is else allowed.

    Four, since exp and tanh are bounded by 2 units in the last place there, 4 times the half unit of a correctly
    rounded function. The tests of the ops hold the arithmetic around them to the plain rule.
    """
    emulated_cuda.install(monkeypatch, approximate=True)
    logits_TV, targets_T = rows(33, V, torch.float32)
    options = row_options(1.0, softcap, 0.7, -100, STATS)
    stats_KT, dlogits_TV = statistics_and_gradient(logits_TV, targets_T, options)
    dstats_KT = torch.randn(stats_KT.shape, generator=torch.Generator().manual_seed(1))
    by_torch = {}
    for dtype in (torch.float32, torch.float64):
        of_torch_KT = _Torch.forward(logits_TV.to(dtype), targets_T, options)
        gradient_TV = torch.empty_like(logits_TV, dtype=dtype)
        _Torch.backward(
            logits_TV.to(dtype), targets_T, of_torch_KT, dstats_KT.to(dtype), options, gradient_TV
        )
        by_torch[dtype] = [*of_torch_KT, gradient_TV]
    for k, (ours, peer, gold) in enumerate(zip([*stats_KT, dlogits_TV], *by_torch.values())):
        if k == STATS.index("is_top1"):
            continue
        allowed = 4 * (2 * c.error(peer, gold).largest + c.slack(ours, gold))
        assert c.error(ours, gold).largest <= allowed, k


class _TensorCores(torch.autograd.Function):
    """Attention as every flash attention computes it: probabilities and dscores are 16-bit numbers in the products."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        query_HTE, key_HTE, value_HTE, seen_TT, scale, softcap, dtype = inputs
        raw_HTT = query_HTE @ key_HTE.mT * scale
        slope_HTT = torch.ones_like(raw_HTT)
        if softcap is not None:
            tanh_HTT = (raw_HTT / softcap).tanh()
            raw_HTT, slope_HTT = softcap * tanh_HTT, 1 - tanh_HTT.square()
        exps_HTT = raw_HTT.masked_fill(~seen_TT, -torch.inf)
        exps_HTT = (exps_HTT - exps_HTT.amax(-1, keepdim=True)).exp()
        total_HT1 = exps_HTT.sum(-1, keepdim=True)
        out_HTE = exps_HTT.to(dtype).to(value_HTE.dtype) @ value_HTE / total_HT1
        ctx.save_for_backward(query_HTE, key_HTE, value_HTE, exps_HTT / total_HT1, slope_HTT, out_HTE)
        ctx.scale, ctx.dtype = scale, dtype
        return out_HTE

    @staticmethod
    def backward(ctx: Any, dout_HTE: Tensor) -> tuple[Tensor | None, ...]:
        query_HTE, key_HTE, value_HTE, p_HTT, slope_HTT, out_HTE = ctx.saved_tensors
        narrow = lambda x: x.to(ctx.dtype).to(x.dtype)  # noqa: E731
        # the kernel's inputs are 16-bit numbers too: the upstream gradient, and the output that was written
        dp_HTT = dout_HTE @ value_HTE.mT - (dout_HTE * narrow(out_HTE)).sum(-1, keepdim=True)
        ds_HTT = narrow(p_HTT * dp_HTT * slope_HTT)
        gradients = (
            ds_HTT @ key_HTE * ctx.scale,
            ds_HTT.mT @ query_HTE * ctx.scale,
            narrow(p_HTT).mT @ dout_HTE,
        )
        return (*gradients, None, None, None, None)


def by_tensor_cores(
    query_THE: Tensor,
    key_TKE: Tensor,
    value_TKE: Tensor,
    layout: PackedLayout,
    *,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    _, H, E = query_THE.shape
    heads = (
        x.float().transpose(0, 1).repeat_interleave(H // x.shape[1], 0)
        for x in (query_THE, key_TKE, value_TKE)
    )
    out_HTE = _TensorCores.apply(*heads, a.seen(layout, window), E**-0.5, softcap, query_THE.dtype)
    return out_HTE.transpose(0, 1).to(query_THE.dtype)


@st.composite
def any_layout(draw: st.DrawFn) -> PackedLayout:
    trees = draw(
        st.lists(
            st.tuples(st.integers(0, 30), st.lists(st.integers(1, 30), max_size=2)), min_size=1, max_size=2
        )
    )
    if not any(prompt or answers for prompt, answers in trees):
        trees = [(1, [])]
    return PackedLayout(tuple(prompt for prompt, _ in trees), tuple(tuple(answers) for _, answers in trees))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_attention(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, data: st.DataObject) -> None:
    """Any small layout, heads and options, in either order of threads: twice as wrong as the same sums in PyTorch."""
    emulated_cuda.install(monkeypatch, descending=data.draw(st.booleans(), "descending"))
    layout = data.draw(any_layout(), "layout")
    K, group, E = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 70))
    options = {
        "window": data.draw(st.none() | st.integers(1, 80), "window"),
        "softcap": data.draw(st.sampled_from([None, 2.0]), "softcap"),
    }
    seed, spread = data.draw(st.integers(0, 2**20)), data.draw(st.sampled_from([0.1, 1.0, 10.0]), "spread")

    def case(heads: int) -> c.Case:
        peer = a.textbook if dtype == torch.float32 else by_tensor_cores
        return c.Case(
            lambda *x: peer(*x, layout, **options),
            lambda *x: packed_attention(*x, layout, backend="torch", **options),
            a.inputs(
                layout.num_tokens, (heads * K * group, heads * K, E), dtype, seed=seed + heads, spread=spread
            ),
        )

    run = lambda *x: packed_attention(*x, layout, backend="native", **options)  # noqa: E731
    c.conform(run, case(1), crowd=case(a.crowd_of(layout.num_tokens, K * group, E)), seed=seed)
