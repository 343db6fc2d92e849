"""`alignfast serve`: a model behind OpenAI's routes, with votes on its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec

from alignfast.commands.parser import parse_options

_NEEDS = ("fastapi", "uvicorn", "prometheus_client", "sqlalchemy", "alembic")


@dataclass(frozen=True)
class ServeOptions:
    """What is served, where, and what it takes on."""

    model: str | None = None
    """Folder or hub name of the model, or of adapters, in safetensors: what serves first. Once the database names a
    version that serves, that one is taken."""
    db: str = "sqlite:///feedback.db"
    """Database of answers, votes, keys and versions: sqlite:///FILE or postgresql://USER@HOST/NAME."""
    host: str = "127.0.0.1"
    """Address to listen on. Others than the loopback need a key: `alignfast keys make`."""
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
    label: str | None = None
    """Prompts whose answers annotators rank at /label: JSONL or another dataset with a column `prompt`. They are put into
    the database's queue, each once."""
    label_answers: int = 4
    """Answers to each of them, drawn when an annotator first asks for it; 2 to 8."""
    label_overlap: int = 2
    """Annotators who rank each."""
    max_votes: int | None = 1000
    """Votes that one user may give in `votes_period`, all anonymous ones together; more are told 429."""
    votes_period: float = 3600.0
    """Of that, in seconds."""
    redact: str | None = None
    """package.module:function, called with each text before it is stored; what it returns is stored."""
    retention_days: float | None = None
    """Delete answers, and the votes on them, so many days after they were shown. None: keep them."""
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
        raise ValueError(
            f"serving needs {', '.join(missing)}: pip install '.[serve]' in alignfast's checkout"
        )
    import torch
    from rich.console import Console

    from alignfast.data import load_rows
    from alignfast.online.server.labelling import request_of
    from alignfast.online.server.run import check_address, serve
    from alignfast.online.server.service import Limits, Service
    from alignfast.online.server.versions import first_version, served_name
    from alignfast.online.store import Store
    from alignfast.online.store.redact import load_redact
    from alignfast.trainers.state import no_bars

    if options.retention_days is not None and not options.retention_days > 0:
        raise ValueError(f"retention_days must be above 0, got {options.retention_days}")
    limits = Limits(**{field.name: getattr(options, field.name) for field in fields(Limits)})
    loading = {
        "dtype": options.dtype, "trust_remote_code": options.trust_remote_code,
        "device": "cuda" if torch.cuda.is_available() and not options.use_cpu else "cpu",
    }  # fmt: skip
    redact = None if options.redact is None else load_redact(options.redact)
    opened = Store.open(options.db, redact=redact, max_votes=options.max_votes, period=options.votes_period)
    with opened as store, no_bars():
        name = options.served_model_name or served_name(store, options.model)
        service = Service(name, store, limits, loading)
        check_address(service, options.host)
        first = first_version(store, options.model)
        service.runner.start()
        version = service.load(first)
        console = Console(highlight=False, soft_wrap=True)
        console.print(
            f"model {name!r}, version {version.name}, weights {version.weights[:12]}, of {first.path}"
        )
        console.print(_who_may_ask(service.keyless))
        console.print(f"answers and votes are kept in {options.db}")
        console.print(
            "a page to chat and vote in is at /, the loop's state at /loop; `alignfast init online` writes a recipe to learn "
            "from the votes"
        )
        if options.label is not None:
            prompts = [row["prompt"] for row in load_rows(options.label, formats=["prompt"])]
            for prompt in prompts:
                request_of(prompt, name, options.label_answers)  # refused here, not before an annotator
            console.print(f"{store.labels.add(prompts)} prompts were put into the queue at /label")
        serve(service, options.host, options.port, retention_days=options.retention_days)


def _who_may_ask(keyless: bool) -> str:
    if keyless:
        return "no key is set: this machine alone may ask, and may do everything"
    return "a key is needed for every route but /health and the page's own files"
