"""Requests that come and go: the same completions as alone, room that comes back, faults that stay with their request."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from trainers.tiny import make_llama, make_tokenizer

from alignfast.models.attention import ModelRefused
from alignfast.models.policy import Policy
from alignfast.rollout import Completion, Sampling
from alignfast.rollout.live import LiveEngine, Request
from alignfast.rollout.native import NativeEngine

TOKENIZER = make_tokenizer()
PROMPTS = [
    TOKENIZER(text)["input_ids"] for text in ("the cat", "a", "the dog sat on the mat and", "very happy bird")
]
ENDLESS = Sampling(max_new_tokens=40, stop_token_ids=())


def sharp_llama() -> Any:
    return make_llama(3, initializer_range=0.5).eval()


def engine_of(model: Any = None, **options: Any) -> LiveEngine:
    return LiveEngine(Policy(model or sharp_llama()), TOKENIZER, **{"cache_tokens": 1024, **options})


def run(engine: LiveEngine) -> dict[tuple[Request, int], Completion]:
    """All that is in it, to the end."""
    found = {}
    while engine.num_running + engine.num_waiting:
        for drawn in engine.step():
            if drawn.completion is not None:
                found[drawn.request, drawn.index] = drawn.completion
    return found


def test_greedy_is_transformers_own_token_for_token() -> None:
    model = sharp_llama()
    expected = []
    for ids in PROMPTS:
        out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12)
        expected.append(out[0, len(ids) :].tolist())
    engine = engine_of(model, max_sequences=3)
    requests = [engine.submit(ids, Sampling(temperature=0, max_new_tokens=12, n=2)) for ids in PROMPTS]
    found = run(engine)
    for request, tokens in zip(requests, expected):
        assert [list(found[request, i].token_ids) for i in range(2)] == [tokens, tokens]


def test_requests_drawn_in_different_ways_do_not_bear_on_each_other() -> None:
    """Each as NativeEngine draws it alone, though all come at different times and leave when they like."""
    ways = [
        Sampling(max_new_tokens=20, n=2, seed=1),
        Sampling(max_new_tokens=7, temperature=0),
        Sampling(max_new_tokens=15, temperature=0.7, top_k=5, seed=2),
        Sampling(max_new_tokens=11, top_p=0.8, min_p=0.01, n=3, seed=1),
    ]
    alone = NativeEngine(Policy(sharp_llama()), TOKENIZER)
    engine, draw, found = engine_of(max_sequences=4), random.Random(0), {}
    asked = {}
    for i in range(24):
        ids, sampling = PROMPTS[i % 4], ways[i // 2 % 4]
        asked[engine.submit(ids, sampling)] = (ids, sampling)
        for _ in range(draw.randint(0, 5)):
            for drawn in engine.step():
                if drawn.completion is not None:
                    found[drawn.request, drawn.index] = drawn.completion
    found |= run(engine)
    for request, (ids, sampling) in asked.items():
        (expected,) = alone.generate([list(ids)], sampling)
        for i, completion in enumerate(expected):
            ours = found[request, i]
            assert (ours.token_ids, ours.finish_reason) == (completion.token_ids, completion.finish_reason)
            assert torch.tensor(ours.logps).allclose(torch.tensor(completion.logps), atol=1e-5)
    assert engine.free_tokens == 1024


def test_a_step_gives_every_running_sequence_a_token_and_starts_what_waits() -> None:
    engine = engine_of(max_sequences=3)
    first = engine.submit(PROMPTS[0], ENDLESS)
    assert [(d.request, d.index) for d in engine.step()] == [(first, 0)]
    second = engine.submit(PROMPTS[1], Sampling(max_new_tokens=40, n=3, stop_token_ids=()))
    drawn = engine.step()
    assert [(d.request, d.index) for d in drawn] == [(first, 0), (second, 0), (second, 1)]
    assert (engine.num_running, engine.num_waiting) == (3, 1)
    assert [len(s.tokens) for s in first.sequences] == [2]


def test_a_cancelled_request_is_out_by_the_next_step() -> None:
    engine = engine_of(max_sequences=2)
    first, second = engine.submit(PROMPTS[0], ENDLESS), engine.submit(PROMPTS[1], ENDLESS)
    third = engine.submit(PROMPTS[2], ENDLESS)
    engine.step()
    engine.cancel(first)
    assert {d.request for d in engine.step()} == {second, third}
    engine.cancel(first)  # twice is as good as once
    engine.cancel(second)
    engine.cancel(third)
    assert (engine.num_running, engine.num_waiting, engine.free_tokens) == (0, 0, 1024)
    assert engine.step() == []


@pytest.mark.parametrize("length", [5, 16, 21])  # a page filled in part; one whole; a whole one and a part
def test_a_request_cancelled_half_started_gives_all_its_memory_back(length: int) -> None:
    engine = engine_of(max_sequences=3)
    request = engine.submit([5] * length, Sampling(max_new_tokens=9, n=5, stop_token_ids=()))
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (3, 2)
    engine.cancel(request)
    assert engine.free_tokens == 1024
    other = engine.submit(PROMPTS[0], Sampling(max_new_tokens=8, temperature=0))
    (expected,) = NativeEngine(engine.policy, TOKENIZER).generate(
        [PROMPTS[0]], Sampling(max_new_tokens=8, temperature=0)
    )
    assert run(engine)[other, 0].token_ids == expected[0].token_ids


def test_requests_that_come_and_are_cancelled_at_random_leave_nothing_behind() -> None:
    engine, draw, live = engine_of(max_sequences=5, cache_tokens=160), random.Random(1), []
    for _ in range(120):
        if draw.random() < 0.6:
            sampling = Sampling(
                max_new_tokens=draw.randint(1, 12), n=draw.randint(1, 3), seed=draw.randint(0, 1)
            )
            live.append(engine.submit([5] * draw.randint(1, 30), sampling))
        if live and draw.random() < 0.4:
            engine.cancel(live.pop(draw.randrange(len(live))))
        engine.step()
        assert engine.num_running <= 5
    run(engine)
    assert engine.free_tokens == 160
    assert all(request.left == 0 for request in live)


def test_what_can_never_run_is_refused_at_once() -> None:
    engine = engine_of(cache_tokens=32)
    with pytest.raises(ValueError, match="may need 48 tokens of the cache, which has 32"):
        engine.check(PROMPTS[0], Sampling(max_new_tokens=20))
    with pytest.raises(ValueError, match="no room in the model's 64 positions"):
        engine.submit([5] * 64, Sampling())
    with pytest.raises(ValueError, match="no token to start from"):
        engine.submit([], Sampling())
    with pytest.raises(ValueError, match="a number for each of 2 completions, got 1"):
        engine.submit([5], Sampling(n=2, max_new_tokens=2), numbers=[3])
    with pytest.raises(ValueError, match="cache_tokens must be >= 16, got 3"):
        engine_of(cache_tokens=3)
    assert engine.num_waiting == 0


def test_logits_without_numbers_end_their_own_request_alone() -> None:
    """A token whose embedding is broken spoils what holds it, and nothing else."""
    model = sharp_llama()
    engine = engine_of(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[30] = torch.nan
    sampling = Sampling(max_new_tokens=5, temperature=0, stop_token_ids=())
    broken, whole = engine.submit([30], sampling), engine.submit([5], sampling)
    by_request = {drawn.request: drawn for drawn in engine.step()}
    assert (
        by_request[broken].fault
        == "the model's logits after 1 tokens are no numbers: there is nothing to draw from"
    )
    assert by_request[whole].token is not None
    assert {request for request, _ in run(engine)} == {whole}
    assert engine.free_tokens == 1024


def test_abort_names_what_was_lost_and_the_engine_goes_on() -> None:
    engine = engine_of(max_sequences=1)
    first, second = engine.submit(PROMPTS[0], ENDLESS), engine.submit(PROMPTS[1], ENDLESS)
    engine.step()
    assert engine.abort() == [first, second]
    assert (engine.num_running, engine.num_waiting, engine.free_tokens) == (0, 0, 1024)
    third = engine.submit(PROMPTS[0], Sampling(max_new_tokens=3, stop_token_ids=()))
    assert len(run(engine)[third, 0].token_ids) == 3


def test_close_gives_the_model_its_mode_and_attention_back() -> None:
    model = make_llama().train()
    before = model.config._attn_implementation
    engine = engine_of(model)
    assert (model.training, model.config._attn_implementation) == (False, "alignfast")
    engine.close()
    assert (model.training, model.config._attn_implementation) == (True, before)


def test_a_model_that_cannot_be_packed_is_refused_when_it_is_opened() -> None:
    model = make_llama(initializer_range=0.5)
    model.config.layer_types = ["conv", "full_attention"]
    with pytest.raises(ModelRefused, match="layers of kind conv"):
        engine_of(model)
