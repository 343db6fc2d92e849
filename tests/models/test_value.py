"""Critics: values are those of transformers' own forward, copies are copies, adapters and heads are what they should be."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from trainers.tiny import make_gpt2_with_dropout, make_llama, make_reward_llama

from alignfast.data import Tree, pack
from alignfast.models import ModelRefused, load_policy
from alignfast.models.value import ActorCritic, Critic, ValueHead, critic_like, load_critic

LAYOUTS = ("shared", "packed", "padded")
TREES = [
    Tree((3, 4, 5), ((6, 7, 8, 1),), ((True,) * 4,)),
    Tree((3, 4, 5), ((9, 10),), ((True, False),)),  # one prompt in two trees: shared shares it
    Tree((11,), ((12, 1),), ((True, True),)),
]


def make_shared(layout="shared", **options) -> ActorCritic:
    policy = load_policy(make_llama(), layout=layout, **options)
    head = ValueHead(policy)
    torch.nn.init.normal_(head.weight)
    return ActorCritic(policy, head)


def plain_values(trunk, head, trees) -> torch.Tensor:
    """By the trunk's own forward on each sequence, at the token before each that is trained."""
    found = []
    with torch.no_grad():
        for tree in trees:
            hidden_LD = trunk(input_ids=torch.tensor([tree.prompt + tree.answers[0]])).last_hidden_state[0]
            values_L = head(hidden_LD)[:, 0]
            first = len(tree.prompt) - 1
            found += [values_L[first + i] for i, trained in enumerate(tree.trained[0]) if trained]
    return torch.stack(found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_do_not_depend_on_the_layout(layout):
    batch = pack(TREES, range(3), layout, pad_id=0)
    reward_model = make_reward_llama(1)
    own = ActorCritic(load_policy(make_llama(), layout=layout), load_critic(reward_model, layout=layout))
    shared = make_shared(layout)
    for module, trunk, head in (
        (own, reward_model.model, reward_model.score),
        (shared, shared.base.model, shared.critic),
    ):
        expected_P = plain_values(trunk, torch.nn.Linear.forward.__get__(head), TREES)
        with module.attached():
            assert (module.values(batch) - expected_P).abs().max() < 1e-5
            _, metrics = module(
                batch,
                lambda stats, rows: (stats.logps.sum(), {}),
                value_fn=lambda values_P: (values_P.sum(), {"values": values_P}),
            )
        assert (metrics["values"] - expected_P).abs().max() < 1e-5


def test_both_losses_reach_a_shared_trunk_and_each_its_own():
    batch = pack(TREES, range(3), "shared")

    def gradients(module, policy_weight, value_weight):
        module.zero_grad()
        with module.attached():
            loss, _ = module(
                batch, lambda stats, rows: (policy_weight * stats.logps.sum(), {}),
                value_fn=lambda v: (value_weight * v.sum(), {}),
            )  # fmt: skip
        loss.backward()
        return {name: p.grad.clone() for name, p in module.named_parameters()}

    shared = make_shared()
    own = ActorCritic(load_policy(make_llama()), load_critic(make_reward_llama(1)))
    for module in (shared, own):
        both, policy, value = (gradients(module, *weights) for weights in ((1, 1), (1, 0), (0, 1)))
        for name in both:
            assert torch.allclose(both[name], policy[name] + value[name], atol=1e-5), name
        reached = {name.split(".")[0] for name, gradient in value.items() if gradient.any()}
        assert reached == ({"model", "critic"} if module is shared else {"critic"})


@pytest.mark.parametrize("make", [make_llama, make_gpt2_with_dropout])
def test_a_critic_like_the_policy_is_a_copy_that_says_0(make, tmp_path):
    model = make()
    policy = load_policy(model)
    critic = critic_like(policy, adapters_are_new=False)
    module = ActorCritic(policy, critic)
    module.probe()
    with module.attached():
        assert module.values(pack(TREES, range(3), "shared")).tolist() == [0.0] * 7
    for mine, theirs in zip(critic.base.base_model.parameters(), model.base_model.parameters()):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()
        assert mine.requires_grad
    assert policy.base.config.num_labels == make().config.num_labels  # the policy's own config is left alone
    torch.nn.init.normal_(critic.base.score.weight)
    critic.model.save_pretrained(tmp_path)
    again = load_critic(str(tmp_path))
    assert not again.fresh_head
    assert torch.equal(again.base.score.weight, critic.base.score.weight)


@pytest.mark.parametrize("as_given", [False, True])
def test_a_policy_with_adapters_has_a_critic_with_adapters(as_given):
    lora = dict(
        r=2, target_modules=["q_proj", "lm_head"], modules_to_save=["embed_tokens"], init_lora_weights=False
    )
    if as_given:
        policy = load_policy(get_peft_model(make_llama(), LoraConfig(task_type="CAUSAL_LM", **lora)))
    else:
        policy = load_policy(make_llama(), peft_config={**lora, "init_lora_weights": True})
    critic = critic_like(policy, adapters_are_new=not as_given)
    assert isinstance(critic, Critic)
    trained = {name for name, p in critic.named_parameters() if p.requires_grad}
    assert {part for name in trained for part in ("q_proj", "embed_tokens", "score", "lm_head") if part in name} == {
        "q_proj", "embed_tokens", "score",
    }  # fmt: skip
    batch = pack(TREES, range(3), "shared")
    with policy.attached(), critic.attached(), torch.no_grad():
        expected, _ = policy.hidden(batch, batch.source_P)
        with critic.adapters_off():
            found, _ = critic.hidden(batch, batch.source_P)
    assert torch.allclose(found, expected, atol=1e-5)


def test_critics_that_can_not_be_are_refused():
    policy = load_policy(make_llama())
    with pytest.raises(ValueError, match="the critic knows 40 tokens and the policy 32"):
        ActorCritic(policy, load_critic(make_reward_llama(vocab_size=40)))
    reward_model = make_reward_llama()
    reward_model.model = policy.base.model
    with pytest.raises(ValueError, match="shares weights with the model"):
        ActorCritic(policy, load_critic(reward_model))
    with pytest.raises(ValueError, match="3 outputs"):
        load_critic(make_reward_llama(num_labels=3))
    head_alone = load_policy(make_llama(), peft_config=dict(r=2, target_modules=["lm_head"]))
    with pytest.raises(ModelRefused, match="adapts the head alone"):
        critic_like(head_alone, adapters_are_new=True)
    config = tf.BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2)
    bloom = load_policy(tf.BloomForCausalLM(config), layout="padded")
    assert isinstance(critic_like(bloom, adapters_are_new=False), Critic)
    codegen = tf.CodeGenConfig(vocab_size=32, n_embd=16, n_layer=1, n_head=4, rotary_dim=2)
    with pytest.raises(ModelRefused, match="no sequence classification model for codegen"):
        critic_like(load_policy(tf.CodeGenForCausalLM(codegen), layout="padded"), adapters_are_new=False)


def test_a_language_model_by_name_gets_a_head_that_says_0(tmp_path):
    make_llama().save_pretrained(tmp_path)
    critic = load_critic(str(tmp_path))
    assert critic.fresh_head
    assert not critic.base.score.weight.any()


def test_a_policy_without_a_critic_has_no_values():
    policy = load_policy(make_llama())
    with policy.attached(), pytest.raises(NotImplementedError, match="Policy has no critic"):
        policy(
            pack(TREES, range(3)),
            lambda stats, rows: (stats.logps.sum(), {}),
            value_fn=lambda v: (v.sum(), {}),
        )
