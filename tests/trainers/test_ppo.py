"""PPO: it learns with each critic, its known details hold, resumption is exact, wrong input is told.

Letters: P predictions, L tokens of a completion.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trainers.test_grpo import OtherArithmetic, logged, share_of_the
from trainers.tiny import make_gpt2_with_dropout, make_llama, make_reward_llama, make_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

from alignfast import PPOConfig, PPOTrainer
from alignfast.kernels import gae
from alignfast.models import load_policy
from alignfast.models.value import ValueHead
from alignfast.trainers.critic import load_critic_weights, save_critic
from alignfast.trainers.kl_control import KLController

ROWS = [{"prompt": prompt} for prompt in ["the cat", "a dog sat", "bird", "very happy"]] * 4
RUN = dict(
    max_steps=4, per_device_train_batch_size=8, max_completion_length=6, learning_rate=1e-2,
    logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True,
)  # fmt: skip
LORA = dict(peft_config=dict(r=4, target_modules=["q_proj", "v_proj", "lm_head"]), learning_rate=5e-2)
CRITICS = ("own", "shared")


def by_length(completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def make_trainer(
    folder: Any, reward_funcs: Any = share_of_the, model: Any = None, **options: Any
) -> PPOTrainer:
    rows, tokenizer = options.pop("rows", ROWS), options.pop("tokenizer", None) or make_tokenizer()
    return PPOTrainer(
        model or make_llama(), reward_funcs, train_dataset=rows, processing_class=tokenizer,
        output_dir=str(folder), **{**RUN, **options},
    )  # fmt: skip


def eager_to_end(model=None):
    """A model that ends its completions soon, so that their lengths differ."""
    model = model or make_llama()
    with torch.no_grad():
        model.lm_head.weight[1] = model.lm_head.weight.mean(0)
        model.lm_head.weight[1] += 0.5 * model.lm_head.weight[2:8].mean(0)
    return model


# --- learning ---


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(critic="shared"),
        dict(steps_per_generation=2, per_device_train_batch_size=8, max_steps=96, whiten_rewards=True),
        dict(kl_coef=0, beta=0.02, entropy_coef=0.005, dual_clip=3.0),
        dict(target_kl=6.0, kl_horizon=100, kl_estimator="k3", critic_learning_rate=2e-2),
        LORA,
        dict(critic="shared", **LORA),
    ],
    ids=["own", "shared", "minibatches", "kl-in-loss", "adaptive-kl", "lora", "shared-lora"],
)
def test_it_learns_what_is_rewarded(tmp_path, options):
    trainer = make_trainer(
        tmp_path,
        **{"max_steps": 64, "per_device_train_batch_size": 16, "kl_coef": 0.01, "vf_coef": 0.5, **options},
    )
    trainer.train()
    rewards = logged(trainer, "reward")
    assert sum(rewards[-8:]) / 8 > 3 * sum(rewards[:8]) / 8 + 0.1


@pytest.mark.parametrize("critic", CRITICS)
def test_the_critic_learns_what_a_prompt_is_worth(tmp_path, critic):
    def by_prompt(prompts, completions, **columns):
        return [2.0 if "dog" in prompt or "bird" in prompt else -1.0 for prompt in prompts]

    trainer = make_trainer(
        tmp_path, by_prompt, critic=critic, kl_coef=0, vf_coef=1.0, cliprange_value=None, max_grad_norm=0, max_steps=48,
        per_device_train_batch_size=16, lam=1.0,
    )  # fmt: skip
    trainer.train()
    losses, explained = logged(trainer, "loss/value_avg"), logged(trainer, "val/explained_variance")
    assert sum(losses[-4:]) < 0.2 * sum(losses[:4])
    assert explained[0] == 0  # a head of zeros says a constant
    assert explained[-1] > 0.8


# --- the known details ---


def test_the_first_ratio_is_1(tmp_path):
    alone = make_trainer(tmp_path / "a", num_iterations=1, max_steps=2)
    alone.train()
    assert logged(alone, "val/ratio") == [1.0, 1.0]
    assert logged(alone, "val/ratio_var") == logged(alone, "policy/approxkl_avg") == [0.0, 0.0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(temperature=0.5),
        dict(temperature=1.7, top_k=9, top_p=0.9, min_p=0.01),
        dict(critic="shared", temperature=0.5),
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [make_llama, make_gpt2_with_dropout])
def test_the_first_of_several_passes_begins_at_1(tmp_path, make, options):
    """Drawn and trained on at one temperature and without dropout; so is the reference, from which nothing is far yet."""
    passes = make_trainer(
        tmp_path, model=make(initializer_range=0.5), steps_per_generation=2, max_steps=4, **options
    )
    passes.train()
    ratios = logged(passes, "max_ratio")
    assert math.isclose(ratios[0], 1.0, abs_tol=1e-5)
    assert ratios[2] > 1.001
    assert abs(logged(passes, "objective/kl")[0]) < 1e-4


def test_advantages_are_gae_of_a_reward_on_the_last_token_and_kl_on_all(tmp_path):
    """From the model's own logits, token by token: KL sign, reward's place, bootstrap, whitening."""
    reference, reward_model = make_llama(seed=5), make_reward_llama(seed=3)
    with torch.no_grad():
        reward_model.score.weight.mul_(20)
    trainer = make_trainer(
        tmp_path, by_length, model=eager_to_end(), ref_model=reference, value_model=reward_model, kl_coef=0.3,
        gamma=0.9, lam=0.8, max_steps=1, missing_eos_penalty=2.0, learning_rate=0,
    )  # fmt: skip
    trainer.train()
    experience, policy = trainer.experience, eager_to_end()
    critic = make_reward_llama(seed=3)
    with torch.no_grad():
        critic.score.weight.mul_(20)
    lengths = [len(tree.answers[0]) for tree in experience.trees]
    assert len(set(lengths)) > 2
    advantages, kls, scores = [], [], []
    for tree, values_L, returns_L in zip(
        experience.trees, experience.more["values"], experience.more["returns"]
    ):
        ids_1L, answer = torch.tensor([tree.prompt + tree.answers[0]]), torch.tensor(tree.answers[0])[:, None]
        first = len(tree.prompt) - 1
        with torch.no_grad():
            logps_L, ref_L = (
                model(ids_1L).logits[0, first:-1].log_softmax(-1).gather(1, answer)[:, 0]
                for model in (policy, reference)
            )
            expected_L = critic.score(critic.model(ids_1L).last_hidden_state[0])[first:-1, 0]
        assert torch.allclose(values_L, expected_L, atol=1e-5)
        rewards_L = -0.3 * (logps_L - ref_L)
        ended = tree.answers[0][-1] == 1
        scores.append(len(answer) - 2.0 * (not ended))
        rewards_L[-1] += scores[-1]
        advantage_1L, return_1L = gae(rewards_L[None], expected_L[None], gamma=0.9, lam=0.8)
        assert torch.allclose(returns_L, return_1L[0], atol=1e-4)
        advantages.append(advantage_1L[0])
        kls.append((logps_L - ref_L).sum().item())
    flat = torch.cat(advantages)
    white = (flat - flat.mean()) / flat.std()
    assert torch.allclose(torch.cat(experience.advantages), white, atol=1e-4)
    number = len(lengths)
    found = {
        name: logged(trainer, name)[0]
        for name in ("objective/kl", "objective/scores", "objective/rlhf_reward")
    }
    assert found["objective/kl"] == pytest.approx(sum(kls) / number, abs=1e-4)
    assert found["objective/scores"] == pytest.approx(sum(scores) / number, abs=1e-4)
    assert found["objective/rlhf_reward"] == pytest.approx(
        sum(scores) / number - 0.3 * sum(kls) / number, abs=1e-4
    )
    assert logged(trainer, "objective/non_score_reward")[0] == pytest.approx(
        -0.3 * sum(kls) / number, abs=1e-4
    )


def test_what_a_tool_wrote_is_read_and_not_trained_on(tmp_path):
    """Values and log-probs are of the policy's own tokens behind it; the score lands on the last of those."""
    wrote = [True, False, False, True, True, False]
    rng = torch.Generator().manual_seed(0)

    def rollout(prompts, trainer):
        ids = torch.randint(3, 24, (len(prompts), 6), generator=rng).tolist()
        prompt_ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        return {
            "prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": [[-3.0] * 6 for _ in ids],
            "env_mask": [list(map(int, wrote)) for _ in ids],
        }  # fmt: skip

    critic = make_reward_llama(seed=3)
    trainer = make_trainer(
        tmp_path, by_length, rollout_func=rollout, value_model=critic, kl_coef=0, gamma=1.0, lam=1.0, max_steps=1,
        learning_rate=0, whiten_advantages=False,
    )  # fmt: skip
    trainer.train()
    experience, critic = trainer.experience, make_reward_llama(seed=3)
    for tree, values_L, returns_L in zip(
        experience.trees, experience.more["values"], experience.more["returns"]
    ):
        assert list(tree.trained[0]) == wrote
        ids_1L = torch.tensor([tree.prompt + tree.answers[0]])
        with torch.no_grad():
            before_L = critic.score(critic.model(ids_1L).last_hidden_state[0])[len(tree.prompt) - 1 : -1, 0]
        assert torch.allclose(values_L, before_L[torch.tensor(wrote)], atol=1e-5)
        assert returns_L.tolist() == pytest.approx([6.0] * 3, abs=1e-5)  # the whole score, from wherever


