"""Keys and values of every layer in pages, as the attention of a forward pass stores and reads them.

Letters: T tokens of a forward pass, S sequences, H query heads, K key heads, E head width, N pages, P tokens of a page,
M pages of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alignfast.kernels import paged_attention


def check_backend(backend: str, device: torch.device) -> None:
    """An attention over no sequences: what the backend refuses on a device, it refuses here.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: it can't run here, and why.
    """
    query_SHE = torch.empty(0, 1, 8, dtype=torch.bfloat16, device=device)
    pages_NPKE = torch.empty(1, 256, 1, 8, dtype=torch.bfloat16, device=device)
    tables = (torch.empty(shape, dtype=torch.int32, device=device) for shape in ((0, 1), (0,)))
    paged_attention(query_SHE, pages_NPKE, pages_NPKE, *tables, backend=backend)


class PagedCache:
    """What `alignfast.models.attention` hands a layer's keys and values to.

    Args:
        num_pages: pages of each layer; a layer's memory is taken when it first stores.
        size: tokens of a page.
        backend: of the kernel.
    """

    def __init__(self, num_pages: int, size: int, *, backend: str = "auto") -> None:
        self.num_pages, self.size, self.backend = num_pages, size, backend
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._row_T = self._pages_SM = self._length_S = torch.empty(0)

    def begin_prefill(self, row_T: Tensor) -> None:
        """The next forward pass stores its tokens at these rows of the pages (int64), and attends by its layout."""
        self._row_T = row_T

    def begin_step(self, row_S: Tensor, pages_SM: Tensor, length_S: Tensor) -> None:
        """The next forward pass is one token a sequence: stored at these rows, attending to `length_S` tokens."""
        self._row_T, self._pages_SM, self._length_S = row_S, pages_SM, length_S

    def store(self, layer: int, key_TKE: Tensor, value_TKE: Tensor) -> None:
        """Keep a layer's keys and values of this forward pass."""
        # a call keeps to one precision, and wants nothing of the calls before it
        if layer not in self._layers or self._layers[layer][0].dtype != key_TKE.dtype:
            shape = (self.num_pages, self.size, *key_TKE.shape[1:])
            # what lies beyond a sequence is never used, but flash-attn multiplies it by 0, and memory may hold NaN
            make = key_TKE.new_zeros if self.backend == "flash" else key_TKE.new_empty
            self._layers[layer] = (make(shape), make(shape))
        for kept_NPKE, new_TKE in zip(self._layers[layer], (key_TKE, value_TKE)):
            kept_NPKE.flatten(0, 1).index_copy_(0, self._row_T, new_TKE)

    def attend(
        self, layer: int, query_SHE: Tensor, scale: float | None, window: int | None, softcap: float | None
    ) -> Tensor:
        """Attention of each sequence's newest token, whose key is stored."""
        return paged_attention(
            query_SHE, *self._layers[layer], self._pages_SM, self._length_S,
            scale=scale, window=window, softcap=softcap, backend=self.backend,
        )  # fmt: skip

    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole pages, in every layer."""
        for keys_and_values in self._layers.values():
            for kept_NPKE in keys_and_values:
                kept_NPKE[list(targets)] = kept_NPKE[list(sources)]
