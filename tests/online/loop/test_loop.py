"""Rounds of the learner on a store that a script has filled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from online.loop.filled import FAST, LIKED, TINY, ask, make_start, serve_start, vote

from alignfast.cli import main
from alignfast.online.feedback import Judged, Shown, Vote
from alignfast.online.learning.gate import Decision
from alignfast.online.loop import OnlineConfig, OnlineLoop, Round
from alignfast.online.loop import gate as loop_gate
from alignfast.online.loop.evaluate import check_judges
from alignfast.online.loop.folders import read_manifest
from alignfast.online.loop.loop import collect
from alignfast.online.loop.votes import first_of_each
from alignfast.online.server.versions import weights_hash
from alignfast.online.store import Store
from alignfast.online.store.lock import LearnerAtWork


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("models") / "start")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(f"sqlite:///{tmp_path}/feedback.db") as opened:
        yield opened


def make_loop(store: Store, tmp_path: Path, **options: Any) -> OnlineLoop:
    merged = {**FAST, **options}
    merged["policy_options"] = {**FAST["policy_options"], **options.get("policy_options", {})}
    return OnlineLoop(store=store, output_dir=str(tmp_path / "versions"), **merged)


@pytest.fixture
def open_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps make no model that is better for certain."""
    monkeypatch.setattr(loop_gate, "gate", lambda figures, limits: Decision(True, ()))


@pytest.mark.usefixtures("open_gate")
@pytest.mark.parametrize(
    "method", ["grpo", *(pytest.param(m, marks=pytest.mark.slow) for m in ("dpo", "kto", "ppo"))]
)
def test_a_round_ends_with_a_new_version_that_serves(
    store: Store, tmp_path: Path, start: Path, method: str
) -> None:
    serve_start(store, start)
    votes = vote(store, ask(store, 12))
    options = {"num_generations": 4} if method == "grpo" else {}
    loop = make_loop(store, tmp_path, method=method, policy_options=options)
    round = loop.run(once=True)
    assert round is not None
    assert round.outcome == "policy-1 serves"
    serving = store.versions.serving()
    assert serving is not None
    assert serving.name == "policy-1"
    assert serving.parents == ("start", "reward-1")
    assert serving.hash == weights_hash(Path(serving.path)) != weights_hash(start)
    manifest = read_manifest(Path(serving.path))
    assert manifest["hash"] == serving.hash
    assert manifest["figures"] == serving.figures
    assert {"kl", "length", "reward", "preference", "win_rate"} - {"win_rate"} <= set(serving.figures)
    assert {one.id for one in store.used_by("reward-1")} == {one.id for one in votes}
    assert [run.status for run in store.runs.all()] == ["done"]
    assert not (tmp_path / "versions" / ".runs" / store.runs.all()[0].id).exists()


def all_lower(answer: Any) -> float:
    """A suite: what share of the answers has no capital."""
    return sum(text == text.lower() for text in answer(["the cat", "a dog"])) / 2


def capitals(answer: Any) -> float:
    return 1 - all_lower(answer)


def likes_some(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(word in LIKED for word in text.split())) for text in completions]


@pytest.mark.usefixtures("open_gate")
def test_figures_of_a_candidate(store: Store, tmp_path: Path, start: Path) -> None:
    serve_start(store, start)
    vote(store, ask(store, 12))
    here = "online.loop.test_loop"
    loop = make_loop(
        store, tmp_path, method="dpo", judge=f"{here}:likes_some", task_suites={"lower": f"{here}:all_lower"},
        safety_suites={"capitals": f"{here}:capitals"}, policy_options={"max_steps": 6}, kl_budget=1e-9,
    )  # fmt: skip
    round = loop.run(once=True)
    assert round is not None
    figures = store.versions.get("policy-1").figures
    assert figures == read_manifest(tmp_path / "versions" / "policy-1")["figures"]
    assert figures["suites"] == {
        "lower": {"candidate": 1.0, "serving": 1.0, "safety": False},
        "capitals": {"candidate": 0.0, "serving": 0.0, "safety": True},
    }
    assert figures["judge"] == f"{here}:likes_some"
    for name in ("win_rate", "preference", "reward_wins", "reward_accuracy", "satisfaction_serving"):
        assert 0 <= figures[name]["low"] <= figures[name]["estimate"] <= figures[name]["high"] <= 1
    assert figures["steps"] == 2  # the budget was spent at the first look
    assert figures["kl_budget"]["ended"]
    # held out whole: no voter is on both sides
    sides = [{one.vote.user for one in loop.judged(ids)} for ids in (round.votes, round.held_out)]
    assert all(sides)
    assert not sides[0] & sides[1]