def test_pad_may_be_the_end_token(tmp_path):
    """The end token carries the reward and is trained, whatever pads."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    runs = []
    for given in (tokenizer, make_tokenizer()):
        for layout in ("shared", "padded"):
            trainer = make_trainer(
                tmp_path / f"{layout}{len(runs)}",
                by_length,
                model=eager_to_end(),
                tokenizer=given,
                layout=layout,
                max_steps=2,
            )
            trainer.train()
            ended = [tree for tree in trainer.experience.trees if tree.answers[0][-1] == 1]
            assert ended
            assert all(all(tree.trained[0]) for tree in ended)
            runs.append(trainer.model.state_dict())
    for other in runs[1:]:
        assert all(torch.allclose(runs[0][name], other[name], atol=1e-5) for name in other)


def test_whitening_of_rewards_leaves_their_mean(tmp_path):
    trainer = make_trainer(
        tmp_path, by_length, model=eager_to_end(), whiten_rewards=True, whiten_advantages=False, kl_coef=0, gamma=1.0, lam=1.0,
        max_steps=1,
    )  # fmt: skip
    trainer.train()
    trees = trainer.experience.trees
    rewards = torch.cat(
        [torch.tensor([0.0] * (len(t.answers[0]) - 1) + [float(len(t.answers[0]))]) for t in trees]
    )
    white = (rewards - rewards.mean()) / rewards.std() + rewards.mean()
    for row_L, returns_L in zip(
        white.split([len(t.answers[0]) for t in trees]), trainer.experience.more["returns"]
    ):
        assert torch.allclose(returns_L, row_L.flip(0).cumsum(0).flip(0), atol=1e-5)


def test_the_controller_follows_the_kl_that_was_measured(tmp_path):
    control = KLController(0.2, target=6.0, horizon=100)
    for kl, expected in (
        (6.0, 0.2),
        (6.6, 0.2 * 1.008),
        (60.0, 0.2 * 1.008 * 1.016),
        (0.0, 0.2 * 1.008 * 1.016 * 0.984),
    ):
        control.update(kl, 8)
        assert control.coef == pytest.approx(expected, rel=1e-12)
    trainer = make_trainer(
        tmp_path, target_kl=0.5, kl_horizon=50, kl_coef=0.1, max_steps=12, save_strategy="steps", save_steps=6
    )
    trainer.train()
    kls, coefs = logged(trainer, "objective/kl")[::4], logged(trainer, "objective/kl_coef")[::4]
    assert coefs[0] == pytest.approx(0.1)
    for kl, before, after in zip(kls, coefs, coefs[1:]):
        error = min(max(kl / 0.5 - 1, -0.2), 0.2)
        assert after == pytest.approx(before * (1 + error * 8 / 50), rel=1e-5)
    kept = json.loads((tmp_path / "checkpoints" / "step-6" / "kl_control.json").read_text())["coef"]
    assert kept == pytest.approx(coefs[2], rel=1e-6)  # after the second draw: what the third begins with


def test_passes_take_the_draw_in_orders_of_their_own(tmp_path):
    seen = []
    trainer = make_trainer(
        tmp_path, per_device_train_batch_size=4, steps_per_generation=2, num_iterations=3, max_steps=6
    )
    forward = trainer.module.forward
    trainer.module.forward = lambda batch, *a, **k: (
        (k.get("value_fn") and seen.append(batch.rows)) or forward(batch, *a, **k)
    )
    trainer.train()
    passes = [seen[i] + seen[i + 1] for i in (0, 2, 4)]
    assert all(sorted(rows) == list(range(8)) for rows in passes)
    assert len(set(passes)) == 3


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize(
    "cut",
    [
        dict(per_device_train_batch_size=1, gradient_accumulation_steps=8),
        dict(layout="packed"),
        dict(layout="padded"),
        dict(max_tokens_per_batch=30),
    ],
    ids=["8x1", "packed", "padded", "tokens"],
)
def test_a_step_is_the_same_however_it_is_cut(tmp_path, cut, critic):
    options = dict(model=eager_to_end(), critic=critic, max_steps=3)
    whole = make_trainer(tmp_path / "a", by_length, **options)
    parts = make_trainer(tmp_path / "b", by_length, **{**options, "model": eager_to_end(), **cut})
    whole.train()
    parts.train()
    for name in ("loss", "loss/value_avg", "policy/approxkl_avg", "val/clipfrac_avg"):
        assert logged(parts, name) == pytest.approx(logged(whole, name), abs=1e-5)
    for a, b in zip(whole.module.parameters(), parts.module.parameters()):
        assert torch.allclose(a, b, atol=1e-5)


def test_what_has_no_reward_is_left_out_never_scored_0(tmp_path):
    def fails_once(completions, **columns):
        return [None if i % 4 == 1 else 1.0 for i in range(len(completions))]

    trainer = make_trainer(tmp_path, fails_once, max_steps=1)
    trainer.train()
    assert [len(a) == 0 for a in trainer.experience.advantages] == [i % 4 == 1 for i in range(8)]
    assert logged(trainer, "objective/scores") == [1.0]


def test_truncated_completions_may_carry_no_loss(tmp_path):
    trainer = make_trainer(tmp_path, model=eager_to_end(), max_steps=1, mask_truncated_completions=True)
    trainer.train()
    for tree in trainer.experience.trees:
        assert any(tree.trained[0]) == (tree.answers[0][-1] == 1)


def test_a_step_without_a_trained_token_leaves_the_weights(tmp_path):
    trainer = make_trainer(tmp_path, mask_truncated_completions=True, max_completion_length=1, max_steps=1)
    before = [p.clone() for p in trainer.module.parameters()]
    trainer.train()
    if not any(any(tree.trained[0]) for tree in trainer.experience.trees):
        assert all(map(torch.equal, before, trainer.module.parameters()))
    assert math.isfinite(logged(trainer, "loss")[0])


@pytest.mark.parametrize(("off", "weight"), [(-0.1, math.exp(0.1)), (-2.0, 0.0)])
def test_another_engines_tokens_are_weighed(tmp_path, off, weight):
    """Beyond the cap a token teaches the policy nothing; the critic learns from it all the same."""
    trainer = make_trainer(tmp_path, by_length, max_steps=1, learning_rate=0.0, max_grad_norm=0)
    # refused beside an engine that is not vLLM's, in whose place one stands here
    object.__setattr__(trainer.args, "vllm_importance_sampling_mode", "token_mask")
    before, gradients = trainer.before_training, {}

    def with_another_engine():
        before()
        trainer.engine = OtherArithmetic(trainer.engine, off)

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **options):
            for name, p in trainer.module.named_parameters():
                reached = p.grad is not None and bool(p.grad.any())
                gradients[name.split(".")[0]] = gradients.get(name.split(".")[0], False) or reached

    trainer.before_training = with_another_engine
    trainer.add_callback(Keep)
    trainer.train()
    assert logged(trainer, "val/ratio")[0] == pytest.approx(1.0, abs=1e-5)
    for weights in trainer.experience.more["importance_weights"]:
        assert torch.allclose(weights, torch.tensor(weight), atol=1e-4)
    assert gradients == {"model": weight > 0, "critic": True}


def test_the_critic_has_a_rate_of_its_own(tmp_path):
    trainer = make_trainer(tmp_path, learning_rate=0, critic_learning_rate=1e-2, max_steps=8, kl_coef=0)
    before = {name: p.clone() for name, p in trainer.module.named_parameters()}
    trainer.train()
    changed = {
        name.split(".")[0]
        for name, p in trainer.module.named_parameters()
        if not torch.equal(p, before[name])
    }
    assert changed == {"critic"}


def test_evaluation_scores_held_out_prompts_the_same_each_time(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, learning_rate=0)
    first, again = (trainer.evaluate([{"prompt": "the dog"}, {"prompt": "a"}]) for _ in range(2))
    assert first["eval_reward"] == again["eval_reward"]


# --- saving ---


@pytest.mark.parametrize(
    "options",
    [
        dict(model=make_gpt2_with_dropout, disable_dropout=False),
        dict(critic="shared"),
        LORA,
        dict(critic="shared", **LORA),
    ],
    ids=["own", "shared", "lora", "shared-lora"],
)
def test_resumed_in_the_middle_of_a_draw_is_the_run_that_was_not_stopped(tmp_path, options):
    options = {
        **dict(max_steps=8, per_device_train_batch_size=4, steps_per_generation=2, num_iterations=2, save_steps=1,
               save_strategy="steps", target_kl=0.1, kl_horizon=50, critic_learning_rate=2e-2),
        **options,
    }  # fmt: skip
    make = options.pop("model", make_llama)
    whole = make_trainer(tmp_path, model=make(), **options)
    whole.train()
    for step in (1, 6):
        resumed = make_trainer(tmp_path, model=make(), **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / f"step-{step}"))
        for a, b in zip(whole.module.parameters(), resumed.module.parameters()):
            assert torch.equal(a, b)
        for name in ("loss", "reward", "objective/kl", "objective/kl_coef", "grad_norm", "loss/value_avg"):
            assert logged(whole, name) == logged(resumed, name)


def test_a_saved_model_is_the_policy_with_its_critic_beside_it(tmp_path):
    trainer = make_trainer(tmp_path / "run", by_length)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(x, trainer.model.state_dict()[name]) for name, x in policy.state_dict().items())
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model" / "critic")
    known = trainer.module.critic.model.state_dict()
    assert all(torch.equal(x, known[name]) for name, x in critic.state_dict().items())
    assert critic.score.weight.any()
    again = make_trainer(tmp_path / "again", by_length, value_model=str(tmp_path / "model" / "critic"))
    assert torch.equal(again.module.critic.base.score.weight, critic.score.weight)


def test_a_shared_head_is_saved_and_started_from(tmp_path):
    trainer = make_trainer(tmp_path / "run", by_length, critic="shared")
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    head = load_file(tmp_path / "model" / "critic" / "value_head.safetensors")
    assert head["weight"].any()
    again = make_trainer(
        tmp_path / "b", by_length, critic="shared", value_model=tmp_path / "model" / "critic"
    )
    assert torch.equal(again.module.critic.weight, head["weight"])


def test_metrics_bear_the_names_that_people_know(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    names = "objective/kl objective/entropy objective/non_score_reward objective/rlhf_reward objective/scores"
    names += " policy/approxkl_avg policy/clipfrac_avg policy/entropy_avg loss/policy_avg loss/value_avg val/clipfrac_avg"
    names += " val/ratio val/ratio_var val/explained_variance reward completions/mean_length seconds/sampling"
    names += " seconds/prefill seconds/decode seconds/rewards seconds/logps seconds/forward seconds/backward seconds/optimizer"
    first = trainer.state.log_history[0]
    assert set(names.split()) <= set(first)
    assert all(first[name] > 0 for name in names.split() if name.startswith("seconds/"))


@pytest.mark.parametrize("critic", CRITICS)
def test_mixed_precision_trains_and_its_values_stay_exact(tmp_path, critic):
    trainer = make_trainer(tmp_path, critic=critic, bf16=True, use_cpu=True)
    trainer.train()
    assert trainer.experience.more["values"][0].dtype == torch.float32
    assert all(map(math.isfinite, logged(trainer, "loss/value_avg")))
    assert logged(trainer, "val/ratio")[0] == pytest.approx(1, abs=1e-2)


# --- refusals ---


def a_classifier(folder, **options):
    make_reward_llama(**options).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(critic="none"), "critic must be one of own, shared"),
        (dict(lam=1.5), r"lam must be in \[0, 1\]"),
        (dict(cliprange=2.0), r"epsilon must lie in \[0, 1\]"),
        (dict(cliprange_value=0.0), "cliprange_value must be above 0"),
        (dict(kl_estimator="k4"), "kl_estimator must be one of k1, abs, k2, k3"),
        (dict(beta=0.1), "beta must be 0 where kl_coef is not"),
        (dict(kl_coef=0.0, target_kl=6.0), "target_kl must be None where kl_coef is 0"),
        (dict(missing_eos_penalty=-1.0), "missing_eos_penalty must be above 0"),
        (dict(reward_funcs="numerik"), "there is no reward 'numerik'; did you mean 'numeric'"),
        (dict(rows=[{"prompt": ""}]), "index 0: column 'prompt' is empty"),
        (dict(max_completion_length=63), "index 0: the prompt has 2 tokens, and the model's 64 positions"),
        (dict(kl_coef=0.0, ref_model=make_llama(1)), "no reference is used: leave ref_model out"),
        (dict(value_model=make_reward_llama(vocab_size=40)), "the critic knows 40 tokens and the policy 32"),
        (dict(critic="shared", value_model=make_reward_llama()), "starts from a folder with value_head.safetensors"),
        (dict(per_device_train_batch_size=1, steps_per_generation=3, gradient_accumulation_steps=2), "a multiple of 2"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_input_is_told_before_training(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)


def test_critics_from_a_folder_that_can_not_be(tmp_path):
    other = make_tokenizer()
    other.add_tokens(["zebra"])
    named = a_classifier(tmp_path / "other")
    other.save_pretrained(named)
    with pytest.raises(ValueError, match=r"the tokenizer of .* is another one"):
        make_trainer(tmp_path, value_model=named)
    headless = a_classifier(tmp_path / "headless")
    weights = load_file(tmp_path / "headless" / "model.safetensors")
    from safetensors.torch import save_file

    save_file(
        {name: x for name, x in weights.items() if not name.startswith("score")},
        tmp_path / "headless" / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match=r"lacks score.weight, without which"):
        make_trainer(tmp_path, value_model=headless)
    with pytest.raises(ValueError, match="2 outputs"):
        make_trainer(tmp_path, value_model=a_classifier(tmp_path / "two", num_labels=2))


def test_a_checkpoint_without_its_critic_is_refused(tmp_path):
    own, shared = (make_trainer(tmp_path / critic, critic=critic).module.critic for critic in CRITICS)
    with pytest.raises(ValueError, match="holds no folder critic"):
        load_critic_weights(own, tmp_path)
    with pytest.raises(ValueError, match="starts from a folder with value_head"):
        load_critic_weights(shared, tmp_path)
    save_critic(ValueHead(load_policy(make_llama(hidden_size=8))), tmp_path, is_main=True)
    with pytest.raises(ValueError, match="it is of another model"):
        load_critic_weights(shared, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_ppo_epochs=4), "passes over a draw are num_iterations"),
        (dict(num_mini_batches=4), "steps_per_generation"),
        (dict(init_kl_coef=0.1), "it is called kl_coef"),
        (dict(clip_range=0.1), "did you mean 'cliprange'"),
    ],
)
def test_options_by_other_names_are_told(options, message):
    with pytest.raises(TypeError, match=message):
        PPOConfig(**options)
