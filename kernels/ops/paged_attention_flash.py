"""paged_attention by flash-attn's call for a cache of keys and values: version 3 on Hopper, else version 2.

By name alone (`backend="flash"`): nobody has measured yet which is faster, it or our Triton kernel, so `auto` does not
take it. It has not run on a GPU: tests hand the call to a stand-in with the library's own parameters.

Version 2 takes pages of a multiple of 256 tokens, version 3 of any number; both take heads of up to 256, by eights.

Letters: S sequences, H query heads, K key heads, E head width, N pages, P tokens of a page, M pages of a sequence.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:  # paged_attention.py imports this file
    from alignfast.kernels.packed_attention import AttentionOptions

_PAGE_OF_2 = 256
_HOPPER = 9
_INSTALL = "`pip install flash-attn` (version 2), or build flash-attention/hopper (version 3); or pass backend='triton'"


class Library(NamedTuple):
    """flash-attn as it is installed."""

    version: int
    module: Any


@cache
def library(device: torch.device) -> Library | None:
    """What of flash-attn serves a GPU, or None where nothing is installed that does."""
    hopper = torch.cuda.get_device_capability(device)[0] == _HOPPER
    if hopper and importlib.util.find_spec("flash_attn_interface") is not None:
        return Library(3, importlib.import_module("flash_attn_interface"))
    if importlib.util.find_spec("flash_attn_2_cuda") is not None:
        return Library(2, importlib.import_module("flash_attn.flash_attn_interface"))
    return None


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why it can't take such tensors, or None."""
    if device.type != "cuda":
        return f"flash-attn needs a CUDA tensor, got {device.type}; pass backend='auto'"
    if library(device) is None:
        return f"flash-attn is not installed: {_INSTALL}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attn takes bfloat16 and float16, got {dtype}; pass backend='triton'"
    return None


def forward(
    query_SHE: Tensor,
    key_NPKE: Tensor,
    value_NPKE: Tensor,
    pages_SM: Tensor,
    length_S: Tensor,
    options: AttentionOptions,
) -> Tensor:
    """The op, of checked inputs.

    Raises:
        RuntimeError: the heads' width, or the pages' size for version 2, is none that it takes.
    """
    found = library(query_SHE.device)
    assert found is not None
    E, P = query_SHE.shape[2], key_NPKE.shape[1]
    if E > 256 or E % 8:
        raise RuntimeError(
            f"flash-attn takes heads up to 256 wide, by eights, got {E}; pass backend='triton'"
        )
    if found.version == 2 and P % _PAGE_OF_2:
        raise RuntimeError(
            f"flash-attn 2 takes pages of a multiple of {_PAGE_OF_2} tokens, got {P}; pass backend='triton'"
        )
    if not len(query_SHE):
        return torch.empty_like(query_SHE)
    pages = {"block_table" if found.version == 2 else "page_table": pages_SM.contiguous()}
    out_S1HE = found.module.flash_attn_with_kvcache(
        query_SHE[:, None], key_NPKE, value_NPKE, cache_seqlens=length_S.contiguous(),
        softmax_scale=options.scale, causal=True, softcap=options.softcap,
        window_size=(options.window - 1, 0) if options.window else (-1, -1), **pages,
    )  # fmt: skip
    return out_S1HE[:, 0]
