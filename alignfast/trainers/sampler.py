"""What a trainer samples with: the policy itself, or, where FSDP shards it, a copy that is whole on each rank.

The copy is brought up to date before each draw.

    memory    the policy's weights once more on each rank; gradients, AdamW's moments and the critic stay sharded
    a draw    gathers each trained weight once, one at a time

An engine on sharded weights would have to run as many passes on one rank as on the others, and completions end when they end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from alignfast.models.policy import Policy
from alignfast.rollout import RolloutEngine, make_engine

if TYPE_CHECKING:
    from alignfast.trainers.on_policy import OnPolicyTrainer


class WholeCopy:
    """A policy for an engine.

    Args:
        module: the policy that will be sharded, while it is whole.

    Attributes:
        policy: the copy.
    """

    def __init__(self, module: Policy) -> None:
        self.module, self.policy = module, module.reference_copy()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the trained weights; to be called on all ranks."""
        trained = dict(self.module.named_parameters())
        for name, own in self.policy.named_parameters():
            if trained[name].requires_grad:
                weight = trained[name].detach()
                own.copy_(weight.full_tensor() if isinstance(weight, DTensor) else weight)


def sampler_of(trainer: OnPolicyTrainer) -> tuple[WholeCopy | None, RolloutEngine]:
    """(the copy, where there must be one; the engine), of a policy that still is whole.

    Raises:
        ValueError: the engine can't serve these ranks, or sharded weights.
    """
    args = trainer.args
    if args.engine == "vllm" and trainer.accelerator.num_processes > 1:
        raise ValueError("engine='vllm' serves one process: run without torchrun, or take engine='native'")
    if args.fsdp and trainer.rollout_func is not None:
        raise ValueError("rollout_func samples with the trainer's model, which fsdp shards: leave one out")
    copy = WholeCopy(trainer.module) if args.fsdp else None
    policy = trainer.module if copy is None else copy.policy
    url, timeout = args.vllm_server_base_url, args.vllm_server_timeout
    options: dict[str, Any] = {}
    if args.engine == "vllm":
        options = {"server_url": url, "server_timeout": timeout}
    elif args.engine == "native":
        options = {"cuda_graphs": args.cuda_graphs, "decode_backend": args.decode_backend}
    return copy, make_engine(args.engine, policy, trainer.processing_class, **options)
