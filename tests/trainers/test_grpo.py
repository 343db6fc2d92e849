"""GRPO: it learns, its numbers are TRL's, a draw is what it should be, resumption is exact, wrong input is told.

Letters: N completions.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from trainers.tiny import make_gpt2_with_dropout, make_llama, make_reward_llama, make_tokenizer

from alignfast import GRPOConfig, GRPOTrainer, PPOTrainer
from alignfast.trainers.experience import Experience
from alignfast.trainers.metrics import read_metrics

ROWS = [
    {"prompt": prompt, "answer": str(i)}
    for i, prompt in enumerate(["the cat", "a dog sat", "bird", "very happy"])
]
RUN = dict(
    max_steps=3, per_device_train_batch_size=8, num_generations=4, max_completion_length=6, learning_rate=1e-2,
    logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True,
)  # fmt: skip


def share_of_the(completions: list[str], **columns: Any) -> list[float]:
    """A reward that is easily found: how many words are `the`."""
    return [text.split().count("the") / 6 for text in completions]


def make_trainer(
    folder: Any, reward_funcs: Any = share_of_the, model: Any = None, **options: Any
) -> GRPOTrainer:
    rows = options.pop("rows", ROWS)
    return GRPOTrainer(
        model or make_llama(), reward_funcs, train_dataset=rows, processing_class=make_tokenizer(),
        output_dir=str(folder), **{**RUN, **options},
    )  # fmt: skip


def logged(trainer: GRPOTrainer, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


# --- learning ---


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(steps_per_generation=2, num_iterations=2, loss_type="grpo", max_steps=100),
        dict(loss_type="dapo", importance_sampling_level="sequence", beta=0.02),
        dict(loss_type="sapo", scale_rewards="batch"),
        dict(peft_config=dict(r=4, target_modules=["q_proj", "v_proj", "lm_head"]), learning_rate=5e-2),
    ],
    ids=["dapo", "grpo-off-policy", "gspo-kl", "sapo", "lora"],
)
def test_it_learns_what_is_rewarded(tmp_path, options):
    trainer = make_trainer(tmp_path, **{"max_steps": 40, "per_device_train_batch_size": 16, **options})
    trainer.train()
    rewards = logged(trainer, "reward")
    assert sum(rewards[-5:]) / 5 > 3 * sum(rewards[:5]) / 5 + 0.1


def test_the_first_ratio_is_1_and_the_gradient_that_of_plain_policy_gradient(tmp_path):
    """dapo at ratio 1: -sum A dlogp / tokens, by the model's own logits."""
    trainer = make_trainer(tmp_path, max_steps=1, max_grad_norm=0, learning_rate=0)
    trainer.train()
    assert logged(trainer, "ratio") == [1.0]
    assert logged(trainer, "max_ratio") == [1.0]
    assert logged(trainer, "clip_ratio/region_mean") == [0.0]
    experience, model = trainer.experience, make_llama()
    tokens = sum(map(len, experience.advantages))
    loss = torch.zeros(())
    for tree, advantages_N in zip(experience.trees, experience.advantages):
        ids = torch.tensor([tree.prompt + tree.answers[0]])
        logps_LV = model(ids).logits[0, len(tree.prompt) - 1 : -1].log_softmax(-1)
        logps_N = logps_LV.gather(1, torch.tensor(tree.answers[0])[:, None])[:, 0]
        loss = loss - (logps_N * advantages_N).sum() / tokens
    loss.backward()
    for ours, theirs in zip(trainer.model.parameters(), model.parameters()):
        if theirs.grad is not None:
            assert torch.allclose(ours.grad, theirs.grad, atol=1e-6) if ours.grad is not None else True
    assert math.isclose(
        logged(trainer, "grad_norm")[0],
        torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item(),
        rel_tol=1e-4,
    )


@pytest.mark.parametrize(
    "sampling", [{}, dict(temperature=0.5), dict(temperature=1.7, top_k=9, top_p=0.9, min_p=0.01)], ids=str
)
def test_old_log_probs_are_those_of_the_policy_that_drew(tmp_path, sampling):
    """Off-policy steps begin at a ratio of 1 as well: the engine's log-probs are the trainer's, and the reference's are
    of the same temperature."""
    trainer = make_trainer(
        tmp_path, model=make_llama(initializer_range=0.5), max_steps=1, steps_per_generation=2,
        per_device_train_batch_size=4, beta=0.1, **sampling,
    )  # fmt: skip
    trainer.train()
    assert abs(logged(trainer, "kl")[0]) < 1e-5
    assert math.isclose(logged(trainer, "ratio")[0], 1.0, abs_tol=1e-5)
    assert math.isclose(logged(trainer, "max_ratio")[0], 1.0, abs_tol=1e-5)


