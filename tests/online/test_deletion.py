"""What must not be stored is not, and what must go goes: from tables, files and SQLite's pages."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, update

from alignfast.online.feedback import Shown, Vote
from alignfast.online.store import Store, Version, tables
from alignfast.online.store.export import export_rows
from alignfast.online.store.files import clear_files
from alignfast.online.store.redact import load_redact
from alignfast.online.store.uses import Learned

SECRET = "geheimnis"


def shown(id: str, user: str | None, **fields: Any) -> Shown:
    return Shown(**{"id": id, "prompt": f"{id} of {user}", "text": f"answer {id}", "user": user, **fields})


def thumb(id: str, user: str, **fields: Any) -> Vote:
    return Vote(response_id=id, kind="thumb", value="up", user=user, **fields)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def counts(store: Store) -> dict[str, int]:
    with store.read() as connection:
        return {
            table.name: connection.execute(select(func.count()).select_from(table)).scalar_one()
            for table in tables.metadata.sorted_tables
        }


# Deleting a user


def test_all_of_a_user_goes_and_nothing_else(store: Store, tmp_path: Path) -> None:
    store.record_shown(
        shown("a1", "ada", episode_id="ea"), shown("a2", "ada", episode_id="shared"),
        shown("b1", "bob", episode_id="shared"),
        shown("a3", "ada", episode_id="half"), shown("n1", None, episode_id="half"),
    )  # fmt: skip
    for id in ("a1", "b1"):
        for user in ("ada", "bob"):
            store.add_vote(thumb(id, user), key=f"{id}-{user}")
    store.add_vote(thumb("a1", "ada", comment="again"))
    for episode in ("ea", "shared", "half"):
        store.add_vote(Vote(episode_id=episode, kind="rating", value=5, user="bob"))
    store.keys.make("ada")
    _, bobs = store.keys.make("bob")
    file = tmp_path / "kto.jsonl"
    store.write_lines(file, "export", lambda: export_rows(store, "kto", with_users=True))
    before = lines(file)

    found = store.delete_user("ada")
    # a1, a2 and a3; ada's votes on a1 (two) and b1, bob's on a1 and on the conversation ea
    assert (found.responses, found.votes, found.keys, found.versions) == (3, 5, 1, ())
    assert [(vote.user, vote.response_id, vote.episode_id) for vote in store.votes(current=False)] == [
        ("bob", "b1", None),
        ("bob", None, "shared"),
        ("bob", None, "half"),
    ]
    assert store.shown("a1") is None
    assert store.shown("b1") is not None
    assert store.keys.all() == [bobs]
    left = lines(file)
    # a conversation's row names all its turns: with one of them deleted the row goes
    assert left == [row for row in before if row["response_ids"] == ["b1"] and row["user"] == "bob"]
    assert found.files.lines == {str(file): len(before) - len(left)}
    assert counts(store)["idempotency"] == 1
    again = store.delete_user("ada")
    assert (again.responses, again.votes, again.keys) == (0, 0, 0)


def test_the_versions_trained_on_it_are_named(store: Store) -> None:
    store.record_shown(shown("a1", "ada"), shown("b1", "bob"))
    store.add_vote(thumb("a1", "bob"))
    store.add_vote(thumb("b1", "bob"))
    for name, kind, parents in (
        ("rm-0", "reward", []),
        ("rm-1", "reward", ["rm-0"]),
        ("rm-2", "reward", ["rm-1"]),
        ("p-0", "policy", []),
        ("p-1", "policy", ["p-0", "rm-1"]),
        ("p-2", "policy", ["p-1"]),
    ):
        store.versions.add(name, kind, f"/{name}", name, parents=parents)  # type: ignore[arg-type]
    store.use_for("rm-1")
    sampled = Version("p-sampled", "policy", "/p-sampled", "0", ("p-0", "rm-0"), time.time(), "candidate")
    store.publish(sampled, Learned(responses=["a1", "b1"]))
    found = store.delete_user("ada")
    assert sorted(found.versions) == ["p-1", "p-2", "p-sampled", "rm-1", "rm-2"]
    assert [vote.response_id for vote in store.used_by("rm-1")] == ["b1"]
    assert counts(store)["prompt_uses"] == 1


def test_files_follow_later_and_on_their_own_machine(store: Store, tmp_path: Path) -> None:
    store.record_shown(shown("a1", "ada"), shown("b1", "bob"))
    for id, user in (("a1", "ada"), ("b1", "bob")):
        store.add_vote(thumb(id, user))
    paths = [tmp_path / name for name in ("here.jsonl", "gone.jsonl", "there.jsonl")]
    for path, kind in zip(paths, ("export", "samples", "replay")):
        store.write_lines(path, kind, lambda: export_rows(store, "kto"))  # type: ignore[arg-type]
    here, gone, there = paths
    gone.unlink()
    here.write_text(here.read_text() + "{torn\n")
    elsewhere = update(tables.files).where(tables.files.c.path == str(there)).values(host="learner")
    store.write(lambda connection: connection.execute(elsewhere))

    found = store.delete_user("ada")
    assert found.files.lines == {str(here): 2}  # the torn line may have been anybody's
    assert found.files.missing == [str(gone)]
    assert found.files.elsewhere == [f"learner:{there}"]
    assert [row["response_ids"] for row in lines(there)] == [["a1"], ["b1"]]
    # the learner's machine comes up, and this one forgets nothing of what it had cleared
    back = update(tables.files).where(tables.files.c.host == "learner").values(host=_host())
    store.write(lambda connection: connection.execute(back))
    assert clear_files(store).lines == {str(there): 1}
    assert [row["response_ids"] for row in lines(there)] == [["b1"]]
    assert clear_files(store).lines == {}


def _host() -> str:
    import socket

    return socket.gethostname()


def test_a_file_that_was_read_before_a_deletion_follows_it(store: Store, tmp_path: Path) -> None:
    store.record_shown(shown("a1", "ada"), shown("b1", "bob"))
    for id, user in (("a1", "ada"), ("b1", "bob")):
        store.add_vote(thumb(id, user))

    def rows() -> list[dict[str, Any]]:
        found = export_rows(store, "kto")
        store.delete_user("ada")  # while the rows are on their way to the disk
        return found

    store.write_lines(tmp_path / "kto.jsonl", "export", rows)
    assert [row["response_ids"] for row in lines(tmp_path / "kto.jsonl")] == [["b1"]]


def test_a_file_is_written_whole_or_not_at_all(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    assert store.write_lines(file, "export", lambda: [{"text": "a\u2028b"}, {}]) == 2

    def rows() -> Any:
        yield {}
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        store.write_lines(file, "export", rows)
    assert lines(file) == [{"text": "a\u2028b"}, {}]
    assert [path.name for path in tmp_path.iterdir() if "jsonl" in path.name] == ["out.jsonl"]
    with pytest.raises(ValueError, match="export, replay, samples"):
        store.write_lines(file, "log", rows)  # type: ignore[arg-type]


def test_sqlites_pages_forget(tmp_path: Path) -> None:
    with Store.open(f"sqlite:///{tmp_path}/feedback.db") as store:
        store.record_shown(shown("a1", "ada", text=SECRET), shown("b1", "bob"))
        store.add_vote(thumb("b1", "ada", comment=SECRET))
        held = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        assert SECRET.encode() in held
        store.delete_user("ada")
        held = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        assert SECRET.encode() not in held


# Retention


def test_what_is_too_old_goes(store: Store, tmp_path: Path) -> None:
    now = time.time()
    store.record_shown(
        shown("old", "ada", created=now - 31 * 86_400, episode_id="e1"),
        shown("young", "ada", created=now - 29 * 86_400, episode_id="e1"),
        shown("lone", None, created=now - 31 * 86_400, episode_id="e2"),
    )
    for id in ("old", "young"):
        store.add_vote(thumb(id, "bob"))
    for episode in ("e1", "e2"):
        store.add_vote(Vote(episode_id=episode, kind="thumb", value="up", user="bob"))
    store.write_lines(tmp_path / "kto.jsonl", "export", lambda: export_rows(store, "kto"))
    found = store.expire(30)
    assert (found.responses, found.votes, found.keys) == (2, 2, 0)
    assert [(vote.response_id, vote.episode_id) for vote in store.votes()] == [("young", None), (None, "e1")]
    assert [row["response_ids"] for row in lines(tmp_path / "kto.jsonl")] == [["young"]]
    with pytest.raises(ValueError, match="days must be a number >= 0"):
        store.expire(-1)


# Redaction


def hide(text: str) -> str:
    return text.replace(SECRET, "[...]")


def test_the_hook_sees_every_text_before_it_is_stored(url: str, tmp_path: Path) -> None:
    tokens = {
        "prompt_ids": (1,),
        "completion_ids": (2, 3),
        "logps": (-0.1, -0.2),
        "sampled_logps": (-0.1, -0.1),
    }
    chat = [{"role": "user", "content": [{"type": "text", "text": f"I am {SECRET}"}]}]
    with Store.open(url, redact=hide) as store:
        store.record_shown(
            shown("r1", "ada", prompt=chat, **tokens),
            shown("r2", "ada", text=f"hello {SECRET}", **tokens),
            shown("r3", "ada", **tokens),
        )
        kept = store.add_vote(
            Vote(response_id="r3", kind="edit", value=f"{SECRET}!", comment=f"{SECRET}?", user="ada"), key="k"
        )
        assert (kept.vote.value, kept.vote.comment) == ("[...]!", "[...]?")
        again = Vote(response_id="r3", kind="edit", value=f"{SECRET}!", comment=f"{SECRET}?", user="ada")
        assert store.add_vote(again, key="k").vote == kept.vote
        found = store.shown_among(["r1", "r2", "r3"])
        assert found["r1"].prompt == [{"role": "user", "content": [{"type": "text", "text": "I am [...]"}]}]
        assert found["r2"].text == "hello [...]"
        # tokens would tell what was taken out
        assert found["r1"].prompt_ids == found["r1"].logps == found["r2"].completion_ids == ()
        assert found["r2"].sampled_logps == ()
        assert found["r3"].completion_ids == (2, 3)
    if url.startswith("sqlite"):
        held = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        assert SECRET.encode() not in held


def test_a_hook_that_fails_stores_nothing(url: str) -> None:
    def broken(text: str) -> Any:
        raise RuntimeError("no connection to the redactor")

    with Store.open(url, redact=broken) as store, pytest.raises(RuntimeError, match="no connection"):
        store.record_shown(shown("r1", "ada"))
    with Store.open(url, redact=lambda text: None) as store:  # type: ignore[arg-type, return-value]
        with pytest.raises(ValueError, match="must return a text, got NoneType"):
            store.record_shown(shown("r1", "ada"))
        assert store.shown("r1") is None


@pytest.mark.parametrize("name", ["textwrap", "textwrap:nothing", "no.module:f", "textwrap:__name__"])
def test_hooks_that_are_not_there(name: str) -> None:
    with pytest.raises(ValueError, match="redact"):
        load_redact(name)
