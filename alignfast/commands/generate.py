"""`alignfast generate`: complete prompts; JSONL out, in the format that training reads."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignfast.commands.parser import UsageError, parse_options

if TYPE_CHECKING:
    from alignfast.rollout import Prompt


@dataclass(frozen=True)
class GenerateOptions:
    """What is completed, and how."""

    model: str
    """Folder or hub name of the model, or of adapters."""
    prompt: str | None = None
    """One prompt. Give this or prompts."""
    prompts: str | None = None
    """A .txt file with a prompt a line, or a .jsonl, .json or .parquet file with a column `prompt`."""
    output: str | None = None
    """Write to this .jsonl file; unless given, to standard output."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer; the model's own unless given."""
    chat: bool | None = None
    """Put a prompt into the chat template as a user's turn. None: where there is a template."""
    max_new_tokens: int = 256
    """A completion ends here at the latest."""
    temperature: float = 1.0
    """0 takes the likeliest token each time."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that hold this probability."""
    top_k: int = 0
    """Sample among so many likeliest tokens; 0 among all."""
    min_p: float = 0.0
    """Sample among tokens at least this share as likely as the likeliest."""
    stop: list[str] | None = None
    """Texts that end a completion, and are left out of it."""
    num_samples: int = 1
    """Completions of each prompt."""
    engine: str = "native"
    """`native` (packed, continuous batching), `transformers` for a model that can't be packed, or `vllm`: a server of
    that model (EXPERIMENTAL), which needs server_url."""
    server_url: str | None = None
    """Address of a vLLM server, such as http://127.0.0.1:8000."""
    seed: int = 0
    """Of the samples."""
    dtype: str = "auto"
    """Type of the weights: float32, bfloat16, float16, or auto for the model's own."""
    trust_remote_code: bool = False
    """Run code that a model brings with it."""
    use_cpu: bool = False
    """Stay on the CPU where there is a GPU."""


def run(command: str, argv: Sequence[str]) -> None:
    """Write a row of prompt and completion for each sample."""
    (options,) = parse_options(command, argv, GenerateOptions)
    if (options.prompt is None) == (options.prompts is None):
        raise UsageError("give --prompt TEXT or --prompts FILE")
    if (options.engine == "vllm") != (options.server_url is not None):
        raise UsageError("--engine vllm and --server_url ADDRESS go together")
    prompts: list[Prompt] = (
        [options.prompt] if options.prompts is None else read_prompts(Path(options.prompts))
    )
    import torch

    from alignfast.models import load_policy, load_tokenizer
    from alignfast.rollout import Sampling, make_engine

    device = "cuda" if torch.cuda.is_available() and not options.use_cpu else "cpu"
    trust = options.trust_remote_code
    policy = None  # a server has its own
    if options.engine != "vllm":
        layout = "padded" if options.engine == "transformers" else "shared"
        policy = load_policy(options.model, layout=layout, dtype=options.dtype, trust_remote_code=trust).to(
            device
        )
    tokenizer = load_tokenizer(options.tokenizer, options.model, trust_remote_code=trust)
    sampling = Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        n=options.num_samples,
        seed=options.seed,
        stop=tuple(options.stop or ()),
    )
    server = {} if options.server_url is None else {"server_url": options.server_url}
    engine = make_engine(options.engine, policy, tokenizer, **server)
    chat = tokenizer.chat_template is not None if options.chat is None else options.chat
    turns = [_as_turn(prompt) if chat else prompt for prompt in prompts]
    found = engine.generate(turns, sampling)
    rows = [_row(prompt, c.text) for prompt, completions in zip(prompts, found) for c in completions]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if options.output is None:
        sys.stdout.write(lines)
    else:
        Path(options.output).write_text(lines)
        print(f"{len(rows)} completions: {options.output}")


def read_prompts(file: Path) -> list[Prompt]:
    """The prompts of a file.

    Raises:
        DataError: the file can't be read, or a row has no prompt.
    """
    from alignfast.data import DataError
    from alignfast.data.sources import open_source

    if file.suffix == ".txt":
        prompts: list[Prompt] = [line for line in file.read_text().splitlines() if line.strip()]
    else:
        opened, prompts = open_source(file), []
        for number, row in opened.items:
            if isinstance(row, str):
                raise DataError(f"{opened.where(number)}: {row}")
            if not isinstance(row.get("prompt"), (str, list)) or not row["prompt"]:
                raise DataError(
                    f"{opened.where(number)}: there is no text or conversation in column 'prompt'"
                )
            prompts.append(row["prompt"])
    if not prompts:
        raise DataError(f"{file}: there is no prompt")
    return prompts


def _as_turn(prompt: Prompt) -> Prompt:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _row(prompt: Prompt, text: str) -> dict[str, Any]:
    completion: Any = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
    return {"prompt": prompt, "completion": completion}
