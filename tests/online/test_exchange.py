"""Votes out and in: TRL's formats there and back, OpenInference's names, Open WebUI's and Argilla's exports.

exports/openwebui.json is written after backend/open_webui/models/feedbacks.py (033ac2e) and what its page downloads;
exports/argilla.json after `records.to_list(flatten=False)`, argilla/src/argilla/records/_io/_generic.py (02e0d37).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignfast.data import DataError, load_rows
from alignfast.online.feedback import Shown, Vote
from alignfast.online.store import Store
from alignfast.online.store.export import export_rows
from alignfast.online.store.foreign import argilla
from alignfast.online.store.import_ import Imported, import_file

EXPORTS = Path(__file__).with_name("exports")
CHAT = [{"role": "user", "content": "2 + 2?"}]


def fill(store: Store, prompt: Any = "2 + 2 =") -> None:
    """A pair, a tie, a ranking with a tie and one without, an edit, thumbs, ratings, a conversation, a hint."""
    fields = {"prompt": prompt, "policy_version": "p1"}
    for group, ids in (("g1", "ab"), ("g2", "cd"), ("g3", "efg"), ("g4", "hij")):
        store.record_shown(*(Shown(id=id, text=f"answer {id}", group_id=group, **fields) for id in ids))
    store.record_shown(
        *(Shown(id=f"t{i}", text=f"turn {i}", episode_id="e", turn=i, **fields) for i in (0, 1))
    )
    for number, (id, kind, value) in enumerate(
        [
            ("a", "pair", "b"),
            ("c", "pair", "tie"),
            ("e", "ranking", ["g", ["e", "f"]]),
            ("h", "ranking", ["i", "h", "j"]),
            ("a", "edit", "4"),
            ("b", "thumb", "down"),
            ("c", "rating", 4),
            ("d", "rating", 3),
            ("e", "implicit", "copy"),
        ]
    ):
        vote = {"id": f"v{number}", "created": float(number), "comment": "hm" if kind == "thumb" else ""}
        store.add_vote(Vote(response_id=id, kind=kind, value=value, user="ada", **vote))  # type: ignore[arg-type]
    store.add_vote(Vote(id="v9", created=9.0, episode_id="e", kind="thumb", value="up", user="bob"))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Out


@pytest.mark.parametrize("prompt", ["2 + 2 =", CHAT])
def test_pairs_in_trls_format(store: Store, prompt: Any, tmp_path: Path) -> None:
    fill(store, prompt)
    rows = export_rows(store, "pairs")

    def text(answer: Any) -> str:
        return answer if isinstance(prompt, str) else answer[0]["content"]

    assert [(text(row["chosen"]), text(row["rejected"]), row["feedback_ids"]) for row in rows] == [
        ("answer b", "answer a", ["v0"]),
        ("answer g", "answer e", ["v2"]),
        ("answer g", "answer f", ["v2"]),
        ("answer i", "answer h", ["v3"]),
        ("answer i", "answer j", ["v3"]),
        ("answer h", "answer j", ["v3"]),
        ("4", "answer a", ["v4"]),
    ]
    assert rows[0]["response_ids"] == ["a", "b"]
    assert all("user" not in row for row in rows)
    read = load_rows(write(tmp_path / "pairs.jsonl", rows))
    assert (read.format, read.conversational, len(read)) == ("preference", not isinstance(prompt, str), 7)


def test_thumbs_in_trls_format(store: Store, tmp_path: Path) -> None:
    fill(store)
    rows = export_rows(store, "kto", with_users=True)
    assert [(row["completion"], row["label"], row["weight"], row["user"]) for row in rows] == [
        ("answer b", False, 1.0, "ada"),
        ("answer c", True, 1.0, "ada"),
        ("turn 0", True, 0.5, "bob"),
        ("turn 1", True, 0.5, "bob"),
    ]
    assert load_rows(write(tmp_path / "kto.jsonl", rows)).format == "thumbs"


def test_rankings(store: Store, tmp_path: Path) -> None:
    fill(store)
    rows = export_rows(store, "ranking")
    assert [row["ranking"] for row in rows] == [["answer i", "answer h", "answer j"]]
    assert load_rows(write(tmp_path / "ranking.jsonl", rows)).format == "ranking"


def test_openinference_names(store: Store) -> None:
    fill(store)
    spans = {row["span_id"]: row for row in export_rows(store, "openinference", with_users=True)}
    # what no vote names has no span; a conversation's vote is on its last turn
    assert sorted(spans) == ["a", "b", "c", "d", "e", "h", "t1"]
    attributes = spans["b"]["attributes"]
    assert attributes["openinference.span.kind"] == "LLM"
    assert attributes["llm.model_name"] == "p1"
    assert attributes["llm.input_messages.0.message.role"] == "user"
    assert attributes["llm.input_messages.0.message.content"] == "2 + 2 ="
    assert attributes["llm.output_messages.0.message.content"] == "answer b"
    place = "annotations.0.annotation"
    found = {name.removeprefix(f"{place}."): v for name, v in attributes.items() if name.startswith(place)}
    assert json.loads(found.pop("metadata")) == {"created": 5.0, "user": "ada"}
    assert found == {
        "name": "thumb",
        "annotator_kind": "HUMAN",
        "identifier": "v5",
        "label": "down",
        "score": 0.0,
        "explanation": "hm",
    }
    both = spans["a"]["attributes"]
    assert (both[f"{place}.name"], both["annotations.1.annotation.name"]) == ("pair", "edit")
    assert (both[f"{place}.label"], both[f"{place}.score"]) == ("rejected", 0.0)
    assert json.loads(both["annotations.1.annotation.metadata"])["edit"] == "4"
    assert spans["h"]["attributes"][f"{place}.score"] == 2.0  # its place
    assert spans["t1"]["attributes"]["session.annotations.0.annotation.label"] == "up"
    assert spans["t1"]["attributes"]["session.id"] == "e"
    # the specification's rule: a name, and one of score, label and explanation
    for span in spans.values():
        names = {name.rsplit(".", 1)[0] for name in span["attributes"] if ".annotation." in name}
        assert names
        for one in names:
            assert f"{one}.name" in span["attributes"]
            assert {f"{one}.score", f"{one}.label", f"{one}.explanation"} & span["attributes"].keys()


def test_only_what_counts_is_exported(store: Store) -> None:
    for id in ("r1", "r2"):
        store.record_shown(Shown(id=id, prompt="2 + 2 =", text=" 4"))
    for number, (id, value) in enumerate([("r1", "down"), ("r1", "up"), ("r2", "down")]):
        store.add_vote(Vote(response_id=id, kind="thumb", value=value, user="ada", created=float(number)))
    assert [row["label"] for row in export_rows(store, "kto", repeats=True)] == [True, False]
    assert [row["label"] for row in export_rows(store, "kto")] == [False]  # the same words: the last vote
    assert [row["label"] for row in export_rows(store, "kto", until=2.0)] == [True]
    with pytest.raises(ValueError, match="format must be one of pairs, kto"):
        export_rows(store, "csv")  # type: ignore[arg-type]


# There and back


@pytest.mark.parametrize("prompt", ["2 + 2 =", CHAT])
@pytest.mark.parametrize("format", ["pairs", "kto", "ranking"])
def test_what_is_exported_comes_back(format: Any, prompt: Any, tmp_path: Path) -> None:
    columns = ("prompt", "chosen", "rejected", "completion", "label", "ranking", "user")

    def essence(store: Store) -> list[str]:
        rows = export_rows(store, format, with_users=True)
        return sorted(json.dumps([row.get(column) for column in columns]) for row in rows)

    with Store.open(f"sqlite:///{tmp_path}/a.db") as one, Store.open(f"sqlite:///{tmp_path}/b.db") as other:
        fill(one, prompt)
        rows = export_rows(one, format, with_users=True)
        file = write(tmp_path / "rows.jsonl", rows)
        assert import_file(other, file, "trl") == Imported(len(rows), len(rows), 0, 0)
        assert essence(other) == essence(one)
        assert import_file(other, file, "trl") == Imported(len(rows), 0, len(rows), 0)
        assert essence(other) == essence(one)


def test_bad_rows_end_an_import_before_it_stores_anything(store: Store, tmp_path: Path) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    messages = [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [good, {**good, "rejected": ""}, {**good, "chosen": "c"}]
    file = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match="line 2: column 'rejected' is empty"):
        import_file(store, file, "trl")
    assert store.votes() == []
    found = import_file(store, file, "trl", skip_bad=True, user="cleo")
    assert (found.rows, found.votes) == (3, 1)
    assert [place.rpartition(", ")[2] for place, _ in found.skipped] == ["line 2", "line 3"]
    assert "nothing is preferred" in found.skipped[1][1]
    assert [vote.user for vote in store.votes()] == ["cleo"]
    chats = {"prompt": CHAT, "chosen": messages, "rejected": messages[:1]}
    with pytest.raises(DataError, match="holds 2 messages"):
        import_file(store, write(tmp_path / "chats.jsonl", [chats]), "trl")


# Open WebUI


def test_open_webui(store: Store) -> None:
    assert import_file(store, EXPORTS / "openwebui.json", "openwebui") == Imported(3, 3, 0, 1)
    up, down, pair = store.judged(store.votes())
    assert (up.vote.kind, up.vote.value, up.vote.comment) == ("thumb", "up", "helpful")
    assert up.vote.user == "openwebui:11111111-0000-4000-8000-000000000001"
    assert up.answer.text == "6"
    assert up.answer.prompt == [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "And 3 + 3?"},
    ]
    assert (up.answer.policy_version, up.answer.user, up.answer.created) == (
        "small",
        up.vote.user,
        1704067130.0,
    )
    assert (down.vote.value, down.vote.comment, down.vote.created) == ("down", "wrong sum", 1704068200.0)
    # against the other model's answer too, as Open WebUI's leaderboard counts it
    (row,) = export_rows(store, "pairs")
    assert (pair.vote.kind, row["chosen"][0]["content"], row["rejected"][0]["content"]) == (
        "pair",
        "10",
        "11",
    )
    assert import_file(store, EXPORTS / "openwebui.json", "openwebui") == Imported(3, 0, 3, 1)
    assert store.delete_user(up.vote.user).responses == 1


def test_open_webui_rated_again(store: Store, tmp_path: Path) -> None:
    """The same feedback with a later time: the last one counts, whatever the order of the files' rows."""
    (first, *_) = json.loads((EXPORTS / "openwebui.json").read_text())
    again = {**first, "data": {**first["data"], "rating": -1}, "updated_at": first["updated_at"] + 60}
    (tmp_path / "again.json").write_text(json.dumps([again, first]))
    import_file(store, tmp_path / "again.json", "openwebui")
    assert [vote.value for vote in store.votes()] == ["down"]
    assert [vote.value for vote in store.votes(current=False)] == ["up", "down"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"snapshot": None}, "the snapshot lacks the answer 'm4'"),
        ({"data": {"rating": 7}}, "data.rating must be 1 or -1, got 7"),
        ({"meta": {"message_id": "m3"}}, "the snapshot lacks the answer 'm3'"),
        (
            {"snapshot": {"chat": {"chat": {"history": {"messages": {"m4": {"id": "m4"}}}}}}},
            "lacks the answer",
        ),
        ({"user_id": 3, "created_at": None, "updated_at": None}, "not shaped as openwebui exports it"),
    ],
)
def test_open_webui_rows_that_will_not_do(
    store: Store, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    (first, *_) = json.loads((EXPORTS / "openwebui.json").read_text())
    (tmp_path / "bad.json").write_text(json.dumps([{**first, **change}]))
    with pytest.raises(DataError, match=said):
        import_file(store, tmp_path / "bad.json", "openwebui")


# Argilla


def test_argilla(store: Store) -> None:
    assert import_file(store, EXPORTS / "argilla.json", "argilla") == Imported(4, 5, 0, 1)
    said = {
        (one.vote.kind, one.vote.user[-1]): (
            one.answers[0].prompt,
            one.vote.body["value"],
            {shown.id: shown.text for shown in one.answers},
        )
        for one in store.judged(store.votes())
    }

    def texts(kind: str, user: str) -> Any:
        _, value, names = said[kind, user]
        return (
            [sorted(names[id] for id in place) for place in value]
            if kind == "ranking"
            else names.get(value, value)
        )

    assert texts("ranking", "1") == [["4", "four"], ["5"]]
    assert texts("ranking", "2") == [["four"], ["4"], ["5"]]
    assert texts("pair", "1") == "7"
    assert texts("pair", "2") == "tie"
    assert said["rating", "1"][:2] == ("What is 4 + 4?", 5)
    assert import_file(store, EXPORTS / "argilla.json", "argilla") == Imported(4, 0, 5, 1)


def test_argilla_flat_records(store: Store, tmp_path: Path) -> None:
    """As `to_datasets` and `to_list(flatten=True)` have them, with the state of each response."""
    flat = {
        "id": "rec-1",
        "prompt": "What is 2 + 2?",
        "completion": "4",
        "_server_id": "s1",
        "status": "completed",
        "score.responses": [7, 1, 4],
        "score.responses.users": ["u1", "u2", "u3"],
        "score.responses.status": ["submitted", "draft", "submitted"],
        "score.suggestion": 3,
    }
    file = write(tmp_path / "flat.jsonl", [flat])
    with pytest.raises(DataError, match="has the rating 7; expected 1 to 5"):
        import_file(store, file, "argilla")
    assert import_file(store, file, "argilla", rating_max=7).votes == 2
    assert [(vote.user, vote.value) for vote in store.votes()] == [("argilla:u1", 5), ("argilla:u3", 3)]


@pytest.mark.parametrize(
    ("fields", "value", "said"),
    [
        ({"text": "a", "label": "b"}, 3, "no field is the prompt among text, label"),
        ({"prompt": "a", "text": "b"}, 3, "no field is an answer among prompt, text"),
        ({"prompt": "a", "answer": "b"}, "good", "says 'good' of 1 answers"),
        ({"prompt": "a", "answer1": "b", "answer2": "c"}, "answer-3", "none of the answers answer1, answer2"),
        ({"prompt": "a", "answer1": "b", "answer2": "c"}, 3, "says 3 of 2 answers"),
    ],
)
def test_argilla_records_that_can_not_be_made_out(fields: dict[str, str], value: Any, said: str) -> None:
    row = {"id": "x", "fields": fields, "responses": {"q": [{"value": value, "user_id": "u"}]}}
    with pytest.raises(ValueError, match=said):
        argilla(row)


def test_argilla_fields_by_name() -> None:
    row = {"id": "x", "fields": {"ask": "a", "left": "b", "right": "c"}, "responses": {}}
    row["responses"] = {"q": [{"value": "Right", "user_id": "u"}]}
    found = argilla(row, prompt_field="ask", answer_fields=("left", "right"))
    assert [(shown.prompt, shown.text) for shown in found.shown] == [("a", "b"), ("a", "c")]
    assert found.votes[0].value == found.shown[1].id
