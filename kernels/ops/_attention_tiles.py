"""How packed attention is cut for a GPU: the size of a tile by type and width, and the list of tiles of a layout.

A program takes one tile of queries, or of keys, of one segment. The lists are built on the host, sorted by the
length of the program's walk, longest first, so that the last programs to start are short; they are cached by the
layout, since every layer of a model asks for the same ones.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from alignfast.kernels.packed_attention import PackedLayout


class Tile(NamedTuple):
    """Queries (of all heads of a group) and keys that a kernel holds at once, its warps, its stages of loads."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


# By kernel, bytes an element and padded head width: what compiles without spills (float32 at width 256 but for)
# into 99 KB of shared memory, for every card from sm_80 on. A fixed table: a search at run time would start again at every new batch of lengths.
_TILES = {
    ("forward", 2, 64): Tile(128, 64, 8, 3),
    ("forward", 2, 128): Tile(128, 32, 8, 3),
    ("forward", 2, 256): Tile(64, 32, 8, 2),
    ("forward", 4, 64): Tile(32, 32, 8, 1),
    ("forward", 4, 128): Tile(32, 32, 8, 1),
    ("forward", 4, 256): Tile(16, 16, 8, 1),
    ("dquery", 2, 64): Tile(128, 64, 8, 2),
    ("dquery", 2, 128): Tile(128, 32, 8, 2),
    ("dquery", 2, 256): Tile(32, 32, 8, 2),
    ("dquery", 4, 64): Tile(16, 16, 8, 1),
    ("dquery", 4, 128): Tile(16, 16, 8, 1),
    ("dquery", 4, 256): Tile(16, 16, 8, 1),
    ("dkey", 2, 64): Tile(64, 128, 8, 2),
    ("dkey", 2, 128): Tile(64, 64, 8, 2),
    ("dkey", 2, 256): Tile(32, 32, 8, 2),
    ("dkey", 4, 64): Tile(16, 32, 8, 1),
    ("dkey", 4, 128): Tile(16, 32, 8, 1),
    ("dkey", 4, 256): Tile(16, 16, 8, 1),
}
# What sm_90 and sm_100 take besides: 227 KB, and products that read shared memory instead of registers.
_LARGE_TILES = {
    ("forward", 2, 128): Tile(128, 64, 8, 3),
    ("forward", 2, 256): Tile(128, 32, 8, 3),
    ("dquery", 2, 128): Tile(128, 64, 8, 2),
    ("dquery", 2, 256): Tile(64, 32, 8, 2),
    ("dkey", 2, 128): Tile(32, 128, 8, 2),
}


def tile_of(kernel: str, element_size: int, width: int, device: torch.device) -> Tile:
    """The tile of kernel `forward`, `dquery` or `dkey` for heads of a padded width."""
    key = (kernel, element_size, max(64, width))
    return _LARGE_TILES.get(key, _TILES[key]) if is_large(device) else _TILES[key]


@functools.lru_cache
def is_large(device: torch.device) -> bool:
    """Whether this is a data centre's card of the last two generations."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


@functools.lru_cache(maxsize=32)
def query_tiles(layout: PackedLayout, group: int, rows: int, device: torch.device) -> Tensor:
    """tiles_N5: first row, start, length, prompt_start, prompt_length. Row r of a segment is its token r // group.

    >>> query_tiles(PackedLayout((2,), ((3,),)), 2, 4, torch.device("cpu")).tolist()
    [[4, 2, 3, 0, 2], [0, 2, 3, 0, 2], [0, 0, 2, 0, 0]]
    """
    tiles = [(first, *segment) for segment in layout.segments for first in range(0, segment[1] * group, rows)]
    tiles.sort(key=lambda tile: -(tile[4] + min(tile[2], (tile[0] + rows) // group)))
    return torch.tensor(tiles, dtype=torch.int32).to(device, non_blocking=True)


@functools.lru_cache(maxsize=32)
def key_tiles(layout: PackedLayout, keys: int, window: int, device: torch.device) -> Tensor:
    """tiles_N3: first key, end of its segment, end of the queries that see it, all as rows of the batch.

    >>> key_tiles(PackedLayout((2,), ((3, 1),)), 2, 0, torch.device("cpu")).tolist()
    [[0, 2, 6], [2, 5, 5], [4, 5, 5], [5, 6, 6]]
    """
    tiles, start = [], 0
    for prompt, answers in zip(layout.prompts, layout.answers):
        tree_end = start + prompt + sum(answers)
        for index, length in enumerate((prompt, *answers)):
            end = start + length
            seen_until = tree_end if index == 0 else end
            for first in range(start, end, keys):
                last = min(first + keys, end) - 1
                # All answers begin right after the prompt, as the row at `end` does: one is out of reach if all are.
                out_of_reach = window and end - last >= window
                tiles.append((first, end, last + window if out_of_reach else seen_until))
            start = end
    tiles.sort(key=lambda tile: tile[0] - tile[2])
    return torch.tensor(tiles, dtype=torch.int32).to(device, non_blocking=True)


@functools.lru_cache(maxsize=32)
def positions(layout: PackedLayout, device: torch.device) -> Tensor:
    """positions_T of each token in its own sequence, int32."""
    return layout.positions().to(torch.int32).to(device, non_blocking=True)
