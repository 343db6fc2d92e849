"""`alignfast serve` as a process: it says what it is, asks for its key, and on SIGTERM ends what it began."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import httpx
import pytest
from online.server.process import Server, save_model
from online.server.serving import make_model

import alignfast
from alignfast.cli import main
from alignfast.online.feedback import Vote
from alignfast.online.server.versions import first_version, served_name, weights_hash
from alignfast.online.store import Store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes until it is told to stop."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny", endless=True)


def test_sigterm_ends_no_answer_before_its_time(folder: Path, tmp_path: Path) -> None:
    """And what it answered can be voted on when it is back."""
    db = f"sqlite:///{tmp_path}/feedback.db"
    with Store.open(db) as store:
        key, _ = store.keys.make("ann")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the cat"}\n{"prompt": "the dog"}\n')
    options = ["--max_tokens", "300", "--label", str(prompts)]
    server = Server(folder, db, tmp_path / "log", options)
    try:
        assert "version tiny" in server.said
        assert "a key is needed for every route but /health" in server.said
        assert f"kept in {db}" in server.said
        assert "`alignfast init online` writes a recipe" in server.said
        assert "2 prompts were put into the queue at /label" in server.said
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        header = {"Authorization": f"Bearer {key}"}
        with httpx.Client(base_url=server.url, headers=header, timeout=60) as http:
            ask = {"model": "tiny", "messages": [{"role": "user", "content": "the cat"}], "stream": True}
            with http.stream("POST", "/v1/chat/completions", json=ask) as stream:
                lines = stream.iter_lines()
                events = [next(lines).removeprefix("data: ")]
                server.process.send_signal(signal.SIGTERM)
                events += [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]"
        last = json.loads(events[-2])["choices"][0]
        assert last["finish_reason"] == "length"
        assert server.process.wait(60) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")
    finally:
        server.kill()
    with Store.open(db) as store:
        serving = store.versions.serving()
        assert serving is not None
        assert (serving.name, serving.path) == ("tiny", str(folder))
        vote = Vote(response_id=json.loads(events[0])["id"], kind="thumb", value="up", user="ann")
        assert store.add_vote(vote, own=True).vote == vote


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "there is no key: make one with `alignfast keys make"),
        (["--db", "sqlite://"], "would keep votes in memory alone"),
        (["--max_tokens", "0"], "max_tokens must be above 0"),
        (["--max_votes", "0"], "max_votes >= 1"),
        (["--retention_days", "0"], "retention_days must be above 0"),
        (["--redact", "nowhere:nothing"], "redact='nowhere:nothing' can't be imported"),
    ],
)
def test_what_can_not_be_done_is_said_before_anything_is_loaded(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["serve", "--model", str(folder), *words]) == 1
    assert message in capsys.readouterr().err


def test_missing_packages_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "alignfast.commands.serve.find_spec", lambda name: None if name == "uvicorn" else name
    )
    assert main(["serve", "--model", "x"]) == 1
    assert "serving needs uvicorn: pip install '.[serve]'" in capsys.readouterr().err


def test_something_must_serve(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["serve"]) == 1
    assert "no version serves yet in this database: give --model FOLDER" in capsys.readouterr().err


def test_the_store_says_what_serves(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "v2"
    make_model(8).save_pretrained(other)
    with Store.open(f"sqlite:///{tmp_path}/feedback.db") as store:
        first = first_version(store, str(folder))
        assert (first.name, first.status, first.hash) == ("tiny", "promoted", weights_hash(folder))
        assert first_version(store, str(other)) == first == first_version(store, None)
        assert (served_name(store, str(other)), served_name(store, None)) == ("v2", "tiny")
    (tmp_path / "again").mkdir()
    with Store.open(f"sqlite:///{tmp_path}/again/feedback.db") as store:
        store.versions.add("v2", "policy", "/elsewhere", "0" * 64)
        with pytest.raises(ValueError, match="no such folder"):
            first_version(store, str(tmp_path / "nowhere"))
        named = first_version(store, str(other))  # the folder has other weights than it had
        assert named.name == f"v2-{weights_hash(other)[:12]}"


def test_the_packages_of_serving_are_imported_by_the_server_alone() -> None:
    """So that alignfast and its other commands do without them."""
    root = Path(alignfast.__file__).parent
    wanting = [
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if "online/server" not in path.as_posix()
        and re.search(
            r"^\s*(import|from) (fastapi|starlette|uvicorn|prometheus_client|pydantic)",
            path.read_text(),
            re.M,
        )
    ]
    assert not wanting
