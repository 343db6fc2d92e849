"""`alignfast online [--once] | --simulate | status | promote | refuse | rollback`: learn from votes, and what serves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from alignfast.commands.parser import UsageError, parse_options

_SIMULATE = "--simulate"
_WORDS = (
    "Learn from the votes in a database, round after round. `alignfast online status` says how far it is and what serves, "
    "`promote NAME`, `refuse NAME` and `rollback` change that by hand, `--simulate` shows the whole loop on people of our own "
    "making; each has a --help of its own."
)


@dataclass(frozen=True)
class RunOptions:
    """How long it goes on."""

    once: bool = False
    """End when the round is over, or where it has to wait for people; called again, it goes on there."""


@dataclass(frozen=True)
class StatusOptions:
    """Which store."""

    db: str = "sqlite:///feedback.db"
    """Database: sqlite:///FILE or postgresql://USER@HOST/NAME."""


@dataclass(frozen=True)
class PromoteOptions:
    """What shall serve."""

    version: str
    """Name of a policy version."""
    db: str = "sqlite:///feedback.db"
    """Database: sqlite:///FILE or postgresql://USER@HOST/NAME."""


@dataclass(frozen=True)
class RefuseOptions:
    """What shall not serve, and why."""

    version: str
    """Name of a policy version that does not serve: a candidate, or the canary, whose duels end."""
    db: str = "sqlite:///feedback.db"
    """Database: sqlite:///FILE or postgresql://USER@HOST/NAME."""
    reason: str = "refused by hand"
    """What is kept with it."""


@dataclass(frozen=True)
class RollbackOptions:
    """Which store, and why."""

    db: str = "sqlite:///feedback.db"
    """Database: sqlite:///FILE or postgresql://USER@HOST/NAME."""
    reason: str = "rolled back by hand"
    """What is kept with the version that stops serving."""


def run(command: str, argv: Sequence[str]) -> None:
    """Learn, or do what the first word says."""
    if argv and not argv[0].startswith("-"):
        if argv[0] not in _ACTIONS:
            raise UsageError(
                f"there is no `alignfast {command} {argv[0]}`: a round begins with options alone, other words are "
                f"{', '.join(_ACTIONS)}"
            )
        _ACTIONS[argv[0]](f"{command} {argv[0]}", argv[1:])
        return
    if _SIMULATE in argv:
        _simulate(f"{command} {_SIMULATE}", [word for word in argv if word != _SIMULATE])
        return
    from alignfast.online.loop import OnlineConfig, OnlineLoop
    from alignfast.trainers.state import no_bars

    options, config = parse_options(command, argv, RunOptions, OnlineConfig, description=_WORDS)
    with OnlineLoop(config) as loop, no_bars():
        try:
            loop.run(once=options.once)
        except KeyboardInterrupt:
            print(f"stopped; `alignfast {command}` goes on where it was")


def _simulate(command: str, argv: Sequence[str]) -> None:
    from alignfast.simulation import SimulationConfig, simulate

    (config,) = parse_options(command, argv, SimulationConfig)
    simulate(config)
    print(f"figures: {config.output_dir}/simulation.json, plot: {config.output_dir}/simulation.png")


def _status(command: str, argv: Sequence[str]) -> None:
    (options,) = parse_options(command, argv, StatusOptions)
    from alignfast.online.loop.status import status
    from alignfast.online.store import Store

    with Store.open(options.db, create=False) as store:
        print(status(store))


def _promote(command: str, argv: Sequence[str]) -> None:
    (options,) = parse_options(command, argv, PromoteOptions, positional=("version",))
    from alignfast.online.store import Store

    with Store.open(options.db, create=False) as store:
        found = store.versions.get(options.version)
        if found.kind != "policy":
            raise ValueError(f"{found.name!r} is a {found.kind} model: only a policy can serve")
        store.versions.promote(found.name)
    print(f"serves: {found.name}")


def _refuse(command: str, argv: Sequence[str]) -> None:
    (options,) = parse_options(command, argv, RefuseOptions, positional=("version",))
    from alignfast.online.store import Store

    with Store.open(options.db, create=False) as store:
        store.versions.refuse(options.version, [options.reason])
    print(f"refused: {options.version}")


def _rollback(command: str, argv: Sequence[str]) -> None:
    (options,) = parse_options(command, argv, RollbackOptions)
    from alignfast.online.store import Store

    with Store.open(options.db, create=False) as store:
        print(f"serves: {store.versions.roll_back(reasons=[options.reason]).name}")


_ACTIONS: dict[str, Callable[[str, Sequence[str]], None]] = {
    "status": _status,
    "promote": _promote,
    "refuse": _refuse,
    "rollback": _rollback,
}
