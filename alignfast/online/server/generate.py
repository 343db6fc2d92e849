"""From a body to an answer: whole, or as a stream of server-sent events.

    job -> ticket -> steps -> pieces of each choice -> kept in the store -> its end is told

An answer is kept before its end is told, so that a vote on it can't come too early. A reader who leaves ends the drawing
before the next step; what a stream had shown until then is kept as `cancelled`. Answers to one prompt are a group. Where
two are to be compared and the user is in the canary's share, they duel: the canary draws one of them, on a side that lots
are drawn for, and neither says its version.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from alignfast.online.feedback import Shown
from alignfast.online.server.errors import ApiError
from alignfast.online.server.guard import Caller
from alignfast.online.server.runner import GenerationFailed, QueueFull, Ticket
from alignfast.online.server.schema import ChatRequest, CompletionRequest, Generating
from alignfast.online.server.service import Service
from alignfast.online.server.shapes import ChatShape, Choice, Frame, TextShape, TokenLogprob, Usage
from alignfast.online.server.votes import episode_of
from alignfast.online.store.duels import DUEL
from alignfast.rollout.live import Drawn
from alignfast.rollout.pieces import Pieces
from alignfast.rollout.sampling import Prompt, Sampling

log = logging.getLogger("alignfast.server")


@dataclass(frozen=True)
class Job:
    """What is to be answered, checked.

    Attributes:
        shape: of the answer.
        prompts: as they were given, and as tokens.
        sampling: of each prompt.
        numbers: by which the answers' random numbers are keyed.
        began: by the monotonic clock.
        canary_at: which of the two prompts of a duel the canary answers; they are one and the same. None: no duel.
    """

    shape: ChatShape | TextShape
    prompts: tuple[tuple[Prompt, tuple[int, ...]], ...]
    sampling: Sampling
    numbers: Sequence[int]
    body: Generating
    caller: Caller
    began: float
    canary_at: int | None = None

    @property
    def logprobs(self) -> bool:
        """Whether they are told."""
        assert isinstance(self.body, (ChatRequest, CompletionRequest))
        return self.body.logprobs is not None and self.body.logprobs is not False


async def make_job(service: Service, body: ChatRequest | CompletionRequest, caller: Caller) -> Job:
    """Check a body against the limits and the model.

    Raises:
        ApiError: 404 for another model; 422 for what can't be done.
    """
    began, limits = time.monotonic(), service.limits
    if body.model != service.name:
        message = f"there is no model {body.model!r} here; this server has {service.name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")
    prompts: list[Any]
    if isinstance(body, ChatRequest):
        shape: ChatShape | TextShape = ChatShape()
        prompts, asked = [[m.plain() for m in body.messages]], body.max_completion_tokens or body.max_tokens
    else:
        shape, prompts, asked = TextShape(), list(body.prompts), body.max_tokens or 16  # OpenAI's own default
    if asked is not None and asked > limits.max_tokens:
        raise _beyond("max_tokens", asked, limits.max_tokens)
    n = body.n or 1
    if len(prompts) * n > limits.max_answers:
        raise _beyond("n", len(prompts) * n, limits.max_answers)
    seed, numbers = service.seed_of(body.seed, len(prompts) * n)
    canary_at = service.side_of(caller.user) if body.alignfast.pair and body.kept else None
    if canary_at is not None:
        prompts, n = prompts * 2, 1
    sampling = Sampling(
        max_new_tokens=asked or limits.max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k or 0,
        min_p=body.min_p or 0.0,
        n=n,
        seed=seed,
        stop=body.stops,
    )
    try:
        encoded = await asyncio.to_thread(lambda: [tuple(service.encode(prompt)) for prompt in prompts])
    except Exception as error:  # a chat template may refuse in any way that Jinja has
        param = "messages" if isinstance(body, ChatRequest) else "prompt"
        raise ApiError(422, f"the prompt can't be read: {error}", param=param) from error
    return Job(shape, tuple(zip(prompts, encoded)), sampling, numbers, body, caller, began, canary_at)


def _beyond(param: str, value: int, limit: int) -> ApiError:
    return ApiError(422, f"{param}: {value} were asked for, this server gives {limit} at most", param=param)


async def answer(service: Service, job: Job, receive: Receive) -> Response:
    """The response to a job; its drawing ends with its reader.

    Raises:
        ApiError: as `begin`, 500 or 504.
    """
    answering = begin(service, job)
    if job.body.stream:
        return EventStream(answering)
    whole = await unless_gone(receive, answering.whole())
    if whole is None:
        return Response(status_code=499)  # nobody reads it
    return JSONResponse(whole, headers=answering.frame.headers())


def begin(service: Service, job: Job) -> Answering:
    """Have a job's answers drawn; who takes them ends that.

    Raises:
        ApiError: 422 for a prompt that leaves no room, 429 where too many wait.
    """
    try:
        ticket = service.runner.submit(
            [ids for _, ids in job.prompts], job.sampling, job.numbers, job.canary_at
        )
    except QueueFull as full:
        headers = {"Retry-After": str(full.retry_after_s)}
        raise ApiError(429, str(full), code="rate_limit_exceeded", headers=headers) from full
    except ValueError as error:
        raise ApiError(422, str(error), param="prompt") from error
    return Answering(service, job, ticket)


class Answering:
    """One response, from its tokens to its end."""

    def __init__(self, service: Service, job: Job, ticket: Ticket) -> None:
        self.service, self.job, self.ticket = service, job, ticket
        name, n = f"{job.shape.prefix}-{uuid.uuid4().hex}", ticket.num_sequences
        ids = [name] if n == 1 else [f"{name}-{i}" for i in range(n)]
        self.choices = [Choice(i, id, logprobs=[] if job.logprobs else None) for i, id in enumerate(ids)]
        versions = dict.fromkeys(map(ticket.version, range(n)))
        self.duel = None if job.canary_at is None or len(versions) < 2 else ticket.version(job.canary_at).name
        self.frame = Frame(
            job.shape, name, int(time.time()), service.name, None if self.duel else next(iter(versions)),
            tuple(self._told_of(choice) for choice in self.choices) if job.body.kept else (),
        )  # fmt: skip
        self._pieces = [Pieces(service.tokenizer, job.sampling.stop) for _ in ids]
        self._started = False

    def _told_of(self, choice: Choice) -> dict[str, Any]:
        token = self.service.signer.token(choice.response_id)
        return {"index": choice.index, "response_id": choice.response_id, "feedback_token": token}

    async def whole(self) -> dict[str, Any]:
        """The response at once."""
        try:
            async for _ in self._parts():
                pass
        finally:
            self.leave(shown=False)
        return self.frame.whole(self.choices, self._usage())

    async def stream(self) -> AsyncIterator[bytes]:
        """The response in events; an error after the first is an event too, and then there is no `[DONE]`."""
        shape, told = self.job.shape, set()
        try:
            for choice in self.choices:
                opening = shape.opening(choice)
                if opening is not None:
                    told.add(choice.index)
                    yield self._event([opening], ours=True)
            async for choice, text, logprobs in self._parts():
                ends, first = choice.finish_reason is not None, choice.index not in told
                told.add(choice.index)
                if isinstance(shape, ChatShape) and ends and (text or logprobs):
                    part = shape.piece(choice, text, logprobs)
                    yield self._event([{**part, "finish_reason": None}])
                    text, logprobs = "", None
                yield self._event([shape.piece(choice, text, logprobs)], ours=ends or first)
            if self._include_usage:
                yield _sse(self.frame.chunk([], usage=self._usage().to_dict()))
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield _sse(error.body())

    @property
    def _include_usage(self) -> bool:
        options = self.job.body.stream_options
        return options is not None and options.include_usage

    def _event(self, choices: list[dict[str, Any]], ours: bool = False) -> bytes:
        more = {"usage": None} if self._include_usage else {}
        return _sse(self.frame.chunk(choices, ours=ours, **more))

    async def _parts(self) -> AsyncIterator[tuple[Choice, str, list[TokenLogprob] | None]]:
        """(choice, text that is new, log-probs of its tokens), a choice's last one after it is kept."""
        seconds = self.service.limits.request_seconds - (time.monotonic() - self.job.began)
        told = [0] * len(self.choices)
        try:
            async for step in self.ticket.steps(seconds):
                for index, drawn in step:
                    choice = self.choices[index]
                    text = self._take(choice, drawn)
                    if drawn.completion is not None:
                        await self._keep(choice)
                    if text or drawn.completion is not None:
                        logprobs = None if choice.logprobs is None else choice.logprobs[told[index] :]
                        told[index] = len(choice.logprobs or ())
                        yield choice, text, logprobs
        except TimeoutError as error:
            raise ApiError(504, str(error), code="timeout") from error
        except GenerationFailed as error:
            raise ApiError(500, str(error)) from error

    def _take(self, choice: Choice, drawn: Drawn) -> str:
        """Add a token to its choice, and return the text that it makes certain."""
        if not self._started:
            self._started = True
            self.service.metrics.first_token.observe(time.monotonic() - self.job.began)
        assert drawn.token is not None
        choice.token_ids.append(drawn.token)
        choice.logps.append(drawn.logp)
        choice.sampled_logps.append(drawn.sampled_logp)
        pieces, text = self._pieces[choice.index], ""
        if drawn.token not in drawn.request.finish.stop_ids:
            text = pieces.add(drawn.token)
            if choice.logprobs is not None:
                token = self.service.tokenizer.decode([drawn.token])
                choice.logprobs.append(TokenLogprob(str(token), drawn.logp))
        if drawn.completion is not None:
            text += pieces.end()
            choice.finish_reason = drawn.completion.finish_reason
        choice.text += text
        return text

    async def _keep(self, choice: Choice) -> None:
        """Have an answer recorded; who asked not to be stored is not."""
        if not self.job.body.kept:
            return
        try:
            await self.service.in_store(lambda: self.service.store.record_shown(self._shown(choice)))
        except Exception as error:
            log.exception("an answer could not be stored")
            raise ApiError(503, "the answer could not be stored, so it is not given") from error

    def _shown(self, choice: Choice) -> Shown:
        job = self.job
        of_prompt = choice.index // job.sampling.n
        prompt, ids = job.prompts[of_prompt]
        version = self.ticket.version(choice.index)
        sampling = {name: getattr(job.sampling, name) for name in _KEPT_OPTIONS}
        group_id = None if job.sampling.n == 1 else f"{self.frame.id}-p{of_prompt}"
        if job.canary_at is not None:
            group_id = self.frame.id
        return Shown(
            id=choice.response_id, prompt=self.service.as_text(prompt), text=choice.text, user=job.caller.user,
            episode_id=episode_of(job.caller.user, job.body.episode_id), turn=_turn(prompt), group_id=group_id,
            prompt_ids=ids, completion_ids=tuple(choice.token_ids), logps=tuple(choice.logps),
            sampled_logps=tuple(choice.sampled_logps), finish_reason=choice.finish_reason or "cancelled",
            sampling=sampling | ({DUEL: self.duel} if self.duel else {}),
            policy_version=version.name, weights_hash=version.weights,
        )  # fmt: skip

    def _usage(self) -> Usage:
        prompts = self.job.prompts if self.job.canary_at is None else self.job.prompts[:1]
        return Usage(
            sum(len(ids) for _, ids in prompts),
            sum(len(choice.token_ids) for choice in self.choices),
        )

    def leave(self, *, shown: bool) -> None:
        """Count, and end what has not ended; `shown` says whether its reader saw the start of it."""
        usage, metrics = self._usage(), self.service.metrics
        metrics.tokens.labels("prompt").inc(usage.prompt)
        metrics.tokens.labels("completion").inc(usage.completion)
        unfinished = [choice for choice in self.choices if choice.finish_reason is None]
        if unfinished:
            self.service.runner.cancel(self.ticket)
            metrics.cancelled.inc(len(unfinished))
        for choice in unfinished:
            if shown and choice.text:
                self.service.spawn(self._keep(choice))


def _turn(prompt: Any) -> int:
    """How many answers came before in a conversation."""
    return sum(isinstance(turn, dict) and turn["role"] == "assistant" for turn in prompt)


_KEPT_OPTIONS = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop")


def _sse(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return f"data: {text}\n\n".encode(errors="replace")


async def unless_gone(receive: Receive, work: Awaitable[Any]) -> Any:
    """The result of some work, or None if the client leaves first, which cancels it."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events for as long as somebody reads them."""

    media_type = "text/event-stream"

    def __init__(self, answering: Answering) -> None:
        self.status_code, self.background, self.answering = 200, None, answering
        self.init_headers(
            {**answering.frame.headers(), "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        try:
            await unless_gone(receive, self._send(send))
        finally:
            self.answering.leave(shown=True)

    async def _send(self, send: Callable[[Message], Awaitable[None]]) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self.answering.stream():
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
