"""What a run measures: summed where it arises, read once a log, written to metrics.jsonl and to trackers.

A metric arrives as 0-d tensors, one per micro-batch, already divided by the whole step's count: its value in a step
is their sum over micro-batches and ranks, in a log the mean over those of its steps that have it. One whose name starts
with `max` or `min` is combined by that instead. All ranks have the same metrics in a step.

metrics.jsonl is strict JSON, a line a log: numbers that are not finite stand as the strings "NaN", "Infinity" and
"-Infinity", which float() reads; `read_metrics` gives them back as floats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from torch import Tensor

Metrics = Mapping[str, Tensor]
_IDENTITY = {"max": -math.inf, "min": math.inf, "sum": 0.0}


class Meter:
    """Running metrics of the steps since the last log. Adding never waits for the device; reading does."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.totals: dict[str, Tensor] = {}
        self.steps: dict[str, int] = {}
        self._of_this_step: set[str] = set()

    def add(self, metrics: Metrics, counts: bool = True) -> None:
        """Take in the metrics of one micro-batch. One that fills up a rank's share does not count: it tells the names,
        which a rank without a row of the step would not know."""
        self._of_this_step |= metrics.keys()
        for name, value in metrics.items():
            value = value if counts else torch.full_like(value, _IDENTITY[_kind(name)])
            # 1e6 tokens in float32 lose their last digits
            value = value.detach().to(self.device, torch.float64)
            known = self.totals.get(name)
            self.totals[name] = value if known is None else _combine(name, torch.stack((known, value)))

    def end_step(self) -> None:
        """Close a step: what was added since the last call makes it up."""
        for name in self._of_this_step:
            self.steps[name] = self.steps.get(name, 0) + 1
        self._of_this_step = set()

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """The metrics of the closed steps, over all ranks; a call to be made on every rank."""
        totals = self._over_ranks(accelerator)
        return {name: total / self._divisor(name) for name, total in totals.items()}

    def _divisor(self, name: str) -> int:
        return self.steps.get(name, 1) if _kind(name) == "sum" else 1

    def _over_ranks(self, accelerator: Accelerator) -> dict[str, float]:
        if not self.totals:
            return {}
        gathered_WN = accelerator.gather(torch.stack(list(self.totals.values()))[None])
        return {name: _combine(name, gathered_WN[:, i]).item() for i, name in enumerate(self.totals)}

    def clear(self) -> None:
        """Begin the next log's window."""
        self.totals, self.steps = {}, {}

    def state(self, accelerator: Accelerator) -> dict[str, Any]:
        """The open window as plain numbers, over all ranks; a call to be made on every rank."""
        totals = {name: to_json(total) for name, total in self._over_ranks(accelerator).items()}
        return {"steps": {name: self.steps.get(name, 0) for name in totals}, "totals": totals}

    def load(self, state: dict[str, Any], is_main: bool) -> None:
        """Go on from `state`: its totals stand on the first rank alone, since reading sums over ranks."""
        self.steps = dict(state["steps"])
        self.totals = {
            name: torch.tensor(
                float(total) if is_main else _IDENTITY[_kind(name)], dtype=torch.float64, device=self.device
            )
            for name, total in state["totals"].items()
        }


def means(sums: Metrics, divisors: Mapping[str, int]) -> dict[str, Tensor]:
    """Summed metrics by what each is a mean over; those without a divisor as they are."""
    return {name: value / divisors.get(name, 1) for name, value in sums.items()}


def _kind(name: str) -> str:
    return name[:3] if name[:3] in ("max", "min") else "sum"


def _combine(name: str, values_N: Tensor) -> Tensor:
    kind = _kind(name)
    if kind == "sum":
        return values_N.sum()
    return values_N.amax() if kind == "max" else values_N.amin()


def to_json(value: Any) -> Any:
    """A number that strict JSON can hold, as described above; anything else as it is.

    >>> to_json(0.5), to_json(float("nan")), to_json(float("-inf"))
    (0.5, 'NaN', '-Infinity')
    """
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def from_json(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row that went through `to_json`, with every number a number again."""
    words = ("NaN", "Infinity", "-Infinity")
    return {name: float(v) if isinstance(v, str) and v in words else v for name, v in row.items()}


def read_metrics(file: Path | str) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, with every number a float or int again."""
    with Path(file).open() as lines:
        return [from_json(json.loads(line)) for line in lines if line.strip()]


class MetricsFile:
    """metrics.jsonl of a run: appended to line by line, cut back where a run goes on from an earlier step."""

    def __init__(self, folder: Path, resumed_step: int) -> None:
        self.file = folder / "metrics.jsonl"
        kept = []
        if self.file.exists() and resumed_step:
            kept = lines_up_to(self.file, resumed_step)
        elif self.file.exists() and self.file.stat().st_size:
            number = sum(1 for _ in folder.glob("metrics.*.jsonl")) + 1
            self.file.rename(folder / f"metrics.{number}.jsonl")  # an earlier run in the same folder
        self.file.write_text("".join(line + "\n" for line in kept))

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one line."""
        with self.file.open("a") as lines:
            lines.write(
                json.dumps({name: to_json(value) for name, value in row.items()}, allow_nan=False) + "\n"
            )


def lines_up_to(file: Path, step: int) -> list[str]:
    """The lines of a JSON-lines file whose `step` is no later."""
    # not splitlines: a text may hold other ends of lines
    return [line for line in file.read_text().split("\n") if line and _step_of(line) <= step]


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf  # the last line of a process that died while writing it


class Trackers:
    """TensorBoard and whatever else `report_to` names, through accelerate."""

    def __init__(self, names: Sequence[str], run_name: str, folder: Path, config: dict[str, Any]) -> None:
        self.trackers: list[GeneralTracker] = []
        for name in names:
            kind = LOGGER_TYPE_TO_CLASS[name]
            if name == "tensorboard":  # its hyperparameter page would be a run of its own
                tracker = kind("tensorboard", folder)
                tracker.start()
            else:
                tracker = kind(run_name, folder) if kind.requires_logging_directory else kind(run_name)
                tracker.start()
                tracker.store_init_configuration(config)
            self.trackers.append(tracker)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send the metrics of a step."""
        for tracker in self.trackers:
            tracker.log(dict(metrics), step=step)

    def finish(self) -> None:
        """Write out what is held back."""
        for tracker in self.trackers:
            tracker.finish()


def tracker_names(report_to: str | Sequence[str]) -> list[str]:
    """The trackers that `report_to` asks for.

    Raises:
        ValueError: one is unknown, or its package is not installed.

    >>> tracker_names("none"), tracker_names(["tensorboard"])
    ([], ['tensorboard'])
    >>> tracker_names("tensorbord")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: report_to='tensorbord' is not one of aim, clearml, comet_ml, dvclive, ..., none
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    if names == ["none"]:
        return []
    available = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(
                f"report_to={name!r} is not one of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}, none"
            )
        if name not in available:
            raise ValueError(f"report_to={name!r} needs a package that is not installed: pip install {name}")
    return names
