"""OpenAI's routes, asked by OpenAI's own client: what comes is what our engine draws alone, whole and in streams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from online.server.serving import (
    FIRST,
    Live,
    listening,
    make_chat_tokenizer,
    make_model,
    make_service,
    num_kept,
)

from alignfast.models.policy import Policy
from alignfast.online.server.votes import episode_of
from alignfast.rollout import Completion, Sampling
from alignfast.rollout.native import NativeEngine

CHAT = [{"role": "user", "content": "the cat sat"}]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with listening(make_service()) as live:
        yield live


def drawn_alone(prompt: Any, **sampling: Any) -> list[Completion]:
    engine = NativeEngine(Policy(make_model()), make_chat_tokenizer())
    return engine.generate([prompt], Sampling(**sampling))[0]


# --- the official client ---


def test_a_chat_is_what_the_engine_draws(live: Live) -> None:
    found = live.openai().chat.completions.create(
        model="tiny", messages=CHAT, seed=5, n=2, temperature=0.8, top_p=0.9, max_tokens=12, logprobs=True
    )
    expected = drawn_alone(CHAT, seed=5, n=2, temperature=0.8, top_p=0.9, max_new_tokens=12)
    for choice, completion in zip(found.choices, expected, strict=True):
        assert (choice.message.role, choice.message.content) == ("assistant", completion.text)
        assert choice.finish_reason == completion.finish_reason
        told = [entry.logprob for entry in choice.logprobs.content]
        assert told == pytest.approx(completion.logps[: len(told)], abs=1e-5)
        words = [entry.token for entry in choice.logprobs.content if entry.token.isalpha()]  # no <pad>
        assert " ".join(words) == completion.text
    prompt, drawn = len(expected[0].prompt_ids), sum(len(c.token_ids) for c in expected)
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (prompt, drawn)
    assert found.usage.total_tokens == prompt + drawn
    assert (found.model, found.object, found.id[:9]) == ("tiny", "chat.completion", "chatcmpl-")


def test_a_completion_is_what_the_engine_draws(live: Live) -> None:
    found = live.openai().completions.create(
        model="tiny", prompt=["the cat", "a"], seed=5, n=2, max_tokens=6, logprobs=0
    )
    sampling = Sampling(seed=5, n=2, max_new_tokens=6)
    groups = NativeEngine(Policy(make_model()), make_chat_tokenizer()).generate(["the cat", "a"], sampling)
    assert [choice.text for choice in found.choices] == [c.text for group in groups for c in group]
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    logprobs = found.choices[0].logprobs
    assert logprobs.token_logprobs == pytest.approx(groups[0][0].logps[: len(logprobs.tokens)], abs=1e-5)
    assert logprobs.text_offset[0] == 0
    by_tokens = live.openai().completions.create(model="tiny", prompt=[3, 5], temperature=0, max_tokens=6)
    by_text = live.openai().completions.create(model="tiny", prompt="the cat", temperature=0, max_tokens=6)
    assert by_tokens.choices[0].text == by_text.choices[0].text


@pytest.mark.parametrize("stop", [None, ["dog"]])
def test_a_stream_adds_up_to_the_whole(live: Live, stop: list[str] | None) -> None:
    asked = dict(model="tiny", messages=CHAT, seed=9, n=2, max_tokens=20, logprobs=True, stop=stop)
    whole = live.openai().chat.completions.create(**asked)
    chunks = list(
        live.openai().chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert parts[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + [choice.finish_reason]
        told = [entry for part in parts if part.logprobs for entry in part.logprobs.content]
        assert [entry.token for entry in told] == [entry.token for entry in choice.logprobs.content]
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage == whole.usage
    if stop:
        assert "stop" in {choice.finish_reason for choice in whole.choices}
        assert not any("dog" in choice.message.content for choice in whole.choices)


def test_a_completion_streams_too(live: Live) -> None:
    asked = dict(model="tiny", prompt="the cat", seed=2, max_tokens=9, logprobs=0)
    whole = live.openai().completions.create(**asked).choices[0]
    parts = [chunk.choices[0] for chunk in live.openai().completions.create(**asked, stream=True)]
    assert len(parts) > 3
    assert "".join(part.text for part in parts) == whole.text
    assert parts[-1].finish_reason == whole.finish_reason
    told = [offset for part in parts for offset in part.logprobs.text_offset]
    assert told == whole.logprobs.text_offset


def test_models(live: Live) -> None:
    (model,) = live.openai().models.list().data
    assert (model.id, model.model_extra["alignfast"]) == ("tiny", FIRST._asdict())
    assert live.openai().models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        live.openai().models.retrieve("other")


def test_32_at_once_are_those_of_one_at_a_time(live: Live) -> None:
    def ask(i: int) -> tuple[list[str], list[float]]:
        found = live.openai().chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "the cat " * (1 + i % 5)}], logprobs=True,
            seed=i // 2, temperature=(0, 0.7, 1)[i % 3], n=1 + i % 2, max_tokens=5 + i,
        )  # fmt: skip
        told = [entry.logprob for choice in found.choices for entry in choice.logprobs.content]
        return [choice.message.content for choice in found.choices], told

    alone = [ask(i) for i in range(32)]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(ask, range(32)))
    for (texts, logps), (expected, logps_alone) in zip(together, alone, strict=True):
        assert texts == expected
        assert logps == pytest.approx(logps_alone, abs=1e-5)


def test_answers_without_a_seed_differ(live: Live) -> None:
    ask = live.openai().completions.create
    texts = {ask(model="tiny", prompt="the cat", max_tokens=20).choices[0].text for _ in range(9)}
    assert len(texts) > 1


def test_each_answer_names_its_id_its_version_and_its_weights(live: Live) -> None:
    asked = {"model": "tiny", "messages": CHAT, "max_tokens": 3}
    with live.http() as http:
        whole = http.post("/v1/chat/completions", json=asked)
        told = whole.json()["alignfast"]
        assert (told["version"], told["weights"]) == FIRST
        assert (
            told["answers"][0]["response_id"]
            == whole.json()["id"]
            == whole.headers["x-alignfast-response-id"]
        )
        assert whole.json()["system_fingerprint"] == "v1-111111111111"
        assert (whole.headers["x-alignfast-version"], whole.headers["x-alignfast-weights"]) == FIRST
        stream = http.post("/v1/chat/completions", json={**asked, "stream": True})
        assert stream.headers["x-alignfast-weights"] == FIRST.weights
    streamed = list(live.openai().chat.completions.create(**asked, stream=True))
    for chunk in (streamed[0], streamed[-1]):
        assert chunk.model_extra["alignfast"]["answers"][0]["response_id"] == chunk.id


def test_an_answer_is_kept_with_all_that_learning_needs(live: Live) -> None:
    found = live.openai().chat.completions.create(
        model="tiny", messages=CHAT, seed=5, n=2, max_completion_tokens=12,
        extra_body={"episode_id": "e1", "top_k": 7},
    )  # fmt: skip
    expected = drawn_alone(CHAT, seed=5, n=2, top_k=7, max_new_tokens=12)
    for i, completion in enumerate(expected):
        shown = live.shown(f"{found.id}-{i}")
        assert (shown.user, shown.episode_id, shown.prompt) == ("ann", episode_of("ann", "e1"), CHAT)
        assert (shown.group_id, shown.turn) == (f"{found.id}-p0", 0)
        assert (shown.prompt_ids, shown.completion_ids) == (completion.prompt_ids, completion.token_ids)
        assert shown.logps == pytest.approx(completion.logps, abs=1e-5)
        assert shown.sampled_logps == pytest.approx(completion.sampled_logps, abs=1e-5)
        assert (shown.text, shown.finish_reason) == (completion.text, completion.finish_reason)
        assert (shown.policy_version, shown.weights_hash) == FIRST
        assert (shown.sampling["top_k"], shown.sampling["seed"]) == (7, 5)


def test_what_is_not_to_be_stored_is_not_and_can_not_be_voted_on(live: Live) -> None:
    before = num_kept(live)
    for said in (
        {"store": False},
        {"alignfast": {"store": False}},
        {"store": True, "alignfast": {"store": False}},
    ):
        found = live.openai().chat.completions.create(
            model="tiny", messages=CHAT, max_tokens=3, extra_body=said
        )
        assert num_kept(live) == before
        assert found.model_extra["alignfast"]["answers"] == []
        with live.http() as http:
            vote = {"response_id": found.id, "kind": "thumb", "value": True}
            assert http.post("/v1/feedback", json=vote).status_code == 404


def test_messages_in_parts_and_a_developer(live: Live) -> None:
    parts = [{"type": "text", "text": "the cat"}, {"type": "text", "text": " sat"}]
    ask = live.openai().chat.completions.create
    by_parts = ask(model="tiny", messages=[{"role": "user", "content": parts}], temperature=0, max_tokens=5)
    by_text = ask(
        model="tiny", messages=[{"role": "developer", "content": "the cat sat"}], temperature=0, max_tokens=5
    )
    assert by_parts.choices[0].message.content == by_text.choices[0].message.content


# --- refusals ---


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"n": 9}, "n", "9 were asked for, this server gives 8 at most"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"max_tokens": 49}, "max_tokens", "49 were asked for, this server gives 48 at most"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, None, "are one option"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"temperature": 1e-9}, "temperature", "must be 0 or at least 1e-06"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"seed": "5"}, "seed", "valid integer"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "at least 1"),
        ({"tools": [{"type": "function"}]}, None, "'tools' is not done here"),
        ({"frequency_penalty": 0.5}, None, "'frequency_penalty' is not done here"),
        ({"logprobs": True, "top_logprobs": 3}, None, "'top_logprobs' is not done here"),
        ({"response_format": {"type": "json_object"}}, None, "'response_format' is not done here"),
        ({"stream_options": {"include_usage": True}}, None, "'stream_options' is for 'stream': true"),
        ({"temprature": 1}, "temprature", "there is no field 'temprature' here"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "'assistant'"),
        ({"messages": [{"role": "user", "content": "the " * 64}]}, "prompt", "no room in the model's 64 positions"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None, "half a character"),
        ({"episode_id": "a b"}, "episode_id", "pattern"),
    ],
)  # fmt: skip
def test_what_can_not_be_obeyed_is_refused(
    live: Live, fields: dict[str, Any], param: str | None, message: str
) -> None:
    with live.http() as http:
        body = json.dumps({"model": "tiny", "messages": CHAT, **fields})
        answer = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


def test_options_at_the_value_that_means_nothing_are_taken(live: Live) -> None:
    live.openai().chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=2, frequency_penalty=0, presence_penalty=0.0, logit_bias={},
        tools=[], response_format={"type": "text"}, parallel_tool_calls=True, user="somebody", temperature=None,
    )  # fmt: skip
    live.openai().completions.create(model="tiny", prompt="a", echo=False, best_of=1, suffix="", max_tokens=2)


def test_another_model_is_not_found(live: Live) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        live.openai().chat.completions.create(model="gpt-4", messages=CHAT)


def test_a_prompt_that_the_template_refuses_is_said_so(live: Live) -> None:
    tokenizer = live.service.tokenizer
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    try:
        with pytest.raises(openai.UnprocessableEntityError, match="roles must alternate"):
            live.openai().chat.completions.create(model="tiny", messages=CHAT)
    finally:
        tokenizer.chat_template = make_chat_tokenizer().chat_template


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"model": NaN}', b"\xff\xfe"])
def test_bodies_that_are_no_request_are_refused(live: Live, body: bytes) -> None:
    with live.http() as http:
        answer = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]["message"]


def test_an_answer_that_can_not_be_stored_is_not_given(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*shown: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(live.store, "record_shown", full)
    with pytest.raises(openai.InternalServerError, match="could not be stored"):
        live.openai().chat.completions.create(model="tiny", messages=CHAT, max_tokens=3)
    with pytest.raises(openai.APIError, match="could not be stored"):
        list(live.openai().chat.completions.create(model="tiny", messages=CHAT, max_tokens=3, stream=True))
