"""A policy's weights into a running vLLM server: vLLM's own protocol, control over HTTP, tensors over NCCL.

    once     /get_world_size, /init_weight_transfer_engine while the trainer joins the group as rank 0
    a sync   /pause, /start_weight_update, /update_weights while rank 0 broadcasts each tensor in the order announced,
             /finish_weight_update, /reset_prefix_cache, /resume

(https://docs.vllm.ai/en/latest/training/weight_transfer/). The group is opened by an NCCL id that travels in the
request, so that no vLLM need be installed beside the trainer; torch's NCCL must be of the server's version. Adapters are
merged one weight at a time, into a tensor of its own: the policy is only read.

EXPERIMENTAL: tested against a recorded server and a stand-in for NCCL; it has not run on a GPU.

Not done here: weights that FSDP or ZeRO-3 split (gather them and pass them by name); models whose checkpoint names its
weights otherwise than transformers does (most mixtures of experts); several tensors to a broadcast.
"""

from __future__ import annotations

import base64
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.conversion_mapping import get_model_conversion_mapping

from alignfast.models.adapters import add_adapters, check_adapters
from alignfast.models.attention import ModelRefused
from alignfast.models.policy import Policy
from alignfast.rollout.server import START, Server, ServerError

_OLDEST = (0, 30)  # the first version that was seen to open a group by an NCCL id
_NO_SUM = "quantised weights can't be merged for a server; train on others, or use engine='native'"
_CHUNK = 1 << 22  # elements of a fingerprint at once: 32 MiB in 64 bits


@dataclass(frozen=True, eq=False)
class ServedWeight:
    """A weight under the name that the model's checkpoint gives it.

    Attributes:
        name: of the weight.
        stored: the tensor in the policy; it tells type and shape.
        layer: PEFT's layer whose adapters are added, or None.
    """

    name: str
    stored: Tensor
    layer: Any = None

    @torch.no_grad()
    def read(self) -> Tensor:
        """The weight to serve, contiguous."""
        tensor = self.stored.detach()
        if self.layer is not None:
            tensor = add_adapters(self.layer, tensor, self.name)
        return tensor.contiguous()

    def sources(self) -> list[Tensor]:
        """All that the weight is made of."""
        return [self.stored] if self.layer is None else [self.stored, *self.layer.parameters()]

    def adapters(self) -> list[str]:
        """Names of the adapters in force on it."""
        return [] if self.layer is None else check_adapters(self.layer, self.name)


def named_weights(named_parameters: Iterable[tuple[str, Tensor]]) -> list[ServedWeight]:
    """Weights that somebody else gathered, under their checkpoint's names.

    Raises:
        ModelRefused: one is split over ranks, or quantised.
    """
    return [ServedWeight(name, _checked(tensor, name)) for name, tensor in named_parameters]


def served_weights(policy: Policy) -> list[ServedWeight]:
    """All weights of a policy, to be read with its active adapters merged.

    Raises:
        ModelRefused: they are not what a checkpoint of the model holds.
    """
    base = policy.base
    if getattr(base, "is_quantized", False):
        raise ModelRefused(f"{type(base).__name__} is quantised: {_NO_SUM}")
    if get_model_conversion_mapping(base, add_legacy=False):
        raise ModelRefused(
            f"the checkpoint of {type(base).__name__} names its weights otherwise than transformers does, and a server "
            "knows the checkpoint's names alone; pass named_parameters under those"
        )
    found: dict[int, ServedWeight] = {}
    for weight in _weights(base, ""):
        first = found.setdefault(id(weight.stored), weight)
        if first is not weight and (first.layer is not None or weight.layer is not None):
            raise ModelRefused(
                f"{first.name} and {weight.name} are one tensor, and adapters on one of them would untie them, which a "
                "server can't; leave both out of target_modules"
            )
    for weight in found.values():
        weight.adapters()  # refused before anything is sent
    return list(found.values())


