"""`alignfast serve` as a process: it says what it is, asks for its key, and on SIGTERM ends what it began."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from online.server.serving import make_chat_tokenizer, make_model

import alignfast
from alignfast.cli import main
from alignfast.commands.serve import keys_of

KEY = "0123456789abcdef-user"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes until it is told to stop."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = make_model(positions=100_000)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    model.save_pretrained(folder)
    make_chat_tokenizer(endless=True).save_pretrained(folder)
    return folder


def test_sigterm_ends_no_answer_before_its_time(folder: Path) -> None:
    words = ["serve", "--model", str(folder), "--port", "0", "--use_cpu", "--max_tokens", "300"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "alignfast", *words], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**os.environ, "ALIGNFAST_API_KEY": KEY, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        said = ""
        while "running on" not in said.lower():
            line = process.stdout.readline()
            assert line, said
            said += line
        assert "version tiny" in said
        assert "a key is needed for every route but /health" in said
        assert "kept in memory" in said
        url = re.findall(r"http://127\.0\.0\.1:\d+", said)[-1]
        assert httpx.get(f"{url}/v1/models").status_code == 401
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as http:
            ask = {"model": "tiny", "messages": [{"role": "user", "content": "the cat"}], "stream": True}
            with http.stream("POST", "/v1/chat/completions", json=ask) as stream:
                lines = stream.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]"
        last = json.loads(events[-2])["choices"][0]
        assert last["finish_reason"] == "length"
        assert process.wait(60) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "there is no key: set ALIGNFAST_API_KEY"),
        (["--db", "sqlite:///feedback.db"], "keeps votes in memory alone"),
        (["--max_tokens", "0"], "max_tokens must be above 0"),
    ],
)
def test_what_can_not_be_done_is_said_before_anything_is_loaded(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.delenv("ALIGNFAST_API_KEY", raising=False)
    assert main(["serve", "--model", str(folder), *words]) == 1
    assert message in capsys.readouterr().err


def test_missing_packages_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "alignfast.commands.serve.find_spec", lambda name: None if name == "uvicorn" else name
    )
    assert main(["serve", "--model", "x"]) == 1
    assert "serving needs uvicorn: pip install 'alignfast[serve]'" in capsys.readouterr().err


def test_keys_that_are_not_safe_are_refused() -> None:
    with pytest.raises(ValueError, match="ALIGNFAST_API_KEY has 5 characters; make one of 16 or more"):
        keys_of({"ALIGNFAST_API_KEY": "short"})
    with pytest.raises(ValueError, match="must differ"):
        keys_of({"ALIGNFAST_API_KEY": KEY, "ALIGNFAST_ADMIN_KEY": KEY})
    assert keys_of({"ALIGNFAST_API_KEY": ""}) == {}
    assert {key: caller.role for key, caller in keys_of({"ALIGNFAST_ADMIN_KEY": KEY}).items()} == {
        KEY: "admin"
    }


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
