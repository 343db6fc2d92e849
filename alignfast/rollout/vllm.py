"""Completions by a vLLM server, which may hold more GPUs than the trainer: the adapter, EXPERIMENTAL.

EXPERIMENTAL: tested against a recorded server; it has not run against one on a GPU.

The server is vLLM's own (`vllm serve`), not TRL's: since TRL 1.16 `trl vllm-serve` does no more than start it, and is
deprecated. Completions come from `/v1/completions`, token ids in and out; weights go by vLLM's native weight transfer
(`transfer.py`), which is documented, is driven over plain HTTP and NCCL, and needs no vLLM beside the trainer.

Log-probs. A server gives one number for each token: with `--logprobs-mode processed_logprobs` under the distribution
that was drawn from (after temperature, top-k, top-p and min-p), with `raw_logprobs` under the whole one at temperature
1. So of `logps` and `sampled_logps`:

    no filters          one number is both; at a temperature other than 1 it must be a processed one
    filters, T = 1      `sampled_logps` are the processed ones; `logps` come from a second request, which scores the tokens
    filters, T != 1     refused: no request gives `logps`
    T = 0               `logps` at temperature 1, `sampled_logps` are 0

They are the server's, whose kernels round otherwise than the trainer's: the trainer computes its own and weighs by
`alignfast.losses.importance_weights(its own, sampled_logps, ...)`.

Random numbers. The i-th of a prompt's completions gets the seed key(sampling.seed) + its sequence number (vLLM adds i
to the seed of a request for n), so a sample is keyed as in the native engine; how its logits round still depends on what
the server computes beside it.

Not done here: starting a server; several servers; images; LoRA adapters served as such (they are merged).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from alignfast.models.policy import Policy
from alignfast.rollout.finish import Finish
from alignfast.rollout.prompts import check_room, encode_prompt, end_tokens, room_for
from alignfast.rollout.sampling import Completion, Prompt, Sampling
from alignfast.rollout.server import START, RouteMissing, Server, ServerError
from alignfast.rollout.transfer import (
    Communicator,
    NcclCommunicator,
    ServedWeight,
    WeightTransfer,
    fingerprint,
    named_weights,
    served_weights,
)

_PROBE = "The 3 cats naïvely said: 'x_i = 42;'\n\tgato\u0301 猫"


@dataclass(frozen=True)
class _Task:
    """A request: `count` completions of one prompt, numbered from `number`."""

    prompt: int
    ids: tuple[int, ...]
    number: int
    count: int
    limit: int


@dataclass(frozen=True)
class _Drawn:
    """A completion as the server gave it: tokens, the number of each, log-probs under the whole distribution, its end."""

    tokens: list[int]
    values: list[float]
    logps: list[float]
    reason: str
    stopped_by: int | str | None
    text: str


class VllmEngine:
    """Completions by a vLLM server. EXPERIMENTAL: see the module's header.

    Args:
        server_url: such as `http://127.0.0.1:8000`.
        tokenizer: the model's, as the server has it.
        policy: whose weights the server gets, and whose end tokens and size are obeyed; None: the server's own model.
        sync: send weights that changed before each `generate`, so that its next token is drawn under them, as by the
            other engines; False: at `sync_weights` alone.
        model: name of the model among those that the server has; None: its only one.
        timeout: seconds that an answer, or a weight update, may take.
        server_timeout: seconds to wait for a server that is starting.
        retries: repeats of a request that failed for want of an answer.
        max_requests: prompts that are asked for at once.
        api_key: the server's `--api-key`.
        communicator: makes the trainer's end of the NCCL group; for tests.

    Raises:
        ServerError: the server is not there, or has another model.
        ValueError: an option is out of range.

    >>> engine = VllmEngine("http://127.0.0.1:8000", tokenizer, policy=policy)  # doctest: +SKIP
    >>> engine.generate(["The cat"], Sampling(max_new_tokens=8))[0][0].text  # doctest: +SKIP
    ' sat on the mat.'
    """

    name = "vllm"

    def __init__(
        self,
        server_url: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        policy: Policy | None = None,
        sync: bool = True,
        model: str | None = None,
        timeout: float = 600.0,
        server_timeout: float = 0.0,
        retries: int = 3,
        max_requests: int = 64,
        api_key: str | None = None,
        communicator: Callable[[torch.device], Communicator] = NcclCommunicator,
    ) -> None:
        if max_requests < 1:
            raise ValueError(f"max_requests must be >= 1, got {max_requests}")
        self.server = Server(server_url, timeout=timeout, retries=retries, api_key=api_key)
        self.tokenizer, self.policy, self.max_requests = tokenizer, policy, max_requests
        self.sync = sync and policy is not None
        self.server.wait_until_up(server_timeout)
        served = self._served(model)
        self.model: str = served["id"]
        limits = [served.get("max_model_len"), None if policy is None else policy.positions]
        self.positions = min((limit for limit in limits if limit is not None), default=None)
        self._check_tokenizer()
        self.logprobs_mode = self._logprobs_mode()
        self._transfer = WeightTransfer(self.server, communicator)
        self._sent: tuple[Any, ...] | None = None

    def _served(self, model: str | None) -> dict[str, Any]:
        """What the server says of the model."""
        models = self.server.get("/v1/models")["data"]
        names = [entry["id"] for entry in models]
        if model is None:
            models = [entry for entry in models if entry.get("parent") is None]  # adapters name their model
            if len(models) != 1:
                raise ServerError(f"{self.server.url} serves {', '.join(names)}: name one by model=")
            return models[0]
        if model not in names:
            raise ServerError(f"{self.server.url} serves {', '.join(names)}, and not {model!r}")
        return models[names.index(model)]

    def _check_tokenizer(self) -> None:
        """Another model is seen by other token ids of a text."""
        ours = list(self.tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
        body = {"model": self.model, "prompt": _PROBE, "add_special_tokens": False}
        theirs = self.server.post("/tokenize", body, repeat=True)["tokens"]
        if ours != theirs:
            raise ServerError(
                f"{self.server.url} serves {self.model!r}, another model than the tokenizer's: of {_PROBE!r} it makes "
                f"tokens {theirs}, and the tokenizer here makes {ours}. Start it on the policy's own folder"
            )

    def _logprobs_mode(self) -> str | None:
        """What the server's log-probs are; None where it keeps its settings to itself."""
        try:
            info = self.server.get("/server_info", config_format="json")
            return info["vllm_config"]["model_config"]["logprobs_mode"]
        except (RouteMissing, KeyError, TypeError):
            return None

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, sequence_ids: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`.

        Raises:
            ServerError: the server fails, or its log-probs are not those that the sampling needs.
        """
        scored = self._needs_scores(sampling)
        encoded = [tuple(encode_prompt(self.tokenizer, prompt)) for prompt in prompts]
        vocabulary = len(self.tokenizer) if self.policy is None else self.policy.vocabulary
        # scoring draws a token that is thrown away, which must have a place too
        positions = None if self.positions is None else self.positions - scored
        check_room(encoded, vocabulary, positions)
        tasks = list(_tasks(encoded, sampling, sequence_ids, positions))
        found: list[list[Completion]] = [[] for _ in prompts]
        if not tasks:
            return found
        if self.sync:
            self.sync_weights()
        stops = sampling.stop_token_ids
        if stops is None and self.policy is not None:
            stops = end_tokens(self.policy.base, self.tokenizer)
        finish = Finish(self.tokenizer, frozenset(stops or ()), sampling.stop)
        pool = ThreadPoolExecutor(min(len(tasks), self.max_requests))
        try:
            answers = pool.map(lambda task: self._ask(task, self._body(task, sampling, stops), scored), tasks)
            for task, answer in zip(tasks, answers):  # the tokenizer stays on this thread
                found[task.prompt] += [
                    self._completion(task, drawn, sampling, stops, finish) for drawn in answer
                ]
        finally:
            pool.shutdown(wait=False)  # after an error, `map` drops what waits
        return [row * sampling.n for row in found] if sampling.temperature == 0 else found

    @torch.no_grad()
    def sync_weights(self, named_parameters: Iterable[tuple[str, Tensor]] | None = None) -> bool:
        """Give the server the policy's weights, adapters merged, if any changed since the last time.

        Args:
            named_parameters: weights under their checkpoint's names, all of them; None: the policy's.

        Returns:
            Whether they were sent.

        Raises:
            ModelRefused: the policy's weights can't be served.
            ServerError: the server does not take them.
            ValueError: there are none to send.
        """
        weights: list[ServedWeight] = []
        if named_parameters is not None:
            weights = named_weights(named_parameters)
        elif self.policy is not None:
            weights = served_weights(self.policy)
        if not weights:
            raise ValueError(
                "there are no weights to send: make the engine with policy=, or pass named_parameters"
            )
        # Of what weights are made of: merged ones are made only where something changed.
        sources = {id(source): source for weight in weights for source in weight.sources()}
        now = (fingerprint(sources.values()), [(weight.name, weight.adapters()) for weight in weights])
        if now == self._sent:
            return False
        self._transfer.send(weights)
        self._sent = now
        return True

    def _needs_scores(self, sampling: Sampling) -> bool:
        """Whether `logps` take a second request; see the module's header."""
        if self.logprobs_mode not in (None, "raw_logprobs", "processed_logprobs"):
            raise ServerError(
                f"the server gives {self.logprobs_mode}, expected log-probs: start it with --logprobs-mode "
                "processed_logprobs"
            )
        filtered = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
        if sampling.temperature == 0 or (sampling.temperature == 1 and not filtered):
            return False
        if filtered and sampling.temperature != 1:
            raise ValueError(
                f"top_k, top_p and min_p go with temperature=1 alone under engine='vllm', got {sampling.temperature}: a "
                "server has no log-probs under the whole distribution at another; use engine='native'"
            )
        if self.logprobs_mode != "processed_logprobs":
            mode = self.logprobs_mode or "unknown log-probs (it was not started with VLLM_SERVER_DEV_MODE=1)"
            raise ServerError(
                f"the server gives {mode}, and temperature={sampling.temperature}, top_k={sampling.top_k}, "
                f"top_p={sampling.top_p}, min_p={sampling.min_p} need processed_logprobs. To have them: {START}"
            )
        return filtered

    def _body(self, task: _Task, sampling: Sampling, stops: Sequence[int] | None) -> dict[str, Any]:
        """The request. What is left out, a server takes from the model's generation config, so nothing is."""
        return {
            "model": self.model, "prompt": list(task.ids), "n": task.count, "max_tokens": task.limit, "min_tokens": 0,
            "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p,
            "min_p": sampling.min_p, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            "seed": request_seed(sampling.seed, task.number), "stop": list(sampling.stop),
            "stop_token_ids": list(stops or ()), "ignore_eos": stops is not None,
            "skip_special_tokens": True, "include_stop_str_in_output": False,
            "logprobs": 0, "return_token_ids": True, "stream": False,
        }  # fmt: skip

    def _ask(self, task: _Task, body: dict[str, Any], scored: bool) -> list[_Drawn]:
        """What the server draws for one request."""
        answer = self.server.post("/v1/completions", body, repeat=True)
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if len(choices) != task.count:
            raise ServerError(
                f"the server gave {len(choices)} completions of a prompt, expected {task.count}"
            )
        found = []
        for choice in choices:
            tokens, values = _tokens(task, choice)
            logps = self._scores(task.ids, tokens) if scored else values
            ended = (choice["finish_reason"], choice.get("stop_reason"), choice["text"])
            found.append(_Drawn(tokens, values, logps, *ended))
        return found

    def _completion(
        self, task: _Task, drawn: _Drawn, sampling: Sampling, stops: Sequence[int] | None, finish: Finish
    ) -> Completion:
        """The completion, ended where the other engines would end it."""
        tokens, reason = drawn.tokens, drawn.reason
        sampled_logps = drawn.values if sampling.temperature else [0.0] * len(tokens)
        completion = finish.first_end(task.ids, tokens, drawn.logps, sampled_logps)
        if reason not in ("stop", "length"):
            raise ServerError(f"the server ended a completion for {reason!r}, expected 'stop' or 'length'")
        if completion.finish_reason == "stop":
            return completion
        if reason == "length":
            if len(tokens) < task.limit:
                raise ServerError(
                    f"the server cut a completion at {len(tokens)} tokens, expected {task.limit}: its own settings limit "
                    "it; start it with --generation-config vllm"
                )
            return completion
        if isinstance(drawn.stopped_by, str):  # a stop text that this tokenizer spells otherwise
            return replace(completion, finish_reason="stop", text=drawn.text)
        if stops is not None:
            raise ServerError(
                f"the server stopped at token {tokens[-1]}, expected one of {list(stops)} alone: its own settings add "
                "it; start it with --generation-config vllm"
            )
        return replace(completion, finish_reason="stop", text=finish.text(tokens[:-1]))

    def _scores(self, ids: tuple[int, ...], tokens: list[int]) -> list[float]:
        """Log-probs of a completion under the whole distribution at temperature 1, as a prompt has them."""
        body = {
            "model": self.model, "prompt": [*ids, *tokens], "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0,
            "stream": False,
        }  # fmt: skip
        (choice,) = self.server.post("/v1/completions", body, repeat=True)["choices"]
        found = choice.get("prompt_logprobs") or []
        if len(found) != len(ids) + len(tokens):
            raise ServerError(
                f"the server scored {len(found)} tokens, expected {len(ids) + len(tokens)}: is it vLLM's own?"
            )
        return [entry[str(token)]["logprob"] for entry, token in zip(found[len(ids) :], tokens)]


def request_seed(seed: int, number: int) -> int:
    """Seed of a request: far apart for different seeds, and one apart for completions next to each other.

    >>> request_seed(0, 5) - request_seed(0, 0)
    5
    """
    key = int.from_bytes(blake2b(str(seed).encode(), digest_size=7).digest(), "big")
    return (key + number) % 2**62


def _tasks(
    encoded: list[tuple[int, ...]],
    sampling: Sampling,
    sequence_ids: Sequence[int] | None,
    positions: int | None,
) -> Iterator[_Task]:
    """Requests: one for each run of successive numbers of a prompt, since a request's seeds are successive."""
    n = sampling.n
    numbers = range(len(encoded) * n) if sequence_ids is None else sequence_ids
    if len(numbers) != len(encoded) * n:
        raise ValueError(
            f"expected a sequence id for each of {len(encoded) * n} completions, got {len(numbers)}"
        )
    for prompt, ids in enumerate(encoded):
        limit = room_for(ids, sampling.max_new_tokens, positions)
        own = numbers[prompt * n : (prompt + 1) * n]
        if sampling.temperature == 0:  # vLLM refuses n > 1 there, and all would be the same
            own = own[:1]
        starts = [i for i in range(len(own)) if i == 0 or own[i] != own[i - 1] + 1]
        for start, end in zip(starts, [*starts[1:], len(own)]):
            yield _Task(prompt, ids, own[start], end - start, limit)


def _tokens(task: _Task, choice: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Tokens of a completion and the number that the server gives for each."""
    tokens, logprobs = choice.get("token_ids"), choice.get("logprobs") or {}
    values = logprobs.get("token_logprobs") or []
    if not tokens:
        raise ServerError("the server gives no token ids: it must be vLLM 0.10.2 or later")
    if choice.get("prompt_token_ids") not in (None, list(task.ids)):
        raise ServerError(
            "the server changed the prompt's tokens: it truncates prompts, or is not vLLM's own"
        )
    if len(values) != len(tokens) or any(value is None or not value <= 0 for value in values):
        raise ServerError(
            f"expected a log-prob for each of {len(tokens)} tokens, got {len(values)} numbers from {values[:4]}: start "
            "the server with --logprobs-mode processed_logprobs"
        )
    return tokens, values
