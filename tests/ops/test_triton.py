"""What is Triton's own: that its kernels compile for real cards, the functions it lacks, tiles, offsets, writes in place.

The values and gradients of its kernels are held to the definitions in the tests of the ops.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignfast.kernels import PackedLayout, packed_attention
from alignfast.kernels.token_logps import STATS, _Torch, row_options

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from alignfast.kernels import _attention_tiles, _triton_math, packed_attention_triton, token_logps_triton  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALL_STATS = {"stats": STATS}
SMALL = {"large": False}  # tiles for cards with 99 KB of shared memory

# --- every kernel compiles for the cards that it is made for, without a GPU ---------------------------------------


def compiled(*jobs: tuple[str, int, str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Reports of `triton_compile.py`, one a kernel."""
    script = Path(__file__).parent / "triton_compile.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, script, json.dumps(jobs)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def assert_fit(reports: list[dict[str, Any]], num_kernels: int) -> None:
    assert len(reports) == num_kernels
    for report in reports:
        assert report["spilled_bytes"] == 0, report
        assert report["same_binary_for_other_lengths"], report
        assert report["shared"] <= (227 if report["large"] else 99) * 1024, report


def test_row_kernels_compile() -> None:
    jobs = [("token_logps", 90, "bfloat16", {}), ("token_logps", 80, "float32", ALL_STATS)]
    jobs += [("preference_loss", 90, "float32", {}), ("gae", 90, "float32", {})]
    jobs += [("kl_penalty", 90, "float32", {}), ("policy_loss", 90, "float32", {})]
    jobs += [("sample_tokens", 90, "bfloat16", {}), ("sample_tokens", 80, "float32", {})]
    jobs += [("kl_divergence", 90, "bfloat16", {})]
    assert_fit(compiled(*jobs), 2 + 2 + 4 + 2 + 8 + 3 + 2 * 2 + 3 * 2)


def test_paged_attention_compiles() -> None:
    jobs = [("paged_attention", 90, "bfloat16", {}), ("paged_attention", 80, "float32", {"window": 512})]
    assert_fit(compiled(*jobs), 2 * 2)


def test_attention_kernels_compile() -> None:
    jobs = [("packed_attention", 90, "bfloat16", {}), ("packed_attention", 80, "bfloat16", SMALL)]
    assert_fit(compiled(*jobs), 2 * 3)


# Widths of a small, a usual and Gemma's head; a window and a softcap as Gemma 2 has them.
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    "options",
    [
        {"width": 64},
        {"width": 80},
        {"width": 256},
        {"width": 128, "window": 4096},
        {"width": 64, "softcap": 50.0},
    ],
    ids=str,
)
def test_attention_options_compile(arch: int, options: dict[str, Any]) -> None:
    assert_fit(compiled(("packed_attention", arch, "float16", {**options, "large": arch == 90})), 3)


# --- functions of _triton_math ------------------------------------------------------------------------------------


@triton.jit
def _apply(x_ptr, out_ptr, N: tl.constexpr, FUNCTION: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out_ptr + n, FUNCTION(tl.load(x_ptr + n)))


NEAR_0 = torch.logspace(-30, 0, 1000)


# Bounds in units of the last place. `exp` of a GPU is 2 ulp and the rounding of its argument, so 4 more there.
@pytest.mark.parametrize(
    ("function", "gold", "x_N"),
    [
        (_triton_math.log1p, torch.log1p, torch.cat((NEAR_0, torch.logspace(0, 30, 24)))),
        (_triton_math.expm1, torch.expm1, -torch.cat((NEAR_0, torch.linspace(1, 100, 24)))),
        (_triton_math.tanh, torch.tanh, torch.cat((NEAR_0, torch.linspace(-12, 12, 24)))),
        (_triton_math.softplus, torch.nn.functional.softplus, torch.linspace(-60, 60, 1024)),
    ],
    ids=["log1p", "expm1", "tanh", "softplus"],
)
def test_missing_functions(function: Any, gold: Any, x_N: Tensor) -> None:
    x_N = x_N.to(DEVICE)
    out_N = torch.empty_like(x_N)
    _apply[(1,)](x_N, out_N, N=1024, FUNCTION=function)
    expected_N = (
        gold(x_N.double()) if gold is not torch.nn.functional.softplus else torch.log1p(x_N.double().exp())
    )
    ulps = ((out_N - expected_N) / expected_N).abs().max() / torch.finfo(torch.float32).eps
    assert ulps < (4 if DEVICE.type == "cpu" else 8)


