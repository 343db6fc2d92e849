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
from functools import cache

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


Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def inputs(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    T = shape.layout.num_tokens
    tensors = [
        torch.randn(T, heads, shape.E, generator=generator) for heads in (shape.H, shape.K, shape.K, shape.H)
    ]
    q_THE, k_TKE, v_TKE, dout_THE = (x.to(device(), dtype) for x in tensors)
    return q_THE.requires_grad_(), k_TKE.requires_grad_(), v_TKE.requires_grad_(), dout_THE


@cache
def errors(backend: str, H: int, K: int, E: int) -> tuple[float, float]:
    """Largest error of a gradient against float64, ours and what is allowed: twice the definition's, plus 2 units."""
    small = Shape(2, 33, (17, 5), H, K, E)
    *low, dlow = inputs(small, DTYPE)
    exact = [x.detach().double().requires_grad_() for x in low]

    def gradients(by: str, of: list[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(packed_attention(*of, small.layout, backend=by), of, dout)

    gold = gradients("torch", exact, dlow.double())
    found, plain = (
        worst(relative_error(x, y) for x, y in zip(gradients(by, low, dlow), gold))
        for by in (backend, "torch")
    )
    return found, 2 * plain + 2 * torch.finfo(DTYPE).eps


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OURS)
def bench_packed(benchmark, name: str, shape: Shape) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = "packed_attention forward+backward"
    *qkv, dout_THE = inputs(shape, DTYPE)
    layout = shape.layout

    backend = name.split()[1]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(packed_attention(*qkv, layout, backend=backend), qkv, dout_THE)

    error, allowed = errors(backend, shape.H, shape.K, shape.E)
    measure(
        benchmark, step, provider=name, shape=str(shape), error=error, allowed_error=allowed,
        flops=shape.flops, moved_bytes=shape.bytes, rounds=5,
    )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", VARLEN)
def bench_varlen(benchmark, name: str, shape: Shape) -> None:  # type: ignore[no-untyped-def]
    """Rows behind one another without padding, each with a prompt of its own; gradients are checked at a small shape."""
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

    def step() -> None:
        torch.autograd.grad(call(*qkv, offsets, longest), qkv, dout_THE)

    measure(
        benchmark, step, provider=name, shape=str(shape), error=varlen_error(call, shape.H, shape.K, shape.E),
        allowed_error=float("inf"), flops=shape.flops, moved_bytes=shape.bytes, rounds=5,
    )  # fmt: skip


def varlen_error(call: Varlen, H: int, K: int, E: int) -> float:
    """Largest error of a gradient against SDPA in float64, of two rows: of long ones the reference would fill the device."""
    lengths = (33, 130)
    offsets = torch.tensor([0, 33, 163], dtype=torch.int32, device=device())
    low = [torch.randn(163, heads, E).to(device(), DTYPE).requires_grad_() for heads in (H, K, K)]
    dout_THE = torch.randn(163, H, E).to(device(), DTYPE)
    exact = [x.detach().double().requires_grad_() for x in low]
    rows = [
        F.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in row), is_causal=True, enable_gqa=H != K
        )
        for row in zip(*(x.split(lengths) for x in exact))
    ]
    out_THE = torch.cat([out_1HLE[0].transpose(0, 1) for out_1HLE in rows])
    gold = torch.autograd.grad(out_THE, exact, dout_THE.double())
    got = torch.autograd.grad(call(*low, offsets, max(lengths)), low, dout_THE)
    return worst(relative_error(x, y) for x, y in zip(got, gold))


def varlen(name: str) -> Varlen:
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
