"""What the tests of policy_loss share: sequences of tokens end to end, and the losses as one writes them in PyTorch.

Letters: T tokens, S sequences.
"""

from __future__ import annotations

import math
from copy import copy
from typing import Any

import pytest
import torch
from ops import conformance as c
from torch import Tensor

from alignfast.kernels import policy_loss
from alignfast.kernels._policy import LOSSES

COMPILED = [name for name, loss in LOSSES.items() if loss.compiled]
on_every_backend = pytest.mark.parametrize(
    ("backend", "device"), c.backends_for("policy_loss", every_isa=True)
)
every_loss = pytest.mark.parametrize("name", LOSSES)
every_compiled_loss = pytest.mark.parametrize("name", COMPILED)


def needed(name: str) -> dict[str, Any]:
    """Options that a loss can't do without."""
    return {"dr_grpo": {"max_completion_length": 50}, "cispo": {"epsilon_high": 1.5}}.get(name, {})


class Tokens:
    """Tokens of sequences of some lengths, as the arguments of policy_loss.

    A fifth does not count and holds NaN; a tenth has no advantage; the policy is `spread` nats from the old one.
    """

    def __init__(
        self, lengths: list[int], dtype: torch.dtype = torch.float32, *, spread: float = 0.3, seed: int = 0
    ) -> None:
        T, generator = sum(lengths), torch.Generator().manual_seed(seed)

        def normal(size: float) -> Tensor:
            return (size * torch.randn(T, generator=generator)).to(dtype)

        self.lengths = lengths
        self.logps_T = (-3 * torch.rand(T, generator=generator)).to(dtype)
        self.old_T, self.ref_T = self.logps_T + normal(spread), self.logps_T + normal(spread)
        self.advantages_T = normal(1.0) * (torch.rand(T, generator=generator) > 0.1)
        self.seq_T = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
        self.mask_T = torch.rand(T, generator=generator) > 0.2
        for x_T in (self.logps_T, self.old_T, self.advantages_T, self.ref_T):
            x_T[~self.mask_T] = math.nan

    def shaken(self, times: int) -> Tokens:
        """The same tokens so many times, each log-prob moved in its last four bits: as large, with other roundings."""
        generator, many = torch.Generator().manual_seed(1), copy(self)
        many.lengths = self.lengths * times
        for name in ("logps_T", "old_T", "advantages_T", "ref_T"):
            factor_T = 1 + (torch.rand(times * len(self.logps_T), generator=generator) - 0.5) * 2**-20
            setattr(many, name, getattr(self, name).repeat(times) * factor_T)
        sequence = len(self.lengths) * torch.arange(times).repeat_interleave(len(self.logps_T))
        many.seq_T, many.mask_T = self.seq_T.repeat(times) + sequence, self.mask_T.repeat(times)
        return many

    @property
    def kept_lengths(self) -> Tensor:
        """Of each sequence, the tokens that count."""
        return torch.tensor([int(part_T.sum()) for part_T in self.mask_T.split(self.lengths)])

    def tensors(self, like_T: Tensor) -> dict[str, Tensor]:
        floats = {"old_logps_T": self.old_T, "advantages_T": self.advantages_T, "ref_logps_T": self.ref_T}
        placed = {name: x_T.to(like_T.device, like_T.dtype) for name, x_T in floats.items()}
        return placed | {"mask_T": self.mask_T.to(like_T.device), "seq_T": self.seq_T.to(like_T.device)}

    def call(
        self, logps_T: Tensor, name: str, backend: str, **options: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        tensors = self.tensors(logps_T)
        if not options.get("beta"):
            del tensors["ref_logps_T"]
        return policy_loss(logps_T, **tensors | needed(name) | options, loss_type=name, backend=backend)

    def peer(
        self,
        logps_T: Tensor,
        name: str,
        *,
        beta: float = 0.0,
        epsilon: float = 0.2,
        epsilon_high: float | None = None,
        delta: float | None = None,
        dual_clip: float | None = None,
        use_bias_correction_kl: bool = False,
    ) -> list[Tensor]:
        """The clipped losses at token level, with exp, clamp and minimum; then the metrics in order of their names."""
        logps_T = logps_T if logps_T.dtype == torch.float64 else logps_T.float()
        t = self.tensors(logps_T)
        where = t["mask_T"].nonzero()[:, 0]
        logp, old, advantage, ref = (
            x_T[where] for x_T in (logps_T, t["old_logps_T"], t["advantages_T"], t["ref_logps_T"])
        )
        high = 1 + (epsilon if epsilon_high is None else epsilon_high)
        ratio = torch.exp(logp - old)
        capped = ratio.clamp(max=math.inf if delta is None else delta)
        loss = -torch.minimum(capped * advantage, ratio.clamp(1 - epsilon, high) * advantage)
        if dual_clip is not None:
            loss = torch.where(advantage < 0, torch.minimum(loss, -advantage * dual_clip), loss)
        kl = torch.expm1(ref - logp) - (ref - logp)
        kl = kl * ratio if use_bias_correction_kl else kl
        loss = loss + beta * kl if beta else loss
        if name in ("ppo", "dapo"):
            loss = loss / max(len(where), 1)
        if name == "dr_grpo":
            loss = loss / (len({*self.seq_T.tolist()}) * 50)
        if name == "grpo":
            lengths_T = self.kept_lengths.to(loss)[t["seq_T"][where]]
            loss = loss / lengths_T / len({*self.seq_T.tolist()})
        loss_T = torch.zeros_like(logps_T).index_put((where,), loss)
        detached, log_ratio = ratio.detach(), (logp - old).detach()
        low_clip = ((advantage < 0) & (detached < 1 - epsilon)).sum()
        high_clip = ((advantage > 0) & (detached > high)).sum()
        metrics = {
            "approx_kl/k1": -log_ratio.sum(), "approx_kl/k3": (log_ratio.expm1() - log_ratio).sum(),
            "clip_ratio/low_mean": low_clip, "clip_ratio/high_mean": high_clip,
            "clip_ratio/region_mean": low_clip + high_clip, "ratio": detached.sum(),
            "max_ratio": detached.amax() if len(where) else detached.sum(),
        }  # fmt: skip
        cap = delta if dual_clip is None else dual_clip
        if cap is not None:
            metrics["clip_ratio/cap_mean"] = ((advantage < 0) & (detached > cap)).sum()
        if beta:
            metrics["kl"] = kl.detach().sum()
        return [loss_T, *(metrics[key].to(loss_T) for key in sorted(metrics))]

    def case(self, device: str, name: str, *, times: int = 1, **options: Any) -> c.Case:
        """`times`, a power of two, multiplies the losses, exactly."""
        return c.Case(
            lambda x_T: times * self.peer(x_T, name, **options)[0],
            lambda x_T: times * self.call(x_T, name, "torch", **options)[0],
            [self.logps_T.to(device)],
        )


def ragged(num_sequences: int, longest: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, longest + 1, (num_sequences,), generator=generator).tolist()
