"""Packed attention beside the padded call that everyone else makes, forward and backward, one layer.

Padded: prompts are repeated and rows padded to the longest, and torch's SDPA runs with is_causal. On a GPU also the packed
call of padding-free training, prompts repeated, by flash-attn 2 and 4 and by torch's own varlen_attn.
FLOPs are those of the packed form (14 E per visible query-key pair and head), so the peer's share is of useful work.
Page faults are half of the time of short segments: run it also with the malloc settings of bench_dpo_step.py (TUNED),
which is how a training step runs.
Letters: T tokens, B rows, L longest row, H query heads, K key heads, E head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from harness import device, measure, need, need_gpu, relative_error, sizes, worst
from torch import Tensor

from alignfast.kernels import PackedLayout, packed_attention, report

OURS = [f"alignfast {name}" for name, state in report()["packed_attention"].items() if state == "available"]
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

    @property
    def bytes(self) -> float:
        """Queries, keys and values read, output written, and all of it again for the gradients."""
        size = 4 if DTYPE == torch.float32 else 2
        return 4.0 * size * self.E * (self.H + self.K) * self.layout.num_tokens

    def __str__(self) -> str:
        answers = (
            f"{len(self.answers)}x{self.answers[0]}"
            if len(set(self.answers)) == 1
            else str(len(self.answers))
        )
        heads = f" H{self.H}/{self.K} E{self.E}"
        return f"{self.trees} x ({self.prompt} + {answers if self.answers else 0}){heads}"


PADDED, VARLEN = "padded sdpa", ("flash-attn", "flash-attn-4", "torch varlen")
ALL_SHAPES = [
    Shape(8, 128, (64, 64)),  # the tiny DPO step
    Shape(4, 128, (64,) * 8),  # a tiny GRPO step
    Shape(256, 16, ()),  # many short texts that share nothing
    Shape(1, 2048, (64,) * 8),  # a long prompt, eight answers
    Shape(2, 2048, (64, 64)),  # the long DPO step
    Shape(1, 1024, ()),
    Shape(8, 0, (16, 31, 64, 90, 128, 180, 200, 250)),  # ragged, nothing shared
    Shape(4, 200, (150, 90), H=9, K=3),  # SmolLM2's heads
]
if torch.cuda.is_available():  # an 8B model's heads
    ALL_SHAPES = [Shape(4, 1024, (256,) * 8, 32, 8, 128), Shape(1, 8192, (512,) * 8, 32, 8, 128), *ALL_SHAPES]
SHAPES = sizes(ALL_SHAPES, [Shape(2, 9, (5, 3))], ALL_SHAPES[:2])


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

    backend = name.split()[1]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(packed_attention(*qkv, layout, backend=backend), qkv, dout_THE)

    small = Shape(2, 33, (17, 5), shape.H, shape.K, shape.E)
    *low, dlow = inputs(small, DTYPE)
    exact = [x.detach().double().requires_grad_() for x in low]
    gold = torch.autograd.grad(packed_attention(*exact, small.layout, backend="torch"), exact, dlow.double())
    got = torch.autograd.grad(packed_attention(*low, small.layout, backend=backend), low, dlow)
    plain = torch.autograd.grad(packed_attention(*low, small.layout, backend="torch"), low, dlow)
    measure(
        benchmark, step, provider=name, shape=str(shape),
        error=worst(relative_error(x, y) for x, y in zip(got, gold)),
        allowed_error=2 * worst(relative_error(x, y) for x, y in zip(plain, gold)) + 2 * torch.finfo(DTYPE).eps,
        flops=shape.flops, moved_bytes=shape.bytes, rounds=5,
    )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", VARLEN)
def bench_varlen(benchmark, name: str, shape: Shape) -> None:  # type: ignore[no-untyped-def]
    """Rows behind one another without padding, each with a prompt of its own; outputs are checked against padded SDPA's."""
    benchmark.group = "packed_attention forward+backward"
    call = varlen(name)
    lengths = torch.tensor(shape.rows, dtype=torch.int32, device=device())
    offsets = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    T, longest = sum(shape.rows), max(shape.rows)
    qkv = [
        torch.randn(T, heads, shape.E).to(device(), DTYPE).requires_grad_()
        for heads in (shape.H, shape.K, shape.K)
    ]
    dout_THE = torch.randn(T, shape.H, shape.E).to(device(), DTYPE)
    first = [x[: shape.rows[0]].transpose(0, 1)[None] for x in qkv]
    exact = F.scaled_dot_product_attention(*(x.double() for x in first), is_causal=True, enable_gqa=True)
    got_THE = call(*qkv, offsets, longest)[: shape.rows[0]]

    def step() -> None:
        torch.autograd.grad(call(*qkv, offsets, longest), qkv, dout_THE)

    measure(
        benchmark, step, provider=name, shape=str(shape), error=relative_error(got_THE, exact[0].transpose(0, 1)),
        allowed_error=float("inf"), flops=shape.flops, moved_bytes=shape.bytes, rounds=5,
    )  # fmt: skip


def varlen(name: str) -> Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]:
    """Causal attention of sequences behind one another."""
    need_gpu(name)
    if name == "flash-attn":
        flash = need("flash_attn", "flash-attn")
        return lambda q, k, v, at, longest: flash.flash_attn_varlen_func(
            q, k, v, at, at, longest, longest, causal=True
        )
    if name == "flash-attn-4":
        four = need("flash_attn.cute", "flash-attn-4 --pre")

        def call(q: Tensor, k: Tensor, v: Tensor, at: Tensor, longest: int) -> Tensor:
            out = four.flash_attn_varlen_func(q, k, v, cu_seqlens_q=at, cu_seqlens_k=at, causal=True)
            return out[0] if isinstance(out, tuple) else out

        return call
    own = need("torch.nn.attention.varlen", "torch>=2.11")

    def torchs(q: Tensor, k: Tensor, v: Tensor, at: Tensor, longest: int) -> Tensor:
        groups = q.shape[1] // k.shape[1]  # grouped heads came later than the function
        k, v = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k, v))
        parameters = inspect.signature(own.varlen_attn).parameters
        causal = {"is_causal": True} if "is_causal" in parameters else {"window_size": (-1, 0)}
        return own.varlen_attn(q, k, v, at, at, longest, longest, **causal)

    return torchs


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [PADDED])
def bench_padded(benchmark, name: str, shape: Shape) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = "packed_attention forward+backward"
    B, L = len(shape.rows), max(shape.rows)
    tensors = [torch.randn(B, heads, L, shape.E).to(device(), DTYPE) for heads in (shape.H, shape.K, shape.K)]
    qkv = [x.requires_grad_() for x in tensors]
    dout_BHLE = torch.randn(B, shape.H, L, shape.E).to(device(), DTYPE)

    def step() -> None:
        out_BHLE = F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=shape.H != shape.K)
        torch.autograd.grad(out_BHLE, qkv, dout_BHLE)

    measure(
        benchmark, step, provider=name, shape=str(shape), flops=shape.flops, moved_bytes=shape.bytes, rounds=5
    )
