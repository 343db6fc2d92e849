"""Late rewards in GRPO: who waits for whom, what joins which step with what weight, what expires, and exact resumption.

Letters: N completions.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from trainers.tiny import make_gpt2_with_dropout, make_llama, make_tokenizer

from alignfast import GRPOTrainer, PPOTrainer
from alignfast.rewards import LATE
from alignfast.trainers.on_policy import A_DRAW

ROWS = [{"prompt": prompt} for prompt in ("the cat", "a dog sat", "bird", "very happy")]
RUN = dict(
    max_steps=5, per_device_train_batch_size=8, max_completion_length=6, learning_rate=1e-2, logging_steps=1,
    report_to="none", save_strategy="no", disable_tqdm=True,
)  # fmt: skip


def late_by(delay_of: Any, steps_per_draw: int = 1) -> Any:
    """How many words are `the`, told `delay_of(place in the draw)` steps after it was drawn; False for never."""

    def reward(
        completions: list[str], sample_ids: list[int], trainer_state: Any, **columns: Any
    ) -> list[Any]:
        found: list[Any] = []
        for text, number in zip(completions, sample_ids):
            born, place = divmod(number, A_DRAW)
            delay = delay_of(place)
            due = delay is not False and trainer_state.global_step >= born * steps_per_draw + delay
            found.append(text.split().count("the") / 6 + len(text) / 100 if due else LATE)
        return found

    return reward


def make_trainer(folder: Any, reward_funcs: Any, model: Any = None, **options: Any) -> GRPOTrainer:
    return GRPOTrainer(
        model or make_llama(), reward_funcs, train_dataset=options.pop("rows", ROWS), processing_class=make_tokenizer(),
        output_dir=str(folder), **{**RUN, "num_generations": 4, "late_max_age": 3, **options},
    )  # fmt: skip


def logged(trainer: Any, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def test_it_learns_from_rewards_that_are_all_late(tmp_path):
    trainer = make_trainer(tmp_path, late_by(lambda place: 2), max_steps=30, per_device_train_batch_size=16)
    trainer.train()
    rewards = logged(trainer, "reward")
    assert len(rewards) == 28  # the first two draws have none, and none is made up
    assert sum(rewards[-5:]) / 5 > 1.5 * sum(rewards[:5]) / 5
    assert logged(trainer, "late/used") == [0.0] * 2 + [16.0] * 28
    assert logged(trainer, "late/waiting") == [16.0] + [32.0] * 29
    assert set(logged(trainer, "late/age")) == {2.0}


def test_a_late_step_is_the_step_that_it_would_have_been(tmp_path):
    """The weights have not moved meanwhile, so the late gradient is the one in time."""
    late = make_trainer(tmp_path / "a", late_by(lambda place: 2), max_steps=3, max_grad_norm=0)
    in_time = make_trainer(tmp_path / "b", late_by(lambda place: 0), max_steps=1, max_grad_norm=0)
    late.train()
    in_time.train()
    assert logged(late, "grad_norm")[:2] == [0.0, 0.0]
    assert logged(late, "grad_norm")[2] == pytest.approx(logged(in_time, "grad_norm")[0], rel=1e-5)
    for a, b in zip(late.experience.advantages, in_time.experience.advantages):
        assert torch.equal(a, b)
    for weights in late.experience.more["importance_weights"]:
        assert torch.allclose(weights, torch.ones(len(weights)), atol=1e-5)


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_weights_are_the_ratio_of_now_to_then(tmp_path, mode, beta):
    """Half of the groups in time, so that the policy moves; by the model's own logits."""
    trainer = make_trainer(
        tmp_path, late_by(lambda place: 0 if place < 4 else 3), max_steps=4, learning_rate=3e-2, beta=beta,
        late_importance_sampling_mode=mode, late_importance_sampling_clip_max=1.1,
    )  # fmt: skip
    then: list[torch.Tensor] = []
    exchange = trainer.late.exchange

    def noted(drawn: Any, *rest: Any) -> Any:
        if not then:
            then.extend(torch.tensor(of.completion.logps) for of in drawn[4:])
        return exchange(drawn, *rest)

    trainer.late.exchange = noted
    twin, before = make_llama(), trainer.collect

    def with_the_weights_of_then(number: int) -> Any:
        twin.load_state_dict(trainer.model.state_dict())
        return before(number)

    trainer.collect = with_the_weights_of_then
    trainer.train()
    trees, weights = trainer.experience.trees, trainer.experience.more["importance_weights"]
    assert len(trees) == 8
    assert all((w == 1).all() for w in weights[:4])  # of this draw
    cut = 0
    for tree, w_L, then_L, old_L in zip(trees[4:], weights[4:], then, trainer.experience.old_logps[4:]):
        ids = torch.tensor([tree.prompt + tree.answers[0]])
        logps_LV = twin(ids).logits[0, len(tree.prompt) - 1 : -1].log_softmax(-1)
        now_L = logps_LV.gather(1, torch.tensor(tree.answers[0])[:, None])[:, 0]
        ratio_L = (now_L - then_L).exp()
        expected_L = ratio_L.clamp(max=1.1)
        if mode == "sequence_mask":
            ratio = ratio_L.prod()
            expected_L = torch.where(ratio > 1.1, 0.0, ratio).expand_as(ratio_L)
        cut += int((ratio_L > 1.1).any())
        assert torch.allclose(w_L, expected_L, atol=1e-4)
        # the ratio of the step is to the policy that begins it
        assert torch.allclose(old_L, now_L, atol=1e-4)
    assert cut > 0
    assert 0 < logged(trainer, "late/ess")[-1] < 1
    assert {"late/weight", "late/cut"} <= set(trainer.state.log_history[3])
    assert logged(trainer, "ratio") == [1.0] * 4


