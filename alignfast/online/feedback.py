"""What people are shown and what they say of it: the words that server, store and learner share.

    kind        value                                             is about            says
    thumb       "up" | "down"                                     answer, conversation   good or bad
    rating      1 | 2 | 3 | 4 | 5                                 answer, conversation   how good
    pair        id of the better answer | "tie"                   the two of its group   which is better
    ranking     ids, best first; a list among them is a tie       answers of its group   their order
    edit        the answer as it should have been                 answer                 edited over original
    implicit    "regenerate" | "copy" | "stop"                    answer                 a hint

Answers that were shown side by side are a group. A voter has one verdict (thumb or rating) on an answer, one comparison
(pair or ranking) of a group, one edit and one hint: the last counts. No vote is missing, never negative.

Not done here: whether a response is there and may be voted on (the store), and who a user is (the server).
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

Kind: TypeAlias = Literal["thumb", "rating", "pair", "ranking", "edit", "implicit"]
Prompt: TypeAlias = str | list[dict[str, Any]]

KINDS: tuple[Kind, ...] = get_args(Kind)
SAID: tuple[Kind, ...] = tuple(kind for kind in KINDS if kind != "implicit")  # the others are hints
THUMBS = ("up", "down")
SIGNALS = ("regenerate", "copy", "stop")
TIE = "tie"
ANONYMOUS = "anonymous"
MAX_TEXT = 100_000  # characters of a comment or an edit

# Which of a voter's votes replace each other.
SLOTS: dict[Kind, str] = {
    "thumb": "verdict",
    "rating": "verdict",
    "pair": "comparison",
    "ranking": "comparison",
    "edit": "edit",
    "implicit": "implicit",
}
_OF_EPISODES = ("thumb", "rating")
TOKEN_FIELDS = ("prompt_ids", "completion_ids", "logps", "sampled_logps")


class UnknownResponse(ValueError):
    """A vote is about a response, or a conversation, that the store does not hold."""


class IdempotencyConflict(ValueError):
    """An idempotency key came before, with another vote."""


class TooManyVotes(ValueError):
    """A user has voted as often as they may for now.

    Attributes:
        retry_after: seconds until the next vote is taken.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.retry_after)


def new_id(prefix: str) -> str:
    """An id that nobody guesses: a prefix, the time, and 128 random bits.

    The time comes first so that new ids lie side by side in a database's index: a commit of votes writes a tenth less.

    >>> new_id("vote").startswith("vote-"), len(new_id("vote"))
    (True, 43)
    """
    return f"{prefix}-{time.time_ns():016x}{secrets.token_urlsafe(16)}"


def voter_of(user: str) -> str:
    """Whose weight a user's votes count to: their own, or the one that all anonymous users share.

    Users without a name are `anonymous`, or `anonymous:` and a number that tells browsers apart.

    >>> voter_of("ada"), voter_of("anonymous:17")
    ('ada', 'anonymous')
    """
    return ANONYMOUS if user.partition(":")[0] == ANONYMOUS else user


