"""`alignfast serve`: a model behind OpenAI's routes, with votes on its answers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any

from alignfast.commands.parser import parse_options

_NEEDS = ("fastapi", "uvicorn", "prometheus_client")


@dataclass(frozen=True)
class ServeOptions:
    """What is served, where, and what it takes on."""

    model: str
    """Folder or hub name of the model, or of adapters, in safetensors."""
    db: str | None = None
    """Where answers and votes are kept. None: in memory, until the server stops."""
    host: str = "127.0.0.1"
    """Address to listen on. Others than the loopback need a key, in ALIGNFAST_API_KEY or ALIGNFAST_ADMIN_KEY."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    served_model_name: str | None = None
    """Name that clients ask for; the folder's unless given."""
    max_sequences: int = 32
    """Answers that are drawn at once."""
    max_queue: int = 256
    """Answers that wait beyond those; more are told 429."""
    cache_tokens: int = 32768
    """Tokens of prompts and answers that run at once; each holds room for all it may become."""
    max_prefill_tokens: int = 8192
    """Tokens of prompts in one forward pass."""
    max_body_bytes: int = 1048576
    """Of a request's body; larger ones are told 413."""
    max_answers: int = 8
    """Answers to one request, prompts times n; more are told 422."""
    max_tokens: int = 1024
    """Tokens of one answer that may be asked for, and those of a chat that asks for no number."""
    request_seconds: float = 120.0
    """From a request to the end of its answer; what takes longer is told 504."""
    session_hours: float = 12.0
    """A browser's cookie is good for so long."""
    dtype: str = "auto"
    """Type of the weights: float32, bfloat16, float16, or auto for the model's own."""
    trust_remote_code: bool = False
    """Run code that a model brings with it."""
    use_cpu: bool = False
    """Stay on the CPU where there is a GPU."""


def run(command: str, argv: Sequence[str]) -> None:
    """Load, listen, and drain on SIGTERM."""
    (options,) = parse_options(command, argv, ServeOptions)
    missing = [name for name in _NEEDS if find_spec(name) is None]
    if missing:
        raise ValueError(f"serving needs {', '.join(missing)}: pip install 'alignfast[serve]'")
    import torch
    from rich.console import Console

    from alignfast.online.server.recorder import make_recorder
    from alignfast.online.server.run import check_address, serve
    from alignfast.online.server.service import Limits, Service
    from alignfast.online.server.versions import folder_of

    limits = Limits(**{field.name: getattr(options, field.name) for field in fields(Limits)})
    recorder = make_recorder(options.db, keys_of(os.environ))
    name = options.served_model_name or folder_of(options.model).resolve().name
    service = Service(name, recorder, limits)
    check_address(service, options.host)
    service.runner.start()
    version = service.swap(
        options.model, dtype=options.dtype, trust_remote_code=options.trust_remote_code,
        device="cuda" if torch.cuda.is_available() and not options.use_cpu else "cpu",
    )  # fmt: skip
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"model {name!r}, version {version.name}, weights {version.weights[:12]}")
    console.print(_who_may_ask(service.keyless))
    if options.db is None:
        console.print("answers and votes are kept in memory, and are gone when the server stops")
    serve(service, options.host, options.port)


def keys_of(environment: Mapping[str, str]) -> dict[str, Any]:
    """The keys in the environment, where no list of processes shows them, and who they are.

    Raises:
        ValueError: the two are the same, or one is too short to be safe.
    """
    from alignfast.online.server.recorder import Caller

    known = {"ALIGNFAST_API_KEY": Caller("key"), "ALIGNFAST_ADMIN_KEY": Caller("admin", "admin")}
    found = {name: environment[name] for name in known if environment.get(name)}
    for name, key in found.items():
        if len(key) < 16:
            raise ValueError(
                f"{name} has {len(key)} characters; make one of 16 or more: openssl rand -hex 24"
            )
    if len(set(found.values())) < len(found):
        raise ValueError("ALIGNFAST_API_KEY and ALIGNFAST_ADMIN_KEY must differ")
    return {key: known[name] for name, key in found.items()}


def _who_may_ask(keyless: bool) -> str:
    if keyless:
        return "no key is set: this machine alone may ask, and may do everything"
    return "a key is needed for every route but /health"
