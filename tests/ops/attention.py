"""What the tests of packed_attention share: layouts, inputs, the textbook, and a backend held to both.

Letters: T tokens, H query heads, K key heads, E head width, N another number of rows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops import conformance as c
from torch import Tensor

from alignfast.kernels import PackedLayout, packed_attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Small enough for Triton's interpreter: nothing shared, a prompt of none, answers of one token, a tree beside a text.
SMALL = {
    "unshared": PackedLayout.of_sequences((5, 1, 17)),
    "shared": PackedLayout((7, 5), ((3, 1, 6), (2, 2))),
    "no prompt": PackedLayout((0, 4, 0), ((3, 2), (1,), (1,))),
    "answers of one token": PackedLayout((9,), ((1, 1, 1, 1, 1),)),
    "some without answers": PackedLayout((6, 3, 1), ((), (4, 2), ())),
}
# The C++ kernel's blocks hold 64 keys, its tiles 96 rows, its parts 128 rows of width 256: each is crossed.
LARGE = {
    "blocks": PackedLayout((70, 130), ((65, 33), (1, 20, 7))),
    "parts": PackedLayout((150, 2), ((20, 110), (40,))),
}
LAYOUTS = SMALL | LARGE
# Window and softcap: neither; a window within a segment; one that ends in the prompt, under a tight cap; a wide cap.
OPTIONS: list[dict[str, Any]] = [
    {}, {"window": 4}, {"window": 75, "softcap": 1.5}, {"softcap": 20.0}
]  # fmt: skip
# H, K, E: plain; groups; more queries a key than tile rows would take at once; widths off every vector, and wide.
HEADS = [(2, 2, 16), (6, 2, 64), (7, 1, 24), (3, 3, 7), (4, 1, 80), (2, 1, 128)]

on_every_backend = pytest.mark.parametrize(
    ("backend", "device"), c.backends_for("packed_attention", every_isa=True)
)
on_fast_backends = pytest.mark.parametrize(
    ("backend", "device"), c.backends_for("packed_attention", only=c.FAST, every_isa=True)
)


def inputs(
    T: int,
    heads: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    spread: float = 1.0,
) -> list[Tensor]:
    """query_THE, key_TKE and value_TKE; scores are about `spread` nats wide."""
    H, K, E = heads
    generator = torch.Generator().manual_seed(seed)
    query_THE, key_TKE, value_TKE = (torch.randn(T, n, E, generator=generator) for n in (H, K, K))
    return [(spread * query_THE).to(dtype), key_TKE.to(dtype), value_TKE.to(dtype)]


def seen(layout: PackedLayout, window: int | None) -> Tensor:
    """seen_TT[i, j]: whether query i sees key j."""
    seen_TT = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    for start, length, prompt_start, prompt_length in layout.segments:
        rows = slice(start, start + length)
        seen_TT[rows, prompt_start : prompt_start + prompt_length] = True
        seen_TT[rows, rows] = torch.ones(length, length, dtype=torch.bool).tril()
    if window is not None:
        positions_T = layout.positions()
        seen_TT &= positions_T[:, None] - positions_T[None, :] < window
    return seen_TT


def textbook(
    query_THE: Tensor,
    key_TKE: Tensor,
    value_TKE: Tensor,
    layout: PackedLayout,
    *,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """One dense masked softmax over the whole row, differentiated by autograd; 16-bit numbers in float32.

    Only the output is rounded, and saved for the backward as that: so it is in PyTorch's own flash attention too.
    """
    _, H, E = query_THE.shape
    compute = torch.promote_types(query_THE.dtype, torch.float32)
    query_HTE, key_HTE, value_HTE = (
        x.to(compute).transpose(0, 1).repeat_interleave(H // x.shape[1], 0)
        for x in (query_THE, key_TKE, value_TKE)
    )
    scores_HTT = query_HTE @ key_HTE.mT * E**-0.5
    if softcap is not None:
        scores_HTT = softcap * (scores_HTT / softcap).tanh()
    scores_HTT = scores_HTT.masked_fill(~seen(layout, window).to(scores_HTT.device), -torch.inf)
    out_THE = (scores_HTT.softmax(-1) @ value_HTE).transpose(0, 1)
    if query_THE.dtype == compute:
        return out_THE
    return _SavedOutput.apply(out_THE, scores_HTT.logsumexp(-1), query_THE.dtype)


class _SavedOutput(torch.autograd.Function):
    """Rounds the output, and makes the gradient of the scores p * (dp - dout . out) with `out` as it was rounded."""

    @staticmethod
    def forward(ctx: Any, out_THE: Tensor, lse_HT: Tensor, dtype: torch.dtype) -> Tensor:
        rounded_THE = out_THE.to(dtype)
        ctx.save_for_backward(out_THE - rounded_THE)
        return rounded_THE

    @staticmethod
    def backward(ctx: Any, dout_THE: Tensor) -> tuple[Tensor, Tensor, None]:
        (lost_THE,) = ctx.saved_tensors
        # p is the derivative of the log-sum-exp
        return dout_THE.float(), (dout_THE * lost_THE).sum(-1).T, None


def crowd_of(T: int, H: int, E: int) -> int:
    """How many times the heads make a crowd: a few small ones say little of how large PyTorch's errors are."""
    return min(64, 1 + 20_000 // (1 + T * H * E))


def conform(
    backend: str,
    device: str,
    leaves: list[Tensor],
    layout: PackedLayout,
    options: dict[str, Any],
    seed: int = 0,
) -> None:
    """Hold a backend to the definition on these leaves; the crowd are more heads."""
    (T, H, E), K = leaves[0].shape, leaves[1].shape[1]
    times = crowd_of(T, H, E)
    others = [x.to(device) for x in inputs(T, (times * H, times * K, E), leaves[0].dtype, seed=seed + 1)]
    others[0] *= leaves[0].float().square().mean().sqrt().nan_to_num(1.0)

    def by(backend: str) -> c.Run:
        return lambda *x: packed_attention(*x, layout, backend=backend, **options)

    def case(leaves: list[Tensor]) -> c.Case:
        return c.Case(lambda *x: textbook(*x, layout, **options), by("torch"), leaves)

    c.conform(by(backend), case([x.to(device) for x in leaves]), crowd=case(others), seed=seed)