@pytest.mark.parametrize(
    "cut",
    [
        dict(per_device_train_batch_size=2, gradient_accumulation_steps=4),
        dict(layout="packed"),
        dict(layout="padded"),
        dict(max_tokens_per_batch=30),
    ],
)
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_a_step_is_the_same_however_it_is_cut(tmp_path, cut, loss_type):
    options = dict(loss_type=loss_type, max_steps=2, beta=0.1)
    whole, parts = make_trainer(tmp_path / "a", **options), make_trainer(tmp_path / "b", **options, **cut)
    whole.train()
    parts.train()
    assert logged(parts, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-6)
    for a, b in zip(whole.model.parameters(), parts.model.parameters()):
        assert torch.allclose(a, b, atol=1e-5)


# --- draws ---


def test_a_draw_serves_its_steps_and_iterations(tmp_path):
    calls = []

    def reward(prompts, completions, completion_ids, trainer_state, answer, **columns):
        calls.append((trainer_state.global_step, prompts, answer))
        return [float(len(ids)) for ids in completion_ids]

    trainer = make_trainer(
        tmp_path, reward, max_steps=8, per_device_train_batch_size=4, steps_per_generation=2, num_iterations=2
    )
    trainer.train()
    assert [step for step, *_ in calls] == [0, 4]
    for _, prompts, answers in calls:
        assert len(prompts) == 8
        assert prompts[:4] == [prompts[0]] * 4
        assert [ROWS[int(answer)]["prompt"] for answer in answers] == prompts


def test_a_group_computes_its_prompt_once_in_training_too(tmp_path):
    trainer, seen = make_trainer(tmp_path, max_steps=1), []
    compute = trainer.compute_loss
    trainer.compute_loss = lambda batch, *more: seen.append(batch.num_tokens) or compute(batch, *more)
    trainer.train()
    trees = trainer.experience.trees
    assert seen == [
        sum(len(tree.answers[0]) for tree in trees) + sum(map(len, {tree.prompt for tree in trees}))
    ]


def test_groups_without_variance_are_skipped_and_counted(tmp_path):
    def flat_for_cats(prompts, completions, **columns):
        return [0.5 if "cat" in prompt else float(len(text)) for prompt, text in zip(prompts, completions)]

    trainer = make_trainer(tmp_path, flat_for_cats, per_device_train_batch_size=16, max_steps=1)
    seen = []
    forward = trainer.module.forward
    trainer.module.forward = lambda batch, *a, **k: seen.append(batch.rows) or forward(batch, *a, **k)
    trainer.train()
    assert logged(trainer, "frac_reward_zero_std") == [0.25]
    flat = [i for i, tree in enumerate(trainer.experience.trees) if tree.prompt == (3, 5)]
    assert len(flat) == 4
    assert not {row for rows in seen for row in rows} & set(flat)


def test_all_rewards_alike_leave_the_weights(tmp_path):
    trainer = make_trainer(tmp_path, lambda completions, **columns: [1.0] * len(completions))
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))
    assert logged(trainer, "frac_reward_zero_std") == [1.0] * 3


def test_groups_without_variance_are_drawn_again(tmp_path):
    def only_birds(prompts, completions, **columns):
        return [float(len(text)) if "bird" in prompt else 0.0 for prompt, text in zip(prompts, completions)]

    trainer = make_trainer(tmp_path, only_birds, dynamic_sampling_rounds=3, max_steps=4)
    trainer.train()
    assert max(logged(trainer, "resampled_groups")) >= 1


def test_the_seconds_of_every_round_are_counted(tmp_path):
    """A draw whose rewards are all alike is drawn again in both rounds, and each call of the reward takes 20 ms."""
    calls = []

    def slow(completions, **columns):
        calls.append(len(completions))
        time.sleep(0.02)
        return [0.0] * len(completions)

    trainer = make_trainer(tmp_path, slow, dynamic_sampling_rounds=2, max_steps=1)
    trainer.train()
    assert calls == [8, 8, 8]
    assert logged(trainer, "seconds/rewards")[0] >= 0.06
    assert logged(trainer, "resampled_groups") == [4.0]


