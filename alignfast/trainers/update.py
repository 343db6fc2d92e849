"""The optimizer's step: clipped, scheduled, and left out where loss or gradient is no number."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from alignfast.trainers.config import TrainerConfig, steps_of

# Parameters that AdamW's decay leaves alone, as in transformers.
_NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


class Update(NamedTuple):
    """What became of a step: whether it was taken, the gradient's norm before clipping, the learning rate."""

    taken: bool
    grad_norm: float
    learning_rate: float


class Updater:
    """Turns the gradients of a whole step into new weights.

    Args:
        config: optimizer, clipping and schedule.
        accelerator: for fp16's loss scale.
        module: whose parameters are trained, sharded if they are to be.
        num_steps: of the run.

    Attributes:
        skipped: steps left out.
        skipped_in_a_row: the last steps among them.
    """

    def __init__(
        self, config: TrainerConfig, accelerator: Accelerator, module: nn.Module, num_steps: int
    ) -> None:
        self.max_norm = config.max_grad_norm or math.inf
        self.accelerator = accelerator
        accelerator.free_memory()  # of an earlier run's optimizer
        self.optimizer = make_optimizer(module, config)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.stepper = accelerator.prepare_optimizer(self.optimizer)  # knows of the loss scale
        self.scheduler = make_scheduler(self.optimizer, config, num_steps)
        self.skipped = self.skipped_in_a_row = 0

    def step(self, loss: float) -> Update:
        """One step of optimizer and schedule; `loss` is the whole step's, alike on all ranks."""
        self.accelerator.unscale_gradients(self.stepper)
        total = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        grad_norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
        if grad_norm > self.max_norm:  # else the pass over all gradients would multiply them by one
            clip_grads_with_norm_(self.parameters, self.max_norm, total)
        learning_rate = float(self.scheduler.get_last_lr()[0])
        scaler = self.accelerator.scaler
        # An infinite gradient is how fp16's loss scale finds its size: the scaler skips such a step and halves.
        searching = scaler is not None and scaler.get_scale() > 1
        taken = math.isfinite(loss) and (math.isfinite(grad_norm) or searching)
        if taken:
            self.stepper.step()
        elif scaler is not None:
            scaler.update()  # closes the step that clipping had opened
        self.skipped += not taken
        self.skipped_in_a_row = 0 if taken else self.skipped_in_a_row + 1
        self.scheduler.step()
        self.stepper.zero_grad(set_to_none=True)
        return Update(taken, grad_norm, learning_rate)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the optimizer's own state."""
        scaler = self.accelerator.scaler
        return {
            "scheduler": self.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]


def make_optimizer(model: nn.Module, config: TrainerConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that want a gradient, decay left out for norms and biases.

    Raises:
        ValueError: nothing is to be trained.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("no parameter of the model wants a gradient: all are frozen")
    decayed = set(get_parameter_names(model, [nn.LayerNorm], _NO_DECAY))
    rates = {"": config.learning_rate, **config.learning_rates}
    rate_of = {name: rates[max(filter(name.startswith, rates), key=len)] for name in trained}
    groups: list[dict[str, Any]] = [
        {
            "params": [
                p for name, p in trained.items() if (name in decayed, rate_of[name]) == (decays, rate)
            ],
            "weight_decay": config.weight_decay if decays else 0.0,
            "lr": rate,
        }
        for rate in dict.fromkeys(rates.values())
        for decays in (True, False)
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
