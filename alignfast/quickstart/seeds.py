"""Seeds side by side, each in a process of its own with its share of the cores: small models gain little from threads.

What a training says goes to the seed's log.txt; what `run_seed` says comes here.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from alignfast.quickstart.run import Passage, Sizes, run_seed


def run_seeds(number: int, folder: Path, sizes: Sizes, began: float) -> list[Passage]:
    """Run seeds 0, 1, ... and print what they say, each line with the seconds since `began` (of `time.time`).

    Raises:
        RuntimeError, ValueError: as `run_seed`.
    """
    cores = _cores()
    workers = min(number, 2 * cores)  # three on two cores end sooner than two and then one
    context = multiprocessing.get_context("spawn")  # a forked torch may hang in its threads
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = [
            pool.submit(_run, seed, folder / f"seed-{seed}", sizes, began, max(1, cores // workers))
            for seed in range(number)
        ]
        return [future.result() for future in waiting]


def _cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(seed: int, folder: Path, sizes: Sizes, began: float, threads: int) -> Passage:
    torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        print(f"{time.time() - began:4.0f} s  seed {seed}: {text}", flush=True)

    with (folder / "log.txt").open("w") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
        return run_seed(seed, folder, sizes, say)