def test_what_has_no_reward_is_left_out_never_scored_0(tmp_path, caplog):
    def fails_once(completions, **columns):
        return [None if i % 4 == 1 else 1.0 + i % 4 for i in range(len(completions))]

    trainer = make_trainer(tmp_path, fails_once, max_steps=1, beta=0.1)
    trainer.train()
    experience = trainer.experience
    # nor has it a KL term
    assert [len(a) == 0 for a in experience.advantages] == [i % 4 == 1 for i in range(8)]
    advantages = [a[0].item() for a in experience.advantages if len(a)]
    assert advantages[:3] == pytest.approx([-1.0911, 0.2182, 0.8729], abs=1e-3)  # of 1, 3 and 4
    assert logged(trainer, "unscored") == [0.25]
    assert trainer.step_counts["tokens"] == sum(map(len, experience.advantages))


def test_no_reward_at_all_stops_the_run(tmp_path):
    def broken(completions, **columns):
        raise KeyError("no such column")

    with pytest.raises(RuntimeError, match="none of 8 completions got a reward from broken"):
        make_trainer(tmp_path, broken).train()


def test_truncated_completions_may_carry_no_loss(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, mask_truncated_completions=True, max_completion_length=2)
    trainer.train()
    for tree in trainer.experience.trees:
        assert all(tree.trained[0]) == (tree.answers[0][-1] == 1)
    assert logged(trainer, "completions/clipped_ratio")[0] > 0


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_several_rewards_are_weighed_as_trl_does(tmp_path, aggregation):
    def first(completions, **columns):
        return [float(i) for i in range(len(completions))]

    def second(completions, **columns):
        return [float(i * i % 7) for i in range(len(completions))]

    trainer = make_trainer(
        tmp_path,
        [first, second],
        max_steps=1,
        reward_weights=[1.0, 0.5],
        multi_objective_aggregation=aggregation,
    )
    trainer.train()
    a = torch.arange(8.0, dtype=torch.float64)
    b = a.square() % 7
    if aggregation == "sum_then_normalize":
        groups = (a + 0.5 * b).view(2, 4)
        expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    else:
        parts = [
            (x.view(2, 4) - x.view(2, 4).mean(1, keepdim=True)) / (x.view(2, 4).std(1, keepdim=True) + 1e-4)
            for x in (a, b)
        ]
        summed = parts[0] + 0.5 * parts[1]
        expected = (summed - summed.mean()) / (summed.std() + 1e-4)
    ours = torch.tensor([x[0].item() for x in trainer.experience.advantages], dtype=torch.float64)
    assert torch.allclose(ours, expected.flatten(), atol=1e-6)
    assert logged(trainer, "rewards/first/mean") == [3.5]


def test_drifting_rewards_are_put_on_a_common_scale(tmp_path):
    trainer = make_trainer(
        tmp_path, lambda completions, **columns: [1e6 + 1e3 * len(text) for text in completions],
        reward_normalization_decay=0.9, scale_rewards="none",
    )  # fmt: skip
    trainer.train()
    assert max(abs(a[0].item()) for a in trainer.experience.advantages) < 5


@pytest.mark.parametrize(("kind", "more"), [(GRPOTrainer, {}), (PPOTrainer, dict(num_iterations=1))])
def test_a_reward_ensembles_disagreement_lowers_the_reward(tmp_path, kind, more):
    def folder(name, heads):
        make_reward_llama(num_labels=heads, initializer_range=0.5).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    def trained(reward_funcs, **options):
        options = {**RUN, **more, **options}
        options = {
            name: of for name, of in options.items() if kind is GRPOTrainer or name != "num_generations"
        }
        trainer = kind(
            make_llama(), reward_funcs, train_dataset=ROWS, processing_class=make_tokenizer(), output_dir=str(tmp_path),
            **{**options, "max_steps": 1},
        )  # fmt: skip
        trainer.train()
        return trainer

    mean, less = (trained(folder("judges", 3), disagreement_coef=coef) for coef in (0.0, 2.0))
    unsure = logged(less, "rewards/judges/disagreement")
    assert unsure == logged(mean, "rewards/judges/disagreement")
    assert unsure[0] > 0.01
    assert logged(less, "reward")[0] == pytest.approx(logged(mean, "reward")[0] - 2 * unsure[0], abs=1e-5)
    with pytest.raises(ValueError, match="the reward model has 3 labels"):
        trained(folder("judges", 3))
    with pytest.raises(ValueError, match=r"disagreement_coef=0\.5 needs an ensemble of heads"):
        trained(folder("judge", 1), disagreement_coef=0.5)


