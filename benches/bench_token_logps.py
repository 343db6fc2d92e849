"""Log-prob of each target from logits in memory: ours by backend, eager torch, torch.compile, TRL, Liger, QuACK.

Floor: forward reads the logits once; backward reads them again and writes their gradient. FLOPs: 4 a logit forward (with the
exponential as one), 6 with the entropy, 8 forward and backward.
Letters: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import compiled, device, measure, need, need_gpu, relative_error, seeded, sizes, worst
from torch import Tensor

from alignfast.kernels import report, token_logps
from alignfast.kernels._backend import resolve
from alignfast.kernels.token_logps import row_options

SHAPES = (
    sizes([(2048, 32_000), (512, 128_256)], [(8, 99)], [(512, 32_000)])
    if not torch.cuda.is_available()
    else sizes([(8192, 128_256), (8192, 151_936), (4096, 256_000)], [(64, 1024)], [(8192, 32_000)])
)
DTYPES = sizes([torch.float32, torch.bfloat16], [torch.float32], [torch.float32])
if torch.cuda.is_available():
    DTYPES = [torch.bfloat16, torch.float32][: sizes(2, 1, 1)]
OURS = [f"alignfast {name}" for name, state in report()["token_logps"].items() if state == "available"]
PROVIDERS = [*OURS, "eager", "compile", "trl", "liger", "quack"]
PEERS = ("trl", "liger", "compile", "quack")  # shown with whatever error they have
Call = Callable[[Tensor, Tensor, bool], tuple[Tensor, ...]]


def eager(logits_TV: Tensor, targets_T: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    """The plain expression, in float32 or float64."""
    logps_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32)).log_softmax(-1)
    picked_T = logps_TV.gather(1, targets_T[:, None])[:, 0]
    return (picked_T, -(logps_TV.exp() * logps_TV).sum(-1)) if entropy else (picked_T,)


def provider(name: str) -> Call:
    """The same call for everyone: log-probs, and the entropies if asked for."""
    if name.startswith("alignfast"):

        def ours(logits_TV: Tensor, targets_T: Tensor, entropy: bool) -> tuple[Tensor, ...]:
            result = token_logps(logits_TV, targets_T, entropy=entropy, backend=name.split()[1])
            return result if isinstance(result, tuple) else (result,)

        return ours
    if name == "trl":
        utils = need("trl.trainer.utils")
        return lambda logits_TV, targets_T, entropy: (
            utils.selective_log_softmax_and_entropy(logits_TV, targets_T)
            if entropy
            else (utils.selective_log_softmax(logits_TV, targets_T),)
        )
    if name == "liger":
        need_gpu("Liger's kernel")
        liger = need("liger_kernel.ops.grpo_loss")
        # of the rows but the last of each sequence
        return lambda logits_TV, targets_T, entropy: (
            pytest.skip("Liger has no entropy here")
            if entropy
            else (
                liger.fused_selective_log_softmax(logits_TV[None], targets_T[None, :-1].contiguous(), 1.0)[0],
            )
        )
    if name == "quack":
        need_gpu("QuACK")
        quack = need("quack.cross_entropy", "quack-kernels")
        return lambda logits_TV, targets_T, entropy: (
            pytest.skip("QuACK has no entropy")
            if entropy
            else (-quack.cross_entropy(logits_TV, targets_T, reduction="none"),)
        )
    return compiled(eager) if name == "compile" else eager


def inputs(T: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = seeded()
    logits_TV = torch.randn(T, V, generator=generator, device=device()).mul_(3).to(dtype)
    return logits_TV, torch.randint(0, V, (T,), generator=generator, device=device())


def errors(name: str, dtype: torch.dtype, entropy: bool) -> tuple[float, float]:
    """Error against float64 on a few rows, ours and twice the eager one's (plus 2 units in the last place)."""
    logits_TV, targets_T = inputs(32, 4999, dtype)
    gold = eager(logits_TV.double(), targets_T, entropy)
    got = provider(name)(logits_TV, targets_T, entropy)
    plain = eager(logits_TV, targets_T, entropy)
    found, allowed = (
        worst(relative_error(x_T, y_T[: len(x_T)]) for x_T, y_T in zip(x, gold)) for x in (got, plain)
    )
    return found, 2 * allowed + 2 * torch.finfo(torch.float32).eps


