"""What a run sets up on its machine: ranks, precision, the allocator."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from alignfast.models.trunk import Trunk
from alignfast.trainers.config import TrainerConfig

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


def make_accelerator(config: TrainerConfig) -> Accelerator:
    """Ranks, device and mixed precision, from the config and from the launcher's environment.

    Raises:
        ValueError: the device is neither a CPU nor a CUDA GPU; sharding is asked of accelerate's launcher, of a single rank, or together with fp16.
        RuntimeError: not all ranks that the launcher started are seen.
    """
    for variable in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        if os.environ.get(variable, "false").lower() == "true":
            raise ValueError(
                f"{variable} is set by the launcher: leave it out there, and shard with fsdp=True"
            )
    precision: str | None  # None: what the launcher says
    if config.bf16:
        precision = "bf16"
    elif config.fp16:
        precision = "fp16"
    elif config.bf16 is None and not config.use_cpu and torch.cuda.is_available():
        precision = "bf16" if torch.cuda.is_bf16_supported() else None
    else:
        precision = None if config.bf16 is None else "no"
    # accelerate keeps one state per process; a second trainer may want another precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    # Not told so, accelerate takes torchrun's ranks on a machine without a GPU for processes that stand alone.
    cpu = config.use_cpu or not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=cpu, mixed_precision=precision)
    accelerator.gradient_accumulation_steps = 1  # our losses are divided by the whole step's counts already
    if accelerator.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"training runs on CPUs and CUDA GPUs, and this machine's device is {accelerator.device.type}: set "
            "use_cpu=True"
        )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        raise RuntimeError(
            f"the launcher started {launched} ranks and accelerate sees {accelerator.num_processes}"
        )
    if config.fsdp and launched == 1:
        raise ValueError("fsdp=True shards over ranks and there is one: start with torchrun")
    if config.fsdp and accelerator.mixed_precision == "fp16":
        raise ValueError("fsdp=True has no loss scale for fp16: use bf16=True")
    return accelerator


def leave_ranks() -> None:
    """End the process group where there is one; for the end of a process, when its trainers are out of reach.

    The group lives as long as somebody holds it: DDP's reducer, or the mesh of a sharded weight, which DTensor's caches
    keep for ever. Where it lives on, so do gloo's threads, and one that frees a tensor while the interpreter ends makes
    the process hang or abort: once in some fifteen ends on a busy machine (torch 2.13).
    """
    gc.collect()  # a trainer and its callbacks hold each other
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for mesh in [thing for thing in gc.get_objects() if type(thing) is DeviceMesh]:
        getattr(mesh, "_pg_registry", {}).clear()  # torch 2.11 has none, and finds groups by name


def wrap(policy: Trunk, config: TrainerConfig, accelerator: Accelerator) -> Any:
    """The module as it is to be called: sharded, or replicated by DDP, or alone; in autocast if asked for."""
    if not config.fsdp:
        return accelerator.prepare_model(policy)
    ranks = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    mixed = MixedPrecisionPolicy()
    if accelerator.mixed_precision == "bf16":
        mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    layers = policy.base._no_split_modules or ()
    for module in [module for module in policy.modules() if type(module).__name__ in layers]:
        fully_shard(module, mesh=ranks, mp_policy=mixed)
    sharded = fully_shard(policy, mesh=ranks, mp_policy=mixed)
    if hasattr(policy, "values"):  # of a policy with a critic, called past its forward
        register_fsdp_forward_method(policy, "values")
    return sharded


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
