"""Visits to the server over HTTP: a question, two answers, a vote on which is better, and a thumb on one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import STDOUT, Popen
from typing import Any

import httpx

from alignfast.quickstart.judges import Judge
from alignfast.quickstart.stages import SFT
from alignfast.simulation.people import Person

_AT_ONCE = 16  # people who ask at the same time
_PATIENCE = 120.0  # seconds for an answer


@dataclass(frozen=True)
class Visit:
    """What came of one.

    Attributes:
        person: name of the voter.
        up: the thumb on one of the answers.
        version: that gave it, where the server tells.
    """

    person: str
    up: bool
    version: str | None


def visit(client: httpx.Client, person: Person, question: str, like: Judge, max_tokens: int) -> Visit:
    """Ask, read both answers, vote.

    Raises:
        RuntimeError: the server refused.
    """
    headers = {"Authorization": f"Bearer {person.key}"}

    def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        reply = client.post(path, json=body, headers=headers)
        if reply.is_error:
            raise RuntimeError(f"{path} said {reply.status_code}: {reply.text}")
        answer: dict[str, Any] = reply.json()
        return answer

    chat: dict[str, Any] = {
        "model": SFT,
        "messages": [{"role": "user", "content": question}],
        "n": 2,
        "max_tokens": max_tokens,
    }
    told = post("/v1/chat/completions", {**chat, "alignfast": {"pair": True}})
    texts = [choice["message"]["content"] for choice in told["choices"]]
    ids = [answer["response_id"] for answer in told["alignfast"]["answers"]]
    verdict = {"than": ids[1], "verdict": person.verdict(texts[0], texts[1], like)}
    post("/v1/feedback", {"response_id": ids[0], "kind": "pair", "value": verdict})
    rated = person.rng.randrange(2)
    up = person.thumb(texts[rated], like)
    post("/v1/feedback", {"response_id": ids[rated], "kind": "thumb", "value": up})
    return Visit(person.name, up, told["alignfast"].get("version"))


def visits(
    url: str, people: Sequence[Person], questions: Sequence[str], number: int, like: Judge, max_tokens: int
) -> list[Visit]:
    """So many visits, the people taking turns, some at a time."""

    def turns(place: int) -> list[Visit]:
        person = people[place]
        count = (number - place + len(people) - 1) // len(people)
        return [
            visit(client, person, person.rng.choice(questions), like, max_tokens)
            for _ in range(max(0, count))
        ]

    with httpx.Client(base_url=url, timeout=_PATIENCE) as client, ThreadPoolExecutor(_AT_ONCE) as pool:
        return [one for found in pool.map(turns, range(len(people))) for one in found]


@contextmanager
def running(command: Sequence[str], url: str, log: Path) -> Iterator[None]:
    """A server's process, from when it answers to its end.

    Raises:
        RuntimeError: it ended before it answered.
    """
    with log.open("w") as told, Popen(command, stdout=told, stderr=STDOUT) as process:
        try:
            _wait_for(process, url, log)
            yield
        finally:
            process.terminate()


def _wait_for(process: Popen[bytes], url: str, log: Path) -> None:
    with httpx.Client(transport=httpx.HTTPTransport(retries=0)) as client:
        while process.poll() is None:
            try:
                client.get(f"{url}/health", timeout=1).raise_for_status()
                return
            except httpx.HTTPError:
                continue
    raise RuntimeError(
        f"the server ended with {process.returncode} before it answered; it said:\n{log.read_text()[-2000:]}"
    )
