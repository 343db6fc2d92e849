"""A step of decoding as a CUDA graph: recorded once for each number of sequences, then replayed with one launch.

    record   the trunk over static tensors: ids_S, positions_S, rows_S, pages_SM, lengths_S -> hidden_SD
    step     the tensors are filled in place, the graph is replayed, the first rows of hidden_SD are the step's

A graph reads what lies at the addresses that it was recorded with: weights that the optimizer changes in place are seen,
ones that are put elsewhere make it void (`_addresses`). Sequences are filled up to a bucket by rows of one token each, in
a page of the cache that is nobody's. The head and the drawing of tokens stay outside: they depend on the call.

Letters: S sequences of a bucket, M pages of a sequence, D width.
Not done here: prompts, whose lengths differ from call to call. It has not run on a GPU: tests replay the recorded
function itself, which proves what goes into the static tensors and comes out, not that a model can be captured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from alignfast.models.attention import ModelRefused
from alignfast.models.policy import Policy
from alignfast.rollout.cache import PagedCache

_SMALL = (1, 2, 4, 8)  # buckets below multiples of _BUCKET
_BUCKET = 16


class Recorder(Protocol):
    """Turns a function over static tensors into something that can be replayed."""

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """(what replays it, the tensor that every replay fills anew); `run` may be called several times."""


class CudaRecorder:
    """torch's CUDA graphs, all in one pool of memory: a graph's result is read before the next is replayed."""

    def __init__(self) -> None:
        self.pool: Any = None

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """See Recorder."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled and libraries set up, which no graph can hold
            run()
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = run()
        self.pool = graph.pool()
        return graph.replay, result


class _Recorded(NamedTuple):
    inputs: tuple[Tensor, ...]  # ids_S, positions_S, rows_S, pages_SM, lengths_S
    replay: Callable[[], None]
    hidden_SD: Tensor


class StepGraphs:
    """The trunk's steps over one cache.

    Args:
        policy: the model.
        cache: with one page more than the sequences' pages are numbered: its last belongs to what fills up a bucket.
        recorder: None is CUDA's.
    """

    def __init__(self, policy: Policy, cache: PagedCache, recorder: Recorder | None = None) -> None:
        self.policy, self.cache = policy, cache
        self.recorder: Recorder = CudaRecorder() if recorder is None else recorder
        self._recorded: dict[tuple[int, int], _Recorded] = {}
        self._made_for: Any = None

    def begin(self) -> None:
        """A call of the engine begins: graphs of weights that lie elsewhere now, or of another precision, are dropped."""
        now = self._addresses()
        if now != self._made_for:
            self._recorded, self._made_for = {}, now

    def hidden(
        self,
        ids_S: np.ndarray,
        positions_S: np.ndarray,
        rows_S: np.ndarray,
        pages_SM: np.ndarray,
        lengths_S: np.ndarray,
        most_pages: int,
    ) -> Tensor:
        """hidden_SD of each sequence's newest token, valid until the next call; `most_pages` that any may have in this call.

        Raises:
            ModelRefused: the model can't be recorded.
        """
        number, size, spare = len(ids_S), self.cache.size, self.cache.num_pages - 1
        key = (bucket(number), 1 << (most_pages - 1).bit_length())
        filled = (
            _filled(ids_S, key[:1], 0),
            _filled(positions_S, key[:1], 0),
            _filled(rows_S, key[:1], spare * size),
            _filled(pages_SM, key, spare),
            _filled(lengths_S, key[:1], 1),
        )
        recorded = self._recorded.get(key)
        if recorded is None:
            recorded = self._recorded[key] = self._record(filled)
        else:
            for static, x in zip(recorded.inputs, filled):
                static.copy_(torch.from_numpy(x))
        recorded.replay()
        return recorded.hidden_SD[:number]

    def _record(self, filled: Sequence[np.ndarray]) -> _Recorded:
        device = next(self.policy.parameters()).device
        ids_S, positions_S, rows_S, pages_SM, lengths_S = inputs = tuple(
            torch.from_numpy(x).to(device, copy=True) for x in filled
        )

        def run() -> Tensor:
            self.cache.begin_step(rows_S, pages_SM, lengths_S)
            with _uncached_autocast(device.type):
                return self.policy.next_hidden(ids_S, positions_S, self.cache)

        try:
            replay, hidden_SD = self.recorder.record(run)
        except RuntimeError as error:
            raise ModelRefused(
                f"{type(self.policy.base).__name__} can't be recorded as a CUDA graph: {error}; set cuda_graphs=False"
            ) from error
        return _Recorded(inputs, replay, hidden_SD)

    def _addresses(self) -> Any:
        """Where the weights lie, and what else a graph was recorded with: precision, and which adapters are in force."""
        device = next(self.policy.parameters()).device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        modules: list[Any] = list(self.policy.modules())
        adapters = [
            (module.disable_adapters, module.merged, tuple(module.active_adapters))
            for module in modules
            if hasattr(module, "disable_adapters") and hasattr(module, "merged")
        ]
        return precision, adapters, [parameter.data_ptr() for parameter in self.policy.parameters()]


def bucket(number: int) -> int:
    """The number of sequences that a graph is recorded for.

    >>> [bucket(number) for number in (1, 3, 8, 9, 17, 250)]
    [1, 4, 8, 16, 32, 256]
    """
    return next((size for size in _SMALL if size >= number), -(-number // _BUCKET) * _BUCKET)


def _filled(x: np.ndarray, shape: tuple[int, ...], value: int) -> np.ndarray:
    """`x` in the corner of a larger array."""
    found = np.full(shape, value, x.dtype)
    found[tuple(map(slice, x.shape))] = x
    return found


def _uncached_autocast(device: str) -> AbstractContextManager[Any]:
    """Autocast without its cache: a graph would go on reading casts that are freed when the block ends."""
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)
