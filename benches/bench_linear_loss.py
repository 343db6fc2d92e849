"""A mean negative log-likelihood from hidden states, forward and backward: the fused head beside its peers.

`logps` in a name: by way of log-probs of every token, which a loss of one's own can be put on; else a plain mean.

Floor: three GEMMs of 2 T D V FLOPs where the gradient is known in the forward pass, four where log-probs come first.
The share is of three GEMMs at the rate that this machine reached, for everyone.
Letters: T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from harness import compiled, device, measure, need, need_gpu, relative_error, seeded, sizes, worst
from torch import Tensor

from alignfast.kernels import linear_loss, linear_token_logps, report

# 135M-class head and a tiny one; on a GPU the 8B-class head of the published figures
SHAPES = (
    sizes([(1024, 256, 32_000), (1024, 576, 49_152)], [(64, 16, 256)], [(512, 256, 32_000)])
    if not torch.cuda.is_available()
    else sizes([(8192, 4096, 128_256)], [(256, 128, 1024)], [(4096, 2048, 32_768)])
)
DTYPES = [torch.float32] if not torch.cuda.is_available() else [torch.bfloat16]
OURS = [name for name, state in report()["token_logps"].items() if state == "available"]
PROVIDERS = [
    *(f"alignfast {name}" for name in OURS),
    *(f"alignfast logps {name}" for name in OURS),
    "eager", "compile", "F.linear_cross_entropy", "trl logps", "liger", "liger logps", "cut-cross-entropy", "quack",
    "verl logps",
]  # fmt: skip
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    return F.cross_entropy((hidden_TD @ weight_VD.T).float(), targets_T)


def provider(name: str) -> Loss:
    """The same call for everyone."""
    if name.startswith("alignfast logps"):
        backend = name.split()[2]
        return lambda h, w, t: -linear_token_logps(h, w, t, backend=backend).mean()  # type: ignore[union-attr]
    if name.startswith("alignfast"):
        backend = name.split()[1]
        return lambda h, w, t: linear_loss(
            h, w, t, lambda stats, rows: (-stats.logps.sum() / len(t), {}), backend=backend
        )[0]
    if name == "trl logps":
        function = need("trl.kernels.chunked_logprob").ChunkedLogProbFunction
        return lambda h, w, t: -function.apply(h, w, None, t, 1.0, 32_768)[0].mean()
    if name == "liger":
        return partial(_liger, need("liger_kernel.transformers.functional"))
    if name == "liger logps":  # CuTe on Hopper where its DSL is installed
        need_gpu("Liger's fused scaled cross-entropy")
        scaled = need("liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction
        return lambda h, w, t: scaled.apply(h, w, t, 1.0, -100, 1, False).mean()
    if name == "cut-cross-entropy":
        need_gpu("cut-cross-entropy's kernels")
        cut = need("cut_cross_entropy", "cut-cross-entropy")
        return lambda h, w, t: cut.linear_cross_entropy(h, w, t)
    if name == "quack":
        need_gpu("QuACK")
        quack = need("quack.linear_cross_entropy", "quack-kernels")
        return lambda h, w, t: quack.chunked_linear_cross_entropy(h, w, t)
    if name == "verl logps":
        need_gpu("verl's kernel")
        verl = need("verl.utils.kernel.linear_cross_entropy", "verl")
        return lambda h, w, t: -verl.linear_cross_entropy(h, w, t, 1.0, "none", None)[0].mean()
    if name == "F.linear_cross_entropy":
        if not hasattr(F, "linear_cross_entropy"):
            pytest.skip("torch's F.linear_cross_entropy came with 2.13")
        return lambda h, w, t: F.linear_cross_entropy(h, w, t)
    return compiled(eager) if name == "compile" else eager


def _liger(functional, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    need_gpu("Liger's kernel")
    result = functional.liger_fused_linear_cross_entropy(hidden_TD, weight_VD, targets_T)
    return result[0] if isinstance(result, tuple) else result


def inputs(T: int, D: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = seeded()
    hidden_TD = torch.randn(T, D, generator=generator, device=device()).to(dtype).requires_grad_()
    weight_VD = (
        torch.randn(V, D, generator=generator, device=device()).mul_(D**-0.5).to(dtype).requires_grad_()
    )
    return hidden_TD, weight_VD, torch.randint(0, V, (T,), generator=generator, device=device())


def gradient_error(loss: Loss, dtype: torch.dtype) -> float:
    # odd sizes, but where a GPU's peers ask for multiples of 128
    hidden_TD, weight_VD, targets_T = inputs(
        *((61, 48, 997) if device().type == "cpu" else (128, 128, 1024)), dtype
    )
    exact = [x.detach().double().requires_grad_() for x in (hidden_TD, weight_VD)]
    gold = torch.autograd.grad(F.cross_entropy(exact[0] @ exact[1].T, targets_T), exact)
    got = torch.autograd.grad(loss(hidden_TD, weight_VD, targets_T), (hidden_TD, weight_VD))
    return worst(relative_error(x, y) for x, y in zip(got, gold))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "D", "V"), SHAPES)
@pytest.mark.parametrize("name", PROVIDERS)
def bench_forward_backward(benchmark, name: str, T: int, D: int, V: int, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = "linear_loss forward+backward"
    loss = provider(name)
    error = gradient_error(loss, dtype)
    allowed = 2 * gradient_error(eager, dtype) + 2 * torch.finfo(dtype).eps
    hidden_TD, weight_VD, targets_T = inputs(T, D, V, dtype)

    def step() -> None:
        torch.autograd.grad(loss(hidden_TD, weight_VD, targets_T), (hidden_TD, weight_VD))

    measure(
        benchmark, step, provider=name, shape=f"{T} x {D} x {V}", error=error,
        allowed_error=allowed if name.startswith("alignfast") else float("inf"), flops=6.0 * T * D * V,
        # hidden states and weight are read, and their gradients written
        moved_bytes=2 * (hidden_TD.nbytes + weight_VD.nbytes), rounds=3 if device().type == "cpu" else 20,
    )  # fmt: skip
