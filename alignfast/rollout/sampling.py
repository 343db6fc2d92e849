"""How completions are drawn, and what comes of it: the same for every engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

Prompt: TypeAlias = str | list[dict[str, Any]] | list[int]
FinishReason: TypeAlias = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw completions.

    Attributes:
        max_new_tokens: a completion ends here at the latest, >= 1; earlier where the model's positions end.
        temperature: divisor of the logits; 0 takes the likeliest token each time.
        top_k: draw among so many likeliest tokens; 0 among all.
        top_p: draw among the likeliest tokens that hold this probability, in (0, 1].
        min_p: draw among tokens at least this share as likely as the likeliest, in [0, 1).
        n: completions of each prompt, >= 1.
        seed: of the random numbers, which are keyed by it, the sequence's number and the token's place in it: so a
            sample does not depend on what is drawn beside it.
        stop: texts that end a completion; they are left out of its text, not out of its tokens.
        stop_token_ids: tokens that end a completion, as its last; None is the model's and tokenizer's end tokens.

    Raises:
        ValueError: one is out of range; the message names it.

    >>> Sampling(max_new_tokens=0)
    Traceback (most recent call last):
    ValueError: max_new_tokens must be >= 1, got 0
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    n: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "n"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not self.temperature >= 0 or self.top_k < 0:  # nor NaN
            raise ValueError(f"temperature and top_k must be >= 0, got {self.temperature} and {self.top_k}")
        if not 0 < self.top_p <= 1 or not 0 <= self.min_p < 1:
            raise ValueError(f"expected 0 < top_p <= 1 and 0 <= min_p < 1, got {self.top_p} and {self.min_p}")
        if isinstance(self.stop, str) or "" in self.stop:
            raise ValueError(f"stop must be a tuple of texts, none of them empty, got {self.stop!r}")


@dataclass(frozen=True, eq=False)
class Completion:
    """One continuation of a prompt.

    Attributes:
        prompt_ids: tokens of the prompt.
        token_ids: tokens of the completion, its stop token included.
        logps: log-probability of each token, in nats, under the whole distribution at the sampling temperature (1 for
            greedy decoding): what a trainer computes again.
        sampled_logps: the same under the distribution that was drawn from: truncated and normalised again.
        mask: which tokens the policy wrote; the others are those of tools, which are never trained on.
        finish_reason: `stop` where it ended by itself, `length` where it was cut.
        text: the completion without special tokens and without the text that stopped it.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logps: tuple[float, ...]
    sampled_logps: tuple[float, ...]
    mask: tuple[bool, ...]
    finish_reason: FinishReason
    text: str


class RolloutEngine(Protocol):
    """What trainers, evaluation and the server ask completions of.

    Attributes:
        name: as `make_engine` knows it.
        seconds: of the last call, by its parts (`prefill`, `decode`), where the engine can tell them apart.
    """

    name: str
    seconds: dict[str, float]

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, sequence_ids: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """`sampling.n` completions of each prompt, in order.

        Args:
            prompts: texts, conversations that the assistant is to answer, or token ids.
            sampling: how to draw.
            sequence_ids: number of each completion, n for each prompt in turn, by which its random numbers are keyed;
                None counts from 0.

        Raises:
            ValueError: a prompt has no token, or leaves no room in the model's context.
        """
