"""Votes as rows of the formats that others read.

    pairs           prompt + chosen + rejected      TRL's preference format: pairs, rankings taken apart, edits
    kto             prompt + completion + label     TRL's unpaired format: thumbs; ratings but 3, above it true
    ranking         prompt + ranking                whole rankings without a tie
    openinference   a span a response               OpenInference's names, its votes as annotations

Every row names its `feedback_ids` and `response_ids`, by which deletions find it. Ties, hints, and answers without a
vote are in no training format: no vote is missing, not negative. A vote on a conversation is a row for each turn, with
the weight 1 / turns.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from alignfast.online.feedback import TIE, Judged, Kind, Shown, Vote
from alignfast.online.voters import distinct

if TYPE_CHECKING:
    from alignfast.online.store.store import Store

ExportFormat: TypeAlias = Literal["pairs", "kto", "ranking", "openinference"]
Row: TypeAlias = dict[str, Any]

_KINDS: dict[ExportFormat, tuple[Kind, ...]] = {
    "pairs": ("pair", "ranking", "edit"),
    "kto": ("thumb", "rating"),
    "ranking": ("ranking",),
}


def export_rows(
    store: Store,
    format: ExportFormat,
    *,
    since: float | None = None,
    until: float | None = None,
    with_users: bool = False,
    repeats: bool = False,
) -> list[Row]:
    """Current votes as rows.

    Args:
        store: that they are in.
        format: see this module.
        since: given then or later, in seconds since 1970.
        until: given before.
        with_users: name in each row who voted.
        repeats: keep all of a user's votes on the same words; else the last one.

    Raises:
        ValueError: the format is unknown.
    """
    if format not in get_args(ExportFormat):
        raise ValueError(f"format must be one of {', '.join(get_args(ExportFormat))}, got {format!r}")
    votes = store.votes(kinds=_KINDS.get(format), since=since, until=until)
    judged = store.judged(votes)
    if not repeats:
        judged = distinct(judged)
    return rows_of(judged, format, with_users=with_users)


def rows_of(judged: Iterable[Judged], format: ExportFormat, *, with_users: bool = False) -> list[Row]:
    """Votes as rows; those that the format has no place for are left out.

    Args:
        judged: the votes, with what they are about.
        format: see this module.
        with_users: name in each row who voted.
    """
    if format == "openinference":
        return list(_spans(judged, with_users))
    make: Callable[[Judged], Iterator[Row]] = {"pairs": _pairs, "kto": _thumbs, "ranking": _rankings}[format]
    found = [one for one in judged if one.vote.kind in _KINDS[format]]
    return [{**row, **_origin(one, with_users)} for one in found for row in make(one)]


def _origin(judged: Judged, with_users: bool) -> Row:
    row: Row = {
        "feedback_ids": [judged.vote.id],
        "response_ids": [shown.id for shown in judged.answers],
        "kind": judged.vote.kind,
    }
    return {**row, "user": judged.vote.user} if with_users else row


def _completion(shown: Shown, text: str) -> Any:
    """An answer in the shape of its prompt."""
    return text if isinstance(shown.prompt, str) else [{"role": "assistant", "content": text}]


def _pairs(judged: Judged) -> Iterator[Row]:
    for shown, better, worse in _preferences(judged):
        if better != worse:
            answers = {"chosen": _completion(shown, better), "rejected": _completion(shown, worse)}
            yield {"prompt": shown.prompt, **answers}


def _preferences(judged: Judged) -> Iterator[tuple[Shown, str, str]]:
    """The answer that gives the prompt, the better text, the worse one."""
    vote, texts = judged.vote, {shown.id: shown.text for shown in judged.answers}
    if vote.kind == "edit":
        yield judged.answer, vote.value, judged.answer.text
    elif vote.kind == "pair" and vote.value != TIE:
        (worse,) = texts.keys() - {vote.value}
        yield judged.answer, texts[vote.value], texts[worse]
    elif vote.kind == "ranking":
        for better, worse_place in combinations(vote.value, 2):
            for one in better:
                yield from ((judged.answer, texts[one], texts[other]) for other in worse_place)


def _thumbs(judged: Judged) -> Iterator[Row]:
    vote = judged.vote
    if vote.value == 3:
        return
    label = vote.value == "up" if vote.kind == "thumb" else vote.value > 3
    for shown in judged.answers:
        answer = {"prompt": shown.prompt, "completion": _completion(shown, shown.text)}
        yield {**answer, "label": label, "weight": 1 / len(judged.answers)}


def _rankings(judged: Judged) -> Iterator[Row]:
    if all(len(place) == 1 for place in judged.vote.value):
        shown, texts = judged.answer, {one.id: one.text for one in judged.answers}
        yield {
            "prompt": shown.prompt,
            "ranking": [_completion(shown, texts[id]) for (id,) in judged.vote.value],
        }


# OpenInference


def _spans(judged: Iterable[Judged], with_users: bool) -> Iterator[Row]:
    """Responses with all that is said of each: comparisons on the answer that the vote names, conversations on their
    last turn."""
    shown: dict[str, Shown] = {}
    said: dict[str, list[Judged]] = defaultdict(list)
    for one in judged:
        about = one.answers[-1] if one.vote.episode_id is not None else one.answer
        shown[about.id] = about
        said[about.id].append(one)
    for id, about in shown.items():
        attributes = _span_attributes(about)
        counts: dict[str, int] = defaultdict(int)
        for one in said[id]:
            prefix = "session.annotations" if one.vote.episode_id is not None else "annotations"
            place = f"{prefix}.{counts[prefix]}.annotation"
            counts[prefix] += 1
            found = _annotation(one, with_users).items()
            attributes.update({f"{place}.{name}": value for name, value in found})
        time = datetime.fromtimestamp(about.created, timezone.utc).isoformat()
        yield {
            "name": "chat",
            "span_id": id,
            "start_time": time,
            "attributes": attributes,
            "feedback_ids": [one.vote.id for one in said[id]],
            "response_ids": sorted({answer.id for one in said[id] for answer in one.answers}),
        }


def _span_attributes(shown: Shown) -> Row:
    prompt = [{"role": "user", "content": shown.prompt}] if isinstance(shown.prompt, str) else shown.prompt
    attributes: Row = {"openinference.span.kind": "LLM", "llm.model_name": shown.policy_version}
    for name, messages in (
        ("llm.input_messages", prompt),
        ("llm.output_messages", [{"role": "assistant", "content": shown.text}]),
    ):
        for place, message in enumerate(messages):
            for key in ("role", "content"):
                value = message.get(key) or ""
                attributes[f"{name}.{place}.message.{key}"] = (
                    value if isinstance(value, str) else json.dumps(value)
                )
    attributes["output.value"] = shown.text
    attributes["llm.invocation_parameters"] = json.dumps(shown.sampling, sort_keys=True)
    if shown.completion_ids:
        attributes["llm.token_count.prompt"] = len(shown.prompt_ids)
        attributes["llm.token_count.completion"] = len(shown.completion_ids)
    if shown.episode_id is not None:
        attributes["session.id"] = shown.episode_id
    attributes["metadata"] = json.dumps({"weights_hash": shown.weights_hash, "group_id": shown.group_id})
    return attributes


def _annotation(judged: Judged, with_users: bool) -> Row:
    vote = judged.vote
    metadata = {"created": vote.created, **({"user": vote.user} if with_users else {})}
    if vote.kind == "edit":
        metadata["edit"] = vote.value
    elif vote.slot == "comparison":
        metadata["compared"] = [shown.id for shown in judged.answers]
        metadata["value"] = vote.body["value"]
    row: Row = {"name": vote.kind, "annotator_kind": "HUMAN", "identifier": vote.id}
    label, score = _label_and_score(vote)
    row.update({"label": label} if label else {}, **({} if score is None else {"score": score}))
    if vote.comment:
        row["explanation"] = vote.comment
    row["metadata"] = json.dumps(metadata)
    return row


def _label_and_score(vote: Vote) -> tuple[str, float | None]:
    if vote.kind == "thumb":
        return vote.value, float(vote.value == "up")
    if vote.kind == "rating":
        return "", float(vote.value)
    if vote.kind == "pair":
        return ("tie", 0.5) if vote.value == TIE else _won(vote.value == vote.response_id)
    if vote.kind == "ranking":  # its place, the best first
        place = next((i for i, ids in enumerate(vote.value, 1) if vote.response_id in ids), None)
        return "ranked", None if place is None else float(place)
    return ("edited", None) if vote.kind == "edit" else (vote.value, None)


def _won(chosen: bool) -> tuple[str, float]:
    return ("chosen", 1.0) if chosen else ("rejected", 0.0)
