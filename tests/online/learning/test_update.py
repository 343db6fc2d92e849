"""Reward models learn from each kind of vote alone, and from none that is not there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from online.learning.people import OPTIONS, liking, make_start, votes_of
from safetensors.torch import load_file
from trainers.tiny import make_tokenizer

from alignfast.models import load_reward_model
from alignfast.online.feedback import KINDS, Judged, Kind
from alignfast.online.learning.said import Said, judged_leads, said_of
from alignfast.online.learning.trainer import FeedbackConfig, FeedbackTrainer, plant
from alignfast.online.learning.update import RewardUpdate, held_out_figures, update_reward
from alignfast.online.learning.votes import Weighed
from alignfast.online.loop.reward import _merged


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("start"))


def update(
    start: Path, folder: Path, train: list[Judged], held_out: list[Judged], **more: Any
) -> RewardUpdate:
    replay = more.pop("replay", ())
    return update_reward(str(start), train, held_out, folder, {**OPTIONS, **more}, replay)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_alone_raises_held_out_accuracy(start: Path, tmp_path: Path, kind: Kind) -> None:
    gold = votes_of("pair", 150, seed=7)
    found = update(start, tmp_path, votes_of(kind, 240), gold, num_train_epochs=3, implicit_weight=1.0)
    assert found.figures["reward_accuracy"]["low"] > 0.6


def test_no_vote_is_missing_never_negative(start: Path, tmp_path: Path) -> None:
    thumbs, held = votes_of("thumb", 30), votes_of("pair", 30, seed=7)
    hints = votes_of("implicit", 30)
    alone = update(start, tmp_path / "alone", thumbs, held)
    beside = update(start, tmp_path / "beside", [*thumbs, *hints], held)  # seen, and silent
    assert weights(alone) == weights(beside)
    with pytest.raises(ValueError, match="none of 30 votes says anything of an answer"):
        update(start, tmp_path / "none", hints, held)


def test_how_easily_somebody_is_pleased_teaches_nothing(start: Path, tmp_path: Path) -> None:
    """One half of the users likes all, and is shown what is bad; the other likes nothing, and is shown what is good."""
    found = []
    for one in votes_of("thumb", 4000):
        good, ease = liking(one.answer.text), int(one.vote.user.split()[-1]) % 3
        if (ease == 2 and good < 0 and good > -2) or (ease == 0 and 0 < good < 3):
            found.append(one)  # in all of these, thumbs say the reverse of what the answers are
    assert all((one.vote.value == "up") == (liking(one.answer.text) < 0) for one in found)
    mixed = [*found[:150], *votes_of("thumb", 150, seed=1)]
    held = votes_of("pair", 150, seed=7)
    accuracy = {
        prior: update(
            start, tmp_path / str(prior), mixed, held, num_train_epochs=4, voter_prior=prior
        ).figures
        for prior in (1e-3, 3.0)
    }
    assert accuracy[3.0]["reward_accuracy"]["estimate"] > accuracy[1e-3]["reward_accuracy"]["estimate"] + 0.1


def test_it_goes_on_from_the_last_model_with_old_votes_beside_new_ones(start: Path, tmp_path: Path) -> None:
    old, new, held = votes_of("pair", 100), votes_of("rating", 20, seed=1), votes_of("pair", 150, seed=7)
    first = update(start, tmp_path / "1", old, held, num_train_epochs=5)
    second = update(first.folder, tmp_path / "2", new, held, replay=old, replay_ratio=2.0)
    assert "reward_accuracy_before" not in first.figures
    assert second.figures["reward_accuracy_before"] == first.figures["reward_accuracy"]
    assert (second.figures["votes"], second.figures["votes_replayed"]) == (60, 40)
    with pytest.raises(ValueError, match="100 votes are both trained on and held out"):
        update(start, tmp_path / "3", new, old, replay=old)


def test_a_killed_update_goes_on_and_ends_alike(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    votes = [*votes_of("rating", 40), *votes_of("pair", 40), *votes_of("ranking", 20)]
    held, options = (
        votes_of("pair", 30, seed=7),
        {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2},
    )
    whole = update(start, tmp_path / "whole", votes, held, **options)
    with killed_at(9, monkeypatch), pytest.raises(KeyboardInterrupt):
        update(start, tmp_path / "killed", votes, held, **options)
    again = update(start, tmp_path / "killed", votes, held, **options)
    assert weights(again) == weights(whole)
    assert again.figures == whole.figures


@contextmanager
def killed_at(number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An update within it dies at its step of this number."""
    step = FeedbackTrainer.compute_loss

    def killed(self: FeedbackTrainer, *args: Any) -> Any:
        if self.state.global_step == number:
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(FeedbackTrainer, "compute_loss", killed)
        yield


