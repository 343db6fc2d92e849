"""What a run will take, said before it begins: tokens, memory and time. Estimates, and called so."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from alignfast.trainers.progress import duration

if TYPE_CHECKING:
    from alignfast.trainers.loop import Trainer

_GEMM = 1024  # width of the matrices whose product says how fast the device is
_SHARE_OF_GEMM = 0.5  # what training reaches of that speed, as measured on small models


def describe_run(trainer: Trainer) -> str:
    """A few lines for people: data, share saved by sharing, memory, time."""
    args, plan, data = trainer.args, trainer.plan, trainer.train_data
    unshared = sum(tree.num_tokens_unshared for tree in data.trees)
    computed = unshared if args.layout != "shared" else sum(tree.num_tokens for tree in data.trees)
    steps_left = plan.num_steps - trainer.state.global_step
    tokens = computed * plan.rows_per_step * steps_left / plan.num_rows
    lines = [
        f"{plan.num_rows:,} rows, {unshared:,} tokens, of which {computed:,} are computed "
        f"({1 - computed / unshared:.0%} saved by sharing prompts); {plan.num_steps:,} steps of "
        f"{plan.rows_per_step:,} rows",
        *data.report.summary().splitlines()[1:],
        f"estimates: {_memory(trainer, computed) / 2**30:.2f} GiB of memory on each rank, {_time(trainer, tokens)}",
    ]
    return "\n".join(lines)


def _memory(trainer: Trainer, computed: int) -> float:
    """Bytes: weights, gradients, AdamW's moments, and the activations of one micro-batch."""
    args, base = trainer.args, trainer.module.base
    ranks = trainer.accelerator.num_processes if args.fsdp else 1
    weights = sum(p.numel() * p.element_size() for p in trainer.module.parameters())
    trained = sum(p.numel() * p.element_size() for p in trainer.module.parameters() if p.requires_grad)
    per_row = computed / trainer.plan.num_rows
    tokens = args.max_tokens_per_batch or per_row * args.per_device_train_batch_size
    sizes = base.config.get_text_config()
    width, layers = getattr(sizes, "hidden_size", 0), getattr(sizes, "num_hidden_layers", 0)
    # Numbers a layer keeps for its backward pass, in widths of a token: its input alone with checkpointing, and one
    # layer whole while it is computed again.
    kept = layers + 34 if args.gradient_checkpointing else 34 * layers
    return (weights + 3 * trained) / ranks + tokens * kept * width * 4


def _time(trainer: Trainer, tokens: float) -> str:
    """Time for the steps that are left, from a matrix product's speed on this device."""
    device, args = trainer.accelerator.device, trainer.args
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(
        trainer.accelerator.mixed_precision, torch.float32
    )
    x = torch.ones(_GEMM, _GEMM, device=device, dtype=dtype)
    best = min(_seconds_of(x) for _ in range(3))
    parameters = sum(p.numel() for p in trainer.module.parameters())
    trained = sum(p.numel() for p in trainer.module.parameters() if p.requires_grad)
    # Per token and parameter 2 FLOPs forward, 2 back through the activations, 2 for a trained weight's gradient.
    flops = tokens * (parameters * (6 if args.gradient_checkpointing else 4) + 2 * trained)
    seconds = flops / (2 * _GEMM**3 / best) / _SHARE_OF_GEMM / trainer.accelerator.num_processes
    return f"{duration(seconds)} of training steps"


def _seconds_of(x: torch.Tensor) -> float:
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    (x @ x)[0, 0].item()
    return time.perf_counter() - began
