"""Voted answers of older versions: their groups and rewards, their weights, and what is left out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from online.loop.filled import TINY, ask, make_start, serve_start
from trainers.tiny import make_llama, make_tokenizer
from transformers import TrainerCallback

from alignfast.models import Policy, load_policy
from alignfast.online.feedback import Judged, Shown, Vote
from alignfast.online.loop.logged import LoggedGRPOTrainer, logged_groups, vote_rewards, within_kl
from alignfast.online.store import Store


def shown(id: str, version: str = "v1", **fields: Any) -> Shown:
    known = {"prompt_ids": (3,), "completion_ids": (4, 5), "logps": (-1.0, -2.0), "policy_version": version}
    return Shown(**{"id": id, "prompt": "a", "text": id, **known, **fields})


def judged(kind: Any, value: Any, *ids: str, created: float = 0.0, **fields: Any) -> Judged:
    vote = Vote(response_id=ids[0], kind=kind, value=value, created=created)
    return Judged(vote, tuple(shown(id, **fields) for id in ids))


def test_rewards_of_each_kind() -> None:
    assert vote_rewards(judged("thumb", "up", "a")) == {"a": 1.0}
    assert vote_rewards(judged("rating", 2, "a")) == {"a": 0.25}
    assert vote_rewards(judged("pair", "b", "a", "b")) == {"b": 1.0, "a": 0.0}
    assert vote_rewards(judged("pair", "tie", "a", "b")) == {"a": 0.5, "b": 0.5}
    assert vote_rewards(judged("ranking", ["c", "a", "b"], "a", "b", "c")) == {"c": 1.0, "a": 0.5, "b": 0.0}
    assert vote_rewards(judged("edit", "better", "a")) == vote_rewards(judged("implicit", "copy", "a")) == {}


def test_groups_are_what_was_compared_and_periods_of_verdicts() -> None:
    votes = [
        judged("thumb", "down", "t2", created=2.0),
        judged("thumb", "up", "t1", created=1.0),
        judged("rating", 5, "t3", created=3.0),
        judged("thumb", "up", "t4", created=4.0),
        judged("pair", "b", "a", "b"),
        judged("pair", "tie", "c", "d"),  # nothing is better
        judged("pair", "f", "e", "f", version="v0"),
        judged("pair", "h", "g", "h", logps=()),
        judged("ranking", ["i", "j", "k"], "i", "j", "k"),
        judged("edit", "better", "l"),
    ]
    groups, left = logged_groups(votes, {"v1": 0}, size=2)
    assert [[of.shown.id for of in group] for group in groups] == [["a", "b"], ["t1", "t2"]]
    assert left == {"unknown_tokens": 1, "too_old": 1, "no_reward": 1, "too_many": 1}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("models") / "start")


@pytest.fixture
def votes(tmp_path: Path, start: Path) -> Iterator[list[Judged]]:
    """Pairs of answers of the start policy."""
    with Store.open(f"sqlite:///{tmp_path}/feedback.db") as store:
        serve_start(store, start)
        groups = ask(store, 6)
        yield [
            Judged(Vote(response_id=group[0].id, kind="pair", value=group[0].id), tuple(group))
            for group in groups
        ]


def test_a_policy_is_as_near_to_its_own_answers_as_can_be(votes: list[Judged], start: Path) -> None:
    groups, _ = logged_groups(votes, {"start": 0}, size=2)
    kept, figures = within_kl(groups, load_policy(str(start)), most=0.01, cap=3.0)
    assert kept == groups
    assert figures["kl"]["start"] == pytest.approx(0, abs=1e-5)
    assert figures["ess"] == pytest.approx(1, abs=1e-5)
    assert figures["answers"] == 12


def test_answers_of_a_policy_far_away_are_left_out(votes: list[Judged]) -> None:
    other = Policy(make_llama(8, initializer_range=0.5).eval())
    groups, _ = logged_groups(votes, {"start": 0}, size=2)
    kept, figures = within_kl(groups, other, most=100.0, cap=3.0)
    assert kept == groups
    assert figures["kl"]["start"] > 0.5
    assert figures["ess"] < 0.9
    kept, figures = within_kl(groups, other, most=0.5, cap=3.0)
    assert (kept, figures["answers"], figures["too_far"]) == ([], 0, 12)


def make_trainer(groups: list[Any], folder: Path, **options: Any) -> LoggedGRPOTrainer:
    return LoggedGRPOTrainer(
        make_llama(8, initializer_range=0.5), lambda completions, **_: [float(len(c)) for c in completions],
        logged=groups, train_dataset=[{"prompt": "the cat"}, {"prompt": "a dog"}], processing_class=make_tokenizer(),
        output_dir=str(folder / "run"), num_generations=4, per_device_train_batch_size=4, late_max_age=0,
        max_completion_length=6, report_to="none", **{**TINY, **options},
    )  # fmt: skip


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> Any:
        control.should_training_stop = state.global_step == 2
        return control


def test_a_run_that_goes_on_takes_each_logged_group_once(votes: list[Judged], tmp_path: Path) -> None:
    """To the weights of one that was not interrupted."""
    groups, _ = logged_groups(votes, {"start": 0}, size=4)
    options: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-3}
    whole = make_trainer(groups, tmp_path / "whole", **options)
    whole.train()
    half = make_trainer(groups, tmp_path / "half", **options)
    half.add_callback(Stop())
    half.train()
    rest = make_trainer(groups, tmp_path / "half", **options)
    rest.train(resume_from_checkpoint=True)
    assert rest.state.global_step == 4
    for name, expected in whole.model.state_dict().items():
        assert torch.equal(rest.model.state_dict()[name], expected), name


def test_logged_groups_join_the_draw_with_truncated_ratios(votes: list[Judged], tmp_path: Path) -> None:
    """Under another policy than that which wrote them; and their advantages are those of their rewards."""
    groups, _ = logged_groups(votes, {"start": 0}, size=4)
    trainer = make_trainer(groups, tmp_path, max_steps=2, save_strategy="no")
    trainer.train()
    drawn = trainer.experience  # of the last draw: the second half of the groups
    assert len(drawn.trees) == 4 + 3 * 4
    for place, group in enumerate(groups[3:]):
        rows = range(4 + 4 * place, 8 + 4 * place)
        for row, of in zip(rows, group):
            tree = drawn.trees[row]
            assert tree.answers[0] == of.shown.completion_ids
            then_P = torch.tensor(of.logps)
            weight_P = drawn.more["importance_weights"][row]
            # old_logps are those of the policy that begins the step
            expected_P = (drawn.old_logps[row].double() - then_P.double()).exp().clamp(max=3.0)
            torch.testing.assert_close(weight_P.double(), expected_P, rtol=1e-5, atol=1e-6)
            assert (drawn.advantages[row][0] > 0) == (of.reward == 1)
        for row in list(rows)[len(group) :]:  # filled up
            assert not drawn.advantages[row].any()