def gradient_errors(call: Call, dtype: torch.dtype) -> tuple[float, float]:
    """The same of the log-probs' gradient, which is in the logits' type."""
    logits_TV, targets_T = inputs(32, 4999, dtype)
    upstream_T = torch.linspace(-1, 1, 32, device=device())

    def gradient(call: Call, logits_TV: Tensor) -> Tensor:
        leaf_TV = logits_TV.requires_grad_()
        (logps_T, *_) = call(leaf_TV, targets_T, False)
        return torch.autograd.grad(logps_T, leaf_TV, upstream_T.to(logps_T.dtype))[0]

    gold_TV = gradient(eager, logits_TV.double())
    found, allowed = (relative_error(gradient(by, logits_TV), gold_TV) for by in (call, eager))
    return found, 2 * allowed + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("entropy", [False, True], ids=["logps", "logps+entropy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "V"), SHAPES)
@pytest.mark.parametrize("name", PROVIDERS)
def bench_forward(benchmark, name: str, T: int, V: int, dtype: torch.dtype, entropy: bool) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = f"token_logps forward{' with entropy' if entropy else ''}"
    error, allowed = errors(name, dtype, entropy)
    if name in PEERS:
        allowed = float("inf")
    call, (logits_TV, targets_T) = provider(name), inputs(T, V, dtype)
    with torch.no_grad():
        measure(
            benchmark, lambda: call(logits_TV, targets_T, entropy), provider=name, shape=f"{T} x {V} {dtype}"[:40],
            error=error, allowed_error=allowed, read_bytes=logits_TV.nbytes,
            flops=(6 if entropy else 4) * logits_TV.numel(),
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "V"), SHAPES)
@pytest.mark.parametrize("name", [name for name in PROVIDERS if name != "liger"])
def bench_forward_backward(benchmark, name: str, T: int, V: int, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = "token_logps forward+backward"
    call, (logits_TV, targets_T) = provider(name), inputs(T, V, dtype)
    logits_TV.requires_grad_()
    upstream_T = torch.randn(T, device=device())

    def step() -> None:
        torch.autograd.grad(call(logits_TV, targets_T, False)[0], logits_TV, upstream_T)

    error, allowed = gradient_errors(call, dtype)
    measure(
        benchmark, step, provider=name, shape=f"{T} x {V} {dtype}"[:40], error=error,
        allowed_error=float("inf") if name in PEERS else allowed, moved_bytes=3 * logits_TV.nbytes,
        flops=8 * logits_TV.numel(),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "V"), SHAPES)
@pytest.mark.parametrize("name", OURS)
def bench_forward_backward_reused(benchmark, name: str, T: int, V: int, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    """As the fused head calls it: the gradient goes into memory that was touched before."""
    benchmark.group = "token_logps forward+backward, reused buffer"
    implementation = resolve("token_logps", device(), dtype, name.split()[1])
    options = row_options(1.0, None, 1.0, -100, ())
    logits_TV, targets_T = inputs(T, V, dtype)
    out_TV, dstats_KT = torch.zeros_like(logits_TV), torch.zeros(6, T, device=device())
    dstats_KT[0] = torch.randn(T, device=device())

    def step() -> None:
        stats_KT = implementation.forward(logits_TV, targets_T, options)
        implementation.backward(logits_TV, targets_T, stats_KT, dstats_KT, options, out_TV)

    error, allowed = gradient_errors(provider(name), dtype)
    measure(
        benchmark, step, provider=name, shape=f"{T} x {V} {dtype}"[:40], error=error, allowed_error=allowed,
        moved_bytes=3 * logits_TV.nbytes, flops=8 * logits_TV.numel(),
    )  # fmt: skip