def test_conversations_are_answered_as_messages(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    seen = []

    def reward(prompts, completions, **columns):
        seen.extend(completions)
        return [float(len(completion[0]["content"])) for completion in completions]

    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    GRPOTrainer(
        make_llama(), reward, train_dataset=rows, processing_class=tokenizer, output_dir=str(tmp_path), **RUN
    ).train()
    assert set(seen[0][0]) == {"role", "content"}


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_both_engines_train(tmp_path, engine):
    trainer = make_trainer(tmp_path, engine=engine, steps_per_generation=2, per_device_train_batch_size=4)
    trainer.train()
    assert math.isclose(logged(trainer, "ratio")[0], 1.0, abs_tol=1e-5)


def test_evaluation_scores_held_out_prompts_the_same_each_time(tmp_path):
    trainer = make_trainer(tmp_path, num_generations_eval=2, max_steps=1, learning_rate=0)
    first, again = (trainer.evaluate([{"prompt": "the dog"}, {"prompt": "a"}]) for _ in range(2))
    assert first["eval_reward"] == again["eval_reward"]
    assert {"eval_rewards/share_of_the/mean", "eval_completions/mean_length"} <= set(first)


# --- checkpoints ---


def test_resumed_in_the_middle_of_a_draw_is_the_run_that_was_not_stopped(tmp_path):
    options = dict(
        max_steps=8, per_device_train_batch_size=4, steps_per_generation=2, num_iterations=2, beta=0.1, save_steps=1,
        save_strategy="steps", reward_normalization_decay=0.5,
    )  # fmt: skip
    whole = make_trainer(tmp_path, model=make_gpt2_with_dropout(), **options)
    whole.train()
    for step in (1, 3, 4, 6):
        resumed = make_trainer(tmp_path, model=make_gpt2_with_dropout(), **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / f"step-{step}"))
        for a, b in zip(whole.model.parameters(), resumed.model.parameters()):
            assert torch.equal(a, b)
        for name in ("loss", "reward", "kl", "grad_norm"):
            assert logged(whole, name) == logged(resumed, name)


def test_experience_survives_the_disk(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, beta=0.1)
    trainer.train()
    trainer.experience.save(tmp_path)
    again = Experience.load(tmp_path)
    assert again.trees == trainer.experience.trees
    assert again.metrics == pytest.approx(trainer.experience.metrics)
    for name in ("advantages", "old_logps"):
        assert all(map(torch.equal, getattr(again, name), getattr(trainer.experience, name)))
    assert all(map(torch.equal, again.more["ref_logps"], trainer.experience.more["ref_logps"]))
    assert Experience.load(tmp_path / "nothing").trees == []


