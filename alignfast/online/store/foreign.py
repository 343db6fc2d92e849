"""Rows of Open WebUI's and Argilla's exports as answers and votes.

Open WebUI (Admin > Evaluations > Feedbacks > Export; backend/open_webui/models/feedbacks.py, read at 033ac2e): a JSON
array of {id, user_id, type, data{rating 1|-1, sibling_model_ids, reason, comment}, meta{message_id, chat_id, arena},
snapshot{chat{chat{history{messages{id: {parentId, childrenIds, role, content, model}}}}}}, created_at, updated_at}. A
rating is a thumb. Where other models answered the same message it is a comparison with them too, as in its leaderboard.

Argilla 2 (`records.to_json`, `to_list`, `to_datasets`; argilla/src/argilla/records, read at 0b73b3f): nested
{id, fields{...}, responses{question: [{value, user_id}]}}, or flat {field: ..., "question.responses": [...],
"question.responses.users": [...], "question.responses.status": [...]}. A whole number is a rating, a list of
{value, rank} a ranking, the name of one of two answers a pair.

Not done here: Argilla's text and span questions, suggestions, and drafts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from alignfast.online.feedback import Shown, Vote
from alignfast.online.store.import_ import BadRow, Read, compared

_PROMPTS = ("prompt", "instruction", "question", "input", "messages", "chat")
_ANSWERS = ("response", "completion", "answer", "generation", "output", "chosen", "rejected")


# Open WebUI


def openwebui(row: dict[str, Any]) -> Read:
    """The thumb of one feedback, and the comparison that it is too.

    Raises:
        BadRow: its message is not in the snapshot, or the rating is none.
    """
    data, meta = row.get("data") or {}, row.get("meta") or {}
    if row.get("type") not in ("rating", None) or data.get("rating") in (None, ""):
        return Read([], [])
    rating = str(data["rating"])
    if rating not in ("1", "-1"):
        raise BadRow(f"data.rating must be 1 or -1, got {data['rating']!r}")
    messages = _messages(row)
    message = messages.get(str(meta.get("message_id")))
    if message is None or message.get("role") != "assistant":
        raise BadRow(
            f"the snapshot lacks the answer {meta.get('message_id')!r}; export feedback with its conversations"
        )
    user = f"openwebui:{row['user_id']}"
    # An answer that was rated again comes with the same id and a later time: it is another vote, and the last.
    changed = row.get("updated_at") or row["created_at"]
    key, created = f"openwebui-{row['id']}-{changed}", float(changed)
    prompt = _path_to(messages, message.get("parentId"))
    comment = data.get("comment") or data.get("reason") or ""
    shown = Shown(
        id=f"openwebui-{meta['message_id']}",
        prompt=prompt,
        text=message["content"],
        created=float(message.get("timestamp") or created),
        user=user,
        policy_version=str(data.get("model_id") or message.get("model") or ""),
    )
    value = "up" if rating == "1" else "down"
    thumb = Vote(
        id=key, response_id=shown.id, kind="thumb", value=value, comment=comment, user=user, created=created
    )
    found = Read([shown], [thumb])
    siblings = _siblings(messages, message) if data.get("sibling_model_ids") else []
    if siblings:
        others = list(range(1, len(siblings) + 1))
        places = [[0], others] if value == "up" else [others, [0]]
        more = compared(f"{key}-beside", prompt, [shown.text, *siblings], places, user, created=created)
        found = Read([*found.shown, *more.shown], [*found.votes, *more.votes])
    return found


def _messages(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The conversation's messages by id."""
    chat = (row.get("snapshot") or {}).get("chat") or {}
    chat = chat.get("chat") or chat
    messages = (chat.get("history") or {}).get("messages") or chat.get("messages") or {}
    found = messages.values() if isinstance(messages, Mapping) else messages
    return {str(message["id"]): message for message in found}


def _path_to(messages: dict[str, dict[str, Any]], id: str | None) -> list[dict[str, Any]]:
    """The turns from the first one to this."""
    turns: list[dict[str, Any]] = []
    seen: set[str] = set()
    while id is not None and id in messages and id not in seen:
        seen.add(id)
        turns.insert(0, {"role": messages[id]["role"], "content": messages[id]["content"]})
        id = messages[id].get("parentId")
    if not turns:
        raise BadRow("the answer's question is not in the snapshot")
    return turns