def test_the_judge_is_not_the_reward_model(store: Store, tmp_path: Path) -> None:
    store.versions.add("reward-1", "reward", str(tmp_path / "reward-1"), "0")
    for own in ("reward-1", "versions/reward-9", "versions/.runs/run-1/reward/model"):
        loop = make_loop(store, tmp_path, judge=str(tmp_path / "." / own))
        with pytest.raises(ValueError, match="is a reward model of this loop"):
            check_judges(loop)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judge": "online.loop.test_loop:nobody"}, "nobody"),
        ({"task_suites": {"maths": "no_such_module:f"}}, "the suite 'maths': .*no_such_module"),
    ],
)
def test_judges_that_are_not_there_are_told_before_a_round(
    store: Store, tmp_path: Path, start: Path, options: dict[str, Any], message: str
) -> None:
    serve_start(store, start)
    with pytest.raises(ValueError, match=message):
        make_loop(store, tmp_path, **options).run(once=True)
    assert store.runs.all() == []


def test_a_refused_candidate_is_kept_with_the_reasons(store: Store, tmp_path: Path) -> None:
    store.versions.add("policy-1", "policy", str(tmp_path / "policy-1"), "0")
    loop, run = make_loop(store, tmp_path, gate={"max_kl": 0.1}), store.runs.start("gate")
    fair = Round(1, "start", policy="policy-1", figures={"kl": 0.05})
    assert loop_gate.pass_gate(loop, run, fair) == "next"
    assert fair.accepted
    far = Round(1, "start", policy="policy-1", figures={"kl": 0.2})
    assert loop_gate.pass_gate(loop, run, far) == "end"
    refused = store.versions.get("policy-1")
    assert refused.status == "refused"
    assert "KL to the start policy is 0.200 nats a token" in refused.reasons[0]
    assert far.outcome == f"policy-1 is refused: {refused.reasons[0]}"


def test_a_round_waits_for_votes(store: Store, tmp_path: Path, start: Path) -> None:
    serve_start(store, start)
    told: list[str] = []
    loop = make_loop(store, tmp_path, min_votes=100)
    loop._say = told.append
    vote(store, ask(store, 2))
    assert loop.run(once=True) == loop.run(once=True)
    assert told == ["round 1: 4 of 100 votes"]
    (run,) = store.runs.all()
    assert (run.status, run.stage) == ("running", "collect")
    for folder in ("versions", "others"):  # the database is one, wherever the versions shall lie
        other = make_loop(store, tmp_path / folder)
        with loop._alone(), pytest.raises(LearnerAtWork, match="another learner is at work on this database"):
            other.run(once=True)
    with Store.open(f"sqlite:///{tmp_path}/second.db") as second:
        serve_start(second, start)
        with loop._alone(), pytest.raises(LearnerAtWork, match=r"at work on .*versions"):
            make_loop(second, tmp_path).run(once=True)


def test_a_round_goes_on_in_its_folder(store: Store, tmp_path: Path, start: Path) -> None:
    serve_start(store, start)
    loop, elsewhere = make_loop(store, tmp_path), make_loop(store, tmp_path / "elsewhere")
    loop.run(once=True)
    moved = elsewhere.run(once=True)  # nothing was made yet
    assert moved is not None
    assert moved.folder == str(elsewhere.config.folder)
    (run,) = store.runs.all()
    store.runs.to_stage(run.id, "policy", moved.to_dict())
    with pytest.raises(ValueError, match=r"round 1 is under way \(policy\) with output_dir=.*elsewhere"):
        loop.run(once=True)


