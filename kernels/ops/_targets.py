"""What a target outside the vocabulary leads to: an error on the CPU, NaN and a flag on a GPU.

Reading one number from a GPU waits for all work before it, so there the row's log-prob becomes NaN and the
fact is noted on the device; a training loop reads the note when it logs.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FLAGS: dict[torch.device, Tensor] = {}


def outside(targets_T: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """True where a target is neither a class nor `ignore_index`."""
    return ((targets_T < 0) | (targets_T >= num_classes)) & (targets_T != ignore_index)


def check_targets(targets_T: Tensor, num_classes: int, ignore_index: int) -> None:
    """Refuse targets outside `[0, num_classes)` on the CPU; note them on a GPU.

    Raises:
        ValueError: a CPU target is neither a class nor `ignore_index`.

    >>> check_targets(torch.tensor([0, 3, -100]), 4, -100)
    >>> check_targets(torch.tensor([0, 4]), 4, -100)
    Traceback (most recent call last):
    ValueError: targets must lie in [0, 4) or equal ignore_index=-100, got 4 at row 1
    """
    if torch.compiler.is_compiling():
        return  # a data-dependent raise would break the graph; the row's NaN still tells
    bad_T = outside(targets_T, num_classes, ignore_index)
    if targets_T.device.type == "cpu":
        if bad_T.any():
            row = int(bad_T.nonzero()[0, 0])
            raise ValueError(
                f"targets must lie in [0, {num_classes}) or equal ignore_index={ignore_index}, "
                f"got {int(targets_T[row])} at row {row}"
            )
        return
    flag = _FLAGS.get(targets_T.device)
    if flag is None:
        flag = _FLAGS[targets_T.device] = torch.zeros((), dtype=torch.bool, device=targets_T.device)
    flag.logical_or_(bad_T.any())


def bad_targets_seen(device: torch.device) -> bool:
    """Whether a target outside the vocabulary came by on this GPU since the last call. Waits for the device.

    Args:
        device: a GPU; without an index, as accelerate names it, the current one.
    """
    if device.type == "cuda" and device.index is None:  # a tensor's device always has its index
        device = torch.device("cuda", torch.cuda.current_device())
    flag = _FLAGS.get(device)
    if flag is None:
        return False
    seen = bool(flag)
    flag.zero_()
    return seen
