"""The queue of the labelling page: an annotator asks for the next prompt, and ranks its answers by an ordinary vote.

GET /v1/label/next   POST /v1/label/skip {"item"}      with an annotator's or an admin's key
GET /v1/label/agreement                                with an admin's

An item's answers are drawn when it is first asked for, by the version that serves then, for nobody: an annotator may vote
on them because they were given the item. Each annotator sees them in an order of their own, always the same one.
"""

from __future__ import annotations

import random
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from alignfast.online.feedback import Prompt, Shown
from alignfast.online.server.errors import ApiError
from alignfast.online.server.generate import begin, make_job
from alignfast.online.server.guard import Caller, require
from alignfast.online.server.schema import ChatRequest, SkipRequest
from alignfast.online.server.service import Service, service_of
from alignfast.online.store.labels import Item

QUEUE = "label-queue"  # whose the answers are

router = APIRouter()


@router.get("/v1/label/next", response_model=None)
async def following(request: Request) -> Response:
    """The item that the annotator ranks now, with its answers; 204 where none is left, 404 where there is no queue."""
    user, service = require(request, "annotator", "admin").user, service_of(request)
    labels, overlap = service.store.labels, service.limits.label_overlap
    item = await service.in_store(lambda: labels.next(user, overlap))
    if item is None:
        if not await service.in_store(labels.any):
            raise ApiError(404, "there is no queue: alignfast serve --label prompts.jsonl")
        return Response(status_code=204)
    answers = await _answers(service, item)
    random.Random(f"{user}|{item.id}").shuffle(answers)
    left = await service.in_store(lambda: labels.left(user, overlap))
    told = [{"id": one.id, "text": one.text} for one in answers]
    return JSONResponse(
        {"object": "label.item", "item": item.id, "prompt": item.prompt, "answers": told, "left": left}
    )


@router.post("/v1/label/skip")
async def skip(request: Request, body: SkipRequest) -> dict[str, Any]:
    """Give an item back, for another annotator."""
    user, service = require(request, "annotator", "admin").user, service_of(request)
    try:
        await service.in_store(lambda: service.store.labels.skip(body.item, user))
    except ValueError as error:
        raise ApiError(404, str(error), param="item") from error
    return {"object": "label.item", "item": body.item, "skipped": True}


@router.get("/v1/label/agreement")
async def agreement(request: Request) -> dict[str, Any]:
    """How far the queue is, and how far its annotators agree."""
    require(request, "admin")
    service = service_of(request)
    overlap = service.limits.label_overlap
    found = await service.in_store(lambda: service.store.labels.stats(overlap))
    return {"object": "label.agreement", "overlap": overlap, **found.to_dict()}


def request_of(prompt: Prompt, model: str, n: int) -> ChatRequest:
    """The request for the answers to a prompt of the queue; a text is a user's message.

    Raises:
        ValueError: there is something in its messages that is not served.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return ChatRequest.model_validate({"model": model, "messages": turns, "n": n})


async def _answers(service: Service, item: Item) -> list[Shown]:
    """The answers of an item, drawn where there are none."""
    if found := await _kept(service, item.group_id):
        return found
    async with service.drawing:  # two annotators may ask at once
        labels = service.store.labels
        group_id = await service.in_store(lambda: labels.group_of(item.id))
        if found := await _kept(service, group_id):
            return found
        drawn = await _draw(service, item)
        return await _kept(service, await service.in_store(lambda: labels.drawn(item.id, drawn)))


async def _kept(service: Service, group_id: str | None) -> list[Shown]:
    return [] if group_id is None else await service.in_store(lambda: service.store.group(group_id))


async def _draw(service: Service, item: Item) -> str:
    """The group of fresh answers to an item's prompt."""
    body = request_of(item.prompt, service.name, service.limits.label_answers)
    answering = begin(service, await make_job(service, body, Caller(QUEUE)))
    await answering.whole()
    first = await service.in_store(lambda: service.store.shown(answering.choices[0].response_id))
    assert first is not None
    assert first.group_id is not None, "several answers to one prompt are a group"
    return first.group_id
