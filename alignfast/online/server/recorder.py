"""What the server keeps: answers as they were shown, votes on them, and whose keys are good.

`Recorder` is all that the server knows of a store. `MemoryRecorder` keeps it until the process ends.

    record(shown)                          an answer, before its end is told to anyone
    vote(vote, caller, idempotency_key)    a vote on it, and what to say to the voter
    user_of(api_key)                       the caller behind a key
    has_keys()                             whether there is any key: without one the server stays on the loopback
    secret                                 bytes that sign cookies and tokens; who keeps it across restarts keeps them good

All but `secret` are called from several threads at once and may block on a disk.
"""

from __future__ import annotations

import hmac
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import Any, Literal, Protocol, TypeAlias

Role: TypeAlias = Literal["user", "admin"]
Kind: TypeAlias = Literal["thumb", "rating", "pair", "ranking", "edit", "implicit"]


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Attributes:
        user: whose vote it is; `anonymous` for all who hold a response's token and nothing else.
        role: what is allowed.
        anonymous: whether the vote is weighed with those of all other anonymous voters, as one.
        response_id: the one response that a token lets its holder vote on, whoever it was shown to.
        by: how the caller was known; a cookie is given for a key alone.
    """

    user: str
    role: Role = "user"
    anonymous: bool = False
    response_id: str | None = None
    by: Literal["key", "cookie", "token", "loopback"] = "key"


@dataclass(frozen=True)
class Shown:
    """An answer as it was shown: all that is needed to learn from a vote on it.

    Attributes:
        response_id: unguessable, unique.
        user: it was shown to.
        episode_id: the conversation that the client says it belongs to; its meaning is the user's own.
        prompt: the messages, or the text or tokens.
        prompt_ids: tokens of the prompt as the model saw it.
        token_ids: tokens of the answer, its end token included.
        logps: log-probability of each token under the whole distribution at the temperature (1 for greedy decoding).
        sampled_logps: the same under the truncated distribution that was drawn from.
        text: what was shown.
        finish_reason: `stop`, `length`, or `cancelled` where the reader left before the end.
        version: that drew every token.
        weights: SHA-256 of its weights.
        sampling: the options by which it was drawn.
        created: seconds since 1970.
    """

    response_id: str
    user: str
    episode_id: str | None
    prompt: Any
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logps: tuple[float, ...]
    sampled_logps: tuple[float, ...]
    text: str
    finish_reason: str
    version: str
    weights: str
    sampling: Mapping[str, Any]
    created: float


@dataclass(frozen=True)
class Vote:
    """A vote, its value checked against its kind (see schema.py). On one response or on one episode.

    Attributes:
        kind: what is said.
        value: thumb: bool; rating: 1 to 5; pair: {"than": id, "verdict": "better" | "worse" | "tie"}; ranking: ids, best
            first; edit: the text as it should have been; implicit: "regenerate" | "copy" | "stop".
        response_id: the answer voted on.
        episode_id: or the conversation.
        comment: in the voter's words; text, never markup.
    """

    kind: Kind
    value: Any
    response_id: str | None = None
    episode_id: str | None = None
    comment: str | None = None


class UnknownResponse(LookupError):
    """There is no such answer, or it was shown to somebody else: the two are not told apart."""


class KeyReused(ValueError):
    """An Idempotency-Key came again with another body."""


class Recorder(Protocol):
    """See the module."""

    secret: bytes

    def record(self, shown: Shown) -> None:
        """Keep an answer."""

    def vote(self, vote: Vote, caller: Caller, idempotency_key: str | None) -> dict[str, Any]:
        """Keep a vote; the last of a user on a response or episode counts.

        Returns:
            What the voter is told (JSON), the same again for a key and a body that came before from this caller.

        Raises:
            UnknownResponse: an answer that the vote names was not shown to the caller.
            KeyReused: the key came with another body before.
        """

    def user_of(self, api_key: str) -> Caller | None:
        """The caller behind a key, compared in constant time; None if it is not good."""

    def has_keys(self) -> bool:
        """Whether any key is good."""


class MemoryRecorder:
    """Everything in memory, the oldest answers forgotten.

    Args:
        keys: caller of each key.
        max_answers: that are kept.

    >>> MemoryRecorder({"k1": Caller("ann")}).user_of("k1").user
    'ann'
    """

    def __init__(self, keys: Mapping[str, Caller] | None = None, *, max_answers: int = 10_000) -> None:
        self.secret = secrets.token_bytes(32)
        self.max_answers = max_answers
        self.shown: OrderedDict[str, Shown] = OrderedDict()
        self.votes: dict[tuple[str, str], list[KeptVote]] = {}  # of (user, response or episode), oldest first
        self._keys = {sha256(key.encode()).digest(): caller for key, caller in (keys or {}).items()}
        self._answered: dict[tuple[str, str], tuple[Vote, dict[str, Any]]] = {}
        self._lock = threading.Lock()

    def record(self, shown: Shown) -> None:
        """See `Recorder`."""
        with self._lock:
            self.shown[shown.response_id] = shown
            while len(self.shown) > self.max_answers:
                self.shown.popitem(last=False)

    def vote(self, vote: Vote, caller: Caller, idempotency_key: str | None) -> dict[str, Any]:
        """See `Recorder`."""
        with self._lock:
            by_key = (caller.user + "/" + (caller.response_id or ""), idempotency_key or "")
            if idempotency_key is not None and by_key in self._answered:
                before, answer = self._answered[by_key]
                if before != vote:
                    raise KeyReused(f"Idempotency-Key {idempotency_key!r} came before with another body")
                return answer
            self._check_shown(vote, caller)
            target = vote.response_id or f"episode/{vote.episode_id}"
            history = self.votes.setdefault((caller.user, target), [])
            kept = KeptVote(f"vote-{secrets.token_hex(12)}", vote, caller, time.time())
            answer = {"id": kept.id, "replaces": history[-1].id if history else None, "kind": vote.kind}
            history.append(kept)
            if idempotency_key is not None:
                self._answered[by_key] = (vote, answer)
            return answer

    def _check_shown(self, vote: Vote, caller: Caller) -> None:
        if vote.response_id is None:
            if not any(
                s.user == caller.user and s.episode_id == vote.episode_id for s in self.shown.values()
            ):
                raise UnknownResponse(f"there is no episode {vote.episode_id!r} of yours")
            return
        for name in (vote.response_id, *responses_named(vote)):
            shown = self.shown.get(name)
            if shown is None or (shown.user != caller.user and name != caller.response_id):
                raise UnknownResponse(f"there is no response {name!r} of yours")

    def user_of(self, api_key: str) -> Caller | None:
        """See `Recorder`."""
        digest, found = sha256(api_key.encode()).digest(), None
        for known, caller in self._keys.items():  # all of them, so that time tells nothing
            if hmac.compare_digest(known, digest):
                found = caller
        return found

    def has_keys(self) -> bool:
        """See `Recorder`."""
        return bool(self._keys)


@dataclass(frozen=True)
class KeptVote:
    """A vote with its voter and time."""

    id: str
    vote: Vote
    caller: Caller
    created: float = field(compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def responses_named(vote: Vote) -> tuple[str, ...]:
    """Ids of the other answers that a vote compares its own with.

    >>> responses_named(Vote("ranking", ["b", "a"], response_id="a"))
    ('b',)
    """
    names = {"pair": lambda: (vote.value["than"],), "ranking": lambda: tuple(vote.value)}.get(
        vote.kind, tuple
    )()
    return tuple(name for name in names if name != vote.response_id)


def make_recorder(db: str | None, keys: Mapping[str, Caller]) -> Recorder:
    """The recorder behind `alignfast serve --db`.

    Raises:
        ValueError: a database is named: there is no store for one yet.
    """
    if db is not None:
        raise ValueError(
            f"db={db!r}: this version keeps votes in memory alone, until the server stops; leave --db out to go on so"
        )
    return MemoryRecorder(keys)