@pytest.mark.parametrize(("options", "why"), [({"held_out": 0.999}, "held out"), ({}, "says anything")])
def test_votes_that_teach_nothing_are_waited_with(
    store: Store, tmp_path: Path, start: Path, options: dict[str, Any], why: str
) -> None:
    """However often the learner looks, there is one run."""
    serve_start(store, start)
    for i in range(5):
        store.record_shown(Shown(id=f"a{i}", prompt="the cat", text="a dog" if options else " "))
        store.add_vote(Vote(response_id=f"a{i}", kind="thumb", value="up", user=f"user-{i}"))
    told: list[str] = []
    loop = make_loop(store, tmp_path, **options)
    loop._say = told.append
    assert loop.run(once=True) == loop.run(once=True)
    assert len(store.runs.all()) == 1
    assert told[0].startswith("round 1: 5 votes, of which ")
    assert why in told[0]


def test_what_a_round_collects(store: Store, tmp_path: Path, start: Path) -> None:
    """After max_wait any number will do; nobody has more than they may, and the rest counts as seen."""
    serve_start(store, start)
    votes = vote(store, ask(store, 12))  # of ten users, two a group
    loop = make_loop(store, tmp_path, min_votes=100, max_wait=1e-9, votes_per_user=2, held_out=0.5)
    run = store.runs.start("collect")
    round = Round(1, "start")
    assert collect(loop, run, round) == "next"
    assert len(round.beyond) == 4
    assert sorted([*round.votes, *round.held_out, *round.beyond]) == sorted(one.id for one in votes)
    sides = [{one.vote.user for one in loop.judged(ids)} for ids in (round.votes, round.held_out)]
    assert all(sides)
    assert not sides[0] & sides[1]
    # another seed holds others out
    again = Round(1, "start")
    collect(make_loop(store, tmp_path, max_wait=1e-9, held_out=0.5, seed=1), run, again)
    assert {*again.held_out} != {*round.held_out}


def test_votes_without_a_row_for_the_method_end_the_round(store: Store, tmp_path: Path, start: Path) -> None:
    serve_start(store, start)
    groups = ask(store, 6)
    vote(store, groups)
    loop = make_loop(store, tmp_path, method="kto", kinds=["ranking"])
    round = loop.run(once=True)
    assert round is not None
    assert round.outcome is not None
    assert "gives kto a row" in round.outcome
    assert [run.status for run in store.runs.all()] == ["done"]
    again = loop.run(once=True)  # the reward model has learned from them: they make no second round
    assert again is not None
    assert (again.number, again.outcome) == (2, None)


def test_answers_leave_room_for_a_prompt(store: Store, tmp_path: Path, start: Path) -> None:
    """The start policy has 64 positions."""
    serve_start(store, start)
    assert make_loop(store, tmp_path, max_completion_length=None).answer_tokens == 32
    assert make_loop(store, tmp_path, max_completion_length=40).longest_prompt(40) == 24
    with pytest.raises(ValueError, match="leaves no room for a prompt in a model of 64 positions"):
        _ = make_loop(store, tmp_path, max_completion_length=64).answer_tokens


