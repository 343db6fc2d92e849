"""What a body may hold. Obey or refuse: a field that is not here is an error, and one that OpenAI has and this server
does not do is taken at the value that means nothing alone.

Ours beside OpenAI's: `top_k`, `min_p`, `episode_id` (a conversation that can be voted on as a whole), and `alignfast`:
{"store": whether the answer is kept to be learned from, as OpenAI's `store` says too (true unless said otherwise),
"pair": whether the two answers are to be compared, so that one of them may be the canary's}. `user` has no effect: who
asks is known by the key or the cookie.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

# What an option that is not done here may be: the values at which it does nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1), "echo": (None, False), "frequency_penalty": (None, 0), "function_call": (None, "none"),
    "functions": (None, []), "logit_bias": (None, {}), "modalities": (None, ["text"]), "parallel_tool_calls": (None, True),
    "presence_penalty": (None, 0), "response_format": (None, {"type": "text"}), "suffix": (None, ""),
    "tool_choice": (None, "none"), "tools": (None, []), "top_logprobs": (None, 0),
}  # fmt: skip
_COLDEST = 1e-6  # of sample_tokens
_as_written = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make a new encoder each time

Id: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.:-]+$")]
Place: TypeAlias = Annotated[list[Id], Field(min_length=1, max_length=16)]  # of a ranking, shared by a tie
Token: TypeAlias = Annotated[int, Field(ge=0, lt=2**31)]
StopText: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class Body(BaseModel):
    """Exactly the fields that are named, of exactly their types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _whole_characters(cls, data: Any) -> Any:
        try:
            _as_written(data).encode()
        except UnicodeEncodeError:  # JSON can write one, and neither tokenizers nor databases take it
            raise ValueError("a text holds half a character (a surrogate without its other half)") from None
        return data


class StreamOptions(Body):
    """Of a stream."""

    include_usage: bool = False


class Ours(Body):
    """What OpenAI's routes have no field for."""

    store: bool | None = None
    pair: bool = False


class Generating(Body):
    """What both routes take."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    min_p: float | None = Field(None, ge=0, lt=1)
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None
    episode_id: Id | None = None
    user: str | None = None
    alignfast: Ours = Ours()

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = dict(data)
        for name in [name for name in kept if name in _NEUTRAL]:
            value = kept.pop(name)
            if not any(
                (value == neutral and type(value) is not bool) or value is neutral
                for neutral in _NEUTRAL[name]
            ):
                raise ValueError(f"{name!r} is not done here: leave it out")
        return kept

    @field_validator("temperature")
    @classmethod
    def _warm_enough(cls, value: float | None) -> float | None:
        if value and value < _COLDEST:
            raise ValueError(f"temperature must be 0 or at least {_COLDEST:g}")
        return value

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Generating:
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is for 'stream': true")
        return self

    @property
    def kept(self) -> bool:
        """Whether the answer may be stored."""
        return self.store is not False and self.alignfast.store is not False

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """A turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates read it: `developer` is what `system` is called since."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text} | ({} if self.name is None else {"name": self.name})


class ChatRequest(Generating):
    """Of /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("'max_tokens' and 'max_completion_tokens' are one option: give one")
        return self

    @model_validator(mode="after")
    def _two_of_a_pair(self) -> ChatRequest:
        if self.alignfast.pair and self.n != 2:
            raise ValueError(f"a pair is of two answers: 'n' must be 2, got {self.n}")
        return self


class CompletionRequest(Generating):
    """Of /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1)]
    )
    logprobs: int | None = None

    @field_validator("alignfast")
    @classmethod
    def _without_pairs(cls, value: Ours) -> Ours:
        if value.pair:
            raise ValueError("pairs are of chats: ask /v1/chat/completions")
        return value

    @field_validator("logprobs")
    @classmethod
    def _of_drawn_tokens(cls, value: int | None) -> int | None:
        if value:
            raise ValueError("other tokens than the drawn ones are not told: logprobs must be 0 or left out")
        return value

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Each of them."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]


class PairValue(Body):
    """The answer voted on against another."""

    than: Id
    verdict: Literal["better", "worse", "tie"]


class FeedbackRequest(Body):
    """Of /v1/feedback: a vote on one response or on one episode."""

    response_id: Id | None = None
    episode_id: Id | None = None
    kind: Literal["thumb", "rating", "pair", "ranking", "edit", "implicit"]
    value: bool | int | PairValue | Annotated[list[Id | Place], Field(max_length=16)] | str
    comment: Annotated[str, StringConstraints(max_length=4000)] | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _value_of_its_kind(self) -> FeedbackRequest:
        if (self.response_id is None) == (self.episode_id is None):
            raise ValueError("give 'response_id' or 'episode_id'")
        if self.response_id is None and self.kind not in ("thumb", "rating"):
            raise ValueError(f"an episode takes a thumb or a rating, not {self.kind!r}")
        wrong = _WRONG[self.kind](self)
        if wrong:
            raise ValueError(f"the value of kind {self.kind!r} must be {wrong}")
        return self

    def ranked(self) -> list[str]:
        """Ids in a ranking, best first, those of a tie in the order in which they came."""
        assert isinstance(self.value, list)
        return [id for place in self.value for id in ([place] if isinstance(place, str) else place)]


def _wrong_pair(vote: FeedbackRequest) -> str:
    fits = isinstance(vote.value, PairValue) and vote.value.than != vote.response_id
    return "" if fits else '{"than": ID OF ANOTHER RESPONSE, "verdict": "better", "worse" or "tie"}'


def _wrong_ranking(vote: FeedbackRequest) -> str:
    ids = vote.ranked() if isinstance(vote.value, list) else []
    fits = len(set(ids)) == len(ids) >= 2 and vote.response_id in ids
    return (
        ""
        if fits
        else "a list of two ids or more, best first, a list of ids a tie, 'response_id' among them, each once"
    )


def _wrong_edit(vote: FeedbackRequest) -> str:
    return "" if isinstance(vote.value, str) and vote.value else "the text as it should have been"


class SkipRequest(Body):
    """Of /v1/label/skip."""

    item: Id


class PromoteRequest(Body):
    """Of /v1/loop/promote."""

    version: Annotated[str, StringConstraints(min_length=1, max_length=256)]


# What the value should have been, by kind; an empty text where it fits.
_WRONG = {
    "thumb": lambda vote: "" if isinstance(vote.value, bool) else "true or false",
    "rating": lambda vote: "" if type(vote.value) is int and 1 <= vote.value <= 5 else "1, 2, 3, 4 or 5",
    "pair": _wrong_pair,
    "ranking": _wrong_ranking,
    "edit": _wrong_edit,
    "implicit": lambda vote: (
        "" if vote.value in ("regenerate", "copy", "stop") else "'regenerate', 'copy' or 'stop'"
    ),
}
