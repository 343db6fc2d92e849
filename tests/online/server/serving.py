"""A server on a free port of this process, with a model of a few thousand parameters."""

from __future__ import annotations

import hashlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import httpx
import torch
import uvicorn
from openai import OpenAI
from sqlalchemy import insert
from trainers.tiny import make_llama, make_tokenizer
from transformers import PreTrainedTokenizerFast

from alignfast.models.policy import Policy
from alignfast.online.feedback import Shown, Vote
from alignfast.online.server.app import make_app
from alignfast.online.server.service import Limits, Service
from alignfast.online.server.versions import Version
from alignfast.online.server.watch import Watch
from alignfast.online.store import Store, tables
from alignfast.online.store.keys import Role
from alignfast.online.store.stats import store_stats

KEY, OTHER_KEY, ADMIN_KEY, ANNOTATOR_KEY = (
    f"af_{name}_0123456789" for name in ("ann", "bob", "operator", "cleo")
)
KEYS: dict[str, Role] = {KEY: "user", OTHER_KEY: "user", ADMIN_KEY: "admin", ANNOTATOR_KEY: "annotator"}
TEMPLATE = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
FIRST = Version("v1", "1" * 64)


def make_model(seed: int = 3, positions: int = 64) -> Any:
    """Weights so large that every prompt token bears on the answer."""
    return make_llama(seed, initializer_range=0.5, max_position_embeddings=positions).eval()


def make_chat_tokenizer(endless: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    if endless:
        tokenizer.eos_token = None
    return tokenizer


def make_store(keys: dict[str, Role], **options: Any) -> Store:
    """On a SQLite file that goes with it."""
    folder = tempfile.TemporaryDirectory(prefix="alignfast-")
    store = Store.open(f"sqlite:///{folder.name}/feedback.db", **options)
    store.folder = folder  # type: ignore[attr-defined]
    rows = []
    for key, role in keys.items():
        _, user, secret = key.split("_")
        salted = hashlib.sha256(bytes(16) + secret.encode()).digest()
        rows.append(dict(id=user, user_id=user, role=role, salt=bytes(16), hash=salted, created=0.0))
    if rows:
        store.write(lambda connection: connection.execute(insert(tables.keys), rows))
    return store


def make_service(
    *,
    keys: dict[str, Role] | None = KEYS,
    endless: bool = False,
    model: Any = None,
    store: Store | None = None,
    **limits: Any,
) -> Service:
    """Its first version open, of which the store knows nothing. An endless one writes until it is told to stop."""
    torch.set_num_threads(1)
    model = model or make_model(positions=100_000 if endless else 64)
    if endless:
        model.generation_config.eos_token_id = None
    defaults = Limits(cache_tokens=4096, max_tokens=2000 if endless else 48, request_seconds=60)
    service = Service("tiny", store or make_store(keys or {}), replace(defaults, **limits))
    service.runner.start()
    service.open(Policy(model), make_chat_tokenizer(endless), FIRST)
    return service


@dataclass
class Live:
    """A server that listens."""

    service: Service
    watch: Watch
    url: str

    @property
    def store(self) -> Store:
        return self.service.store

    def shown(self, id: str) -> Shown:
        """An answer that is kept."""
        found = self.store.shown(id)
        assert found is not None, f"{id} is not kept"
        return found

    def votes(self, response_id: str, user: str = "ann") -> list[Vote]:
        """A user's votes that name a response, the ones that were replaced too."""
        return [v for v in self.store.votes(users=[user], current=False) if v.response_id == response_id]

    def http(self, key: str | None = KEY, **options: Any) -> httpx.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30, **options)

    @cached_property  # a client takes 0.2 s to make
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=30)

    def openai(self) -> OpenAI:
        """OpenAI's own client."""
        return self.client


@contextmanager
def listening(service: Service) -> Iterator[Live]:
    app = make_app(service)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield Live(
            service, app.app.state.watch, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        )
    finally:
        server.should_exit = True
        thread.join()


def until(what: Callable[[], Any], seconds: float = 20) -> None:
    """Wait for it."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def num_kept(live: Live) -> int:
    """How many answers are kept."""
    return store_stats(live.store).responses