def test_without_the_correction_no_weights_are_made(tmp_path):
    trainer = make_trainer(tmp_path, late_by(lambda place: 1), late_importance_sampling_correction=False)
    trainer.train()
    assert trainer.experience.more == {}
    assert not logged(trainer, "late/ess")
    assert logged(trainer, "late/used")[-1] == 8


def test_a_group_waits_for_its_last_member_and_its_advantages_are_those_of_all(tmp_path):
    trainer = make_trainer(
        tmp_path, late_by(lambda place: 2 if place == 5 else 0), max_steps=3, learning_rate=0
    )
    draws: list[Any] = []
    before = trainer.collect
    trainer.collect = lambda number: draws.append(before(number)) or draws[-1]
    trainer.train()
    # place 5's group is away twice, then back beside a new one
    assert [len(of.trees) for of in draws] == [4, 4, 8]
    in_time = make_trainer(tmp_path / "b", late_by(lambda place: 0), max_steps=1, learning_rate=0)
    in_time.train()
    for a, b in zip(draws[2].advantages[4:], in_time.experience.advantages[4:]):
        assert torch.equal(a, b)
    assert [logged(trainer, f"late/{name}") for name in ("used", "expired")] == [[0, 0, 4], [0, 0, 0]]
    assert logged(trainer, "late/waiting") == [1, 2, 2]


def test_at_its_last_chance_a_group_goes_with_what_has_come(tmp_path):
    """Place 5 never gets a reward: at age 3 its mates are compared with each other, and it is counted."""
    never = make_trainer(
        tmp_path, late_by(lambda place: False if place == 5 else 0), max_steps=4, learning_rate=0
    )
    never.train()
    assert logged(never, "late/used") == [0, 0, 0, 3]
    assert logged(never, "late/expired") == [0, 0, 0, 1]
    assert logged(never, "late/age") == [3]
    mates, left_out = never.experience.advantages[4:], never.experience.advantages[5]
    assert sum(a[0].item() for a in mates if len(a)) == pytest.approx(0, abs=1e-5)
    assert not len(left_out)


@pytest.mark.parametrize(("max_age", "used"), [(2, 8.0), (1, 0.0), (0, 0.0)])
def test_the_limit_on_age_is_in_updates(tmp_path, max_age, used):
    trainer = make_trainer(tmp_path, late_by(lambda place: 2), late_max_age=max_age, max_steps=6)
    trainer.train()
    assert logged(trainer, "late/used")[-1] == used
    assert sum(logged(trainer, "late/expired")) == (0 if used else 8 * (6 - max_age))


def test_age_counts_the_steps_of_a_draw(tmp_path):
    options = dict(steps_per_generation=2, per_device_train_batch_size=4, max_steps=8)
    for max_age, used in ((2, 8.0), (1, 0.0)):
        trainer = make_trainer(tmp_path, late_by(lambda place: 1, 2), late_max_age=max_age, **options)
        trainer.train()
        assert logged(trainer, "late/used")[-1] == used
        assert set(logged(trainer, "late/age")) == ({2.0} if used else set())


def test_nothing_to_learn_from_leaves_the_weights(tmp_path):
    """All wait, also where a KL would have a gradient without a reward."""
    trainer = make_trainer(tmp_path, late_by(lambda place: False), beta=0.5, late_max_age=9, max_steps=2)
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))


