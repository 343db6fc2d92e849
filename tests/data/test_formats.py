"""Every format from every source, and for every kind of bad row an error with file, row and reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from alignfast.data import DataError, load_rows
from alignfast.data.formats import scan


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


EXAMPLES = {
    "text": ({"text": "ab"}, None),
    "messages": (None, {"messages": [user("a"), assistant("b")]}),
    "prompt_completion": (
        {"prompt": "a", "completion": "b"},
        {"prompt": [user("a")], "completion": [assistant("b")]},
    ),
    "preference": (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
    ),
    "thumbs": (
        {"prompt": "a", "completion": "b", "label": False},
        {"prompt": [user("a")], "completion": [assistant("b")], "label": True},
    ),
    "ranking": (
        {"prompt": "a", "ranking": ["b", "c", "d"]},
        {"prompt": [user("a")], "ranking": [[assistant("b")], [assistant("c")]]},
    ),
}
ROWS = [
    (format, bool(kind), row)
    for format, rows in EXAMPLES.items()
    for kind, row in enumerate(rows)
    if row is not None
]


def write_lines(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.mark.parametrize(("format", "conversational", "row"), ROWS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset", "list"])
def test_each_format_from_each_source(
    format: str, conversational: bool, row: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    row = {**row, "source": "forum"}  # a column of the user's own
    source: Any = [row, row]
    if kind == "jsonl":
        source = str(write_lines(tmp_path / "rows.jsonl", row, row))
    if kind == "parquet":
        source = tmp_path / "rows.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), source)
    if kind == "dataset":
        source = datasets.Dataset.from_list([row, row])
    rows = load_rows(source)
    assert (rows.format, rows.conversational, len(rows)) == (format, conversational, 2)
    assert rows[1] == row


def test_tuples_are_prompt_preferred_dispreferred() -> None:
    rows = load_rows([("Prompt 1", "Preferred", "Dispreferred")])
    assert rows[0] == {"prompt": "Prompt 1", "chosen": "Preferred", "rejected": "Dispreferred"}


def test_empty_lines_and_a_byte_order_mark_are_no_rows_but_count_as_lines(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", b"\xef\xbb\xbf" + b'{"text": "a"}', b"", b'{"text": "b"}')
    rows = load_rows(path)
    assert [row["text"] for row in rows] == ["a", "b"]
    assert rows.where(1) == f"{path}, line 3"


# Expected values: TRL 1.16's extract_prompt on the same rows.
@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        (
            "\n\nHuman: hi\n\nAssistant: I can.",
            "\n\nHuman: hi\n\nAssistant: No.",
            "\n\nHuman: hi\n\nAssistant:",
        ),
        ("the cat", "the cow", "the c"),  # the border may fall into a word
        ("ab", "abc", "a"),  # one begins the other: the last common character stays with the answers
        ("same", "same", "sam"),
        (
            [user("a"), assistant("b"), user("c"), assistant("d")],
            [user("a"), assistant("b"), user("c"), assistant("e")],
            [user("a"), assistant("b"), user("c")],
        ),
    ],
)
def test_implicit_prompts_are_split_off_where_trl_does(chosen: Any, rejected: Any, prompt: Any) -> None:
    row = load_rows([{"chosen": chosen, "rejected": rejected, "id": 3}])[0]
    assert row["prompt"] == prompt
    assert (prompt + row["chosen"], prompt + row["rejected"], row["id"]) == (chosen, rejected, 3)


def test_answers_that_begin_apart_have_an_empty_prompt() -> None:
    # TRL looks at the character before the first and takes the last one: a trailing space there moves the border.
    assert load_rows([{"chosen": "yes ", "rejected": "no"}])[0]["prompt"] == ""


def test_a_string_prompt_beside_conversations_that_hold_it_is_replaced() -> None:
    row = {"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}
    assert load_rows([row])[0]["prompt"] == [user("a")]


GOOD = {"prompt": "a", "completion": "b"}
CHAT = {"messages": [user("a"), assistant("b")]}


@pytest.mark.parametrize(
    ("first", "bad", "reason"),
    [
        (GOOD, b'{"prompt": "a", "compl', "bad JSON"),
        (GOOD, b'{"prompt": "\xff", "completion": "b"}', "invalid UTF-8: byte 0xff at 12"),
        (
            GOOD,
            b'{"prompt": "\\ud83d", "completion": "b"}',
            "invalid UTF-8: prompt has the lone surrogate U\\+D83D",
        ),
        (GOOD, ["a", "b"], "expected one JSON object a line, got list"),
        (GOOD, {"prompt": "a"}, "column 'completion' is missing"),
        (GOOD, {"prompt": "a", "completion": None}, "column 'completion' is missing a value"),
        (GOOD, {"prompt": "a", "completion": ""}, "column 'completion' is empty"),
        (
            GOOD,
            {"prompt": "a", "completion": 3},
            "'completion' must be a string like the first row's, got int 3",
        ),
        (GOOD, {"prompt": 1, "completion": "b"}, "'prompt' must be a string"),
        (GOOD, {**GOOD, "images": ["x.png"]}, "column 'images' holds images"),
        (GOOD, {**GOOD, "image": "x.png"}, "column 'image' holds images"),
        (GOOD, b'{"prompt": "a", "completion": ' + b"1" * 5000 + b"}", "bad JSON: .*4300 digits"),
        (GOOD, b"[" * 100_000, "bad JSON: it is nested too deeply"),
        (GOOD, b"[", "bad JSON: .*; expected one object a line"),
        (CHAT, {"messages": "ab"}, "must be a list of messages like the first row's, got str"),
        (CHAT, {"messages": []}, "column 'messages' is empty"),
        (CHAT, {"messages": [user("a"), assistant("")]}, "column 'messages' is empty"),
        (
            {"prompt": [user("a")], "completion": [assistant("b")]},
            {"prompt": [user("a")], "completion": [assistant([{"type": "text", "text": ""}])]},
            "column 'completion' is empty",
        ),
        (CHAT, {"messages": [user("a"), {"content": "b"}]}, r"messages\[1\] must be a message with 'role'"),
        (CHAT, {"messages": [user("a"), {"role": "assistant"}]}, r"messages\[1\] has content NoneType None"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}]},
            r"messages\[0\] holds a block that is no text",
        ),
        ({**GOOD, "label": True}, {**GOOD, "label": 1}, "column 'label' must be true or false, got 1"),
        ({"prompt": "a", "ranking": ["b", "c"]}, {"prompt": "a", "ranking": ["b"]}, "must list 2 or more"),
        (
            {"prompt": "a", "ranking": ["b", "c"]},
            {"prompt": "a", "ranking": ["b", ""]},
            r"'ranking\[1\]' is empty",
        ),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
            {"chosen": [user("a"), assistant("b")], "rejected": [user("x"), assistant("c")]},
            "do not start with the same message",
        ),
    ],
)
def test_a_bad_row_is_an_error_that_names_file_row_and_reason(
    first: Any, bad: Any, reason: str, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", first, bad, first)
    with pytest.raises(DataError, match=f"^{path}, line 2: .*{reason}"):
        load_rows(path)
    rows, found = scan(path)  # the check goes on after it
    assert (len(rows), [where for where, _ in found]) == (2, [f"{path}, line 2"])


def test_the_first_row_may_be_bad_too(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 1: its columns \(question, answer\) are no known format"):
        load_rows(write_lines(tmp_path / "rows.jsonl", {"question": "a", "answer": "b"}))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": 3}, "column 'text' must be a string, got int 3"),
        ({"text": [user("a")]}, "column 'text' must be a string, got list"),
        ({"messages": "a"}, "column 'messages' must be a list of messages, got str 'a'"),
        ({"prompt": 3, "completion": "b"}, "column 'prompt' must be a string or a list of messages, got int"),
        ({"text": None}, r"column 'text' is missing a value \(null\)"),
    ],
)
def test_a_first_row_of_a_wrong_type_is_not_compared_with_itself(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=f"index 0: {reason}"):
        load_rows([row])


@pytest.mark.parametrize("images", [None, [], "", [None]])
def test_an_empty_column_of_images_is_none(images: Any) -> None:
    assert len(load_rows([{**GOOD, "images": images, "image": None}])) == 1


def test_numpys_booleans_are_thumbs() -> None:
    rows = load_rows([{**GOOD, "label": np.True_}, {**GOOD, "label": np.False_}])
    assert rows.format == "thumbs"
    assert [row["label"] for row in rows] == [True, False]
    assert all(type(row["label"]) is bool for row in rows)


def test_a_label_that_is_no_thumb_is_a_column_of_the_users_own_but_the_check_asks() -> None:
    labelled = [{**GOOD, "label": 1}]
    assert load_rows(labelled).format == "prompt_completion"
    assert scan(labelled)[1][0][1].startswith("column 'label' must be true or false, got 1")


def test_a_json_file_may_hold_an_array(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([GOOD, GOOD], indent=2))
    assert list(load_rows(path)) == [GOOD, GOOD]
    path.write_text(json.dumps([GOOD, ["a"]]))
    with pytest.raises(DataError, match=r"rows\.json, index 1: expected a JSON object, got list"):
        load_rows(path)
    path.write_text("[\n{]")
    with pytest.raises(DataError, match=r"rows\.json: bad JSON: .* at line 2, column 2"):
        load_rows(path)
    write_lines(path, GOOD, GOOD)  # an object a line, as before
    assert load_rows(path).where(1) == f"{path}, line 2"


def test_invalid_utf8_in_parquet_is_named(tmp_path: Path) -> None:
    offsets = pyarrow.array([0, 2, 4], pyarrow.int32()).buffers()[1]
    column = pyarrow.Array.from_buffers(pyarrow.utf8(), 2, [None, offsets, pyarrow.py_buffer(b"ab\xffc")])
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    with pytest.raises(DataError, match=f"^{path}, row 2: invalid UTF-8: byte 0xff"):
        load_rows(path)


def test_what_is_no_parquet_is_said(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"rows\.parquet: can't be read as Parquet"):
        load_rows(tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "there are no rows"),
        (
            [("a", "b")],
            r"index 0: expected a dict or a \(prompt, preferred, dispreferred\) tuple, got 2 items",
        ),
        (["a"], "index 0: .* got str"),
        ("nowhere/rows.jsonl", r"nowhere/rows\.jsonl: there is no such file"),
    ],
)
def test_sources_that_hold_nothing(source: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(source)


def test_other_suffixes_and_types_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,completion\n")
    with pytest.raises(DataError, match=r"can't read \.csv; expected \.jsonl, \.json or \.parquet"):
        load_rows(tmp_path / "rows.csv")
    with pytest.raises(TypeError, match="got DatasetDict; pass one of its splits: test"):
        load_rows(datasets.DatasetDict({"test": datasets.Dataset.from_list([GOOD])}))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="without streaming=True"):
        load_rows(datasets.Dataset.from_list([GOOD]).to_iterable_dataset())  # type: ignore[arg-type]


def test_only_the_columns_of_the_formats_asked_for_are_looked_at() -> None:
    row = {"messages": [user("a"), assistant("b")], "chosen": "b", "rejected": ""}
    with pytest.raises(DataError, match="column 'rejected' is empty"):
        load_rows([row])
    assert load_rows([row], formats=["text", "messages"]).format == "messages"
    with pytest.raises(DataError, match=r"make no format that is taken here: prompt\+completion\+label"):
        load_rows([row], formats=["thumbs"])
    thumb = {"prompt": "a", "completion": "b", "label": 1}
    # no other format to fall back to
    with pytest.raises(DataError, match="'label' must be true or false, got 1"):
        load_rows([thumb], formats=["thumbs"])
