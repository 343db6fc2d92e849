"""Sampled completions: greedy ones by hand, frequencies against the model's own probabilities, order, stops, seeds."""

from __future__ import annotations

import pytest
import torch
from trainers.tiny import WORDS, make_llama, make_tokenizer

from alignfast.rollout import generate_texts

TOKENIZER = make_tokenizer()
PROMPTS = ["the cat", "a", "the dog sat on the mat and", "very happy bird"]
TEMPLATE = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"


def sharp_llama() -> torch.nn.Module:
    """Weights so large that every prompt token bears on the answer; the usual ones give all prompts the same."""
    return make_llama(3, initializer_range=0.5)


def greedy(model: torch.nn.Module, prompt: str, num_tokens: int) -> str:
    ids = TOKENIZER(prompt)["input_ids"]
    start = len(ids)
    for _ in range(num_tokens):
        with torch.no_grad():
            token = model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
        if token == TOKENIZER.eos_token_id:
            break
        ids.append(token)
    return TOKENIZER.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_greedy_is_the_models_own_whatever_the_batch(batch_size: int) -> None:
    model = sharp_llama()
    found = generate_texts(
        model, TOKENIZER, PROMPTS, temperature=0, max_new_tokens=8, num_samples=2, batch_size=batch_size
    )
    for prompt, samples in zip(PROMPTS, found):
        assert samples == [greedy(model, prompt, 8)] * 2


def test_samples_follow_the_models_probabilities() -> None:
    model = sharp_llama()
    with torch.no_grad():
        p_V = model(input_ids=torch.tensor([TOKENIZER("the cat")["input_ids"]])).logits[0, -1].softmax(-1)
    (samples,) = generate_texts(
        model, TOKENIZER, ["the cat"], max_new_tokens=1, num_samples=4000, batch_size=1000
    )
    for word in WORDS[:5]:
        p = p_V[TOKENIZER.convert_tokens_to_ids(word)].item()
        # four standard deviations: a wrong distribution is far outside, chance in one of 3,000 runs; seeded anyway
        assert abs(samples.count(word) / 4000 - p) < 4 * (p * (1 - p) / 4000) ** 0.5


def test_a_seed_gives_the_same_again_and_leaves_torchs_own() -> None:
    model = sharp_llama()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (
        generate_texts(model, TOKENIZER, PROMPTS, max_new_tokens=8, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert torch.rand(1) == expected


def test_generation_stops_at_the_end_token_and_keeps_the_mode() -> None:
    model = sharp_llama().train()
    with torch.no_grad():
        model.lm_head.weight[TOKENIZER.eos_token_id] = 0
        model.lm_head.weight[5:] = -1000 * model.lm_head.weight[5:].abs()
    found = generate_texts(model, TOKENIZER, PROMPTS, max_new_tokens=30)
    assert all("<eos>" not in text and len(text.split()) < 30 for (text,) in found)
    assert model.training


def test_a_stop_of_the_models_own_ends_a_text_and_is_not_part_of_it() -> None:
    model, tokenizer = sharp_llama(), make_tokenizer()
    tokenizer.pad_token = None  # so that rows are filled up with the stop, which is a word here
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("cat")
    found = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=30, num_samples=8)
    lengths = {len(text.split()) for texts in found for text in texts}
    assert len(lengths) > 1  # some stopped
    assert not any("cat" in text for texts in found for text in texts)


def test_texts_become_a_users_turn_where_there_is_a_template() -> None:
    model, tokenizer = sharp_llama(), make_tokenizer()
    with pytest.raises(ValueError, match="chat template"):
        generate_texts(model, tokenizer, [[{"role": "user", "content": "the cat"}]])
    with pytest.raises(ValueError, match="chat template"):
        generate_texts(model, tokenizer, ["the cat"], chat=True)
    tokenizer.chat_template = TEMPLATE.replace("m['content']", "'happy ' + m['content']")
    options = {"temperature": 1.0, "max_new_tokens": 8, "num_samples": 4}
    templated = generate_texts(model, tokenizer, ["the cat"], **options)
    assert templated == generate_texts(model, tokenizer, ["happy the cat"], chat=False, **options)
    assert templated == generate_texts(
        model, tokenizer, [[{"role": "user", "content": "the cat"}]], **options
    )
    assert templated != generate_texts(model, tokenizer, ["the cat"], chat=False, **options)


def test_a_tokenizer_without_a_pad_token_will_do() -> None:
    model, tokenizer = sharp_llama(), make_tokenizer()
    expected = generate_texts(model, tokenizer, PROMPTS, temperature=0, max_new_tokens=6)
    tokenizer.pad_token = None
    assert generate_texts(model, tokenizer, PROMPTS, temperature=0, max_new_tokens=6) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"temperature": -1},
        {"top_p": 0},
        {"top_k": -1},
        {"num_samples": 0},
        {"batch_size": 0},
    ],
)
def test_options_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(ValueError):
        generate_texts(make_llama(), TOKENIZER, PROMPTS, **options)


def test_a_prompt_without_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match="no token"):
        generate_texts(make_llama(), TOKENIZER, [""])