def _weights(module: Any, prefix: str) -> Iterator[ServedWeight]:
    if hasattr(module, "modules_to_save"):  # PEFT: a module that is trained whole
        active = [] if module.disable_adapters else module.active_adapters
        yield from _weights(module.modules_to_save[active[0]] if active else module.original_module, prefix)
        return
    layer = module if hasattr(module, "base_layer") else None
    inner: nn.Module = module if layer is None else module.base_layer
    if hasattr(module, "original_module") or (layer is not None and any(inner.children())):
        raise ModelRefused(
            f"{prefix}{type(module).__name__} is an adapter of a kind that can't be merged; use LoRA"
        )
    for name, parameter in inner.named_parameters(recurse=False):
        yield ServedWeight(
            prefix + name, _checked(parameter, prefix + name), layer if name == "weight" else None
        )
    if layer is None:
        for name, child in inner.named_children():
            yield from _weights(child, f"{prefix}{name}.")


def _checked(tensor: Tensor, name: str) -> Tensor:
    if isinstance(tensor, DTensor):
        raise ModelRefused(f"{name} is split over ranks; gather the weights and pass named_parameters")
    if not tensor.is_floating_point():
        raise ModelRefused(f"{name} holds {tensor.dtype}, expected floating-point numbers: {_NO_SUM}")
    return tensor


