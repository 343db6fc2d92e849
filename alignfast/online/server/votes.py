"""From a body to a vote in the store, and what its voter is told.

    on the wire                                                    in the store
    thumb     true | false                                         "up" | "down"
    pair      {"than": B, "verdict": "better" | "worse" | "tie"}   A | B | "tie"          A the response_id
    ranking   [A, [B, C]]                                          ((A,), (B, C))
    others    as they are

An episode's id means something to its user alone: in the store a digest of the user stands behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from hashlib import sha256
from typing import Any

from sqlalchemy import Connection

from alignfast.online.feedback import TIE, IdempotencyConflict, TooManyVotes, UnknownResponse, Vote
from alignfast.online.server.errors import ApiError
from alignfast.online.server.guard import Caller
from alignfast.online.server.schema import FeedbackRequest, PairValue
from alignfast.online.server.service import Service
from alignfast.online.store import Kept, StoreError

_LONGEST_KEY = 255  # of an Idempotency-Key


def episode_of(user: str, episode_id: str | None) -> str | None:
    """A conversation's id in the store, where two users may both have a conversation of one name.

    >>> episode_of("ann", "talk-1") == episode_of("bob", "talk-1")
    False
    """
    return None if episode_id is None else f"{episode_id}@{sha256(user.encode()).hexdigest()[:32]}"


def vote_of(body: FeedbackRequest, user: str) -> Vote:
    """The vote that a body asks for.

    Raises:
        ValueError: no database takes its text.
    """
    value: Any = body.value
    among: tuple[str, ...] = ()
    if isinstance(value, PairValue):
        assert body.response_id is not None
        among = (body.response_id, value.than)
        value = {"better": body.response_id, "worse": value.than, "tie": TIE}[value.verdict]
    elif body.kind == "ranking":
        among = tuple(body.ranked())
    return Vote(
        kind=body.kind, value=value, response_id=body.response_id, episode_id=episode_of(user, body.episode_id),
        among=among, comment=body.comment or "", user=user,
    )  # fmt: skip


def check_allowed(body: FeedbackRequest, caller: Caller, key: str | None) -> None:
    """Refuse what no store need be asked about.

    Raises:
        ApiError: 403 for somebody else's vote, 422 for an idempotency key that is none.
    """
    if body.user is not None and body.user != caller.user:
        message = "whose vote it is, is known by the key or the cookie: leave 'user' out"
        raise ApiError(403, message, param="user")
    of_one = body.response_id == caller.response_id and body.kind not in ("pair", "ranking")
    if caller.response_id is not None and not of_one:
        raise ApiError(403, f"the token is for votes on {caller.response_id!r} alone", param="response_id")
    if key is not None and not 0 < len(key) <= _LONGEST_KEY:
        raise ApiError(422, f"Idempotency-Key must have 1 to {_LONGEST_KEY} characters, got {len(key)}")


async def keep(service: Service, body: FeedbackRequest, caller: Caller, key: str | None) -> Kept:
    """Keep a vote; it is on disk when this returns.

    Raises:
        ApiError: 404 for an answer that was not shown to the caller, 422, or 429 and 503 with Retry-After.
    """
    check_allowed(body, caller, key)

    def prepare() -> Callable[[Connection], Kept]:
        vote = vote_of(body, caller.user)
        return service.store.voting(vote, caller=caller.own, key=key, own=True, token_of=caller.response_id)

    try:
        # a hook may take its time; without one nothing here waits, and a thread would cost more than the vote
        work = prepare() if service.store.redact is None else await service.in_store(prepare)
        return await service.write_vote(work)
    except UnknownResponse as error:
        if body.episode_id is not None:
            raise ApiError(
                404, f"there is no episode {body.episode_id!r} of yours", param="episode_id"
            ) from error
        raise ApiError(404, str(error), param="response_id") from error
    except IdempotencyConflict as error:
        raise ApiError(422, str(error), code="idempotency_key_reused") from error
    except TooManyVotes as error:
        headers = {"Retry-After": str(math.ceil(error.retry_after))}
        raise ApiError(429, str(error), code="rate_limit_exceeded", headers=headers) from error
    except ValueError as error:
        raise ApiError(422, str(error), param="value") from error
    except StoreError as error:
        raise ApiError(503, str(error), headers={"Retry-After": "1"}) from error
