"""What a run sets up on its machine: ranks and precision, the optimizer, the allocator."""

from __future__ import annotations

import ctypes
import platform
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from alignfast.trainers.config import TrainerConfig, steps_of

# Parameters that AdamW's decay leaves alone, as in transformers.
_NO_DECAY = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


def make_accelerator(config: TrainerConfig) -> Accelerator:
    """Ranks, device and mixed precision, from the config and from the launcher's environment."""
    if config.bf16:
        precision = "bf16"
    elif config.fp16:
        precision = "fp16"
    elif config.bf16 is None and not config.use_cpu and torch.cuda.is_available():
        precision = "bf16" if torch.cuda.is_bf16_supported() else None
    else:
        precision = None if config.bf16 is None else "no"
    plugin = None
    if config.fsdp:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
    AcceleratorState._reset_state()  # a second trainer of the process may want another precision
    accelerator = Accelerator(cpu=config.use_cpu, mixed_precision=precision, fsdp_plugin=plugin)
    accelerator.gradient_accumulation_steps = 1  # our losses are divided by the whole step's count already
    if config.fsdp and accelerator.num_processes == 1:
        raise ValueError(
            "fsdp=True shards over ranks and there is one: start with torchrun or accelerate launch"
        )
    return accelerator


def make_optimizer(model: nn.Module, config: TrainerConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that want a gradient, decay left out for norms and biases.

    Raises:
        ValueError: nothing is to be trained.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("no parameter of the model wants a gradient: all are frozen")
    decayed = set(get_parameter_names(model, [nn.LayerNorm], list(_NO_DECAY)))
    groups = [
        {
            "params": [p for name, p in trained.items() if name in decayed],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for name, p in trained.items() if name not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=config.optim == "adamw_torch_fused",
    )


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainerConfig, num_steps: int) -> LRScheduler:
    """One of transformers' learning rate schedules.

    Raises:
        ValueError: the schedule is unknown, or goes by a metric.
    """
    if config.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        raise ValueError(
            f"lr_scheduler_type={config.lr_scheduler_type!r} goes by a metric; take one that goes by steps"
        )
    return get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=steps_of(config.warmup_steps, num_steps) if config.warmup_steps else 0,
        num_training_steps=num_steps,
        scheduler_specific_kwargs=config.lr_scheduler_kwargs,
    )


def keep_cpu_memory() -> bool:
    """Have malloc keep what is freed, for the rest of the process. Says whether this is a system where it can.

    By default glibc gives large blocks back at once and takes them anew, a page fault per 4 kB: 0.35 to 0.46 ms a
    MB, against 0.05 for memory that it kept. Half of a small model's training step on a CPU goes that way.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt: Any = ctypes.CDLL("libc.so.6").mallopt
    kept = [mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, -1), mallopt(_M_TOP_PAD, 256 << 20)]
    return all(kept)
