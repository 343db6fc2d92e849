"""`alignfast feedback` and `alignfast keys` as an operator meets them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from alignfast.cli import main
from alignfast.online.feedback import Shown, Vote
from alignfast.online.store import Store

PAIR = {"prompt": "2 + 2 =", "chosen": "4", "rejected": "5", "user": "ada"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory; the commands' database is feedback.db there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    try:
        found = main(words)
    except SystemExit as leave:
        found = leave.code
    said = capsys.readouterr().err
    assert (found, "Traceback" in said) == (code, False), said
    return said


def test_import_export_stats_and_deletion(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [PAIR, {**PAIR, "prompt": "3 + 3 =", "user": "bob"}]
    (here / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "2 new votes, 0 known" in told(capsys, "feedback", "import", "pairs.jsonl")
    assert "0 new votes, 2 known" in told(capsys, "feedback", "import", "pairs.jsonl")
    assert "2 rows: out.jsonl" in told(capsys, "feedback", "export", "--output", "out.jsonl", "--with_users")
    assert [json.loads(line)["user"] for line in (here / "out.jsonl").read_text().splitlines()] == [
        "ada",
        "bob",
    ]
    assert "votes         2 of 2 users" in told(capsys, "feedback", "stats")
    assert json.loads(told(capsys, "feedback", "stats", "--as_json"))["kinds"] == {"pair": 2}

    with Store.open("sqlite:///feedback.db") as store:
        store.versions.add("rm-1", "reward", "/rm-1", "h")
        store.use_for("rm-1")
    said = told(capsys, "feedback", "delete-user", "ada")
    assert "deleted: 2 answers, 1 votes, 0 keys" in said
    assert f"cleared: {here / 'out.jsonl'}: 1 lines" in said
    assert "trained on it, and not changed: rm-1" in said
    assert "'ada' is unknown here" in refused(capsys, 1, "feedback", "delete-user", "ada")
    assert "deleted: 0 answers" in told(capsys, "feedback", "expire", "--days", "30")


def test_import_redacts_and_leaves_out_bad_rows(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "hooks.py").write_text("def hide(text):\n    return text.replace('4', '*')\n")
    rows = [PAIR, {**PAIR, "rejected": "4"}]
    (here / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["feedback", "import", "pairs.jsonl", "--redact", "hooks:hide"]
    assert "nothing is preferred" in refused(capsys, 1, *words)
    assert "left out: " in told(capsys, *words, "--skip_bad")
    told(capsys, "feedback", "export", "--output", "out.jsonl")
    assert json.loads((here / "out.jsonl").read_text())["chosen"] == "*"


def test_keys(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = told(capsys, "keys", "make", "ada", "--role", "admin").splitlines()
    with Store.open("sqlite:///feedback.db") as store:
        found = store.keys.check(said[0])
    assert found is not None
    assert (found.user, found.role) == ("ada", "admin")
    assert f"{found.id}  ada (admin), made 20" in told(capsys, "keys", "list")
    told(capsys, "keys", "revoke", found.id)
    assert "revoked 20" in told(capsys, "keys", "list")
    assert "no key" in refused(capsys, 1, "keys", "revoke", found.id)


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["feedback", "look"], 2, "export | import | stats | expire | delete-user"),
        (["feedback", "stats"], 1, "there is no file"),
        (["feedback", "export"], 2, "required: output"),
        (["feedback", "export", "--outputs", "x"], 2, "'output'"),
        (["feedback", "stats", "--db", "mysql://x"], 1, "mysql is not supported"),
        (["feedback", "import", "no.jsonl"], 1, "no such file"),
        (["keys", "make", "ada", "--role", "root"], 1, "user, annotator, admin"),
        (["keys", "drop"], 2, "make | list | revoke"),
        (["keys", "list"], 1, "there is no file"),
    ],
)
def test_errors_say_what_to_do(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, part: str
) -> None:
    assert part in refused(capsys, code, *words)


@pytest.mark.parametrize("words", [["feedback"], ["feedback", "--help"], ["keys", "-h"]])
def test_help(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert "usage: alignfast" in told(capsys, *words)


def test_days_choose_the_newest(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Store.open("sqlite:///feedback.db") as store:
        store.record_shown(Shown(id="r1", prompt="a", text="b"), Shown(id="r2", prompt="a", text="c"))
        store.add_vote(Vote(response_id="r1", kind="thumb", value="up", created=1.0))
        store.add_vote(Vote(response_id="r2", kind="thumb", value="up"))
    assert "1 rows" in told(
        capsys, "feedback", "export", "--format", "kto", "--days", "1", "--output", "o.jsonl"
    )


def test_the_store_says_what_it_is_missing() -> None:
    """Importing alignfast needs no database; the store names the extra."""
    code = (
        "import sys; sys.modules['sqlalchemy'] = None\n"
        "import alignfast, alignfast.online.feedback, alignfast.online.voters\n"
        "from alignfast.cli import main; sys.exit(main(['feedback', 'stats']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "pip install '.[serve]'" in done.stderr
