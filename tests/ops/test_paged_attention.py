"""paged_attention: the definition against packed attention's last rows, every backend against the definition; refusals.

Letters: S sequences, H query heads, K key heads, E head width, N pages, P tokens of a page, M pages of a sequence.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import conformance as c
from ops.attention import HEADS, OPTIONS, inputs
from torch import Tensor

from alignfast.kernels import PackedLayout, packed_attention, paged_attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
on_every_backend = pytest.mark.parametrize(
    ("backend", "device"), c.backends_for("paged_attention", every_isa=True)
)


class Cache:
    """Sequences in pages of which no two follow each other, NaN wherever no token lies."""

    def __init__(self, lengths: list[int], heads: tuple[int, int, int], P: int, seed: int = 0) -> None:
        self.lengths, self.P = lengths, P
        self.query_THE, self.key_TKE, self.value_TKE = inputs(sum(lengths), heads, seed=seed)
        needed = [-(-length // P) for length in lengths]
        N, M = sum(needed) + 1, max(needed)
        free = torch.randperm(N, generator=torch.Generator().manual_seed(seed)).tolist()
        self.key_NPKE, self.value_NPKE = (torch.full((N, P, *heads[1:]), torch.nan) for _ in range(2))
        self.pages_SM = torch.full((len(lengths), M), free.pop(), dtype=torch.int32)
        start = 0
        for s, length in enumerate(lengths):
            for j in range(0, length, P):
                page, rows = free.pop(), slice(start + j, start + min(j + P, length))
                self.pages_SM[s, j // P] = page
                self.key_NPKE[page, : rows.stop - rows.start] = self.key_TKE[rows]
                self.value_NPKE[page, : rows.stop - rows.start] = self.value_TKE[rows]
            start += length
        self.length_S = torch.tensor(lengths, dtype=torch.int32)
        self.last_S = self.length_S.cumsum(0) - 1

    def run(self, dtype: torch.dtype = torch.float32, device: str = "cpu", **options: Any) -> Tensor:
        floats = (x.to(device, dtype) for x in (self.query_THE[self.last_S], self.key_NPKE, self.value_NPKE))
        return paged_attention(*floats, self.pages_SM.to(device), self.length_S.to(device), **options)


def conform(backend: str, device: str, cache: Cache, dtype: torch.dtype, **options: Any) -> None:
    rounded = Cache.__new__(Cache)
    rounded.__dict__ = {
        name: x.to(dtype).float() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in cache.__dict__.items()
    }
    gold = rounded.run(torch.float64, backend="torch", **options)
    ours, peer = (
        rounded.run(dtype, device, backend=backend, **options),
        rounded.run(dtype, backend="torch", **options),
    )
    crowd = Cache([max(cache.lengths)] * 2, (24, 24, cache.query_THE.shape[2]), cache.P, seed=1)
    if dtype == torch.float32:
        crowd_error = c.error(
            crowd.run(backend="torch", **options), crowd.run(torch.float64, backend="torch", **options)
        ).largest
    else:
        crowd_error = 0.0  # what rounding the output costs, which `hold` allows
    c.hold("out", ours, peer, gold, crowd_error=crowd_error)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_is_the_last_row_of_packed_attention(options: dict[str, Any]) -> None:
    cache = Cache([5, 1, 90, 16], (6, 2, 24), P=16)
    layout = PackedLayout.of_sequences(cache.lengths)
    doubles = (x.double() for x in (cache.query_THE, cache.key_TKE, cache.value_TKE))
    expected_THE = packed_attention(*doubles, layout, backend="torch", **options)
    ours_SHE = cache.run(torch.float64, backend="torch", **options)
    assert (ours_SHE - expected_THE[cache.last_S]).abs().max() < 1e-13


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_conforms(backend: str, device: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    conform(backend, device, Cache([5, 1, 150, 64, 65], (6, 2, 64), P=16), dtype, **options)


@on_every_backend
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_heads_of_any_width_and_group(backend: str, device: str, heads: tuple[int, int, int]) -> None:
    conform(backend, device, Cache([70, 3], heads, P=8), torch.float32)


@on_every_backend
def test_random_caches(backend: str, device: str) -> None:
    @settings(max_examples=300 if backend != "triton" or device == "cuda" else 10)
    @given(st.lists(st.integers(1, 140), min_size=1, max_size=4), st.sampled_from(HEADS), st.sampled_from([1, 4, 16]),
           st.none() | st.integers(1, 150), st.none() | st.sampled_from([1.5, 30.0]), st.integers(0, 1 << 16))  # fmt: skip
    def check(
        lengths: list[int], heads: Any, P: int, window: int | None, softcap: float | None, seed: int
    ) -> None:
        conform(
            backend, device, Cache(lengths, heads, P, seed), torch.float32, window=window, softcap=softcap
        )

    check()


@on_every_backend
def test_sequences_may_share_pages(backend: str, device: str) -> None:
    cache = Cache([40, 37], (2, 1, 16), P=8)
    cache.pages_SM[1, :4] = cache.pages_SM[0, :4]
    conform(backend, device, cache, torch.float32)


@on_every_backend
def test_nan_stays_in_its_sequence(backend: str, device: str) -> None:
    cache = Cache([20, 20], (2, 1, 16), P=8)
    cache.query_THE[19] = torch.nan
    out_SHE = cache.run(device=device, backend=backend)
    assert out_SHE[0].isnan().all()
    assert out_SHE[1].isfinite().all()


@on_every_backend
def test_no_sequences(backend: str, device: str) -> None:
    empty = torch.empty(0, 2, 16, device=device)
    pages_NPKE = torch.empty(1, 8, 1, 16, device=device)
    tables = (torch.empty(shape, dtype=torch.int32, device=device) for shape in ((0, 1), (0,)))
    assert paged_attention(empty, pages_NPKE, pages_NPKE, *tables, backend=backend).shape == (0, 2, 16)


def test_a_strided_query_is_read_as_it_is() -> None:
    cache = Cache([20, 9], (2, 1, 16), P=8)
    expected = cache.run()
    query_SHE = cache.query_THE[cache.last_S].transpose(0, 1).contiguous().transpose(0, 1)
    out_SHE = paged_attention(query_SHE, cache.key_NPKE, cache.value_NPKE, cache.pages_SM, cache.length_S)
    assert torch.equal(out_SHE, expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query_SHE": torch.zeros(2, 3, 16)}, "their heads divide the queries'"),
        ({"query_SHE": torch.zeros(2, 16)}, r"expected query \(S, H, E\)"),
        ({"query_SHE": torch.zeros(2, 2, 16).half()}, "dtypes differ"),
        ({"pages_SM": torch.zeros(2, 3, dtype=torch.int64)}, "must be int32"),
        ({"pages_SM": torch.zeros(3, 3, dtype=torch.int32)}, "for each of 2 sequences"),
        ({"key_NPKE": torch.zeros(4, 2, 8, 16).transpose(1, 2)}, "must be contiguous"),
        ({"window": 0}, "window must be >= 1"),
        ({"softcap": -1.0}, "softcap must be a positive number"),
    ],
)
def test_refuses(changed: dict[str, Any], message: str) -> None:
    arguments = {
        "query_SHE": torch.zeros(2, 4, 16), "key_NPKE": torch.zeros(4, 8, 2, 16),
        "value_NPKE": torch.zeros(4, 8, 2, 16), "pages_SM": torch.zeros(2, 3, dtype=torch.int32),
        "length_S": torch.ones(2, dtype=torch.int32),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        paged_attention(**{**arguments, **changed})


def test_compiled_code_refuses_what_its_stack_does_not_hold() -> None:
    cache = Cache([2], (1, 1, 1032), P=8)
    with pytest.raises(RuntimeError, match="up to 1024 wide, got 1032; pass backend='torch'"):
        cache.run(backend="native")


def test_traces_and_is_a_sound_operator() -> None:
    cache = Cache([20, 9], (2, 1, 16), P=8)
    inputs = (cache.query_THE[cache.last_S], cache.key_NPKE, cache.value_NPKE, cache.pages_SM, cache.length_S)
    torch.library.opcheck(torch.ops.alignfast.paged_attention, (*inputs, 0.25, 0, 0.0))
    compiled = torch.compile(paged_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), paged_attention(*inputs))
