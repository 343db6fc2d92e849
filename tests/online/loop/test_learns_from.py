"""What a round's models learn from: whose votes, how many of them, how long, and not what was deleted meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from online.loop.filled import FAST, TINY, ask, make_start, serve_start, vote
from trainers.tiny import WORDS

from alignfast.online.feedback import Judged, Shown, Vote
from alignfast.online.learning.gate import Decision
from alignfast.online.loop import OnlineLoop, Round
from alignfast.online.loop import gate as loop_gate
from alignfast.online.loop import policy as loop_policy
from alignfast.online.loop import reward as loop_reward
from alignfast.online.loop.evaluate import _finite, _preference, evaluate_candidate
from alignfast.online.loop.loop import collect
from alignfast.online.loop.policy import (
    candidate_folder,
    learn_policy,
    load_version,
    training_figures,
    votes_of_policy,
)
from alignfast.online.loop.reward import _replayable, learn_reward
from alignfast.online.loop.votes import prompts_of, training_rows
from alignfast.online.store import Run, Store

LONG = " ".join(WORDS * 20)[:2000]  # far beyond the start policy's 64 positions


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("models") / "start")


@pytest.fixture
def store(tmp_path: Path, start: Path) -> Iterator[Store]:
    with Store.open(f"sqlite:///{tmp_path}/feedback.db") as opened:
        serve_start(opened, start)
        yield opened


def make_loop(store: Store, tmp_path: Path, **options: Any) -> OnlineLoop:
    merged = {**FAST, "method": "dpo", **options}
    if merged["method"] == "grpo":
        merged["policy_options"] = {**merged["policy_options"], "num_generations": 4}
    return OnlineLoop(store=store, output_dir=str(tmp_path / "versions"), say=lambda text: None, **merged)


def collected(loop: OnlineLoop) -> tuple[Run, Round]:
    run = loop._run()
    round = Round.from_dict(run.state)
    assert collect(loop, run, round) == "next"
    loop.store.runs.to_stage(run.id, "reward", round.to_dict())
    return run, round


def judged(kind: Any, value: Any, *shown: Shown, user: str = "ada", **fields: Any) -> Judged:
    about = {"episode_id": shown[0].episode_id} if shown[0].episode_id else {"response_id": shown[0].id}
    return Judged(Vote(kind=kind, value=value, user=user, **about, **fields), shown)


def say_long_things(store: Store) -> list[str]:
    """Votes from another program, without tokens: a prompt, and an answer, that no position is left for."""
    pairs = [("the cat", LONG), (LONG, "a dog"), (LONG, LONG)]
    votes = []
    for i, (prompt, text) in enumerate(pairs * 4):
        shown = [
            Shown(id=f"long-{i}-{j}", prompt=prompt, text=f"{text} {j}", group_id=f"long-{i}") for j in "ab"
        ]
        store.record_shown(*shown)
        votes.append(Vote(response_id=shown[0].id, kind="pair", value=shown[0].id, user=f"user-{i % 10}"))
        store.add_vote(votes[-1])
    return [one.id for one in votes]


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_rows_beyond_the_models_positions_end_no_learner(store: Store, tmp_path: Path, method: str) -> None:
    """They are left out, or cut, and counted, in each stage."""
    vote(store, ask(store, 12))
    say_long_things(store)
    loop = make_loop(store, tmp_path, method=method, max_age=2)
    run, round = collected(loop)
    learn_reward(loop, run, round)
    assert store.versions.get("reward-1").figures["rows_too_long"] > 0
    learn_policy(loop, run, round)
    figures = training_figures(loop, run)
    if method == "grpo":
        assert figures["left_out"]["too_long"] > 0
    evaluate_candidate(loop, run, round)
    assert store.versions.get("policy-1").figures["pairs"] > 0


def test_prompts_without_tokens_are_counted(store: Store, tmp_path: Path) -> None:
    loop = make_loop(store, tmp_path)
    shown = [
        Shown(id=f"s{i}", prompt=prompt, text="a") for i, prompt in enumerate(["the cat", LONG, "a dog"])
    ]
    votes = [judged("thumb", "up", one) for one in shown]
    rows, left = loop.prompts(votes, 10, 6)
    assert sorted(row["prompt"] for row in rows) == ["a dog", "the cat"]
    assert left == {"too_long": 1, "other_format": 0}
    mixed = [
        *votes,
        judged("thumb", "up", Shown(id="m", prompt=[{"role": "user", "content": "hi"}], text="a")),
    ]
    assert prompts_of(mixed, 10).left == {"too_long": 0, "other_format": 1}


def test_rows_that_are_left_out_are_counted() -> None:
    cat = Shown(id="cat", prompt="a", text="the cat sat on the mat")
    talk = Shown(id="talk", prompt=[{"role": "user", "content": "a"}], text="the cat sat on the mat")
    empty = Shown(id="empty", prompt="a", text=" ")
    votes = [
        judged("edit", "the cat sat on a mat", cat),
        judged("edit", "buy my product at once", cat),
        judged("edit", "the cat sat on the rug", talk),
        judged("edit", " a", empty),
    ]
    rows, left = training_rows(votes, "pairs")
    assert [row["chosen"] for row in rows] == ["the cat sat on a mat"]
    assert left == {"other_text": 2, "wordless": 0, "other_format": 1}
    assert training_rows([judged("thumb", "up", empty)], "kto").left["wordless"] == 1
    assert len(training_rows(votes, "pairs", edit_kept=0.0).rows) == 2


def test_a_thumb_on_a_conversation_is_one_row() -> None:
    """Of a turn that follows from the vote, and each turn as often."""
    turns = [Shown(id=f"t{i}", prompt="a", text=str(i), episode_id="e", turn=i) for i in range(4)]
    counts: dict[str, int] = {}
    for i in range(400):
        one = judged("thumb", "up", *turns, id=f"vote-{i}")
        (row,), _ = training_rows([one], "kto")
        assert training_rows([one], "kto").rows == [row]
        counts[row["completion"]] = counts.get(row["completion"], 0) + 1
    assert sorted(counts) == ["0", "1", "2", "3"]
    assert min(counts.values()) > 70


@pytest.mark.parametrize("method", ["dpo", "kto", "grpo"])
def test_nobody_outweighs_many_in_the_policy(store: Store, tmp_path: Path, method: str) -> None:
    """The newest votes of each voter, all anonymous ones as one; of a voter alone all."""
    loop = make_loop(store, tmp_path, method=method, held_out=0.0, reward_options={**TINY, "voter_most": 3})

    def say(numbers: range, user: str) -> None:
        for i in numbers:
            shown = Shown(id=f"s{i}", prompt="the cat", text=f"a dog {i}", policy_version="start")
            store.record_shown(shown)
            name = f"anonymous:{i}" if user == "anonymous" else user
            store.add_vote(
                Vote(response_id=shown.id, kind="thumb", value="up" if i % 2 else "down", user=name)
            )

    def learned() -> list[str]:
        round = Round(1, "start", votes=[vote.id for vote in store.votes()])
        return [one.answers[0].id for one in votes_of_policy(loop, round)]

    say(range(12), "ada")
    assert learned() == [f"s{i}" for i in range(12)]
    say(range(12, 18), "anonymous")
    assert len(learned()) == 12  # the six weigh 1/2 each, as do six of the twelve
    say(range(18, 19), "bob")
    assert learned() == ["s9", "s10", "s11", "s15", "s16", "s17", "s18"]


def test_votes_beyond_a_voters_number_are_not_replayed(store: Store, tmp_path: Path) -> None:
    vote(store, ask(store, 20))  # of ten users, four each
    loop = make_loop(store, tmp_path, votes_per_user=3, held_out=0.0)
    run, round = collected(loop)
    learn_reward(loop, run, round)
    assert len(round.beyond) == 10
    reward = loop.reward_model()
    assert reward is not None
    replayed = {one.vote.id for one in _replayable(loop, loop.used(reward))}
    assert replayed == {*round.votes}


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_votes_of_a_refused_round_come_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Until something that serves has learned from them."""
    accepts = iter([False, True, True])
    monkeypatch.setattr(loop_gate, "gate", lambda *_: Decision(next(accepts), ("no",)))
    loop = make_loop(store, tmp_path, method=method)
    learned: list[set[str]] = []
    rounds: list[Round] = []
    for seed in range(3):
        vote(store, ask(store, 6, seed=seed))
        round = loop.run(once=True)
        assert round is not None
        rounds.append(round)
        assert round.policy is not None
        learned.append({one.id for one in store.used_by(round.policy)})
    serving = store.versions.serving()
    assert serving is not None
    assert (serving.name, serving.parents[0]) == ("policy-3", "policy-2")
    first, second, third = (set(round.votes) for round in rounds)
    assert learned == [first, first | second, third]


