"""How time and peak memory grow: with tokens, vocabulary, width, length, answers by prompt, and the prompt's share.

One size grows at a time, the others stay; `alignfast bench growth` draws each sweep with its fitted exponent. What the
machine could not hold is skipped with the reason. In the sweeps of the vocabulary the head is frozen, as under LoRA, or
trained: then its gradient, V D numbers, is part of every side's memory. Attention stands beside the padded call, whose
prompts are repeated, and so grows with the answers by more than they.
Letters: T tokens, D width, V vocabulary, B rows, L steps, P tokens of the prompt, R of an answer, G answers.
"""

from __future__ import annotations

from functools import cache

import bench_gae
import bench_linear_loss as linear
import bench_packed_attention as attention
import bench_token_logps as logps
import pytest
import torch
import torch.nn.functional as F
from harness import device, measure, need_memory, seeded, sizes
from torch import Tensor

from alignfast.kernels import packed_attention, report

GPU = torch.cuda.is_available()
POWERS = [1024 << i for i in range(7)]  # 1k to 64k
ROUNDS = sizes(5 if GPU else 3, 1, 3)  # of up to a minute on a CPU
VOCABULARIES = [32_000, 128_256, 151_936, 256_000]


def ours(op: str) -> list[str]:
    """The compiled backends; the definition where there is none."""
    available = [name for name, state in report()[op].items() if state == "available"]
    return [name for name in available if name != "torch"] or available


def swept(full: list[int], quick: int = 3) -> list[int]:
    """The smallest alone in the smoke suite, the smaller ones in the quick one."""
    return sizes(full, full[:1], full[:quick])


DTYPE = torch.bfloat16 if GPU else torch.float32
# On a CPU a narrow head, so that 64k tokens take seconds; tokens enough that logits pass the workspace at any vocabulary
WIDTH, TOKENS = (4096, 8192) if GPU else (64, sizes(2048, 8, 1024))


def head_cases() -> list[tuple[str, int, tuple[int, int, int], bool]]:
    """(what grows, its value, (T, D, V), whether the head is frozen)."""
    tokens_V = 128_256 if GPU else sizes(32_000, 256, 8192)
    widths = swept([256, 512, 1024, 2048, 4096])
    cases = [("tokens", x, (x, WIDTH, tokens_V), False) for x in swept(POWERS)]
    cases += [
        ("vocabulary", x, (TOKENS, WIDTH, x), frozen) for frozen in (False, True) for x in swept(VOCABULARIES)
    ]
    return cases + [("width", x, (8192 if GPU else sizes(512, 8, 256), x, 32_000), False) for x in widths]


HEAD_PROVIDERS = [
    *(f"alignfast {name}" for name in ours("token_logps")), "eager", "F.linear_cross_entropy", "trl logps", "liger",
    "quack",
]  # fmt: skip


@cache
def head_errors(name: str) -> tuple[float, float]:
    allowed = 2 * linear.gradient_error(linear.eager, DTYPE) + 2 * torch.finfo(DTYPE).eps
    found = linear.gradient_error(linear.provider(name), DTYPE)
    return found, allowed if name.startswith("alignfast") else float("inf")


def logits_bytes(name: str, T: int, V: int) -> int:
    """What a provider holds of logits and their like at once, as measured."""
    if name.startswith("alignfast"):
        return 0
    if name == "trl logps":  # by tiles of 4,096 rows, a MiB a row
        return min(T, 4096) << 20
    return (10 if GPU else 12) * T * V


@pytest.mark.parametrize(("axis", "x", "shape", "frozen"), head_cases())
@pytest.mark.parametrize("name", HEAD_PROVIDERS)
def bench_head(  # type: ignore[no-untyped-def]
    benchmark, name: str, axis: str, x: int, shape: tuple[int, int, int], frozen: bool
) -> None:
    benchmark.group = f"linear_loss forward+backward{', head frozen' if frozen else ''}"
    loss, (error, allowed) = linear.provider(name), head_errors(name)
    T, D, V = shape
    need_memory(logits_bytes(name, T, V) + 3 * DTYPE.itemsize * (T + V) * D)
    hidden_TD, weight_VD, targets_T = linear.inputs(T, D, V, DTYPE)
    wanted = [hidden_TD] if frozen else [hidden_TD, weight_VD]
    weight_VD.requires_grad_(not frozen)

    def step() -> None:
        torch.autograd.grad(loss(hidden_TD, weight_VD, targets_T), wanted)

    nbytes = hidden_TD.nbytes + weight_VD.nbytes + sum(tensor.nbytes for tensor in wanted)
    measure(
        benchmark, step, provider=name, shape=f"{T} x {D} x {V}", error=error, allowed_error=allowed,
        flops=(4.0 if frozen else 6.0) * T * D * V, moved_bytes=nbytes, axis=(axis, x), rounds=ROUNDS,
    )  # fmt: skip


