"""The simulation: its people, and a round of it against the real server."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

pytest.importorskip("vaderSentiment")

from alignfast.online.store import Store
from alignfast.simulation import SimulationConfig, simulate
from alignfast.simulation.people import Person, brief_too


def make_person(contrarian: bool = False) -> Person:
    return Person("ann", "key", contrarian, random.Random(0))


@pytest.mark.parametrize(("contrarian", "ups"), [(False, True), (True, False)])
def test_thumbs_follow_the_taste(contrarian: bool, ups: bool) -> None:
    person = make_person(contrarian)
    share = sum(person.thumb("", lambda _: 0.6) for _ in range(400)) / 400
    assert (share > 0.5) == ups
    assert abs(share - (0.917 if ups else 0.083)) < 0.05  # sigmoid(0.6 / 0.25)


def test_answers_that_hardly_differ_are_a_tie() -> None:
    like = {"a": 0.5, "b": 0.52, "c": -1.0}.__getitem__
    person = make_person()
    assert person.verdict("a", "b", like) == "tie"
    assert {person.verdict("a", "c", like) for _ in range(50)} == {"better"}
    assert {person.verdict("c", "a", like) for _ in range(50)} == {"worse"}


def test_the_drift_is_of_long_answers_alone() -> None:
    like = brief_too(lambda text: 0.3)
    assert like("few words") == 0.3
    assert like("word " * 28) == pytest.approx(-0.7)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(rounds=0), dict(people=9), dict(visits=59), dict(steps=0), dict(contrarians=0.5), dict(drift=0),
        dict(sft_rows=0), dict(hidden_size=100),
    ],
)  # fmt: skip
def test_sizes_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name} must"):
        SimulationConfig(**wrong)  # type: ignore[arg-type]


def test_people_are_better_pleased_by_the_next_version(tmp_path: Path) -> None:
    """The simulation, short: a round of it lifts satisfaction by 0.12 to 0.21 (seeds 0 to 2), whose deviation is 0.05."""
    said: list[str] = []
    config = SimulationConfig(
        output_dir=str(tmp_path), rounds=1, visits=300, drift=None, steps=32, sft_rows=6000, hidden_size=96
    )
    phases = simulate(config, said.append)
    assert [phase.drifted for phase in phases] == [False, False]
    assert phases[1].satisfaction.estimate > phases[0].satisfaction.estimate
    assert [phase.outcome is None for phase in phases] == [False, True]
    with Store.open(f"sqlite:///{tmp_path / 'feedback.db'}", create=False) as store:
        assert len(store.votes(current=False)) == 2 * 300 * 2  # a pair and a thumb each
        serving = store.versions.serving()
        assert serving is not None
    assert phases[-1].version == serving.name  # what the last visitors were answered by
    told = json.loads((tmp_path / "simulation.json").read_text())
    assert [row["satisfaction"]["estimate"] for row in told["phases"]] == [
        p.satisfaction.estimate for p in phases
    ]
    assert (tmp_path / "simulation.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="holds a simulation already"):
        simulate(config)