def test_a_candidate_that_nothing_can_measure_ends_the_round(
    store: Store, tmp_path: Path, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_start(store, start)
    vote(store, ask(store, 4))
    monkeypatch.setattr(OnlineLoop, "longest_prompt", lambda self, tokens: 0)
    options: dict[str, Any] = {"reward_options": {**TINY, "max_steps": 1}, "policy_options": {"max_steps": 1}}
    round = make_loop(store, tmp_path, method="dpo", kl_budget=None, **options).run(once=True)
    assert round is not None
    assert round.outcome is not None
    assert "no prompt leaves room for an answer of 6 tokens" in round.outcome
    assert [run.status for run in store.runs.all()] == ["done"]
    assert [version.name for version in store.versions.all("policy")] == ["start"]


def test_a_voter_has_so_many_votes_in_a_round() -> None:
    shown = Shown(id="a", prompt="b", text="c")
    users = ["ada", "anonymous:1", "ada", "anonymous:2", "ada"]
    votes = [
        Judged(Vote(response_id="a", kind="thumb", value="up", user=user, id=str(i)), (shown,))
        for i, user in enumerate(users)
    ]
    kept, beyond = first_of_each(votes, 1)
    assert [one.vote.id for one in kept] == ["0", "1"]
    assert beyond == ["2", "3", "4"]
    assert first_of_each(votes, None) == (votes, [])


def test_options_come_from_a_file(
    store: Store, tmp_path: Path, start: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve_start(store, start)
    vote(store, ask(store, 2))
    options = {
        "db": f"sqlite:///{tmp_path}/feedback.db", "output_dir": str(tmp_path / "versions"), "method": "grpo",
        "min_votes": 100, "max_wait": 3600, "kinds": ["thumb", "ranking"], "policy_options": {"num_generations": 4},
        "gate": {"max_kl": 0.5}, "task_suites": {"lower": "online.loop.test_loop:all_lower"},
    }  # fmt: skip
    file = tmp_path / "loop.yaml"
    file.write_text(yaml.safe_dump(options))
    assert main(["online", "--config", str(file), "--once"]) == 0
    assert "round 1: 4 of 100 votes" in capsys.readouterr().out
    assert main(["online", "--config", str(file), "--once", "--method", "ppo"]) == 1
    assert "num_generations" in capsys.readouterr().err
    assert main(["online", "--config", str(file), "--once", "--gate.max_length_ratio", "0.5"]) == 1
    assert "gate: max_length_ratio must be at least 1, got 0.5" in capsys.readouterr().err
    file.write_text(yaml.safe_dump({**options, "gate": {"max_kl": -1}}))
    assert main(["online", "--config", str(file), "--once", "--gate.max_length_ratio", "2"]) == 1
    assert "gate: max_kl must be above 0, got -1" in capsys.readouterr().err  # the file's, beside the other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_votes": 0}, "min_votes must be at least 1"),
        ({"method": "sft"}, "method must be one of grpo, ppo, dpo, kto"),
        ({"method": "ppo", "logged_answers": True}, "logged_answers is an option of grpo, and"),
        ({"kinds": ["stars"]}, "kinds must be some of thumb"),
        ({"policy_options": {"output_dir": "x"}}, "policy_options: output_dir is set by the loop"),
        ({"policy_options": {"epsilon": 0.1}, "method": "dpo"}, "epsilon"),
        ({"gate": {"max_kl": 0}}, "gate: max_kl must be above 0"),
        ({"gate": {"max_length_drift": 0.9}}, "gate: max_length_drift must be at least 1"),
        ({"canary_share": 1.5}, "canary_share must be in"),
        ({"canary_margin": 0.5}, "canary_margin must be in"),
        ({"votes_per_user": 0.5}, "votes_per_user must be a whole number"),
        ({"method": "dpo", "max_logged_kl": 1.0}, "max_logged_kl is an option of grpo with logged answers"),
        ({"logged_answers": False, "max_age": 3}, "max_age is an option of dpo, kto and grpo with logged"),
        ({"method": "kto", "max_prompts": 3}, "max_prompts is an option of grpo and ppo"),
        ({"kinds": ["thumb", "implicit"]}, "hints weigh nothing"),
        ({"task_suites": {"a": "b:c"}, "safety_suites": {"a": "b:d"}}, "both name a: give each its own name"),
        ({"peft": {"rank": 8}}, "peft: .*rank"),
        ({"reward_options": {"peft": {"rank": 8}}}, "reward_options.peft: .*rank"),
    ],
)
def test_wrong_options_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        OnlineConfig(**options)
