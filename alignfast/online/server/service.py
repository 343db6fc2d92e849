"""What the routes share: the model's versions, the recorder, the limits."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, fields
from itertools import count
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignfast.models.policy import Policy
from alignfast.online.server.guard import Signer
from alignfast.online.server.metrics import Metrics
from alignfast.online.server.recorder import Recorder
from alignfast.online.server.runner import Runner
from alignfast.online.server.versions import Version, version_of
from alignfast.rollout.live import LiveEngine
from alignfast.rollout.prompts import encode_prompt
from alignfast.rollout.sampling import Prompt


@dataclass(frozen=True)
class Limits:
    """What the server takes on."""

    max_sequences: int = 32
    """Answers that are drawn at once."""
    max_queue: int = 256
    """Answers that wait beyond those; more are told 429."""
    cache_tokens: int = 32768
    """Tokens of prompts and answers that run at once; each holds room for all it may become."""
    max_prefill_tokens: int = 8192
    """Tokens of prompts in one forward pass."""
    max_body_bytes: int = 1 << 20
    """Of a request's body; larger ones are told 413."""
    max_answers: int = 8
    """Answers to one request: prompts times n; more are told 422."""
    max_tokens: int = 1024
    """Tokens of one answer that may be asked for, and those of a chat that asks for no number."""
    request_seconds: float = 120.0
    """From a request to the end of its answer; what takes longer is told 504."""
    session_hours: float = 12.0
    """A browser's cookie is good for so long."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0 and (field.name, value) != ("max_queue", 0):
                raise ValueError(f"{field.name} must be above 0, got {value}")


class Service:
    """A model that is served.

    Args:
        name: of the model, as clients ask for it.
        recorder: where answers and votes go.
        limits: what it takes on.

    Attributes:
        keyless: whether there was no key at the start: the loopback alone is answered.
    """

    def __init__(self, name: str, recorder: Recorder, limits: Limits | None = None) -> None:
        self.name, self.recorder = name, recorder
        self.limits = limits or Limits()
        self.keyless = not recorder.has_keys()
        self.signer = Signer(recorder.secret)
        self.runner = Runner(self.limits.max_sequences, self.limits.max_queue)
        self.metrics = Metrics(self.runner)
        self._seed = secrets.randbits(63)
        self._numbers = count()
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._encoding = (
            threading.Lock()
        )  # tokenizers that are used by two threads at once have been seen to fail
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of all versions."""
        assert self._tokenizer is not None, "a version is opened before anything is asked"
        return self._tokenizer

    def open(self, policy: Policy, tokenizer: PreTrainedTokenizerBase, version: Version) -> Version:
        """Serve a version: new requests go to it, running ones end on their own. Blocks until it is in place.

        Raises:
            ModelRefused: it can't be run; the version before it goes on.
            ValueError: its tokenizer is another one.
        """
        if self._tokenizer is not None and not _alike(self._tokenizer, tokenizer):
            raise ValueError(
                f"version {version.name!r} has another tokenizer or chat template than the one that is served: start a "
                "server of its own for it"
            )
        limits = self.limits

        def make() -> LiveEngine:
            return LiveEngine(
                policy, tokenizer, max_sequences=limits.max_sequences, cache_tokens=limits.cache_tokens,
                max_prefill_tokens=limits.max_prefill_tokens,
            )  # fmt: skip

        done = self.runner.open(make, version).result()
        self._tokenizer = self._tokenizer or tokenizer
        return done

    def swap(self, model: str, name: str | None = None, **loading: Any) -> Version:
        """Serve the weights in a folder from the next request on. Blocks while they are loaded; requests go on.

        Args:
            model: folder of the model or of adapters.
            name: of the version; None is the folder's.
            **loading: options of `load_policy`, and `device`.

        Raises:
            ValueError: the folder holds no safetensors; as `open`.
        """
        from alignfast.models import load_policy, load_tokenizer

        version = version_of(model, name)
        device = loading.pop("device", "cpu")
        policy = load_policy(model, **loading).to(device)
        trust = loading.get("trust_remote_code", False)
        return self.open(policy, load_tokenizer(None, model, trust_remote_code=trust), version)

    def encode(self, prompt: Prompt) -> list[int]:
        """Tokens of a prompt; any thread may ask."""
        with self._encoding:
            return encode_prompt(self.tokenizer, prompt)

    def seed_of(self, seed: int | None, num_sequences: int) -> tuple[int, Sequence[int]]:
        """(seed, number of each sequence): a request's own seed counts from 0, others share one and never a number."""
        if seed is not None:
            return seed % 2**64, range(num_sequences)
        return self._seed, [next(self._numbers) for _ in range(num_sequences)]

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Have something done that nobody waits for, before the server ends at the latest."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Finish what was spawned, and stop the engine."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self.runner.stop)


def _alike(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    return a.get_vocab() == b.get_vocab() and a.chat_template == b.chat_template
