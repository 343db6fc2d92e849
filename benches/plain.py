"""pytest-benchmark's fixture in as few lines as our benches need, for machines that have pytest alone.

It times; it compares and stores nothing. What was measured goes line by line into the file that ALIGNFAST_BENCH_ROWS names.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest


class Benchmark:
    """What `harness.measure` asks of the fixture."""

    def __init__(self, fullname: str) -> None:
        self.fullname, self.name, self.group = fullname, fullname.rpartition("::")[2], None
        self.extra_info: dict[str, Any] = {}
        self.stats: Any = None

    def pedantic(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...] = (),
        setup: Callable[[], None] | None = None,
        rounds: int = 1,
        warmup_rounds: int = 0,
    ) -> Any:
        """Time `target` so many times; returns its last result."""
        seconds, result = [], None
        for number in range(warmup_rounds + rounds):
            if setup:
                setup()
            start = time.perf_counter()
            result = target(*args)
            if number >= warmup_rounds:
                seconds.append(time.perf_counter() - start)
        cuts = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        self.stats = SimpleNamespace(
            stats=SimpleNamespace(
                sorted_data=sorted(seconds), min=min(seconds), median=statistics.median(seconds), q1=cuts[0], q3=cuts[2]
            )
        )  # fmt: skip
        return result


@pytest.fixture
def benchmark(request: pytest.FixtureRequest) -> Benchmark:
    """Stands for pytest-benchmark's."""
    return Benchmark(request.node.nodeid)
