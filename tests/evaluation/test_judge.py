"""The judge behind an API, against a server of our own that answers as it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from alignfast.evaluation import ApiJudge, JudgeError, load_judge
from alignfast.evaluation.judge import read_verdict
from alignfast.rewards import RewardSet

Answer = Callable[[dict[str, Any]], Any]


class Server:
    """An API whose answers are `answer(body)`: a text, a (status, text), or a whole reply."""

    def __init__(self) -> None:
        self.answer: Answer = lambda body: "Verdict: tie"
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append({**body, "path": self.path})
                outer.headers.append(dict(self.headers))
                found = outer.answer(body)
                status, found = found if isinstance(found, tuple) else (200, found)
                if isinstance(found, str) and status == 200:
                    found = {"choices": [{"message": {"content": found}}]}
                text = found if isinstance(found, bytes) else json.dumps(found).encode()
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    thread = threading.Thread(target=found.http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield found
    found.http.shutdown()
    found.http.server_close()


@pytest.fixture
def judge(server: Server, monkeypatch: pytest.MonkeyPatch) -> ApiJudge:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    monkeypatch.setattr("alignfast.evaluation.judge.time.sleep", lambda seconds: None)
    return ApiJudge("wise", base_url=server.url + "/")


def question(body: dict[str, Any]) -> str:
    return body["messages"][1]["content"]


def prefers(word: str) -> Answer:
    """The answer with a word in it wins, wherever it stands."""

    def answer(body: dict[str, Any]) -> str:
        a, b = question(body).split("<answer B>")
        if (word in a) == (word in b):
            return "Verdict: tie"
        return f"It says {word}.\nVerdict: {'A' if word in a else 'B'}"

    return answer


def test_the_better_answer_wins_from_both_places(server, judge):
    server.answer = prefers("good")
    found = judge.compare(["q"] * 3, ["good", "bad", "good one"], ["bad", "good", "another good"])
    assert found == [1.0, 0.0, 0.5]
    assert len(server.bodies) == 6


def test_a_judge_that_looks_at_places_gives_ties(server, judge):
    server.answer = lambda body: "Verdict: A"
    assert judge.compare(["q"], ["x"], ["y"]) == [0.5]


def test_half_a_win_is_a_tie(server, judge):
    server.answer = lambda body: "Verdict: A" if "<answer A>\nx" in question(body) else "Verdict: tie"
    assert judge.compare(["q"], ["x"], ["y"]) == [0.5]


def test_answers_alike_tie_without_a_question(server, judge):
    assert judge.compare(["q"], ["x"], ["x"]) == [0.5]
    assert server.bodies == []


def test_what_is_sent(server, judge):
    judge.compare(
        [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]],
        [[{"role": "assistant", "content": "So."}]],
        [[{"role": "assistant", "content": "Thus."}]],
    )
    body = server.bodies[0]
    assert (body["path"], body["model"], body["temperature"]) == ("/v1/chat/completions", "wise", 0)
    assert "system: Be brief.\n\nuser: Why?" in question(body)
    assert server.headers[0]["Authorization"] == "Bearer sesame"
    assert {question(body).index("So.") < question(body).index("Thus.") for body in server.bodies} == {
        True,
        False,
    }


def test_the_key_stays_out_of_what_is_shown(judge):
    assert "sesame" not in repr(judge)


def test_a_failure_that_may_pass_is_tried_again(server, judge):
    server.answer = lambda body: (503, "busy") if len(server.bodies) % 3 else "Verdict: A"
    assert judge.verdict("q", "x", "y") == "A"
    assert len(server.bodies) == 3


def test_a_failure_that_stays_is_told(server, judge):
    server.answer = lambda body: (401, {"error": {"message": "no such key"}})
    with pytest.raises(
        JudgeError, match=r"127\.0\.0\.1:\d+/v1/chat/completions, model 'wise': status 401: .*no such key"
    ):
        judge.check()
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((200, b"<html>"), "no JSON"),
        ({"choices": []}, "without a message"),
        ("I like both", "no 'Verdict: A'"),
        ((500, "on fire"), "status 500"),
    ],
)
def test_pairs_without_a_verdict_are_left_out(server, judge, reply, message, caplog):
    server.answer = lambda body: reply if "odd" in question(body) else prefers("good")(body)
    assert judge.compare(["q", "q"], ["odd", "good"], ["bad", "bad"]) == [None, 1.0]
    assert "no verdict on 1 of 2 pairs" in caplog.text
    assert message in caplog.text


def test_nobody_there(monkeypatch):
    monkeypatch.setattr("alignfast.evaluation.judge.time.sleep", lambda seconds: None)
    judge = ApiJudge("wise", base_url="http://127.0.0.1:9/v1", api_key_env=None)
    with pytest.raises(JudgeError, match=r"127\.0\.0\.1:9"):
        judge.check()


def test_wrong_input_is_told(monkeypatch, judge):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="no OPENAI_API_KEY: set it"):
        ApiJudge("wise")
    with pytest.raises(ValueError, match="must be an address"):
        ApiJudge("wise", base_url="localhost:8000", api_key_env=None)
    with pytest.raises(ValueError, match="at least 1"):
        ApiJudge("wise", api_key_env=None, tries=0)
    with pytest.raises(ValueError, match="equally many"):
        judge.compare(["q"], ["x", "y"], ["z"])
    with pytest.raises(ValueError, match="names no model"):
        load_judge("api:", None)


def test_judges_by_name(monkeypatch, server):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    judge = load_judge("api:wise", None)
    assert isinstance(judge, ApiJudge)
    assert judge.name == "api:wise"
    assert judge.verdict("q", "x", "y") == "tie"
    assert load_judge(judge, None) is judge
    assert isinstance(load_judge(["exact", "format"], 5.0), RewardSet)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Verdict: A", "A"),
        ("verdict - b", "B"),
        ("First I thought Verdict: A, but\n\n**Verdict:** B", "B"),
        ("Verdict: [[tie]]", "tie"),
        ("B", "B"),
        ("Verdict: Tie.", "tie"),
    ],
)
def test_verdicts(reply, verdict):
    assert read_verdict(reply) == verdict


@pytest.mark.parametrize("reply", ["", "Answer A is a good answer", "Verdict: both", "Verdict: Alice"])
def test_no_verdict(reply):
    with pytest.raises(JudgeError):
        read_verdict(reply)