def test_metrics_bear_trls_names(tmp_path):
    make_trainer(tmp_path, beta=0.1).train()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    names = "reward reward_std frac_reward_zero_std entropy kl clip_ratio/low_mean clip_ratio/high_mean clip_ratio/region_mean"
    names += " completions/mean_length completions/clipped_ratio rewards/share_of_the/mean seconds/sampling"
    assert set(names.split()) <= set(rows[0])
    assert 0 < rows[0]["seconds/prefill"] + rows[0]["seconds/decode"] <= rows[0]["seconds/sampling"]
    stages = "sampling rewards logps forward backward optimizer".split()
    tokens = 0
    for row in [row for row in rows if "loss" in row]:
        seconds, trained = [row[f"seconds/{name}"] for name in stages], row["num_tokens"] - tokens
        tokens = row["num_tokens"]
        assert min(seconds) > 0
        assert 0.5 < sum(seconds) / (trained / row["tokens_per_second"]) < 1  # the rest is Python's
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_generations=1), "num_generations must be at least 2"),
        (dict(num_generations=3), "does not divide into groups of 3 completions"),
        (dict(temperature=0), "temperature must be above 0"),
        (dict(loss_type="gpro"), "loss_type is 'gpro'; known are"),
        (dict(steps_per_generation=3, gradient_accumulation_steps=2), "steps_per_generation must be a multiple of 2"),
        (dict(steps_per_generation=0), "steps_per_generation must be at least 1, got 0"),
        (dict(num_generations_eval=0), "num_generations_eval must be at least 1, or None, got 0"),
        (dict(reward_timeout=0), "reward_timeout must be above 0, got 0"),
        (dict(vllm_importance_sampling_clip_max=0.0), "vllm_importance_sampling_clip_max must be above 0, or None"),
        (dict(vllm_importance_sampling_clip_min=4.0), "vllm_importance_sampling_clip_min must be between 0 and the cap"),
        (dict(scale_rewards="groups"), "scale_rewards must be one of group, batch, none"),
        (dict(max_length=64), "max_length must be None"),
        (dict(engine="vlm"), "engine must be one of native, transformers, vllm"),
        (dict(engine="vllm"), "vllm_server_base_url must be given with"),
        (dict(max_completion_length=63), "index 0: the prompt has 2 tokens, .* leave 1: shorten it, or lower max_comp"),
        (dict(rows=[{"prompt": ""}]), "index 0: column 'prompt' is empty"),
        (dict(rows=[{"question": "a"}]), r"columns \(question\) make no format that is taken here: prompt"),
        (dict(reward_funcs="numerik"), "there is no reward 'numerik'; did you mean 'numeric'"),
        (dict(reward_funcs="numeric", rows=[{"prompt": "a"}]), "answer"),
        (dict(reward_weights=[1.0, 2.0]), "weights"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_input_is_told_before_training(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(TypeError, match="num_generations"):
        GRPOConfig(num_generation=4)


# --- who else draws ---


def rollouts(prompts, trainer, mask_first=False):
    """An environment that answers with the prompt's own words, and says what it thinks of them."""
    tokenizer, n = trainer.processing_class, trainer.args.num_generations
    output = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "score": []}
    for prompt in prompts:
        for g in range(n):
            ids = tokenizer(prompt)["input_ids"]
            answer = [3 + g, *ids, tokenizer.eos_token_id]
            output["prompt_ids"].append(ids)
            output["completion_ids"].append(answer)
            output["logprobs"].append([-1.0] * len(answer))
            output["score"].append(float(g))
    if mask_first:
        output["env_mask"] = [[0, *[1] * (len(ids) - 1)] for ids in output["completion_ids"]]
    return output


def test_trls_rollout_func_takes_the_engines_place(tmp_path):
    trainer = make_trainer(
        tmp_path, lambda completions, score, **columns: score, max_steps=1,
        rollout_func=lambda prompts, trainer: rollouts(prompts, trainer, mask_first=True),
    )  # fmt: skip
    trainer.train()
    assert logged(trainer, "reward") == [1.5]
    assert logged(trainer, "completions/clipped_ratio") == [0.0]
    for tree in trainer.experience.trees:
        assert tree.trained[0] == (False, *[True] * (len(tree.answers[0]) - 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda output: output.pop("logprobs"), "it left out logprobs"),
        (
            lambda output: output["prompt_ids"].pop(),
            "must return 8 items in each field, 4 for each of 2 prompts",
        ),
        (lambda output: output["logprobs"][2].pop(), "completion 2 has"),
    ],
)
def test_a_wrong_rollout_is_told(tmp_path, change, message):
    def wrong(prompts, trainer):
        output = rollouts(prompts, trainer)
        change(output)
        return output

    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, rollout_func=wrong).train()


class OtherArithmetic:
    """An engine whose log-probs are a little off, as a server's are."""

    name = "vllm"

    def __init__(self, engine, off):
        self.engine, self.off, self.seconds = engine, off, {}

    def generate(self, *args, **options):
        found = self.engine.generate(*args, **options)
        return [
            [replace(c, logps=(0.0,) * len(c.logps), sampled_logps=tuple(x + self.off for x in c.sampled_logps)) for c in group]
            for group in found
        ]  # fmt: skip


@pytest.mark.parametrize(("off", "weight"), [(-0.1, math.exp(0.1)), (-2.0, 0.0)])
def test_another_engines_tokens_are_weighed(tmp_path, off, weight):
    trainer = make_trainer(tmp_path, max_steps=1, steps_per_generation=2, per_device_train_batch_size=4)
    # refused beside an engine that is not vLLM's, in whose place one stands here
    object.__setattr__(trainer.args, "vllm_importance_sampling_mode", "token_mask")
    before = trainer.before_training

    def with_another_engine():
        before()
        trainer.engine = OtherArithmetic(trainer.engine, off)

    trainer.before_training = with_another_engine
    trainer.train()
    # against the policy's own, not the engine's
    assert logged(trainer, "ratio")[0] == pytest.approx(1.0, abs=1e-5)
    for weights in trainer.experience.more["importance_weights"]:
        assert torch.allclose(weights, torch.tensor(weight), atol=1e-4)
    assert logged(trainer, "sampling/sampling_logp_difference/mean")[0] == pytest.approx(-off, abs=1e-4)