def test_heads_texts_and_conversations(start: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    folder = tmp_path / "chat"
    shutil.copytree(start, folder)
    tokenizer.save_pretrained(folder)
    plain, chat = votes_of("ranking", 60), votes_of("ranking", 60, seed=1)
    chat = [
        Judged(
            one.vote,
            tuple(replace(of, prompt=[{"role": "user", "content": of.prompt}]) for of in one.answers),
        )
        for one in chat
    ]
    found = update(folder, tmp_path / "run", [*plain, *chat], votes_of("pair", 60, seed=7), num_heads=3)
    assert found.figures["votes"] == 120
    assert load_reward_model(str(found.folder)).num_heads == 3


def test_gradients_do_not_depend_on_how_a_step_is_cut(start: Path, tmp_path: Path) -> None:
    votes = [one for kind in KINDS for one in votes_of(kind, 12)]
    options = {"max_steps": 3, "implicit_weight": 0.5}
    whole = update(start, tmp_path / "1", votes, [], per_device_train_batch_size=16, **options)
    cut = update(
        start,
        tmp_path / "2",
        votes,
        [],
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        **options,
    )
    for name, tensor in load_file(whole.folder / "model.safetensors").items():
        torch.testing.assert_close(
            load_file(cut.folder / "model.safetensors")[name], tensor, rtol=1e-3, atol=1e-4
        )


def test_a_light_vote_teaches_lightly(start: Path, tmp_path: Path) -> None:
    whole = [said_of([Weighed(one, 1.0)])[0] for one in votes_of("pair", 8)]

    def trained(*light: str) -> dict[str, torch.Tensor]:
        beside = [replace(one, texts=light, places=(1, 1), weight=1e-9) for one in whole]
        args = FeedbackConfig(output_dir=str(tmp_path), report_to="none", max_steps=2, **OPTIONS)
        trainer = FeedbackTrainer(str(start), args, train_dataset=[*whole, *beside])
        trainer.train()
        return {name: value.clone() for name, value in trainer.model.state_dict().items()}

    one, other = trained(" cat", " dog"), trained(" dog", " cat")
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-5)


def test_judgements_of_held_out_votes() -> None:
    said = [
        Said("ranking", "a", ("x", "y", "z"), (1, 2), user="ada"),
        Said("rating", "a", ("x",), above=(True, False, False, False), user="ada"),
        Said("rating", "b", ("x",), above=(True, True, False, False), user="ada"),
        Said("rating", "c", ("x",), above=(True, True, False, False), user="ada"),
        Said("thumb", "d", ("x",), above=(True,), user="anonymous:1"),
        Said("thumb", "e", ("x",), above=(False,), user="anonymous:2"),
        Said("pair", "a", ("x", "y"), (2,), user="bob"),
    ]
    rewards = [[3.0, 1.0, 4.0], [1.0], [2.5], [9.0], [0.0], [1.0], [5.0, 0.0]]
    assert list(judged_leads(said, rewards)) == [(2.0, "ada"), (-1.0, "ada"), (1.5, "ada")]


@pytest.mark.parametrize(
    "wrong",
    [
        {"voter_prior": 0.0},
        {"edit_kept": 2.0},
        {"replay_ratio": -1.0},
        {"level_period": 0.0},
        {"voter_cap": 0},
    ],
)
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|expected most > 0"):
        FeedbackConfig(**wrong)


