"""The loop's state, and its two buttons.

GET /v1/loop   POST /v1/loop/promote {"version": NAME}   POST /v1/loop/rollback {}
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from alignfast.online.feedback import SAID
from alignfast.online.server.errors import ApiError
from alignfast.online.server.guard import require
from alignfast.online.server.schema import Body, PromoteRequest
from alignfast.online.server.service import Service, service_of
from alignfast.online.server.watch import Watch
from alignfast.online.store import Run, Version
from alignfast.online.store.stats import Satisfaction, satisfaction

router = APIRouter()


@router.get("/v1/loop")
async def loop(request: Request) -> dict[str, Any]:
    """Versions with what people think of them, what serves, the canary, the queue of votes and the learner's run."""
    service, watch = service_of(request), _watch(request)
    return await service.in_store(lambda: _state(service, watch))


@router.post("/v1/loop/promote")
async def promote(request: Request, body: PromoteRequest) -> dict[str, Any]:
    """Have a policy serve; with an admin's key. What can't be loaded is not promoted."""
    require(request, "admin")
    service, watch = service_of(request), _watch(request)
    return await service.in_store(lambda: _promote(service, watch, body.version))


@router.post("/v1/loop/rollback")
async def rollback(request: Request, body: Body) -> dict[str, Any]:
    """Have the policy serve again that served before; with an admin's key."""
    require(request, "admin")
    service, watch = service_of(request), _watch(request)
    return await service.in_store(lambda: _roll_back(service, watch))


def _watch(request: Request) -> Watch:
    watch: Watch = request.app.state.watch
    return watch


def _state(service: Service, watch: Watch) -> dict[str, Any]:
    store, runner = service.store, service.runner
    found, runs = store.versions.all(), store.runs.all()
    thumbs, reward = satisfaction(store), store.versions.serving("reward")
    canary = next((one for one in found if one.status == "canary"), None)
    return {
        "object": "loop",
        "versions": [_version(one, thumbs.get(one.name)) for one in found],
        "serving": None if runner.current is None else runner.current.version.name,
        "canary": None if canary is None else _canary(service, canary),
        "votes": store.unused(kinds=SAID),  # by a version that comes from none: all that count
        "unused": store.unused(None if reward is None else reward.name, SAID),
        "run": _run(runs[-1]) if runs else None,
        "faults": watch.faults,
    }


def _version(version: Version, thumbs: Satisfaction | None) -> dict[str, Any]:
    rate = None if thumbs is None else {**thumbs.rate._asdict(), "votes": thumbs.votes}
    return {
        "name": version.name, "kind": version.kind, "status": version.status, "created": version.created,
        "parents": list(version.parents), "reasons": list(version.reasons), "weights": version.hash,
        "satisfaction": rate, "figures": version.figures,
    }  # fmt: skip


def _canary(service: Service, canary: Version) -> dict[str, Any]:
    duels = service.store.duels(canary.name)
    running = service.runner.canary
    return {
        "version": canary.name, "share": canary.share, "voters": len(duels),
        "wins": sum(one.wins for one in duels) / len(duels) if duels else None,
        "loaded": running is not None and running.version.name == canary.name,
    }  # fmt: skip


def _run(run: Run) -> dict[str, Any]:
    return {"stage": run.stage, "status": run.status, "created": run.created, "updated": run.updated}


def _promote(service: Service, watch: Watch, name: str) -> dict[str, Any]:
    versions = service.store.versions
    try:
        version = versions.get(name)
    except ValueError as error:
        raise ApiError(404, str(error), param="version") from error
    if version.kind != "policy":
        raise ApiError(422, f"{name!r} is a {version.kind} model: only a policy can serve", param="version")
    versions.promote(name)
    try:
        return _followed(service, watch, name)
    except ApiError as error:
        versions.roll_back(reasons=[f"it can't be loaded: {watch.faults[name]}"], of=name)
        raise ApiError(409, f"{name!r} is not promoted: {watch.faults[name]}", param="version") from error


def _roll_back(service: Service, watch: Watch) -> dict[str, Any]:
    try:
        found = service.store.versions.roll_back(reasons=["rolled back by hand"])
    except ValueError as error:
        raise ApiError(409, str(error)) from error
    return _followed(service, watch, found.name)


def _followed(service: Service, watch: Watch, name: str) -> dict[str, Any]:
    """What serves now, at once rather than at the next look.

    Raises:
        ApiError: 500 where the store says a version that can't be loaded here.
    """
    watch.look(again=True)
    assert service.runner.current is not None
    serving = service.runner.current.version.name
    if name in watch.faults:
        message = f"the store says {name!r}, but it can't be loaded here, so that {serving!r} goes on: {watch.faults[name]}"
        raise ApiError(500, message)
    return {"object": "loop.version", "serving": serving}
