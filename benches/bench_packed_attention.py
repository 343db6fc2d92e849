"""Packed attention beside the padded call that everyone else makes, forward and backward, one layer.

The peer gets its prompts repeated and its rows padded to the longest, and runs torch's SDPA with is_causal.
FLOPs are those of the packed form (14 E per visible query-key pair and head), so the peer's share is of useful work.
Page faults are half of the time of short segments: run it also with the malloc settings of bench_dpo_step.py (TUNED),
which is how a training step runs.
Letters: T tokens, B rows, L longest row, H query heads, K key heads, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from harness import device, measure, relative_error
from torch import Tensor

from alignfast.kernels import PackedLayout, packed_attention, report

OURS = [name for name, state in report()["packed_attention"].items() if state == "available"]
DTYPE = torch.float32 if not torch.cuda.is_available() else torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """A batch: so many trees of one prompt and its answers."""

    trees: int
    prompt: int
    answers: tuple[int, ...]
    H: int = 4
    K: int = 4
    E: int = 64

    @property
    def layout(self) -> PackedLayout:
        return PackedLayout((self.prompt,) * self.trees, (self.answers,) * self.trees)

    @property
    def rows(self) -> list[int]:
        """Lengths of the rows that a padded batch has."""
        return [self.prompt + answer for answer in self.answers or (0,)] * self.trees

    @property
    def flops(self) -> float:
        """Forward and backward: seven products of 2 E FLOPs each a visible pair, two of them forward."""
        own = (
            sum(n * (n + 1) / 2 + n * self.prompt for n in self.answers) + self.prompt * (self.prompt + 1) / 2
        )
        return 14.0 * self.E * self.H * own * self.trees

    def __str__(self) -> str:
        answers = (
            f"{len(self.answers)}x{self.answers[0]}"
            if len(set(self.answers)) == 1
            else str(len(self.answers))
        )
        heads = f" H{self.H}/{self.K} E{self.E}"
        return f"{self.trees} x ({self.prompt} + {answers if self.answers else 0}){heads}"


SHAPES = [
    Shape(8, 128, (64, 64)),  # the tiny DPO step
    Shape(4, 128, (64,) * 8),  # a tiny GRPO step
    Shape(256, 16, ()),  # many short texts that share nothing
    Shape(1, 2048, (64,) * 8),  # a long prompt, eight answers
    Shape(2, 2048, (64, 64)),  # the long DPO step
    Shape(1, 1024, ()),
    Shape(8, 0, (16, 31, 64, 90, 128, 180, 200, 250)),  # ragged, nothing shared
    Shape(4, 200, (150, 90), H=9, K=3),  # SmolLM2's heads
]


def inputs(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    T = shape.layout.num_tokens
    tensors = [
        torch.randn(T, heads, shape.E, generator=generator) for heads in (shape.H, shape.K, shape.K, shape.H)
    ]
    q_THE, k_TKE, v_TKE, dout_THE = (x.to(device(), dtype) for x in tensors)
    return q_THE.requires_grad_(), k_TKE.requires_grad_(), v_TKE.requires_grad_(), dout_THE


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OURS)
def bench_packed(benchmark, name: str, shape: Shape) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = "packed_attention forward+backward"
    *qkv, dout_THE = inputs(shape, DTYPE)
    layout = shape.layout

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(packed_attention(*qkv, layout, backend=name), qkv, dout_THE)

    small = Shape(2, 33, (17, 5), shape.H, shape.K, shape.E)
    *low, dlow = inputs(small, DTYPE)
    exact = [x.detach().double().requires_grad_() for x in low]
    gold = torch.autograd.grad(packed_attention(*exact, small.layout, backend="torch"), exact, dlow.double())
    got = torch.autograd.grad(packed_attention(*low, small.layout, backend=name), low, dlow)
    plain = torch.autograd.grad(packed_attention(*low, small.layout, backend="torch"), low, dlow)
    measure(
        benchmark, step, provider=f"alignfast {name}", shape=str(shape),
        error=max(relative_error(x, y) for x, y in zip(got, gold)),
        allowed_error=2 * max(relative_error(x, y) for x, y in zip(plain, gold)) + 2 * torch.finfo(DTYPE).eps,
        flops=shape.flops, rounds=5,
    )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_padded(benchmark, shape: Shape) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = "packed_attention forward+backward"
    B, L = len(shape.rows), max(shape.rows)
    tensors = [torch.randn(B, heads, L, shape.E).to(device(), DTYPE) for heads in (shape.H, shape.K, shape.K)]
    qkv = [x.requires_grad_() for x in tensors]
    dout_BHLE = torch.randn(B, shape.H, L, shape.E).to(device(), DTYPE)

    def step() -> None:
        out_BHLE = F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=shape.H != shape.K)
        torch.autograd.grad(out_BHLE, qkv, dout_BHLE)

    measure(benchmark, step, provider="padded sdpa", shape=str(shape), flops=shape.flops, rounds=5)