def weights(found: RewardUpdate) -> bytes:
    return (found.folder / "model.safetensors").read_bytes()


def test_who_contradicts_what_the_others_teach_is_not_heard(start: Path, tmp_path: Path) -> None:
    """Two of 20 users say the reverse. Each answer is seen by one user alone."""
    first = update(start, tmp_path / "first", votes_of("ranking", 400, seed=2), [], num_train_epochs=2)
    honest, held = votes_of("ranking", 400), votes_of("pair", 30, seed=7)

    votes = [
        one
        if int(one.vote.user.split()[-1]) > 1
        else Judged(replace(one.vote, value=one.vote.value[::-1]), one.answers)
        for one in honest
    ]
    unheard = update(first.folder, tmp_path / "unheard", votes, held, contrary_weight=0.0)
    assert unheard.figures["users_contrary"] == 2
    heard = update(first.folder, tmp_path / "heard", votes, held, contrary_weight=1.0)
    assert heard.figures["users_contrary"] == 2  # told, and heard
    assert weights(heard) != weights(unheard)


PEFT: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def test_adapters_and_head_go_from_version_to_version(start: Path, tmp_path: Path) -> None:
    """Saved, loaded and gone on from: rewards are the same to the bit, and the base is nobody's to change."""
    base = load_file(start / "model.safetensors")
    votes, held = votes_of("pair", 100), votes_of("pair", 60, seed=7)
    first = update(start, tmp_path / "1", votes, held, peft=PEFT)
    saved = adapters(first)
    assert not (first.folder / "model.safetensors").exists()
    assert any("lora_A" in name for name in saved)
    assert any("score" in name for name in saved)
    second = update(
        first.folder, tmp_path / "2", votes_of("rating", 40, seed=1), held, replay=votes, peft=PEFT
    )
    assert second.figures["reward_accuracy_before"] == first.figures["reward_accuracy"]
    for other in ({"r": 8}, {"target_modules": ["q_proj"]}):
        with pytest.raises(ValueError, match="merge them into their model first"):
            update(first.folder, tmp_path / "other", votes, held, peft={**PEFT, **other})
    assert adapters(second).keys() == saved.keys()  # the same adapters, not further ones on top
    for name, tensor in adapters(second).items():
        assert not torch.equal(tensor, saved[name]), name
    for name, tensor in load_file(start / "model.safetensors").items():
        assert torch.equal(tensor, base[name]), name
    args, said = FeedbackConfig(**OPTIONS), said_of([Weighed(one, 1.0) for one in held])
    trees = plant(said, make_tokenizer(), None).trees
    folder = _merged(second.folder)  # as the loop publishes it
    rewards = {path: load_reward_model(str(path)).score(trees) for path in (second.folder, folder)}
    figures = held_out_figures(load_reward_model(str(second.folder)), make_tokenizer(), said, args)
    assert figures.items() <= second.figures.items()
    np.testing.assert_allclose(rewards[folder], rewards[second.folder], rtol=1e-4, atol=1e-5)
    third = update(folder, tmp_path / "3", votes, held, peft=PEFT)
    assert third.figures["reward_accuracy_before"] == second.figures["reward_accuracy"]


def test_a_killed_update_of_adapters_goes_on_and_ends_alike(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    votes, options = votes_of("pair", 60), {"save_strategy": "steps", "save_steps": 2, "peft": PEFT}
    whole = update(start, tmp_path / "whole", votes, [], **options)
    with killed_at(3, monkeypatch), pytest.raises(KeyboardInterrupt):
        update(start, tmp_path / "killed", votes, [], **options)
    again = update(start, tmp_path / "killed", votes, [], **options)
    for name, tensor in adapters(whole).items():
        assert torch.equal(adapters(again)[name], tensor), name


def adapters(found: RewardUpdate) -> dict[str, torch.Tensor]:
    return load_file(found.folder / "adapter_model.safetensors")
