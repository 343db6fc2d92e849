"""Which of two answers is the better one, by asking a language model over an OpenAI-compatible API.

    ask (A = ours, B = other) and (A = other, B = ours)       temperature 0
    1 where ours wins both, 0 where it loses both, 1/2 otherwise

Judges favour a place (arXiv 2306.05685, section 3.3): a verdict that turns with the places is a tie. Answers that are
alike tie without a question.

Not done here: rubrics, grades of single answers (a reward function), batches of an API's own.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any, Literal, Protocol, TypeAlias
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from alignfast.rewards import RewardSet
from alignfast.rewards.protocol import Text, completion_text

logger = logging.getLogger("alignfast")

Verdict: TypeAlias = Literal["A", "B", "tie"]
OPENAI = "https://api.openai.com/v1"
INSTRUCTION = (
    "Compare two answers to the same request. Judge how well each does what was asked: correctness first, then "
    "helpfulness and clarity. Neither length nor order counts. Give your reasons in a sentence or two, then end with one "
    "line: 'Verdict: A', 'Verdict: B', or 'Verdict: tie' if neither is better."
)
_VERDICT = re.compile(r"verdict\W*(a|b|tie)\b", re.IGNORECASE)
_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})  # statuses that another try may cure


class JudgeError(RuntimeError):
    """The judge gave no verdict; the message says why."""


class PairwiseJudge(Protocol):
    """What compares answers with others, rather than scoring each."""

    name: str

    def check(self) -> None:
        """Raise `JudgeError` where it can't judge at all; called before training."""

    def compare(
        self, prompts: Sequence[Text], completions: Sequence[Text], others: Sequence[Text]
    ) -> list[float | None]:
        """Of each completion 1 where it beats the other, 0 where it loses, 1/2 for a tie, None without a verdict."""


