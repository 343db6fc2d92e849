"""The textbook's function: it learns, its first iteration is plain policy gradient, later ones are held by the clip."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trainers.tiny import make_gpt2_with_dropout, make_llama, make_tokenizer

from alignfast import ppo_step
from alignfast.models import load_policy

PROMPTS = ["the cat", "a dog sat", "bird", "very happy"] * 4


def share_of_the(prompts, completions):
    return [text.split().count("the") / 6 for text in completions]


def train(model, prompts, reward, steps=40, **options):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.pop("lr", 3e-3))
    torch.manual_seed(0)
    return [ppo_step(model, reward, optimizer, prompts, max_new_tokens=6, **options) for _ in range(steps)]


@pytest.mark.parametrize("kind", ["llama", "dropout", "lora", "padded"])
def test_it_learns_what_is_rewarded(kind):
    model = make_gpt2_with_dropout() if kind == "dropout" else make_llama()
    if kind == "lora":
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"], task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    given = load_policy(model, layout="padded") if kind == "padded" else model
    model.train()
    lr = 2e-2 if kind == "lora" else 3e-3
    figures = train(given, PROMPTS, share_of_the, steps=20, tokenizer=make_tokenizer(), lr=lr)
    rewards = [step["reward"] for step in figures]
    assert sum(rewards[-5:]) / 5 > 3 * sum(rewards[:5]) / 5 + 0.1
    assert model.training
    assert (model.get_base_model() if kind == "lora" else model).config._attn_implementation != "alignfast"


def test_the_first_iteration_is_plain_policy_gradient():
    model, seen = make_llama(), {}

    def reward(prompts, completions):
        seen.update(prompts=prompts, completions=completions)
        return torch.arange(len(completions)).float()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    torch.manual_seed(1)
    prompts = [[3, 4], [5], [6, 7, 8]]
    figures = ppo_step(model, reward, optimizer, prompts, 1, max_new_tokens=5, max_grad_norm=None)
    assert seen["prompts"] == prompts
    assert figures["val/ratio"] == pytest.approx(1, abs=1e-5)
    assert figures["policy/clipfrac_avg"] == 0
    twin, loss = make_llama(), torch.zeros(())
    tokens = sum(map(len, seen["completions"]))
    for advantage, prompt, completion in zip((-1, 0, 1), prompts, seen["completions"]):
        logps_LV = twin(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        loss = loss - advantage * logps_LV.gather(1, torch.tensor(completion)[:, None]).sum() / tokens
    loss.backward()
    for mine, theirs in zip(model.parameters(), twin.parameters()):
        assert torch.allclose(mine.grad, theirs.grad, atol=2e-4)  # the deviation is 1 + 1e-4


def test_old_log_probs_stay_and_the_clip_holds():
    """With ratios against the last iteration's policy they would stay near 1; with the fixed ones they move until clipped."""
    torch.manual_seed(0)
    model = make_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=3.0)
    figures = ppo_step(
        model, share_of_the, optimizer, PROMPTS * 8, 12, tokenizer=make_tokenizer(), max_new_tokens=6
    )
    assert figures["policy/clipfrac_avg"] > 0
    assert figures["policy/approxkl_avg"] > 1e-3
    unclipped = make_llama()
    torch.manual_seed(0)
    make_llama()
    loose = ppo_step(
        unclipped, share_of_the, torch.optim.SGD(unclipped.parameters(), lr=3.0), PROMPTS * 8, 12,
        tokenizer=make_tokenizer(), max_new_tokens=6, cliprange=1.0,
    )  # fmt: skip
    assert loose["policy/approxkl_avg"] > figures["policy/approxkl_avg"]


def test_prompts_in_every_form_are_the_same():
    tokenizer, found = make_tokenizer(), []
    texts = ["the cat", "bird", "a dog sat"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    left = make_tokenizer()
    left.padding_side = "left"
    padded = [make(texts, padding=True, return_tensors="pt") for make in (tokenizer, left)]
    for prompts, given in ((texts, tokenizer), (ids, None), *((encoded, None) for encoded in padded)):
        model = make_llama()

        def reward(prompts, completions, given=given):
            words = completions if given is None else [given(text)["input_ids"] for text in completions]
            return [float(sum(token for token in word if 2 < token < len(tokenizer))) for word in words]

        torch.manual_seed(3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found.append(ppo_step(model, reward, optimizer, prompts, 2, tokenizer=given, max_new_tokens=4))
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-5)
    torch.manual_seed(3)
    tensor = torch.tensor([[3, 4], [5, 6]])
    model = make_llama()
    step = ppo_step(
        model,
        lambda p, c: torch.ones(2),
        torch.optim.SGD(model.parameters(), lr=0.1),
        tensor,
        max_new_tokens=2,
    )
    assert step["loss"] == 0  # alike: nothing to learn


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(prompts=["one"]), "give a list of two or more prompts"),
        (dict(prompts="the cat"), "give a list of two or more prompts"),
        (dict(tokenizer=None), "prompts are texts: give their tokenizer"),
        (dict(num_iterations=0), "expected num_iterations >= 1"),
        (dict(temperature=0.0), "temperature > 0"),
        (dict(reward="numeric"), r"must be a function reward\(prompts, completions\), got 'numeric'"),
        (dict(reward=lambda p, c: [1.0]), "reward must give 2 numbers"),
        (dict(reward=lambda p, c: [math.inf, 1.0]), "finite numbers"),
        (dict(reward=lambda p, c: [None, None]), "finite numbers"),
        (dict(prompts=["the", ""]), "has no token to start from"),
    ],
)
def test_wrong_input_is_told(options, message):
    model = make_llama()
    before = [p.clone() for p in model.parameters()]
    given = dict(
        reward=share_of_the, prompts=["the", "a"], tokenizer=make_tokenizer(), max_new_tokens=2,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        ppo_step(model, **{**given, **options})
    assert all(map(torch.equal, before, model.parameters()))
