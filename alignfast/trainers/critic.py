"""Critics of PPOTrainer: made from what it was given, saved beside the policy and read back.

critic/   a sequence classification model of one output, as save_pretrained writes it (its adapters alone for PEFT);
          of critic='shared' value_head.safetensors
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from alignfast.models.policy import Policy
from alignfast.models.value import Critic, ValueHead, critic_like, load_critic
from alignfast.trainers.state import load_weights, save_weights, shard_like, whole

if TYPE_CHECKING:
    from alignfast.trainers.ppo import PPOConfig

CRITICS = ("own", "shared")
FOLDER = "critic"
_HEAD_FILE = "value_head.safetensors"


def make_critic(
    policy: Policy, args: PPOConfig, value_model: Any, *, adapters_are_new: bool
) -> Critic | ValueHead:
    """The critic that the options ask for.

    Raises:
        ValueError: the value model is of no use to such a critic, or a checkpoint lacks its head.
        ModelRefused: there can be no critic of this architecture.
    """
    if args.critic == "shared":
        head = ValueHead(policy)
        if value_model is not None:
            _load_head(head, value_model)
        return head
    if value_model is None:
        return critic_like(policy, adapters_are_new)
    loading = {**args.loading, "four_bit": None}  # it is trained whole
    if not isinstance(value_model, (str, os.PathLike)):
        loading["dtype"] = None  # an object keeps its own
    return load_critic(value_model, **loading)


def save_critic(critic: Critic | ValueHead, folder: Path, is_main: bool) -> None:
    """Write a critic into the folder `critic` of a model's; to be called on all ranks."""
    if isinstance(critic, Critic):
        save_weights(critic.model, folder / FOLDER, is_main)
        return
    head = {name: whole(x.detach()).cpu() for name, x in critic.state_dict().items()}
    if is_main:
        (folder / FOLDER).mkdir(exist_ok=True)
        save_file(head, folder / FOLDER / _HEAD_FILE)


def load_critic_weights(critic: Critic | ValueHead, folder: Path) -> None:
    """Read back what `save_critic` wrote, bit for bit.

    Raises:
        ValueError: the folder holds no critic, or one of another kind or size.
    """
    if isinstance(critic, ValueHead):
        _load_head(critic, folder / FOLDER)
    elif not (folder / FOLDER).is_dir():
        raise ValueError(
            f"{folder} holds no folder {FOLDER}: it was not written by PPOTrainer, or lost its critic"
        )
    else:
        load_weights(critic.model, folder / FOLDER)


def _load_head(head: ValueHead, source: Any) -> None:
    file = Path(source).expanduser() / _HEAD_FILE if isinstance(source, (str, os.PathLike)) else None
    if file is None or not file.is_file():
        raise ValueError(
            f"critic='shared' is a head on the policy's trunk and starts from a folder with {_HEAD_FILE}, got "
            f"{source if file is not None else type(source).__name__}: leave value_model out, or set critic='own'"
        )
    stored = load_file(file)
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    if shapes != expected:
        raise ValueError(f"{file} holds {shapes}, expected {expected}: it is of another model")
    with torch.no_grad():
        for name, tensor in head.state_dict().items():
            tensor.copy_(shard_like(stored[name], tensor))
