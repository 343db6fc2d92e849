"""Each op once at small odd sizes, or once beyond 2^31 elements: for a GPU's first minutes and for compute-sanitizer.

`python benches/gpu_cases.py small [--backend native]` holds values and gradients to float64. `large` makes the tensor that a
kernel's offsets run over larger than 2^31 elements, and holds the last rows, which lie beyond, to float64; what the device
can't hold is left out and named. `environment` prints what a reader must know. The exact comparison, with all options, is
tests/ops; here a case fails that is wrong by more than 1e-4 of its largest value (1e-2 in bfloat16).

Letters: T tokens, D width, V vocabulary, B rows, L steps, N pairs, H heads, K key heads, E head width,
S sequences.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import device, environment, relative_error, worst
from torch import Tensor

from alignfast import kernels

BEYOND = (1 << 31) + 4096
ROWS = 3  # that are compared
Case = Callable[[str, int], float]  # backend and elements: the error


def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers on the device; a short stretch over and over where there are billions."""
    count = torch.Size(shape).numel()
    some = (scale * torch.randn(min(count, 1 << 20), device=device())).to(dtype)
    if count <= len(some):
        return some.view(shape)
    out = torch.empty(count, dtype=dtype, device=device())
    whole = count // len(some) * len(some)
    out[:whole].view(-1, len(some)).copy_(some.expand(whole // len(some), -1))
    out[whole:] = some[: count - whole]
    return out.view(shape)


def gradients(call: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """The call's value, and the gradients of its sum."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = call(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))


def compared(call: Callable[..., Tensor], definition: Callable[..., Tensor], *inputs: Tensor) -> float:
    """Largest error of value and gradients, in the last rows, against float64 of those rows alone."""
    got = [x[-ROWS:].double() for x in gradients(call, *inputs)]
    gold = gradients(definition, *(x[-ROWS:].double() for x in inputs))
    return worst(relative_error(x, y) for x, y in zip(got, gold))


def rows_of(elements: int, V: int) -> int:
    return max(elements // V + 1, ROWS)


def token_logps(backend: str, elements: int, dtype: torch.dtype = torch.float32) -> float:
    V = 128_256 if elements > 1 << 20 else 517
    T = rows_of(elements, V)
    target_T = torch.arange(T, device=device()) * 37 % V
    return compared(
        lambda x: kernels.token_logps(x, target_T, backend=backend),
        lambda x: kernels.token_logps(x, target_T[-ROWS:], backend="torch"),
        draw(T, V, scale=3.0, dtype=dtype),
    )


def token_logps_bf16(backend: str, elements: int) -> float:
    return token_logps(backend, elements, torch.bfloat16)


def kl_divergence(backend: str, elements: int, dtype: torch.dtype = torch.float32) -> float:
    V = 128_256 if elements > 1 << 20 else 517
    T = rows_of(elements, V)
    x_TV = draw(T, V, scale=3.0, dtype=dtype)
    ref_TV = x_TV.flip(1)
    return compared(
        lambda x: kernels.kl_divergence(x, ref_TV, kind="forward", backend=backend),
        lambda x: kernels.kl_divergence(x, ref_TV[-ROWS:].double(), kind="forward", backend="torch"),
        x_TV,
    )


def kl_divergence_bf16(backend: str, elements: int) -> float:
    return kl_divergence(backend, elements, torch.bfloat16)


def kl_penalty(backend: str, elements: int) -> float:
    x_T = draw(elements)
    ref_T = x_T.roll(1)
    return compared(
        lambda x: kernels.kl_penalty(x, ref_T, kind="k3", backend=backend),
        lambda x: kernels.kl_penalty(x, ref_T[-ROWS:].double(), kind="k3", backend="torch"),
        x_T,
    )


def policy_loss(backend: str, elements: int) -> float:
    logps_T = draw(elements).abs_().neg_()
    old_T, advantages_T = logps_T.roll(1), draw(elements).roll(7)

    def call(rows: slice, backend: str, wide: bool) -> Callable[[Tensor], Tensor]:
        old, advantages = (x[rows].double() if wide else x[rows] for x in (old_T, advantages_T))
        return lambda x: kernels.policy_loss(x, old, advantages, num_items=1, backend=backend)[0]

    return compared(call(slice(None), backend, False), call(slice(-ROWS, None), "torch", True), logps_T)


def gae(backend: str, elements: int) -> float:
    L = 2048 if elements > 1 << 20 else 67
    B = rows_of(elements, L)
    rewards_BL, values_BL = draw(B, L), draw(B, L).roll(3)
    mask_BL = torch.ones(B, L, dtype=torch.bool, device=device())
    mask_BL[:, L // 3] = False
    got = kernels.gae(rewards_BL, values_BL, mask_BL, gamma=0.99, backend=backend)
    last = (rewards_BL[-ROWS:].double(), values_BL[-ROWS:].double(), mask_BL[-ROWS:])
    gold = kernels.gae(*last, gamma=0.99, backend="torch")
    return worst(relative_error(x[-ROWS:], y) for x, y in zip(got, gold))


def preference_loss(backend: str, elements: int) -> float:
    N = 4
    L = elements // (2 * N) + 1
    offsets_M = torch.arange(0, 2 * N * L + 1, L, device=device())
    refs = [draw(N), draw(N)]
    logps_P = draw(2 * N * L, scale=1 / L**0.5)

    def call(backend: str) -> Callable[[Tensor], Tensor]:
        return lambda x: kernels.packed_preference_loss(x, offsets_M, *refs, beta=0.1, backend=backend).loss_N

    loss_N, gradient_P = gradients(call(backend), logps_P)
    sums_M = torch.stack([part.double().sum() for part in logps_P.split(L)])
    margin_N = (sums_M[::2] - refs[0]) - (sums_M[1::2] - refs[1])
    gold_N = -torch.nn.functional.logsigmoid(0.1 * margin_N)
    # of the rejected one's tokens; the chosen one's have the other sign
    slope_N = 0.1 * torch.sigmoid(-0.1 * margin_N)
    return worst((relative_error(loss_N, gold_N), relative_error(gradient_P[-1:], slope_N[-1:])))


def packed_attention(backend: str, elements: int, dtype: torch.dtype = torch.float32) -> float:
    H, K, E, length = (32, 8, 128, 128) if elements > 1 << 20 else (4, 2, 16, 19)
    texts = elements // (H * E * length) + 2
    qkv = [draw(texts * length, heads, E, dtype=dtype) for heads in (H, K, K)]
    whole, last = (kernels.PackedLayout((length,) * count, ((),) * count) for count in (texts, 1))
    out_THE, *grads = gradients(lambda *x: kernels.packed_attention(*x, whole, backend=backend), *qkv)
    ends = [x[-length:].double() for x in qkv]
    gold = gradients(lambda *x: kernels.packed_attention(*x, last, backend="torch"), *ends)
    return worst(relative_error(x[-length:], y) for x, y in zip([out_THE, *grads], gold))


def packed_attention_bf16(backend: str, elements: int) -> float:
    """By tensor cores, which float32 never meets."""
    return packed_attention(backend, elements, torch.bfloat16)


def paged_attention(backend: str, elements: int) -> float:
    """One query a sequence; only the last ones' keys are looked at again, and they lie in the last pages."""
    H, K, E, block, pages = (32, 8, 128, 16, 64) if elements > 1 << 20 else (4, 2, 16, 16, 3)
    S = elements // (K * E * block * pages) + ROWS
    length_S = torch.full((S,), block * pages - 5, device=device(), dtype=torch.int32)
    page_SN = torch.arange(S * pages, device=device(), dtype=torch.int32).view(S, pages)
    q_SHE = draw(S, H, E)
    k_PBKE, v_PBKE = draw(S * pages, block, K, E), draw(S * pages, block, K, E).roll(1)
    got = kernels.paged_attention(q_SHE, k_PBKE, v_PBKE, page_SN, length_S, backend=backend)
    last = slice(-ROWS * pages, None)
    gold = kernels.paged_attention(
        q_SHE[-ROWS:].double(), k_PBKE[last].double(), v_PBKE[last].double(), page_SN[:ROWS], length_S[-ROWS:],
        backend="torch",
    )  # fmt: skip
    return relative_error(got[-ROWS:], gold)


def sample_tokens(backend: str, elements: int, dtype: torch.dtype = torch.float32) -> float:
    V = 128_256 if elements > 1 << 20 else 517
    B = rows_of(elements, V)
    logits_BV, at_B = draw(B, V, scale=3.0, dtype=dtype), torch.arange(B, device=device())
    token_B, logps_B, _ = kernels.sample_tokens(
        logits_BV, top_p=0.9, seed=1, sequence_B=at_B, position_B=at_B, backend=backend
    )
    gold = logits_BV[-ROWS:].double().log_softmax(-1).gather(1, token_B[-ROWS:, None])[:, 0]
    return relative_error(logps_B[-ROWS:], gold)


def sample_tokens_bf16(backend: str, elements: int) -> float:
    return sample_tokens(backend, elements, torch.bfloat16)


def linear_loss(backend: str, elements: int) -> float:
    """The logits are never whole: beyond 2^31 of them the chunks' offsets into hidden states are what is tried."""
    V, D = (128_256, 64) if elements > 1 << 20 else (517, 32)
    T = rows_of(elements, V)
    target_T, weight_VD = torch.arange(T, device=device()) * 37 % V, draw(V, D, scale=D**-0.5)

    def loss(x: Tensor, weight: Tensor, targets: Tensor, backend: str) -> Tensor:
        return kernels.linear_loss(
            x, weight, targets, lambda stats, _: (-stats.logps.sum(), {}), backend=backend
        )[0]

    hidden_TD = draw(T, D).requires_grad_()
    (got_TD,) = torch.autograd.grad(loss(hidden_TD, weight_VD, target_T, backend), hidden_TD)
    end_TD = hidden_TD.detach()[-ROWS:].double().requires_grad_()
    (gold_TD,) = torch.autograd.grad(loss(end_TD, weight_VD.double(), target_T[-ROWS:], "torch"), end_TD)
    return relative_error(got_TD[-ROWS:], gold_TD)


# Name of the op: its cases, and bytes by element that a case takes at most
CASES: dict[str, tuple[tuple[Case, ...], float]] = {
    "token_logps": ((token_logps, token_logps_bf16), 13),
    "kl_divergence": ((kl_divergence, kl_divergence_bf16), 21),
    "kl_penalty": ((kl_penalty,), 25),
    "policy_loss": ((policy_loss,), 41),
    "gae": ((gae,), 22),
    "preference_loss": ((preference_loss,), 21),
    "packed_attention": ((packed_attention, packed_attention_bf16), 24),
    "paged_attention": ((paged_attention,), 13),
    "sample_tokens": ((sample_tokens, sample_tokens_bf16), 13),
    "linear_loss": ((linear_loss,), 1),
}


def chosen(wanted: str | None) -> Iterator[tuple[str, Case, str, float]]:
    """(op, case, backend, bytes by element) of all that is available; the definition is not tried against itself."""
    for op, (cases, size) in CASES.items():
        known = kernels.report()["token_logps" if op == "linear_loss" else op]
        for backend, state in known.items():
            if state == "available" and backend == (wanted or backend) and (wanted or backend != "torch"):
                yield from ((op, case, backend, size) for case in cases)


def run(kind: str, backend: str | None, elements: int) -> int:
    """All cases; returns how many failed, 1 where there was none to try."""
    failed, cases = 0, list(chosen(backend))
    if not cases:
        print(
            f"FAILED    no op has an available {backend or 'compiled'} backend here: alignfast doctor says why"
        )
        return 1
    for _, case, name, size in cases:
        what = f"{case.__name__} {name}, {'small' if kind == 'small' else f'{elements} elements'}"
        if kind == "large" and device().type == "cuda" and elements * size > torch.cuda.mem_get_info()[0]:
            print(
                f"left out  {what}: the device holds less than {elements * size / 2**30:.0f} GiB", flush=True
            )
            continue
        try:
            error = case(name, 1001 if kind == "small" else elements)
        except Exception as broke:  # the others are to run
            print(
                f"FAILED    {what}: {type(broke).__name__}: {next(iter(str(broke).splitlines()), '')[:200]}",
                flush=True,
            )
            failed += 1
            continue
        right = error <= (1e-2 if "bf16" in case.__name__ else 1e-4)
        failed += not right
        print(f"{'right' if right else 'FAILED':9s} {what}: error {error:.1e}", flush=True)
        if device().type == "cuda":
            torch.cuda.empty_cache()
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["environment", "small", "large"])
    parser.add_argument("--backend", choices=["native", "triton", "torch"])
    parser.add_argument("--elements", type=int, default=BEYOND)
    arguments = parser.parse_args()
    if arguments.kind == "environment":
        report: Any = {**environment(), "ops": kernels.report()}
        print(json.dumps(report, indent=1))
        return
    torch.manual_seed(0)
    sys.exit(min(run(arguments.kind, arguments.backend, arguments.elements), 1))


if __name__ == "__main__":
    main()
