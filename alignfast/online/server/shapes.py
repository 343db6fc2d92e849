"""What answers look like: OpenAI's objects, with a key `alignfast` beside theirs.

    "alignfast": {"version", "weights", "answers": [{"index", "response_id", "feedback_token"}]}

A stream tells it in its first chunk, and in those that end a choice. Answers that duel do not say their version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from alignfast.online.server.versions import Version


class TokenLogprob(NamedTuple):
    """A token that was drawn, as text."""

    token: str
    logp: float


@dataclass
class Choice:
    """One answer of a response, so far.

    Attributes:
        index: among the response's answers.
        response_id: by which it is voted on.
        logprobs: of its tokens, the end token left out; None where they were not asked for.
    """

    index: int
    response_id: str
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] | None = None
    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    sampled_logps: list[float] = field(default_factory=list)


class Usage(NamedTuple):
    """Tokens of a response; a prompt counts once for all its answers."""

    prompt: int
    completion: int

    def to_dict(self) -> dict[str, int]:
        """OpenAI's object."""
        total = self.prompt + self.completion
        return {"prompt_tokens": self.prompt, "completion_tokens": self.completion, "total_tokens": total}


@dataclass(frozen=True)
class ChatShape:
    """Of /v1/chat/completions."""

    prefix = "chatcmpl"
    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"

    def whole(self, choice: Choice) -> dict[str, Any]:
        """A choice that has ended."""
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return self._choice(choice, "message", message, choice.logprobs)

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """What comes before its text."""
        return self._choice(choice, "delta", {"role": "assistant", "content": "", "refusal": None}, None)

    def piece(self, choice: Choice, text: str, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any]:
        """A piece of its text; what ends it has no text."""
        return self._choice(choice, "delta", {"content": text} if text else {}, logprobs)

    def _choice(
        self, choice: Choice, name: str, content: dict[str, Any], logprobs: Sequence[TokenLogprob] | None
    ) -> dict[str, Any]:
        told = (
            None if logprobs is None else {"content": [_entry(entry) for entry in logprobs], "refusal": None}
        )
        return {"index": choice.index, name: content, "logprobs": told, "finish_reason": choice.finish_reason}


@dataclass(frozen=True)
class TextShape:
    """Of /v1/completions."""

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def whole(self, choice: Choice) -> dict[str, Any]:
        """A choice that has ended."""
        return self._choice(choice, choice.text, choice.logprobs, 0)

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """Nothing comes before its text."""
        return None

    def piece(self, choice: Choice, text: str, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any]:
        """A piece of its text."""
        told = len(choice.logprobs or ()) - len(logprobs or ())
        before = sum(len(entry.token) for entry in (choice.logprobs or ())[:told])
        return self._choice(choice, text, logprobs, before)

    def _choice(
        self, choice: Choice, text: str, logprobs: Sequence[TokenLogprob] | None, offset: int
    ) -> dict[str, Any]:
        told = None
        if logprobs is not None:
            ends = [offset]
            for entry in logprobs:
                ends.append(ends[-1] + len(entry.token))
            told = {
                "tokens": [entry.token for entry in logprobs], "token_logprobs": [entry.logp for entry in logprobs],
                "top_logprobs": None, "text_offset": ends[:-1],
            }  # fmt: skip
        return {"index": choice.index, "text": text, "logprobs": told, "finish_reason": choice.finish_reason}


def _entry(entry: TokenLogprob) -> dict[str, Any]:
    return {
        "token": entry.token, "logprob": entry.logp, "bytes": list(entry.token.encode(errors="replace")),
        "top_logprobs": [],
    }  # fmt: skip


@dataclass(frozen=True)
class Frame:
    """What all objects of one response share; the version is None where it is not to be told."""

    shape: ChatShape | TextShape
    id: str
    created: int
    model: str
    version: Version | None
    answers: tuple[dict[str, Any], ...]

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The response at once."""
        told = [self.shape.whole(choice) for choice in choices]
        return {
            **self._frame(self.shape.whole_object),
            "choices": told,
            "usage": usage.to_dict(),
            **self.ours(),
        }

    def chunk(self, choices: list[dict[str, Any]], *, ours: bool = False, **more: Any) -> dict[str, Any]:
        """A part of a stream."""
        frame = {**self._frame(self.shape.chunk_object), "choices": choices, **more}
        return {**frame, **self.ours()} if ours else frame

    def ours(self) -> dict[str, Any]:
        """What OpenAI's objects have no place for."""
        told = {} if self.version is None else self.version.told()
        return {"alignfast": {**told, "answers": list(self.answers)}}

    def headers(self) -> dict[str, str]:
        """The same for who reads no bodies."""
        told = {"X-Alignfast-Response-Id": self.id}
        if self.version is not None:
            told["X-Alignfast-Version"] = self.version.name.encode("ascii", "backslashreplace").decode()
            told["X-Alignfast-Weights"] = self.version.weights
        return told

    def _frame(self, kind: str) -> dict[str, Any]:
        fingerprint = None if self.version is None else f"{self.version.name}-{self.version.weights[:12]}"
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.model,
            "system_fingerprint": fingerprint,
        }  # fmt: skip