@dataclass(frozen=True, kw_only=True)
class Shown:
    """An answer as it was shown, with all that is needed to learn from a vote on it later.

    Attributes:
        id: of the response.
        prompt: a text, or the messages that were answered.
        text: the answer.
        created: seconds since 1970.
        episode_id: of the conversation that it belongs to, unlike all others in the store; None: it stands alone.
        turn: place of the answer in it, from 0.
        group_id: of the answers shown side by side; None: it was shown alone.
        user: who asked; deleting them deletes it. None: nobody that is known.
        prompt_ids: tokens of the prompt; empty where they are not known.
        completion_ids: tokens of the answer.
        logps: log-prob of each of those when it was drawn, in nats, under the whole distribution.
        sampled_logps: the same under the truncated one that it was drawn from; empty where there was none.
        finish_reason: `stop`, `length` or `cancelled`; empty where it is not known.
        sampling: options it was drawn with, as JSON can hold them.
        policy_version: name of the version that wrote it.
        weights_hash: of that version's weights.

    Raises:
        ValueError: a field is not as said; the message names it.

    >>> Shown(id="r1", prompt="2 + 2 =", text=" 4", completion_ids=(5,), logps=(-0.1, -0.2))
    Traceback (most recent call last):
    ValueError: shown answer 'r1': 1 completion_ids and 2 logps; there must be one log-prob a token, or none
    """

    id: str
    prompt: Prompt
    text: str
    created: float = field(default_factory=time.time)
    episode_id: str | None = None
    turn: int = 0
    group_id: str | None = None
    user: str | None = None
    prompt_ids: tuple[int, ...] = ()
    completion_ids: tuple[int, ...] = ()
    logps: tuple[float, ...] = ()
    sampled_logps: tuple[float, ...] = ()
    finish_reason: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)
    policy_version: str = ""
    weights_hash: str = ""

    def __post_init__(self) -> None:
        where = f"shown answer {self.id!r}"
        check_id(self.id, "id", where)
        for name in ("episode_id", "group_id", "user"):
            if getattr(self, name) is not None:
                check_id(getattr(self, name), name, where)
        if not isinstance(self.text, str):
            raise ValueError(f"{where}: text must be a string, got {_brief(self.text)}")
        if not _is_prompt(self.prompt):
            raise ValueError(
                f"{where}: prompt must be a string or a list of messages with 'role', got {_brief(self.prompt)}"
            )
        if self.turn < 0 or not math.isfinite(self.created):
            raise ValueError(f"{where}: expected turn >= 0 and a time, got {self.turn} and {self.created}")
        for name in TOKEN_FIELDS:
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, logps in (("logps", self.logps), ("sampled_logps", self.sampled_logps)):
            if logps and len(logps) != len(self.completion_ids):
                raise ValueError(
                    f"{where}: {len(self.completion_ids)} completion_ids and {len(logps)} {name}; there must be one "
                    "log-prob a token, or none"
                )
            if not all(map(math.isfinite, logps)):
                raise ValueError(f"{where}: {name} must be finite numbers; a token that was drawn has one")

    @property
    def text_hash(self) -> str:
        """The same for the same prompt and answer."""
        content = json.dumps([self.prompt, self.text], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Vote:
    """What a user says of an answer, or of a whole conversation.

    Attributes:
        kind: see this module's table.
        value: see there; a ranking is kept as a tuple of tuples of ids, each of them one place.
        response_id: what it is about; for a pair or a ranking one of the answers that were compared.
        episode_id: of the conversation, in place of `response_id`.
        among: ids of all answers that were compared, where they were not recorded as a group; the store fills it in.
        comment: in the user's words.
        user: who votes, as the server knows them: never what a request says of itself.
        id: of the vote.
        created: seconds since 1970.

    Raises:
        ValueError: a field is not as said; the message says what came and what was expected.

    >>> Vote(response_id="r1", kind="ranking", value=["r2", ["r1", "r3"]]).value
    (('r2',), ('r1', 'r3'))
    >>> Vote(response_id="r1", kind="thumb", value=1)
    Traceback (most recent call last):
    ValueError: a thumb's value must be 'up' or 'down', got 1
    """

    kind: Kind
    value: Any
    response_id: str | None = None
    episode_id: str | None = None
    among: tuple[str, ...] = ()
    comment: str = ""
    user: str = ANONYMOUS
    id: str = field(default_factory=lambda: new_id("vote"))
    created: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {_brief(self.kind)}")
        if (self.response_id is None) == (self.episode_id is None):
            raise ValueError(
                f"a vote is about a response or a conversation: give response_id or episode_id, got "
                f"{_brief(self.response_id)} and {_brief(self.episode_id)}"
            )
        for name in ("response_id", "episode_id"):
            if getattr(self, name) is not None:
                check_id(getattr(self, name), name, "a vote")
        if self.episode_id is not None and self.kind not in _OF_EPISODES:
            raise ValueError(
                f"a vote on a whole conversation is a {' or a '.join(_OF_EPISODES)}, got {self.kind!r}; "
                "give response_id"
            )
        check_id(self.user, "user", "a vote")
        check_id(self.id, "id", "a vote")
        _check_text(self.comment, "comment")
        if not isinstance(self.created, (int, float)) or not math.isfinite(self.created):
            raise ValueError(f"a vote's created must be seconds since 1970, got {_brief(self.created)}")
        object.__setattr__(self, "value", _checked_value(self.kind, self.value))
        object.__setattr__(self, "among", tuple(sorted(self.among)))
        if self.among and self.slot != "comparison":
            raise ValueError(f"among is for a pair or a ranking, got it with a {self.kind}")
        for id in self.among:
            check_id(id, "among", "a vote")

    @property
    def slot(self) -> str:
        """Which of the user's votes this one replaces: verdict, comparison, edit or implicit."""
        return SLOTS[self.kind]

    @property
    def body(self) -> dict[str, Any]:
        """What the user said, as JSON can hold it: the same for a request that is sent again."""
        value = [list(place) for place in self.value] if self.kind == "ranking" else self.value
        return {
            "response_id": self.response_id,
            "episode_id": self.episode_id,
            "kind": self.kind,
            "value": value,
            "among": list(self.among),
            "comment": self.comment,
            "user": self.user,
        }


@dataclass(frozen=True)
class Judged:
    """A vote with what it is about.

    Attributes:
        vote: the vote.
        answers: the answer; of a pair or a ranking all that were compared; of a conversation its turns.
    """

    vote: Vote
    answers: tuple[Shown, ...]

    @property
    def answer(self) -> Shown:
        """The answer that the vote names."""
        return next(shown for shown in self.answers if shown.id == self.vote.response_id)


def _checked_value(kind: Kind, value: Any) -> Any:
    if kind == "thumb" and isinstance(value, bool):
        value = "up" if value else "down"
    if kind == "thumb" and not (isinstance(value, str) and value in THUMBS):
        raise ValueError(f"a thumb's value must be 'up' or 'down', got {_brief(value)}")
    if kind == "rating" and (type(value) is not int or not 1 <= value <= 5):
        raise ValueError(f"a rating's value must be a whole number from 1 to 5, got {_brief(value)}")
    if kind == "pair" and not (isinstance(value, str) and value):
        raise ValueError(
            f"a pair's value must be the id of the better response, or 'tie', got {_brief(value)}"
        )
    if kind == "implicit" and not (isinstance(value, str) and value in SIGNALS):
        raise ValueError(f"an implicit vote's value must be one of {', '.join(SIGNALS)}, got {_brief(value)}")
    if kind == "edit":
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"an edit's value must be the better answer's text, got {_brief(value)}")
        _check_text(value, "edit")
    return _places(value) if kind == "ranking" else value


