"""What a checkpoint holds of a run besides its bookkeeping: weights, optimizer, random numbers.

Tensors go to safetensors under the names of their parameters, everything else to JSON; nothing is pickled. Weights
are what `save_pretrained` writes, so a checkpoint loads in transformers. A parameter sharded over the ranks is saved
whole and cut again on loading.

Every function here is to be called on all ranks; the first one writes.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict, load_peft_weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.utils import logging as transformers_logging

OPTIMIZER, RNG = "optimizer", "rng"


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its shards, on the CPU where it was sharded."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, target: Tensor) -> Tensor:
    """`tensor`, which every rank has whole, placed as `target` is."""
    tensor = tensor.to(target.device)
    if not isinstance(target, DTensor):
        return tensor
    return distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)


def save_weights(model: Any, folder: Path, is_main: bool) -> None:
    """Write the model as `save_pretrained` does: all of it, or the adapter alone for a PEFT model."""
    state = None
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        gathered: dict[int, Tensor] = {}  # by the shard's identity: a tied weight has two names
        state = {}
        for name, shard in model.state_dict(keep_vars=True).items():
            if id(shard) not in gathered:
                full = whole(shard.detach())
                gathered[id(shard)] = full if is_main else torch.empty(0)
            state[name] = gathered[id(shard)]
    if is_main:
        with no_bars():
            model.save_pretrained(folder, state_dict=state)


def load_weights(model: Any, folder: Path) -> None:
    """Read back what `save_weights` wrote, bit for bit.

    Raises:
        ValueError: the folder holds other weights than the model has.
    """
    state = model.state_dict()
    if isinstance(model, PeftModel):
        names = get_peft_model_state_dict(
            model, state_dict={name: torch.tensor(i) for i, name in enumerate(state)}
        )
        stored = {saved: list(state)[int(label)] for saved, label in names.items()}
        weights = load_peft_weights(str(folder), device="cpu")
        loaded = {stored.get(name, name): tensor for name, tensor in weights.items()}
        missing, unexpected = set(stored.values()) - set(loaded), set(loaded) - set(stored.values())
    else:
        widest = max((p.dtype for p in model.parameters()), key=lambda dtype: dtype.itemsize)
        with no_bars():
            twin, report = type(model).from_pretrained(
                folder, config=copy.deepcopy(model.config), dtype=widest, output_loading_info=True
            )
        loaded, missing, unexpected = twin.state_dict(), report["missing_keys"], report["unexpected_keys"]
    if missing or unexpected:
        raise ValueError(
            f"{folder} holds weights of another model: missing {sorted(missing)[:3]}, "
            f"unexpected {sorted(unexpected)[:3]}"
        )
    with torch.no_grad():
        for name, tensor in loaded.items():
            state[name].copy_(shard_like(tensor, state[name]))


@contextmanager
def no_bars() -> Iterator[None]:
    """transformers' bars for reading and writing files would tear the one of the run."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def save_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, is_main: bool) -> None:
    """Write the optimizer: its tensors as `parameter.field`, its numbers as JSON."""
    names = _names_in_order(model, optimizer)
    state = optimizer.state_dict()
    tensors = {}
    for index, fields in state["state"].items():
        for field, shard in fields.items():
            full = whole(shard)
            if is_main:
                tensors[f"{names[index]}.{field}"] = full.contiguous()
    groups = [
        {key: value for key, value in group.items() if key != "params"} for group in state["param_groups"]
    ]
    if is_main:
        save_file(tensors, folder / f"{OPTIMIZER}.safetensors")
        write_json(folder / f"{OPTIMIZER}.json", {"param_groups": groups})


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Read back what `save_optimizer` wrote, bit for bit.

    Raises:
        ValueError: the parameters that are trained are not those of the checkpoint.
    """
    names = _names_in_order(model, optimizer)
    parameters = dict(model.named_parameters())
    fields: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / f"{OPTIMIZER}.safetensors").items():
        name, _, field = key.rpartition(".")
        if name not in parameters:
            raise ValueError(f"{folder} holds the optimizer of another model: there is no parameter {name}")
        sharded = tensor.shape == parameters[name].shape and tensor.ndim > 0
        fields.setdefault(name, {})[field] = shard_like(tensor, parameters[name]) if sharded else tensor
    if fields and set(fields) != set(names):
        raise ValueError(
            f"{folder} holds the optimizer of another model: {sorted(set(names) - set(fields))[:3]} missing"
        )
    state = optimizer.state_dict()
    saved_groups = read_json(folder / f"{OPTIMIZER}.json")["param_groups"]
    groups = [
        {**saved, "params": group["params"]} for group, saved in zip(state["param_groups"], saved_groups)
    ]
    optimizer.load_state_dict(
        {"state": {i: fields[name] for i, name in enumerate(names) if fields}, "param_groups": groups}
    )


def _names_in_order(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters, in the order of its state."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def save_rng(folder: Path, rank: int) -> None:
    """Write the state of every random number generator of this process."""
    version, words, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=False)
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    save_file(tensors, folder / f"{RNG}-{rank}.safetensors")
    rest = {
        "python": [version, gauss],
        "numpy": {"pos": numpy["state"]["pos"], "has_gauss": numpy["has_gauss"], "gauss": numpy["gauss"]},
    }
    write_json(folder / f"{RNG}-{rank}.json", rest)


def load_rng(folder: Path, rank: int) -> None:
    """Put back what `save_rng` wrote.

    Raises:
        ValueError: the checkpoint was written by fewer ranks.
    """
    file = folder / f"{RNG}-{rank}.safetensors"
    if not file.exists():
        raise ValueError(
            f"{folder} was written by fewer processes: it has no {file.name}; use as many as then"
        )
    tensors, rest = load_file(file), read_json(folder / f"{RNG}-{rank}.json")
    version, gauss = rest["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    numpy, key = rest["numpy"], tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state({**numpy, "bit_generator": "MT19937", "state": {"key": key, "pos": numpy["pos"]}})
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def write_json(file: Path, value: Any) -> None:
    """Write a value as strict JSON."""
    file.write_text(json.dumps(value, allow_nan=False))


def read_json(file: Path) -> Any:
    """Read a JSON file."""
    return json.loads(file.read_text())
