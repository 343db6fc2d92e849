"""What the server takes on, and what it does when a client leaves, a deadline passes or the engine breaks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from online.server.serving import KEY, Live, listening, make_service, num_kept, until

from alignfast.online.server.runner import Ticket
from alignfast.online.server.service import Limits

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 2000}
SHORT = {**ASK, "max_tokens": 2}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """One that writes 2,000 tokens unless it is stopped: seconds."""
    service = make_service(endless=True, max_sequences=2, max_queue=2, max_body_bytes=2000, cache_tokens=8192)
    with listening(service) as live:
        yield live


def idle(live: Live) -> bool:
    return live.service.runner.in_flight == live.service.runner.num_running == 0


def engine_of(live: Live) -> Any:
    assert live.service.runner.current is not None
    return live.service.runner.current.engine


# --- too much ---


def test_a_full_queue_is_told_429_at_once_and_when_to_come_again(live: Live) -> None:
    with live.http() as http, ThreadPoolExecutor(4) as pool:
        streams = [
            http.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) for _ in range(4)
        ]
        opened = list(pool.map(lambda stream: stream.__enter__(), streams))
        until(lambda: live.service.runner.num_running == 2)
        answer = http.post("/v1/chat/completions", json=ASK)
        assert (answer.status_code, answer.elapsed.total_seconds() < 1) == (429, True)
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        assert http.post("/v1/chat/completions", json={**SHORT, "stream": True}).status_code == 429
        assert {stream.status_code for stream in opened} == {200}
        for stream in opened:
            stream.close()
        until(lambda: idle(live))
        assert http.post("/v1/chat/completions", json=SHORT).status_code == 200


def test_more_answers_than_there_is_ever_room_for_are_not_told_to_come_again(live: Live) -> None:
    with live.http() as http:
        answer = http.post("/v1/chat/completions", json={**SHORT, "n": 5})
    assert (answer.status_code, "takes 4 on at most" in answer.text) == (422, True)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_told_413(live: Live, chunked: bool) -> None:
    body = json.dumps({**ASK, "messages": [{"role": "user", "content": "a" * 2000}]}).encode()
    content = iter([body[i : i + 100] for i in range(0, len(body), 100)]) if chunked else body
    with live.http() as http:
        answer = http.post(
            "/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}
        )
        assert (answer.status_code, answer.json()["error"]["type"]) == (413, "invalid_request_error")
        assert http.post("/v1/chat/completions", json=SHORT).status_code == 200


@pytest.mark.parametrize("limit", ["max_sequences", "cache_tokens", "request_seconds", "max_queue"])
def test_limits_out_of_range_are_refused(limit: str) -> None:
    with pytest.raises(ValueError, match=f"{limit} must be above 0, got -1"):
        Limits(**{limit: -1})


# --- clients that leave ---


def test_a_stream_that_is_left_frees_its_slot_within_a_step(live: Live) -> None:
    engine, steps_after = engine_of(live), []
    step = engine.step

    def counted() -> Any:
        if left:
            steps_after.append(engine.num_running)
        return step()

    engine.step, left = counted, False
    try:
        with (
            live.http() as http,
            http.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as answer,
        ):
            lines = answer.iter_lines()
            for _ in range(8):
                next(lines)
            runner = live.service.runner
            assert runner.num_running == 1
            cancel = runner.cancel

            def cancelled(ticket: Any) -> None:
                nonlocal left
                cancel(ticket)
                left = True

            runner.cancel = cancelled  # type: ignore[method-assign]
        until(lambda: left and idle(live))
    finally:
        engine.step, runner.cancel = step, cancel
    assert len(steps_after) <= 1  # the one that was being made
    assert engine.free_tokens == live.service.limits.cache_tokens


def test_what_a_stream_had_shown_is_kept_as_cancelled(live: Live) -> None:
    with (
        live.http() as http,
        http.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as answer,
    ):
        name, seen = answer.headers["x-alignfast-response-id"], ""
        for line in answer.iter_lines():
            if line:
                seen += json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content", "")
            if len(seen.split()) > 5:
                break
    until(lambda: live.store.shown(name))
    shown = live.shown(name)
    assert shown.finish_reason == "cancelled"
    assert shown.text.startswith(seen)
    assert len(shown.logps) == len(shown.completion_ids) < 2000


def test_who_leaves_before_the_answer_frees_its_slot(live: Live) -> None:
    before = num_kept(live)
    with live.http() as http, pytest.raises(httpx.ReadTimeout):
        http.post("/v1/chat/completions", json=ASK, timeout=0.3)
    until(lambda: idle(live))
    assert num_kept(live) == before  # nobody saw it


def test_who_leaves_while_waiting_is_never_begun(live: Live) -> None:
    with live.http() as http:
        with http.stream("POST", "/v1/chat/completions", json={**ASK, "n": 2, "stream": True}):
            until(lambda: live.service.runner.num_running == 2)
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/chat/completions", json=SHORT, timeout=0.2)
            until(lambda: live.service.runner.in_flight == 2)
            assert engine_of(live).num_waiting == 0
    until(lambda: idle(live))


def test_a_reader_who_leaves_at_the_moment_a_token_comes_is_noticed() -> None:
    """The cancellation must not be lost to the token."""

    async def leave() -> bool:
        ticket = Ticket((), 1)

        async def read() -> None:
            async for _ in ticket.steps(60):
                pass

        reader = asyncio.ensure_future(read())
        await asyncio.sleep(0)
        ticket.put([])
        reader.cancel()
        await asyncio.wait((reader,), timeout=1)
        return reader.cancelled()

    assert asyncio.run(leave())


# --- time, and faults ---


def test_a_deadline_is_told_504_and_ends_the_drawing() -> None:
    with listening(make_service(endless=True, request_seconds=0.3, cache_tokens=8192)) as live:
        with live.http() as http:
            answer = http.post("/v1/chat/completions", json=ASK)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        until(lambda: idle(live))
        stream = live.openai().chat.completions.create(**ASK, stream=True)
        assert next(stream).choices[0].delta.role == "assistant"
        with pytest.raises(openai.APIError, match=r"not complete after 0\.\d+ s"):
            list(stream)
        until(lambda: idle(live))


def test_a_step_that_fails_fails_its_requests_and_the_server_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(make_service()) as live:
        short = {**ASK, "max_tokens": 4}

        def broken() -> Any:
            raise MemoryError("no room")

        with live.http() as http:
            monkeypatch.setattr(engine_of(live), "step", broken)
            answer = http.post("/v1/chat/completions", json=short)
            assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
            assert "no room" not in answer.text
            health = http.get("/health")
            assert (health.status_code, health.json()) == (503, {"status": "failing"})
            monkeypatch.undo()
            assert idle(live)
            assert http.post("/v1/chat/completions", json=short).status_code == 200
            assert http.get("/health").json() == {"status": "ok"}


def test_an_error_of_ours_is_told_without_its_insides(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("secret")

    monkeypatch.setattr(live.store, "voting", broken)
    with live.http(KEY) as http:
        answer = http.post("/v1/feedback", json={"response_id": "x", "kind": "thumb", "value": True})
    assert (answer.status_code, "secret" in answer.text) == (500, False)
