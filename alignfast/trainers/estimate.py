"""What a run will take, said before it begins: tokens, memory and time. Estimates, and called so."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import nn

from alignfast.models.four_bit import arithmetic_of, num_weights
from alignfast.trainers.progress import duration

if TYPE_CHECKING:
    from alignfast.trainers.loop import Trainer

_GEMM = 1024  # width of the matrices whose product says how fast the device is
_SHARE_OF_GEMM = 0.5  # what training reaches of that speed, as measured on small models
_KEPT_BY_LAYER = (
    22  # numbers that a layer keeps for its backward pass, in widths; Llamas were seen at 20 to 25
)


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
    args = trainer.args
    weights, *beside = (sum(map(_bytes, module.parameters())) for module in trainer.modules_in_memory)
    trained = sum(_bytes(p) for p in trainer.module.parameters() if p.requires_grad)
    tokens = args.max_tokens_per_batch or computed * args.per_device_train_batch_size / trainer.plan.num_rows
    sizes = trainer.module.base.config.get_text_config()
    layers = getattr(sizes, "num_hidden_layers", 0)
    # With checkpointing a layer keeps its input alone, and one layer at a time is computed again.
    kept = layers + _KEPT_BY_LAYER if args.gradient_checkpointing else layers * _KEPT_BY_LAYER
    activations = tokens * kept * getattr(sizes, "hidden_size", 0) * _dtype(trainer).itemsize
    ranks = trainer.accelerator.num_processes if args.fsdp else 1  # which share the trained model alone
    return (weights + 3 * trained) / ranks + sum(beside) + activations


def _bytes(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.element_size()


def _dtype(trainer: Trainer) -> torch.dtype:
    """Type of the arithmetic."""
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(trainer.accelerator.mixed_precision)
    if mixed is not None:
        return mixed
    # codes of 4 bits are whole numbers, and what they stand for is computed in a type of its own
    dtype = next(p.dtype for p in trainer.module.parameters() if p.is_floating_point())
    return arithmetic_of(trainer.module.base, dtype)


def _time(trainer: Trainer, tokens: float) -> str:
    """Time for the steps that are left, from a matrix product's speed on this device."""
    args = trainer.args
    x = torch.ones(_GEMM, _GEMM, device=trainer.accelerator.device, dtype=_dtype(trainer))
    best = min(_seconds_of(x) for _ in range(3))
    parameters = sum(map(num_weights, trainer.module.parameters()))
    trained = sum(p.numel() for p in trainer.module.parameters() if p.requires_grad)
    # Per token and parameter 2 FLOPs forward, 2 back through the activations, 2 for a trained weight's gradient.
    passes = (6 if args.gradient_checkpointing else 4) + 2 * trainer.forwards_beside
    flops = tokens * (parameters * passes + 2 * trained)
    seconds = flops / (2 * _GEMM**3 / best) / _SHARE_OF_GEMM / trainer.accelerator.num_processes
    return f"{duration(seconds)} of training steps"


def _seconds_of(x: torch.Tensor) -> float:
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    (x @ x)[0, 0].item()
    return time.perf_counter() - began