def _siblings(messages: dict[str, dict[str, Any]], message: dict[str, Any]) -> list[str]:
    """Other answers to the same question."""
    parent = messages.get(str(message.get("parentId")), {})
    others = [messages[id] for id in parent.get("childrenIds", []) if id in messages and id != message["id"]]
    return [one["content"] for one in others if one.get("role") == "assistant" and one.get("content")]


# Argilla


def argilla(
    row: dict[str, Any],
    *,
    rating_max: int = 5,
    prompt_field: str | None = None,
    answer_fields: tuple[str, ...] = (),
) -> Read:
    """The votes of all annotators on one record.

    Raises:
        BadRow: prompt, answers or a response can't be made out.
    """
    fields, responses = (row["fields"], row["responses"]) if "responses" in row else _nested(row)
    prompt_name = prompt_field or next((name for name in _PROMPTS if name in fields), None)
    if prompt_name is None or prompt_name not in fields:
        raise BadRow(f"no field is the prompt among {', '.join(fields)}: name it with prompt_field")
    names = answer_fields or tuple(
        n for n in fields if n != prompt_name and n.lower().startswith(_ANSWERS) and fields[n]
    )
    if not names or not set(names) <= set(fields):
        raise BadRow(f"no field is an answer among {', '.join(fields)}: name them with answer_fields")
    shown, votes = [], []
    for question, given in (responses or {}).items():
        for response in given:
            if response["value"] is None or response.get("status", "submitted") != "submitted":
                continue
            key = f"argilla-{row.get('id') or row['_server_id']}-{question}-{response['user_id']}"
            user = f"argilla:{response['user_id']}"
            read = _response(key, fields, prompt_name, names, question, response["value"], user, rating_max)
            shown += read.shown
            votes += read.votes
    return Read(shown, votes)


def _response(
    key: str,
    fields: dict[str, Any],
    prompt_name: str,
    names: tuple[str, ...],
    question: str,
    value: Any,
    user: str,
    rating_max: int,
) -> Read:
    texts = [fields[name] for name in names]
    if type(value) is int and len(names) == 1:
        if not 1 <= value <= rating_max:
            raise BadRow(
                f"question {question!r} has the rating {value}; expected 1 to {rating_max} (rating_max)"
            )
        shown = Shown(id=f"{key}-0", prompt=fields[prompt_name], text=texts[0], user=user)
        rating = 1 + round((value - 1) * 4 / (rating_max - 1))
        return Read([shown], [Vote(id=key, response_id=shown.id, kind="rating", value=rating, user=user)])
    if isinstance(value, str) and len(names) == 2:
        first = None if _plain(value) == "tie" else _answer_named(value, names, question)
        places = [[0, 1]] if first is None else [[first], [1 - first]]
        return compared(key, fields[prompt_name], texts, places, user)
    if (
        isinstance(value, list)
        and len(names) > 1
        and all(isinstance(item, dict) and "rank" in item for item in value)
    ):
        by_rank: dict[int, list[int]] = {}
        for item in value:
            by_rank.setdefault(item["rank"], []).append(_answer_named(item["value"], names, question))
        return compared(key, fields[prompt_name], texts, [by_rank[rank] for rank in sorted(by_rank)], user)
    raise BadRow(
        f"question {question!r} says {value!r} of {len(names)} answers ({', '.join(names)}): expected a rating of one, "
        "the name of the better of two, or a ranking"
    )


def _answer_named(value: str, names: tuple[str, ...], question: str) -> int:
    found = [i for i, name in enumerate(names) if _plain(name) == _plain(value)]
    if len(found) != 1:
        raise BadRow(
            f"question {question!r} names {value!r}, which is none of the answers {', '.join(names)}"
        )
    return found[0]


def _plain(name: str) -> str:
    """A name by which `response-1`, `response_1` and `Response 1` are the same."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _nested(row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields and responses of a flat record."""
    questions = [name.removesuffix(".responses") for name in row if name.endswith(".responses")]
    if not questions:
        raise BadRow(f"its columns ({', '.join(row)}) are no record of Argilla: there are no responses")
    responses = {}
    for question in questions:
        column = f"{question}.responses"
        values = row[column] or []
        users = row.get(f"{column}.users") or []
        status = row.get(f"{column}.status") or ["submitted"] * len(values)
        responses[question] = [
            {"value": value, "user_id": user, "status": state}
            for value, user, state in zip(values, users, status)
        ]
    fields = {
        name: value
        for name, value in row.items()
        if "." not in name and name not in ("id", "_server_id", "status")
    }
    return fields, responses
