"""What the routes share: the model's versions, the store, the limits."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from hashlib import sha256
from itertools import count
from typing import Any, TypeVar

from fastapi import Request
from sqlalchemy import Connection
from transformers import PreTrainedTokenizerBase

from alignfast.models.policy import Policy
from alignfast.online.server.guard import Signer
from alignfast.online.server.metrics import Metrics
from alignfast.online.server.runner import Runner
from alignfast.online.server.versions import Version, folder_of, weights_hash
from alignfast.online.store import Kept, Store
from alignfast.online.store import Version as Stored
from alignfast.rollout.live import LiveEngine
from alignfast.rollout.prompts import encode_prompt
from alignfast.rollout.sampling import Prompt

Result = TypeVar("Result")

_STORE_THREADS = 64  # answers wait for the disk in one of them; those that wait together share its commit


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
    label_answers: int = 4
    """Answers to each prompt of the labelling queue."""
    label_overlap: int = 2
    """Annotators who rank each of them."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0 and (field.name, value) != ("max_queue", 0):
                raise ValueError(f"{field.name} must be above 0, got {value}")
        if not 2 <= self.label_answers <= 8:
            raise ValueError(f"label_answers must be 2 to 8, for people to rank, got {self.label_answers}")
        if self.label_answers > self.max_answers:
            raise ValueError(
                f"label_answers={self.label_answers} is above max_answers={self.max_answers}: raise that too"
            )


class Service:
    """A model that is served.

    Args:
        name: of the model, as clients ask for it.
        store: where answers and votes go, and that says which version serves.
        limits: what it takes on.
        loading: options of `load_policy` by which versions are loaded, and `device`.

    Attributes:
        keyless: whether there never was a key: the loopback alone is answered.
        canary_share: of the users who meet the canary.
        write_vote: keeps a vote, as `Store.write_from_loop` does.
        drawing: held while answers of the labelling queue are drawn.
    """

    def __init__(
        self,
        name: str,
        store: Store,
        limits: Limits | None = None,
        loading: Mapping[str, Any] | None = None,
    ) -> None:
        self.name, self.store = name, store
        self.limits, self.loading = limits or Limits(), dict(loading or {})
        self.keyless = not store.keys.any()
        self.canary_share = 0.0
        self.write_vote: Callable[[Callable[[Connection], Kept]], Awaitable[Kept]] = store.write_from_loop
        self.drawing = asyncio.Lock()
        self.signer = Signer(store.secret("server"))
        self.runner = Runner(self.limits.max_sequences, self.limits.max_queue)
        self.metrics = Metrics(self.runner)
        self._seed = secrets.randbits(63)
        self._numbers = count()
        self._tokenizer: PreTrainedTokenizerBase | None = None
        # tokenizers that are used by two threads at once have been seen to fail
        self._encoding = threading.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._threads = ThreadPoolExecutor(_STORE_THREADS, thread_name_prefix="alignfast-server")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of all versions."""
        assert self._tokenizer is not None, "a version is opened before anything is asked"
        return self._tokenizer

    def open(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        version: Version,
        *,
        canary: bool = False,
    ) -> Version:
        """Serve a version: new requests go to it, running ones end on their own. Blocks until it is in place.

        Args:
            policy: its model.
            tokenizer: its tokenizer.
            version: what its answers say they came from.
            canary: leave the version that serves, and have this one answer in duels alone.

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

        done = self.runner.open(make, version, canary=canary).result()
        self._tokenizer = self._tokenizer or tokenizer
        return done

    def load(self, version: Stored, *, canary: bool = False) -> Version:
        """Load a version of the store and open it. Blocks meanwhile; requests go on.

        Raises:
            ValueError: its folder is not here, or holds other weights than it was registered with; as `open`.
        """
        from alignfast.models import load_policy, load_tokenizer

        folder, loading = folder_of(version.path), dict(self.loading)
        weights = weights_hash(folder)
        if weights != version.hash:
            raise ValueError(
                f"version {version.name!r}: {folder} holds the weights {weights[:12]}, the store says "
                f"{version.hash[:12]}: versions never change, register the folder under another name"
            )
        device = loading.pop("device", "cpu")
        policy = load_policy(str(folder), **loading).to(device)
        trust = loading.get("trust_remote_code", False)
        tokenizer = load_tokenizer(None, str(folder), trust_remote_code=trust)
        return self.open(policy, tokenizer, Version(version.name, weights), canary=canary)

    def side_of(self, user: str) -> int | None:
        """On which side the canary stands in a pair, by lot; None where this user meets none."""
        canary = self.runner.canary
        if canary is None:
            return None
        drawn = int.from_bytes(sha256(f"{canary.version.name}|{user}".encode()).digest()[:8], "big") / 2**64
        return secrets.randbelow(2) if drawn < self.canary_share else None

    def as_text(self, prompt: Any) -> Any:
        """A prompt as it is kept: tokens as the text that they are of."""
        if isinstance(prompt, list) and isinstance(prompt[0], int):
            with self._encoding:
                return self.tokenizer.decode(prompt)
        return prompt

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

    async def in_store(self, work: Callable[[], Result]) -> Result:
        """What some work gives that reads from or writes to the store, done in another thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def close(self) -> None:
        """Finish what was spawned, and stop the threads; the store is its opener's to close."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self.runner.stop)
        self._threads.shutdown(wait=False)


def service_of(request: Request) -> Service:
    """The service behind a route."""
    service: Service = request.app.state.service
    return service


def _alike(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    return a.get_vocab() == b.get_vocab() and a.chat_template == b.chat_template
