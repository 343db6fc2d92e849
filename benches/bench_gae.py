"""Advantages of ragged rows: ours by backend, into new tensors and into given ones, a loop over time, verl's and OpenRLHF's.

Floor: rewards and values are read, advantages and returns written, a byte of the mask read: 17 bytes a step; some 8 FLOPs.
The loop is written from the formula with the mask blended in by products, as verl does, and without the whitening that verl
adds; its mask is float32, so that nothing is converted inside the loop. verl's and OpenRLHF's own are timed where they are
installed. verl whitens its advantages, so what is compared of it is its returns; OpenRLHF's masked steps decay.
Letters: B rows, L steps.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import device, measure, need, relative_error, sizes, worst
from torch import Tensor

from alignfast.kernels import gae, report

OURS = [f"alignfast {name}" for name, state in report()["gae"].items() if state == "available"]
PEERS = ("verl", "openrlhf")
PROVIDERS = [*OURS, *(f"{name}, out=" for name in OURS), "loop", *PEERS]
SHAPES = sizes([(4096, 2048), (512, 1024), (64, 256)], [(8, 32)], [(512, 1024)])
GAMMA, LAM = 0.99, 0.95
Pair = tuple[Tensor, Tensor]
Call = Callable[[Tensor, Tensor, Tensor], Pair]


def loop(rewards_BL: Tensor, values_BL: Tensor, mask_BL: Tensor) -> Pair:
    """Backwards over time; a masked step hands on what it got."""
    B, L = values_BL.shape
    next_B, advantage_B = values_BL.new_zeros(B), values_BL.new_zeros(B)
    newest_first = []
    for t in reversed(range(L)):
        taken_B = mask_BL[:, t]
        step_B = rewards_BL[:, t] + GAMMA * next_B - values_BL[:, t] + GAMMA * LAM * advantage_B
        next_B = values_BL[:, t] * taken_B + (1 - taken_B) * next_B
        advantage_B = step_B * taken_B + (1 - taken_B) * advantage_B
        newest_first.append(advantage_B)
    advantages_BL = torch.stack(newest_first[::-1], dim=1)
    return advantages_BL, advantages_BL + values_BL


def provider(name: str, shape: tuple[int, int]) -> Call:
    """The same call for everyone."""
    if name == "loop":
        return loop
    if name == "verl":
        verl = need("verl.trainer.ppo.core_algos", "verl")
        return lambda rewards, values, mask: verl.compute_gae_advantage_return(
            rewards, values, mask, GAMMA, LAM
        )
    if name == "openrlhf":
        maker = need("openrlhf.trainer.ppo_utils.experience_maker", "openrlhf")
        # a method of whichever class makes experiences in that version, which uses nothing of it
        method = next(
            vars(kind)["get_advantages_and_returns"]
            for kind in vars(maker).values()
            if isinstance(kind, type) and "get_advantages_and_returns" in vars(kind)
        )
        return lambda rewards, values, mask: method(None, values, rewards, mask, GAMMA, LAM)
    backend = name.removesuffix(", out=").split()[1]
    out = tuple(torch.zeros(shape, device=device()) for _ in range(2)) if name.endswith("out=") else None

    def ours(rewards_BL: Tensor, values_BL: Tensor, mask_BL: Tensor) -> Pair:
        return gae(rewards_BL, values_BL, mask_BL, gamma=GAMMA, lam=LAM, out=out, backend=backend)  # type: ignore[arg-type]

    return ours


def inputs(B: int, L: int, name: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """Rows of any length, and one token in twenty of a tool's; the mask as the provider knows it."""
    generator = torch.Generator().manual_seed(0)
    rewards_BL, values_BL = (torch.randn(B, L, generator=generator).to(device()) for _ in range(2))
    mask_BL = torch.arange(L) < torch.randint(L // 2, L + 1, (B, 1), generator=generator)
    mask_BL = (mask_BL & (torch.rand(B, L, generator=generator) > 0.05)).to(device())
    return rewards_BL, values_BL, mask_BL.float() if name == "loop" or name in PEERS else mask_BL


def errors(name: str) -> tuple[float, float]:
    """Error against float64 where the mask is 1, and twice the loop's (plus 2 units in the last place)."""
    B, L = 33, 517
    *floats, mask_BL = inputs(B, L)

    def error_of(name: str) -> float:
        masked = "decay" if name == "openrlhf" else "skip"
        exact = (x_BL.double() for x_BL in floats)
        gold = gae(*exact, mask_BL, gamma=GAMMA, lam=LAM, masked=masked, backend="torch")
        got = provider(name, (B, L))(*inputs(B, L, name))
        pairs = list(zip(got, gold))[1 if name == "verl" else 0 :]
        return worst(relative_error(x_BL[mask_BL], exact_BL[mask_BL]) for x_BL, exact_BL in pairs)

    allowed = float("inf") if name in PEERS else 2 * error_of("loop") + 2 * torch.finfo(torch.float32).eps
    return error_of(name), allowed


@pytest.mark.parametrize(("B", "L"), SHAPES)
@pytest.mark.parametrize("name", PROVIDERS)
def bench_gae(benchmark, name: str, B: int, L: int) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = "gae"
    error, allowed = errors(name)
    call, arguments = provider(name, (B, L)), inputs(B, L, name)
    measure(
        benchmark, lambda: call(*arguments), provider=name, shape=f"{B} x {L}", error=error, allowed_error=allowed,
        moved_bytes=17 * B * L, flops=8 * B * L, rounds=20 if "native" in name else 5,
    )  # fmt: skip