def _places(value: Any) -> tuple[tuple[str, ...], ...]:
    """A ranking as places, best first."""
    places = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
    found = tuple(
        (place,) if isinstance(place, str) else tuple(place) if isinstance(place, (list, tuple)) else ()
        for place in places
    )
    ids = [id for place in found for id in place]
    if not all(found) or not all(isinstance(id, str) and id for id in ids) or len(ids) < 2:
        raise ValueError(
            "a ranking's value must list two or more response ids, best first, where a list of ids is a tie, got "
            f"{_brief(value)}"
        )
    if len(set(ids)) < len(ids):
        raise ValueError(f"a ranking's value must name each response once, got {_brief(value)}")
    return found


def _is_prompt(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return True
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in prompt)
    )


def check_id(value: Any, name: str, where: str) -> None:
    """Refuse what is no id.

    Raises:
        ValueError: it is no string, is empty or too long, or no database takes it.
    """
    if not isinstance(value, str) or not 0 < len(value) <= 256 or not is_storable(value):
        raise ValueError(f"{where}: {name} must be a string of 1 to 256 characters, got {_brief(value)}")


def _check_text(text: Any, name: str) -> None:
    if not isinstance(text, str) or len(text) > MAX_TEXT:
        came = f"{len(text)} characters" if isinstance(text, str) else _brief(text)
        raise ValueError(f"{name} must be a text of at most {MAX_TEXT:,} characters, got {came}")
    if not is_storable(text):
        raise ValueError(f"{name} holds a NUL or half a character, which no database takes: leave it out")


def is_storable(text: str) -> bool:
    """Whether every database takes a text: PostgreSQL refuses NUL, and half characters have no UTF-8."""
    if "\0" in text:
        return False
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def storable(value: Any) -> Any:
    """A text, or JSON with texts in it, with U+FFFD for NUL and for half characters, which a model may write and
    PostgreSQL refuses.

    >>> storable([{"content": "a" + chr(0)}]) == [{"content": "a" + chr(0xFFFD)}]
    True
    """
    if isinstance(value, str):
        if is_storable(value):
            return value
        return "".join("\ufffd" if char == "\0" or "\ud800" <= char <= "\udfff" else char for char in value)
    if isinstance(value, list):
        return [storable(item) for item in value]
    if isinstance(value, dict):
        return {storable(key): storable(item) for key, item in value.items()}
    return value


def _brief(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