LOGITS = swept(POWERS), 128_256 if GPU else 4096  # tokens, vocabulary
LOGPS_PROVIDERS = [*(f"alignfast {name}" for name in ours("token_logps")), "eager", "trl"]


@pytest.mark.parametrize("T", LOGITS[0])
@pytest.mark.parametrize("name", LOGPS_PROVIDERS)
def bench_token_logps(benchmark, name: str, T: int) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = "token_logps forward+backward"
    V, call = LOGITS[1], logps.provider(name)
    need_memory(5 * DTYPE.itemsize * T * V)
    logits_TV, targets_T = logps.inputs(T, V, DTYPE)
    logits_TV.requires_grad_()
    upstream_T = torch.ones(T, device=device())
    error, allowed = logps.gradient_errors(call, DTYPE)

    def step() -> None:
        torch.autograd.grad(call(logits_TV, targets_T, False)[0], logits_TV, upstream_T)

    measure(
        benchmark, step, provider=name, shape=f"{T} x {V}", error=error,
        allowed_error=float("inf") if name in logps.PEERS else allowed, moved_bytes=3 * logits_TV.nbytes,
        axis=("tokens", T), rounds=ROUNDS,
    )  # fmt: skip


@pytest.mark.parametrize("L", swept(POWERS))
@pytest.mark.parametrize("name", [*(f"alignfast {name}" for name in ours("gae")), "loop", *bench_gae.PEERS])
def bench_gae_steps(benchmark, name: str, L: int) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = "gae, 64 rows"
    B, (error, allowed) = 64, bench_gae.errors(name)
    call, arguments = bench_gae.provider(name, (B, L)), bench_gae.inputs(B, L, name)
    measure(
        benchmark, lambda: call(*arguments), provider=name, shape=f"{B} x {L}", error=error, allowed_error=allowed,
        moved_bytes=17 * B * L, flops=8 * B * L, axis=("steps", L), rounds=ROUNDS,
    )  # fmt: skip


HEADS_OF = {"H": 32, "K": 8, "E": 128} if GPU else {}  # of an 8B model; else the tiny one's
PROMPT, ANSWER = (2048, 256) if GPU else sizes((1024, 64), (8, 4), (512, 64))
ATTENTION = [
    *(("tokens of one text", n, attention.Shape(1, n, (), **HEADS_OF)) for n in swept(POWERS if GPU else POWERS[:5])),
    *(("answers", g, attention.Shape(1, PROMPT, (ANSWER,) * g, **HEADS_OF)) for g in swept([2, 4, 8, 16, 32, 64])),
    # a sequence of one length, of which the prompt takes more and more: eight answers to it
    *(
        ("prompt share", eighths / 8, attention.Shape(1, PROMPT * eighths // 8, (PROMPT * (8 - eighths) // 8,) * 8, **HEADS_OF))
        for eighths in swept([1, 2, 4, 6, 7])
    ),
]  # fmt: skip


@pytest.mark.parametrize(("axis", "x", "shape"), ATTENTION, ids=str)
@pytest.mark.parametrize(
    "name", [*(f"alignfast {name}" for name in ours("packed_attention")), attention.PADDED]
)
def bench_attention(  # type: ignore[no-untyped-def]
    benchmark, name: str, axis: str, x: float, shape: attention.Shape
) -> None:
    benchmark.group = f"packed_attention forward+backward, {axis}"
    generator = seeded()
    B, L = len(shape.rows), max(shape.rows)
    packed = name.startswith("alignfast")
    need_memory(20 * (shape.layout.num_tokens if packed else B * L) * shape.H * shape.E)

    def fresh(heads: int) -> Tensor:
        size = (shape.layout.num_tokens, heads, shape.E) if packed else (B, heads, L, shape.E)
        return torch.randn(size, generator=generator, device=device()).to(attention.DTYPE)

    qkv = [fresh(heads).requires_grad_() for heads in (shape.H, shape.K, shape.K)]
    dout, layout = fresh(shape.H), shape.layout

    def step() -> None:
        if packed:
            out = packed_attention(*qkv, layout, backend=name.split()[1])
        else:
            out = F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=shape.H != shape.K)
        torch.autograd.grad(out, qkv, dout)

    error, allowed = attention.errors(name.split()[1], shape.H, shape.K, shape.E) if packed else (None, None)
    measure(
        benchmark, step, provider=name, shape=str(shape), error=error, allowed_error=allowed, flops=shape.flops,
        moved_bytes=shape.bytes, axis=(axis, x), rounds=ROUNDS,
    )  # fmt: skip