def test_groups_that_wait_are_not_drawn_again(tmp_path):
    def flat_or_late(
        prompts: list[str], completions: list[str], trainer_state: Any, **columns: Any
    ) -> list[Any]:
        late = trainer_state.global_step < 1
        return [1.0 if "cat" in prompt else LATE if late else 0.0 for prompt in prompts]

    trainer = make_trainer(
        tmp_path, flat_or_late, dynamic_sampling_rounds=1, per_device_train_batch_size=12, max_steps=1
    )  # fmt: skip
    trainer.train()
    assert sum(logged(trainer, "resampled_groups")) <= 1
    assert logged(trainer, "late/waiting")[0] in (8, 12)
    waiting = trainer.late.buffer.waiting()
    prompts = {of.extra["row"]: of.prompt_ids for of in waiting}
    assert all(list(trainer.train_data.trees[row].answers[0]) == ids for row, ids in prompts.items())


def test_what_fails_or_has_nothing_to_say_later_is_left_out(tmp_path):
    def reward(
        completions: list[str], sample_ids: list[int], trainer_state: Any, **columns: Any
    ) -> list[Any]:
        if trainer_state.global_step == 0:
            return [LATE] * len(completions)
        places = [number % A_DRAW for number in sample_ids]
        return [None if place == 1 else float("nan") if place == 2 else float(place) for place in places]

    trainer = make_trainer(tmp_path, reward, max_steps=2, learning_rate=0)
    trainer.train()
    late = trainer.experience.advantages[8:]
    assert [bool(a.any()) for a in late] == [True, False, False, True] + [True] * 4
    assert logged(trainer, "late/used") == [0, 6]


def test_resumed_while_rewards_are_late_is_the_run_that_was_not_stopped(tmp_path):
    def length(completions: list[str], **columns: Any) -> list[float]:
        return [len(text) / 10 for text in completions]

    options = dict(
        max_steps=7, per_device_train_batch_size=4, steps_per_generation=2, beta=0.1, save_steps=1,
        save_strategy="steps", reward_normalization_decay=0.5, late_max_age=4, multi_objective_aggregation="normalize_then_sum",
    )  # fmt: skip
    rewards = [late_by(lambda place: False if place == 1 else place % 4, 2), length]
    whole = make_trainer(tmp_path, rewards, model=make_gpt2_with_dropout(), **options)
    whole.train()
    assert sum(logged(whole, "late/used")) > 0
    assert sum(logged(whole, "late/expired")) > 0
    for step in (2, 5):
        kept = json.loads((tmp_path / "checkpoints" / f"step-{step}" / "late.json").read_text())
        assert kept["waiting"]
        resumed = make_trainer(tmp_path, rewards, model=make_gpt2_with_dropout(), **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / f"step-{step}"))
        for a, b in zip(whole.model.parameters(), resumed.model.parameters()):
            assert torch.equal(a, b)
        for name in (
            "loss",
            "reward",
            "kl",
            "grad_norm",
            "late/used",
            "late/expired",
            "late/ess",
            "late/waiting",
        ):
            assert logged(whole, name) == logged(resumed, name), name


def test_held_out_rewards_that_are_late_are_left_out(tmp_path):
    trainer = make_trainer(tmp_path, late_by(lambda place: False if place % 2 else 0), max_steps=1)
    figures = trainer.evaluate([{"prompt": "the dog"}, {"prompt": "a"}])
    assert figures["eval_unscored"] == 1.0
    assert "eval_reward" not in figures


def test_who_does_not_wait_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"said LATE, and GRPOTrainer does not wait: .*late_max_age"):
        make_trainer(tmp_path, late_by(lambda place: 1), late_max_age=None).train()
    ppo = PPOTrainer(
        make_llama(), late_by(lambda place: 1), train_dataset=ROWS, processing_class=make_tokenizer(),
        output_dir=str(tmp_path), **RUN,
    )  # fmt: skip
    with pytest.raises(ValueError, match="said LATE, and PPOTrainer does not wait: GRPOTrainer does"):
        ppo.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(late_max_age=-1), "late_max_age must be at least 0"),
        (dict(late_importance_sampling_mode="token"), "late_importance_sampling_mode must be one of token_truncate"),
        (dict(late_importance_sampling_clip_max=0), "late_importance_sampling_clip_max must be above 0"),
        (dict(engine="vllm", vllm_server_base_url="http://a"), "late_max_age must be None with engine='vllm'"),
        (dict(rollout_func=print), "late_max_age waits for no completions of a rollout_func"),
        (dict(rows=[{"prompt": "a", "sample_ids": 1}]), "'sample_ids' has the name of an argument"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_options_are_told(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, late_by(lambda place: 1), **options)