def fingerprint(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Two numbers a tensor that tell whether a bit changed: sum_i b_i and sum_i i b_i of its elements' bits, mod 2^64.

    A change of one or two elements always shows, one of more by all but chance. Versions that torch counts would miss
    what is written through `.data`.

    >>> fingerprint([torch.tensor([1.0, 2.0])]) == fingerprint([torch.tensor([2.0, 1.0])])
    False
    """
    sums = [total for tensor in tensors for total in _sums(tensor.detach())]
    return tuple(int(total) for total in sums)


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _sums(tensor: Tensor) -> tuple[Tensor, Tensor]:
    bits = tensor.contiguous().view(-1).view(_BITS[tensor.element_size()])
    plain = torch.zeros((), dtype=torch.int64, device=bits.device)
    placed = plain.clone()
    for start in range(0, len(bits), _CHUNK):
        chunk = bits[start : start + _CHUNK].long()
        total = chunk.sum()
        plain += total
        placed += (chunk * torch.arange(len(chunk), device=bits.device)).sum() + start * total
    return plain, placed


class Communicator(Protocol):
    """The trainer's end of a group of ranks, as rank 0; each is joined once.

    Attributes:
        unique_id: the 128 bytes by which the other ranks find it.
    """

    unique_id: bytes

    def join(self, world_size: int) -> None:
        """Wait for all ranks, and take part in the all-reduce of one float32 by which vLLM's warm up."""

    def broadcast(self, tensor: Tensor) -> None:
        """Send a tensor to all ranks, in the order of calls."""

    def synchronize(self) -> None:
        """Wait for all that was computed and sent."""


class NcclCommunicator:
    """NCCL by torch's own bindings.

    Args:
        device: of the weights.

    Raises:
        RuntimeError: it is no GPU, or torch was built without NCCL.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda" or not hasattr(torch._C, "_nccl_unique_id"):
            raise RuntimeError(
                f"weights go to a server over NCCL, and these are on {device}: put the policy on a GPU that the server "
                "does not use, under a torch that was built with NCCL"
            )
        from torch.cuda import nccl

        self.device, self._nccl, self._group = device, nccl, None
        self.unique_id = bytes(nccl.unique_id())

    def join(self, world_size: int) -> None:
        """See `Communicator`."""
        with torch.cuda.device(self.device):
            self._group = self._nccl.init_rank(world_size, self.unique_id, 0)
            self._nccl.all_reduce([torch.zeros(1, device=self.device)], comms=[self._group])
            self.synchronize()

    def broadcast(self, tensor: Tensor) -> None:
        """See `Communicator`."""
        with torch.cuda.device(self.device):  # threads each have a current device of their own
            self._nccl.broadcast([tensor.to(self.device)], root=0, comms=[self._group])

    def synchronize(self) -> None:
        """See `Communicator`."""
        torch.cuda.synchronize(self.device)


class WeightTransfer:
    """The way of weights into one server, opened at the first `send`.

    Args:
        server: that takes them.
        make_communicator: called with the weights' device.
    """

    def __init__(self, server: Server, make_communicator: Callable[[torch.device], Communicator]) -> None:
        self.server, self.make_communicator = server, make_communicator
        self._group: Communicator | None = None
        self._broken = False

    def send(self, weights: list[ServedWeight]) -> None:
        """Replace the server's weights, and drop what it cached under the old ones.

        Raises:
            ServerError: it refuses or takes too long. If that is half-way it stays paused, since some of its weights
                are new and some old.
        """
        if self._broken:
            raise ServerError(
                f"an earlier weight update to {self.server.url} failed half-way: restart the server, and make a new engine"
            )
        if self._group is None:
            self._group = self._open(weights[0].stored.device)
        group = self._group
        group.synchronize()  # what the optimizer wrote on another stream
        self.server.post("/pause", {}, mode="wait")
        self._broken = True
        try:
            self.server.post("/start_weight_update", {})
            side_by_side(
                {
                    "/update_weights": lambda: self.server.post(
                        "/update_weights", {"update_info": _info(weights)}
                    ),
                    "the broadcast": lambda: _broadcast(group, weights),
                },
                self.server.timeout,
            )
            self.server.post("/finish_weight_update", {})
            answer = self.server.post("/reset_prefix_cache", {})
            if isinstance(answer, dict) and answer.get("success") is False:  # no body before vLLM 0.26
                raise ServerError("its prefix cache could not be reset")
            self.server.post("/resume", {})
        except Exception as error:
            raise ServerError(
                f"the weight update to {self.server.url} failed half-way, and the server stays paused: restart it "
                f"({error})"
            ) from error
        self._broken = False

    def _open(self, device: torch.device) -> Communicator:
        """Join the server's workers in a group."""
        version = self.server.get("/version")
        known = _version(version["version"]) if isinstance(version, dict) else None
        if known is not None and known < _OLDEST:
            raise ServerError(
                f"the server at {self.server.url} is vLLM {version['version']}, and weights need 0.30 or later: upgrade it"
            )
        world_size = 1 + self.server.get("/get_world_size")["world_size"]
        group = self.make_communicator(device)
        info = {
            "nccl_unique_id_b64": base64.b64encode(group.unique_id).decode(),
            "rank_offset": 1,
            "world_size": world_size,
            "packed": False,
        }
        try:
            side_by_side(
                {
                    "/init_weight_transfer_engine": lambda: self.server.post(
                        "/init_weight_transfer_engine", {"init_info": info}
                    ),
                    "joining the group": lambda: group.join(world_size),
                },
                self.server.timeout,
            )
        except Exception as error:
            raise ServerError(
                f"the server at {self.server.url} and the trainer found no way for weights: {error}. Both need NCCL of "
                f"one version and GPUs of their own. To have a server that takes weights: {START}"
            ) from error
        return group


def side_by_side(calls: dict[str, Callable[[], object]], timeout: float) -> None:
    """Run calls that wait for each other, each on a thread.

    Raises:
        ServerError: one has not ended after so many seconds.
        Exception: of the first that failed, at once: the others may wait for it for ever.
    """
    ended: queue.Queue[tuple[str, BaseException | None]] = queue.Queue()

    def run(name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:
            ended.put((name, error))
        else:
            ended.put((name, None))

    for name, call in calls.items():
        # A daemon: a collective whose peer is gone never returns, and must not keep the process alive.
        threading.Thread(target=run, args=(name, call), daemon=True).start()
    waiting, end = set(calls), time.monotonic() + timeout
    while waiting:
        try:
            name, error = ended.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            raise ServerError(f"{' and '.join(sorted(waiting))} did not end within {timeout:g} s") from None
        if error is not None:
            raise error
        waiting.remove(name)


def _info(weights: list[ServedWeight]) -> dict[str, list[Any]]:
    """What the server must know beforehand, in the order of the broadcasts."""
    return {
        "names": [weight.name for weight in weights],
        "dtype_names": [str(weight.stored.dtype).removeprefix("torch.") for weight in weights],
        "shapes": [list(weight.stored.shape) for weight in weights],
    }


def _broadcast(group: Communicator, weights: list[ServedWeight]) -> None:
    for weight in weights:
        group.broadcast(weight.read())
    group.synchronize()


def _version(text: str) -> tuple[int, int] | None:
    """Major and minor number; None for a version made by hand.

    >>> _version("0.9.2"), _version("0.30.1rc1+cu130"), _version("0.1.dev1+g1234"), _version("main")
    ((0, 9), (0, 30), None, None)
    """
    found = re.match(r"(\d+)\.(\d+)(?!\.dev)", text)
    return None if found is None else (int(found[1]), int(found[2]))