class ApiJudge:
    """A language model behind `POST base_url/chat/completions`.

    Args:
        model: its name there.
        base_url: of the API, up to and with `/v1`. None is $OPENAI_BASE_URL, or else OpenAI's own.
        api_key_env: environment variable that holds the key; None sends no key.
        instruction: what the judge is told; its answer must end in a verdict, `Verdict: A`, `B` or `tie`.
        timeout: seconds of one request.
        tries: of one request, where the failure may pass.
        workers: requests at once.

    Raises:
        ValueError: there is no key, or the address is none.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key_env: str | None = "OPENAI_API_KEY",
        instruction: str = INSTRUCTION,
        timeout: float = 60.0,
        tries: int = 4,
        workers: int = 8,
    ) -> None:
        base_url = base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI
        if urlsplit(base_url).scheme not in ("http", "https") or not urlsplit(base_url).netloc:
            raise ValueError(
                f"base_url must be an address such as http://127.0.0.1:8000/v1, got {base_url!r}"
            )
        key = os.environ.get(api_key_env) if api_key_env is not None else None
        if api_key_env is not None and not key:
            raise ValueError(
                f"the judge {model!r} needs a key, and the environment has no {api_key_env}: set it (to anything, for a "
                "server that asks for none), or pass api_key_env=None"
            )
        if not timeout > 0 or tries < 1 or workers < 1:
            raise ValueError(
                f"timeout must be above 0, tries and workers at least 1, got {timeout}, {tries} and {workers}"
            )
        self.name, self.model = f"api:{model}", model
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.instruction, self.timeout, self.tries, self.workers = instruction, timeout, tries, workers
        self._key = key

    def __repr__(self) -> str:
        return f"ApiJudge({self.model!r}, url={self.url!r})"  # the key stays out of logs

    def check(self) -> None:
        """Ask for one verdict, so that a wrong key or name is told before training.

        Raises:
            JudgeError: there is none.
        """
        self.verdict("What is 2 + 2?", "4", "5")

    def compare(
        self, prompts: Sequence[Text], completions: Sequence[Text], others: Sequence[Text]
    ) -> list[float | None]:
        """Of each completion 1 where it beats the other, 0 where it loses, 1/2 for a tie.

        None where the judge gave no verdict; a warning says how often, and why.

        Raises:
            ValueError: the lists differ in length.
        """
        if not len(prompts) == len(completions) == len(others):
            raise ValueError(
                f"expected equally many prompts, completions and others, got {len(prompts)}, {len(completions)} and "
                f"{len(others)}"
            )
        with ThreadPoolExecutor(self.workers) as pool:
            found = list(pool.map(self._compare_one, prompts, completions, others))
        failed = [of for of in found if isinstance(of, JudgeError)]
        if failed:
            logger.warning(
                "judge %s gave no verdict on %d of %d pairs: %s",
                self.name,
                len(failed),
                len(found),
                failed[0],
            )
        return [None if isinstance(of, JudgeError) else of for of in found]

    def _compare_one(self, prompt: Text, completion: Text, other: Text) -> float | JudgeError:
        ours, theirs = completion_text(completion), completion_text(other)
        if ours == theirs:
            return 0.5
        try:
            first, second = self.verdict(prompt, ours, theirs), self.verdict(prompt, theirs, ours)
        except JudgeError as error:
            return error
        return {("A", "B"): 1.0, ("B", "A"): 0.0}.get((first, second), 0.5)

    def verdict(self, prompt: Text, a: str, b: str) -> Verdict:
        """The judge's word on answer A against answer B, as they stand.

        Raises:
            JudgeError: the request failed, or the reply holds no verdict.
        """
        question = f"<request>\n{_as_text(prompt)}\n</request>\n\n<answer A>\n{a}\n</answer A>\n\n<answer B>\n{b}\n</answer B>"
        messages = [
            {"role": "system", "content": self.instruction},
            {"role": "user", "content": question},
        ]
        reply = self._ask({"model": self.model, "temperature": 0, "messages": messages})
        try:
            text = reply["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise JudgeError(f"{self.url} answered without a message: {_short(reply)}") from None
        return read_verdict(text or "")

    def _ask(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = Request(self.url, json.dumps(body).encode(), headers, method="POST")
        for attempt in range(self.tries):
            if attempt:
                time.sleep(min(2.0 ** (attempt - 1), 10.0))
            try:
                with urlopen(request, timeout=self.timeout) as reply:
                    return json.loads(reply.read())
            except HTTPError as error:
                failure = f"status {error.code}: {_short(error.read().decode(errors='replace'))}"
                if error.code not in _PASSING:
                    break
            except (URLError, HTTPException, OSError) as error:
                failure = f"{getattr(error, 'reason', None) or error or type(error).__name__}"
            except ValueError as error:
                failure = f"a reply that is no JSON: {error}"
                break
        raise JudgeError(f"{self.url}, model {self.model!r}: {failure}")


def load_judge(spec: Any, timeout: float | None) -> PairwiseJudge | RewardSet:
    """What judges, from what a config can say.

    Args:
        spec: `api:MODEL`; an object with `compare` and `check`; or what `load_reward` takes, whose scores are compared.
        timeout: seconds that a reward function may take.

    Raises:
        ValueError: there is no such judge, or it lacks its key.
    """
    if isinstance(spec, str) and spec.startswith("api:"):
        model = spec.removeprefix("api:")
        if not model:
            raise ValueError("judge 'api:' names no model; write api:MODEL")
        return ApiJudge(model)
    if hasattr(spec, "compare"):
        return spec  # type: ignore[no-any-return]
    return RewardSet(spec, timeout=timeout)


def read_verdict(reply: str) -> Verdict:
    """The last verdict of a reply; one that consists of a verdict alone needs no word before it.

    Raises:
        JudgeError: there is none.

    >>> read_verdict("A is wrong. **Verdict: B**"), read_verdict("[[A]]"), read_verdict("Tie.")
    ('B', 'A', 'tie')
    >>> read_verdict("Both are fine")
    Traceback (most recent call last):
    alignfast.evaluation.judge.JudgeError: the reply holds no 'Verdict: A', 'B' or 'tie': 'Both are fine'
    """
    found = _VERDICT.findall(reply)
    word = (found[-1] if found else re.sub(r"\W", "", reply)).lower()
    if word == "tie":
        return "tie"
    if word in ("a", "b"):
        return "A" if word == "a" else "B"
    raise JudgeError(f"the reply holds no 'Verdict: A', 'B' or 'tie': {_short(reply)}")


def _as_text(prompt: Text) -> str:
    """A prompt as it is; of messages, who said what."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn['role']}: {completion_text([turn])}" for turn in prompt)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."
