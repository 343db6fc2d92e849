"""The simulation: a small model is fine-tuned, served, voted on, improved and served again, round after round.

    sft -> serve -> [ visits and votes over HTTP -> a round of the learner -> the server swaps ] x rounds

In the middle the people's preference drifts, and nobody tells the loop. Satisfaction is the share of thumbs up of a round's
visits, with its 95 % interval, the votes of one person taken together.
"""

from __future__ import annotations

import random
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from alignfast.data.intervals import Interval, proportion
from alignfast.online.loop import OnlineConfig, OnlineLoop
from alignfast.online.loop.round import Round
from alignfast.online.store import Store
from alignfast.quickstart import grammar
from alignfast.quickstart.judges import simulated_user
from alignfast.quickstart.run import answered_by_the_grammar
from alignfast.quickstart.stages import ANSWER_TOKENS, SFT, fine_tune
from alignfast.simulation.people import Person, brief_too, is_contrarian
from alignfast.simulation.plot import draw
from alignfast.simulation.visits import Visit, running, visits
from alignfast.trainers.state import write_json

_SWAP_SECONDS = 60.0


@dataclass(frozen=True)
class SimulationConfig:
    """How much of everything."""

    output_dir: str = "simulation"
    """Folder for models, the database, simulation.json and simulation.png."""
    rounds: int = 10
    """Rounds of the learner, >= 1."""
    people: int = 60
    """Who vote, >= 10."""
    contrarians: float = 0.1
    """Share of them who like what the others don't."""
    visits: int = 300
    """Visits between two rounds, each with two answers, at least one a person."""
    drift: int | None = 5
    """After so many rounds the preference drifts; None: never."""
    steps: int = 24
    """Steps of the policy in a round."""
    sft_rows: int = 12_000
    """Answers of the grammar that the start policy is fine-tuned on."""
    hidden_size: int = 128
    """Width of the Llama, a multiple of 8."""
    seed: int = 0
    """Of everything drawn."""

    def __post_init__(self) -> None:
        for name, least in (
            ("rounds", 1),
            ("people", 10),
            ("visits", self.people),
            ("steps", 1),
            ("sft_rows", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.hidden_size < 8 or self.hidden_size % 8:
            raise ValueError(f"hidden_size must be a multiple of 8, for four heads, got {self.hidden_size}")
        if self.drift is not None and self.drift < 1:
            raise ValueError(f"drift must be at least 1, or None for never, got {self.drift}")
        if not 0 <= self.contrarians < 0.5:
            raise ValueError(f"contrarians must lie in [0, 0.5), got {self.contrarians}")


@dataclass(frozen=True)
class Phase:
    """A time between two rounds of the learner.

    Attributes:
        number: from 0, the start policy's.
        drifted: whether the preference was the later one.
        version: that served.
        satisfaction: share of thumbs up.
        outcome: of the round of the learner that followed, in words; None after the last.
        figures: of its candidate.
        seconds: of the visits, and of the round.
    """

    number: int
    drifted: bool
    version: str
    satisfaction: Interval
    outcome: str | None
    figures: dict[str, Any]
    seconds: tuple[float, float]


def tell(line: str) -> None:
    """Print it at once, into a file too: rounds take their time."""
    print(line, flush=True)


def simulate(config: SimulationConfig, say: Callable[[str], None] = tell) -> list[Phase]:
    """Run it; the figures are left in `simulation.json` under the output folder, and drawn in `simulation.png`.

    Raises:
        ValueError: the folder holds a simulation already.
        RuntimeError: the judges' package is not installed, or the server did not start.
    """
    folder = Path(config.output_dir).resolve()
    if (folder / "feedback.db").exists():
        raise ValueError(f"{folder} holds a simulation already: name another output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    rng, like = random.Random(config.seed), simulated_user()
    asked, _ = grammar.questions(config.seed)
    began = time.perf_counter()
    demonstrations = answered_by_the_grammar(asked, rng, config.sft_rows)
    with _told_to(folder):
        fine_tune(demonstrations, config.hidden_size, folder, config.seed)
    say(f"start policy: {time.perf_counter() - began:.0f} s")
    with Store.open(f"sqlite:///{folder / 'feedback.db'}") as store:
        people = [
            Person(
                f"person-{i}", store.keys.make(f"person-{i}")[0], is_contrarian(i, config.contrarians), random.Random(rng.random())
            )
            for i in range(config.people)
        ]  # fmt: skip
        url = f"http://127.0.0.1:{_free_port()}"
        with running(_server(folder, url), url, folder / "server.log"):
            loop = OnlineLoop(_loop_options(config, folder), store=store)
            phases: list[Phase] = []
            for number in range(config.rounds + 1):
                drifted = config.drift is not None and number >= config.drift
                wants = brief_too(like) if drifted else like
                start = time.perf_counter()
                texts = [question.text for question in asked]
                found = visits(url, people, texts, config.visits, wants, ANSWER_TOKENS)
                voted = time.perf_counter()
                last = number == config.rounds
                round = None
                if not last:
                    with _told_to(folder):
                        round = loop.run(once=True)
                    _await_swap(store, url, people[0].key)
                seconds = (voted - start, time.perf_counter() - voted)
                phases.append(_phase(number, drifted, found, round, seconds))
                say(_line(phases[-1]))
                write_json(folder / "simulation.json", _figures(config, phases))
                draw(phases, folder / "simulation.png")
    return phases


@contextmanager
def _told_to(folder: Path) -> Iterator[None]:
    """What trainers print goes to the log."""
    with (folder / "learner.log").open("a") as log, redirect_stdout(log), redirect_stderr(log):
        yield


def _loop_options(config: SimulationConfig, folder: Path) -> OnlineConfig:
    small = {"gradient_checkpointing": False, "use_cpu": True, "logging_steps": 0.25}
    return OnlineConfig(
        model=str(folder / SFT),
        db=f"sqlite:///{folder / 'feedback.db'}",
        output_dir=str(folder / "versions"),
        min_votes=config.visits,
        max_completion_length=ANSWER_TOKENS,
        reward_options={"per_device_train_batch_size": 16, "learning_rate": 1e-3, "warmup_steps": 5, **small},
        policy_options={
            "max_steps": config.steps, "per_device_train_batch_size": 64, "steps_per_generation": 2,
            "num_iterations": 2, "num_generations": 8, "learning_rate": 3e-4, "warmup_steps": 3, "beta": 0.04, **small,
        },
        kl_budget=None,
        gate={"max_length_ratio": 2.0},
        canary_share=0.0,
        watch_seconds=0.0,
        seed=config.seed,
    )  # fmt: skip


def _server(folder: Path, url: str) -> list[str]:
    port = url.rpartition(":")[2]
    options = {
        "model": folder / SFT,
        "db": f"sqlite:///{folder / 'feedback.db'}",
        "port": port,
        "use_cpu": "true",
    }
    return [
        sys.executable,
        "-m",
        "alignfast",
        "serve",
        *(f"--{name}={value}" for name, value in options.items()),
    ]


def _await_swap(store: Store, url: str, key: str) -> None:
    """Until the server gives its answers by the version that the store says."""
    wanted, until = store.versions.serving(), time.monotonic() + _SWAP_SECONDS
    while wanted is not None:
        models = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}).json()["data"]
        if wanted.name == models[0]["alignfast"]["name"]:
            return
        if time.monotonic() > until:
            raise RuntimeError(
                f"the server still serves {models[0]['alignfast']['name']}, not {wanted.name}; see server.log"
            )
        time.sleep(0.2)


def _phase(
    number: int, drifted: bool, found: list[Visit], round: Round | None, seconds: tuple[float, float]
) -> Phase:
    return Phase(
        number=number,
        drifted=drifted,
        version=found[-1].version or "",
        satisfaction=proportion([one.up for one in found], [one.person for one in found]),
        outcome=None if round is None else round.outcome,
        figures={} if round is None else round.figures,
        seconds=seconds,
    )


def _line(phase: Phase) -> str:
    after = "" if phase.outcome is None else f"; round {phase.number + 1}: {phase.outcome}"
    seconds = f"{phase.seconds[0]:.0f} + {phase.seconds[1]:.0f} s"
    return f"{phase.version}: satisfaction {phase.satisfaction}{after} ({seconds})"


def _figures(config: SimulationConfig, phases: list[Phase]) -> dict[str, Any]:
    rows = [{**asdict(phase), "satisfaction": phase.satisfaction._asdict()} for phase in phases]
    return {"config": asdict(config), "phases": rows}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