@pytest.mark.parametrize("method", ["dpo", "kto", "grpo", "ppo"])
def test_the_anchor_is_the_start_policy(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Also when another version serves: what is trained is that one, its KL is to where all began."""
    monkeypatch.setattr(loop_gate, "gate", lambda *_: Decision(True, ()))
    vote(store, ask(store, 12))
    make_loop(store, tmp_path).run(once=True)
    vote(store, ask(store, 12, seed=1))
    loop = make_loop(store, tmp_path, method=method)
    run, round = collected(loop)
    assert round.serving == "policy-1"
    learn_reward(loop, run, round)
    judged = votes_of_policy(loop, round)
    trainer: Any
    trainer, _ = loop_policy._trainer(loop, round, judged, candidate_folder(loop, run).parent)
    trainer.before_training()
    for name, module in (("policy-1", trainer.module), ("start", trainer.reference.policy)):
        policy, _ = load_version(store.versions.get(name).path, "cpu")
        theirs = policy.model.lm_head.weight
        ours = next(p for path, p in module.named_parameters() if path.endswith("lm_head.weight"))
        assert (ours == theirs).all(), name
        assert not (
            ours
            == load_version(store.versions.get("policy-1" if name == "start" else "start").path, "cpu")[
                0
            ].model.lm_head.weight
        ).all()


def test_an_option_that_changes_begins_the_training_anew(store: Store, tmp_path: Path) -> None:
    vote(store, ask(store, 12))
    loop = make_loop(store, tmp_path)
    run, round = collected(loop)
    learn_reward(loop, run, round)
    learn_policy(loop, run, round)
    folder = candidate_folder(loop, run).parent
    before = (folder / "figures.json").stat().st_mtime_ns
    learn_policy(loop, run, round)
    learn_policy(make_loop(store, tmp_path, eval_prompts=3, canary_voters=9), run, round)
    assert (folder / "figures.json").stat().st_mtime_ns == before
    learn_policy(make_loop(store, tmp_path, max_age=1), run, round)
    assert (folder / "figures.json").stat().st_mtime_ns > before


def test_a_training_that_diverges_ends_the_round(store: Store, tmp_path: Path) -> None:
    vote(store, ask(store, 12))
    options = {**FAST["policy_options"], "max_steps": 6, "learning_rate": 1e30, "max_grad_norm": 1e30}
    round = make_loop(store, tmp_path, policy_options=options, kl_budget=None).run(once=True)
    assert round is not None
    assert round.outcome is not None
    assert round.outcome.startswith("no candidate: its training diverged: ")
    assert [run.status for run in store.runs.all()] == ["done"]


# Deletions meanwhile


def test_a_voter_who_is_deleted_before_publication_is_in_no_version(store: Store, tmp_path: Path) -> None:
    """Their votes trained the candidate: it is made anew, and what the deletion named was all."""
    vote(store, ask(store, 12))
    loop = make_loop(store, tmp_path, held_out=0.0)
    run, round = collected(loop)
    learn_reward(loop, run, round)
    learn_policy(loop, run, round)
    rows = training_figures(loop, run)["rows"]
    gone = {one.id for one in store.votes(users=["user-3"])}
    assert gone & {*round.votes}
    assert store.delete_user("user-3").versions == ("reward-1",)
    evaluate_candidate(loop, run, round)
    version = store.versions.get("policy-1")
    assert version.figures["rows"] < rows
    assert {one.id for one in store.used_by("policy-1")} == {*round.votes} - gone
    assert store.delete_user("user-4").versions == ("reward-1", "policy-1")


@pytest.mark.parametrize("method", ["dpo", "ppo"])
def test_a_voter_who_is_deleted_while_their_votes_are_trained_on(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    vote(store, ask(store, 12))
    loop = make_loop(store, tmp_path, method=method)
    run, round = collected(loop)
    calls: list[int] = []
    update = loop_reward.update_reward

    def deletes(start: str, train: Any, *rest: Any) -> Any:
        calls.append(len(train))
        found = update(start, train, *rest)
        if len(calls) == 1:
            assert store.delete_user(train[0].vote.user).versions == ()
        return found

    monkeypatch.setattr(loop_reward, "update_reward", deletes)
    learn_reward(loop, run, round)
    assert calls[0] > calls[1]
    assert len(calls) == 2
    left = {one.id for one in store.votes()}
    assert {one.id for one in store.used_by("reward-1")} == left & {*round.votes, *round.held_out}
    learn_policy(loop, run, round)
    evaluate_candidate(loop, run, round)
    assert store.versions.get("policy-1").status == "candidate"


# Figures


def test_held_out_preference_takes_a_voters_pairs_together(store: Store, tmp_path: Path) -> None:
    """Thirty pairs on thirty prompts by three people are three."""
    groups = ask(store, 30)
    rows = [
        {"prompt": f"{group[0].prompt} {i}", "chosen": group[0].text + " cat", "rejected": group[1].text + " dog", "user": user}
        for i, group in enumerate(groups)
        for user in [f"user-{i % 3}"]
    ]  # fmt: skip
    loop = make_loop(store, tmp_path)
    other = make_start(tmp_path / "other", seed=8)
    policy, tokenizer = load_version(str(other), "cpu")
    path = store.versions.get("start").path
    wide = _preference(loop, policy, tokenizer, rows, path)["preference"]
    narrow = _preference(loop, policy, tokenizer, [{**row, "user": "anonymous"} for row in rows], path)[
        "preference"
    ]
    assert wide["estimate"] == narrow["estimate"]
    assert wide["high"] - wide["low"] != narrow["high"] - narrow["low"]
    alone = _preference(
        loop, policy, tokenizer, [{**row, "user": str(i)} for i, row in enumerate(rows)], path
    )
    assert alone["preference"] == narrow


def test_figures_that_are_no_numbers_are_named() -> None:
    nan = float("nan")
    found = _finite(
        {"kl": nan, "reward": 1.0, "reward_wins": {"estimate": nan, "low": 0.0}, "judge": "a", "loss": None}
    )
    assert found == {"reward": 1.0, "judge": "a", "loss": None, "not_finite": ["kl", "reward_wins"]}
    assert _finite({"kl": 0.1}) == {"kl": 0.1}


def test_a_short_training_is_measured_against_the_budget(store: Store, tmp_path: Path) -> None:
    vote(store, ask(store, 12))
    loop = make_loop(store, tmp_path, kl_every=100)
    run, round = collected(loop)
    learn_reward(loop, run, round)
    learn_policy(loop, run, round)
    budget = training_figures(loop, run)["kl_budget"]
    assert budget["spent"] > 0
    assert not budget["ended"]


def test_a_budget_that_was_spent_stays_spent_after_a_kill(store: Store, tmp_path: Path) -> None:
    """The checkpoint of the step at which it ended says so, and no further step is made."""
    vote(store, ask(store, 12))
    options = {**FAST["policy_options"], "max_steps": 8, "save_steps": 2}
    loop = make_loop(store, tmp_path, kl_budget=1e-9, kl_every=2, policy_options=options)
    run, round = collected(loop)
    learn_reward(loop, run, round)
    learn_policy(loop, run, round)
    figures = training_figures(loop, run)
    assert (figures["steps"], figures["kl_budget"]["ended"]) == (2, True)
    folder = candidate_folder(loop, run).parent
    assert [path.name for path in (folder / "checkpoints").iterdir()] != []
    (folder / "figures.json").unlink()  # killed just before they were written
    learn_policy(loop, run, round)
    again = training_figures(loop, run)
    assert (again["steps"], again["kl_budget"]) == (2, figures["kl_budget"])