@pytest.mark.parametrize(
    ("function", "x", "expected"),
    [
        (_triton_math.log1p, [0.0, 1e-38, math.nan], [0.0, 1e-38, math.nan]),
        (_triton_math.expm1, [0.0, -math.inf, math.nan], [0.0, -1.0, math.nan]),
        (_triton_math.tanh, [-math.inf, math.inf, math.nan], [-1.0, 1.0, math.nan]),
        (_triton_math.softplus, [-math.inf, math.inf, math.nan], [0.0, math.inf, math.nan]),
    ],
    ids=["log1p", "expm1", "tanh", "softplus"],
)
def test_missing_functions_at_their_ends(function: Any, x: list[float], expected: list[float]) -> None:
    x_N = torch.tensor([*x, 0.0], device=DEVICE)
    out_N = torch.empty_like(x_N)
    _apply[(1,)](x_N, out_N, N=4, FUNCTION=function)
    torch.testing.assert_close(out_N[:3].cpu(), torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


# --- token_logps --------------------------------------------------------------------------------------------------


# The third row lies 2^31 numbers from the first; so does the second block of columns, where a block is 4096.
@pytest.mark.parametrize(("V", "strides"), [(37, (2**30, 1)), (4100, (1, 2**19))], ids=["rows", "columns"])
def test_offsets_pass_two_to_the_31(V: int, strides: tuple[int, int]) -> None:
    """4 GB of addresses, of which few pages are touched."""
    store = torch.empty(2 * strides[0] + V * strides[1], dtype=torch.bfloat16, device=DEVICE)
    logits_TV = store.as_strided((3, V), strides)
    logits_TV.copy_(torch.randn(3, V))
    targets_T = torch.tensor([3, 4, V - 1], device=DEVICE)
    options = row_options(1.0, None, 1.0, -100, ())
    stats_KT = token_logps_triton.forward(logits_TV, targets_T, options)
    torch.testing.assert_close(stats_KT, _Torch.forward(logits_TV, targets_T, options))
    expected_TV = torch.empty(3, V, dtype=torch.bfloat16, device=DEVICE)
    token_logps_triton.backward(
        logits_TV, targets_T, stats_KT, torch.ones_like(stats_KT), options, expected_TV
    )
    token_logps_triton.backward(logits_TV, targets_T, stats_KT, torch.ones_like(stats_KT), options, logits_TV)
    assert torch.equal(logits_TV, expected_TV)
    assert expected_TV.any()


def test_rows_without_a_gradient_are_not_read() -> None:
    """Their logits may be anything: NaN would show. They are zeros, also where `out` held something else."""
    logits_TV = torch.randn(3, 300).to(DEVICE)
    logits_TV[1] = math.nan
    targets_T = torch.tensor([5, 6, 7], device=DEVICE)
    options = row_options(1.0, None, 1.0, -100, STATS)
    stats_KT = token_logps_triton.forward(logits_TV, targets_T, options)
    dstats_KT = torch.ones_like(stats_KT)
    dstats_KT[:, 1] = 0
    out_TV = torch.full_like(logits_TV, 7.0)
    token_logps_triton.backward(logits_TV, targets_T, stats_KT, dstats_KT, options, out_TV)
    assert not out_TV[1].any()
    assert out_TV[0].any()


@pytest.mark.parametrize("target", [-1, 300, 2**40])
def test_bad_target_gives_nan_without_a_check(target: int) -> None:
    """As on a GPU, where the host does not look: no read out of bounds, NaN in that row alone."""
    logits_TV = torch.randn(2, 300).to(DEVICE)
    targets_T = torch.tensor([target, 7], device=DEVICE)
    options = row_options(1.0, None, 1.0, -100, STATS)
    stats_KT = token_logps_triton.forward(logits_TV, targets_T, options)
    out_TV = torch.empty_like(logits_TV)
    token_logps_triton.backward(logits_TV, targets_T, stats_KT, torch.ones_like(stats_KT), options, out_TV)
    assert stats_KT.isnan().all(0).tolist() == [True, False]
    assert out_TV.isnan().all(1).tolist() == [True, False]
    assert not out_TV[1].isnan().any()


# --- packed_attention ---------------------------------------------------------------------------------------------

LAYOUTS = [
    PackedLayout((5, 0, 3), ((2, 7), (4, 1), ())),
    PackedLayout.of_sequences((9,)),
    PackedLayout((20,), ((1, 1, 1),)),
]


def visible(layout: PackedLayout, window: int) -> Tensor:
    """seen_TT: which row sees which, token by token as the contract of packed_attention says it."""
    T = layout.num_tokens
    seen_TT = torch.zeros(T, T, dtype=torch.bool)
    position_T = layout.positions()
    for start, length, prompt_start, prompt_length in layout.segments:
        for token in range(start, start + length):
            seen_TT[token, prompt_start : prompt_start + prompt_length] = True
            seen_TT[token, start : token + 1] = True
    return seen_TT & (position_T[:, None] - position_T[None, :] < (window or T + 1))


@pytest.mark.parametrize("window", [0, 1, 4])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_key_tiles_reach_all_that_see_them(layout: PackedLayout, window: int) -> None:
    """Each key is in one tile, and no query that sees a key lies outside its tile's walk."""
    seen_TT = visible(layout, window)
    found = []
    for first, end, seen_until in _attention_tiles.key_tiles(layout, 4, window, torch.device("cpu")).tolist():
        keys = range(first, min(first + 4, end))
        found += keys
        assert not seen_TT[seen_until:, keys.start : keys.stop].any()
        assert not seen_TT[: keys.start, keys.start : keys.stop].any()
    assert sorted(found) == list(range(layout.num_tokens))


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_query_tiles_hold_each_query_once(layout: PackedLayout, group: int) -> None:
    found = []
    for first, start, length, _, _ in _attention_tiles.query_tiles(
        layout, group, 4, torch.device("cpu")
    ).tolist():
        found += [start * group + row for row in range(first, min(first + 4, length * group))]
    assert sorted(found) == list(range(layout.num_tokens * group))


def test_attention_writes_every_row_and_no_input() -> None:
    """Strided inputs, two key heads for six of queries, a width between powers of two; twice the same bits."""
    layout = PackedLayout((30, 0), ((5, 9), (3,)))
    T = layout.num_tokens
    packed_TX = torch.randn(T, 10, 40).to(DEVICE)
    query_THE, key_TKE, value_TKE = (x.requires_grad_() for x in packed_TX.split((6, 2, 2), 1))
    before = packed_TX.clone()
    runs = []
    for _ in range(2):
        out_THE = packed_attention(
            query_THE, key_TKE, value_TKE, layout, window=7, softcap=3.0, backend="triton"
        )
        upstream = torch.ones((), device=DEVICE).expand_as(out_THE)
        runs.append((out_THE, *torch.autograd.grad(out_THE, (query_THE, key_TKE, value_TKE), upstream)))
    assert torch.equal(packed_TX, before)
    expected = packed_attention(query_THE, key_TKE, value_TKE, layout, window=7, softcap=3.0, backend="torch")
    gradients = torch.autograd.grad(expected.sum(), (query_THE, key_TKE, value_TKE))
    for one, other, wanted in zip(*runs, (expected, *gradients)):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-5)


def test_wide_heads_are_refused() -> None:
    x_THE = torch.zeros(2, 1, 257, device=DEVICE)
    with pytest.raises(RuntimeError, match="up to 256 wide, got 257; pass backend='torch'"):
        packed_attention(x_THE, x_THE, x_THE, PackedLayout.of_sequences((2,)), backend="triton")


def test_no_tokens() -> None:
    x_THE = torch.zeros(0, 2, 16, device=DEVICE, requires_grad=True)
    out_THE = packed_attention(x_THE, x_THE, x_THE, PackedLayout((), ()), backend="triton")
    out_THE.sum().backward()
    assert out_THE.shape == x_THE.grad.shape == (0, 2, 16)


def test_every_tile_divides() -> None:
    """The kernel of the keys walks its diagonal in whole tiles of queries."""
    for tiles in (_attention_tiles._TILES, _attention_tiles._LARGE_TILES):
        for (kernel, *_), tile in tiles.items():
            assert kernel != "dkey" or tile.keys % tile.rows == 0
    assert packed_attention_triton._WIDEST == max(width for _, _, width in _attention_tiles._TILES)
