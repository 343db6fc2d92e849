"""What a run sets up on its machine: ranks, precision, the allocator."""

from __future__ import annotations

import ctypes
import platform
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin

from alignfast.trainers.config import TrainerConfig

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


def make_accelerator(config: TrainerConfig) -> Accelerator:
    """Ranks, device and mixed precision, from the config and from the launcher's environment."""
    precision: str | None  # None: what the launcher says
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
