"""When a sequence ends, and what its completion is then."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from alignfast.rollout.sampling import Completion, FinishReason
from alignfast.rollout.scheduler import PromptState, Running

_LOOK_BACK = (
    8  # tokens decoded again beyond the stop text's own length, since a token may hold half a character
)


class Finish:
    """Ends sequences by a stop token, a stop text, or their limit.

    Args:
        tokenizer: to decode with.
        stop_ids: tokens that end a sequence.
        stop_texts: texts that end one.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int], stop_texts: tuple[str, ...]
    ) -> None:
        self.tokenizer, self.stop_ids, self.stop_texts = tokenizer, stop_ids, stop_texts
        self._reach = max(map(len, stop_texts), default=0) + _LOOK_BACK

    def completion(self, sequence: Running) -> Completion | None:
        """The completion, if the sequence's newest token ends it."""
        reason: FinishReason
        stopped = sequence.tokens[-1] in self.stop_ids
        if stopped or self.stopped_by_text(sequence.tokens):
            reason = "stop"
        elif len(sequence.tokens) >= sequence.limit:
            reason = "length"
        else:
            return None
        return Completion(
            prompt_ids=sequence.prompt.ids,
            token_ids=tuple(sequence.tokens),
            logps=tuple(sequence.logps),
            sampled_logps=tuple(sequence.sampled_logps),
            mask=(True,) * len(sequence.tokens),
            finish_reason=reason,
            text=self.text(sequence.tokens[:-1] if stopped else sequence.tokens),
        )

    def first_end(
        self, ids: tuple[int, ...], tokens: list[int], logps: list[float], sampled_logps: list[float]
    ) -> Completion:
        """The completion that ends at the first stop in a row of tokens, or at the row's end; the rest is cut away."""
        sequence = Running(PromptState(ids, 0), 0, 0, limit=len(tokens))
        for token, logp, sampled_logp in zip(tokens, logps, sampled_logps):
            sequence.tokens.append(token)
            sequence.logps.append(logp)
            sequence.sampled_logps.append(sampled_logp)
            completion = self.completion(sequence)
            if completion is not None:
                return completion
        raise AssertionError("a sequence ends at its limit at the latest")

    def stopped_by_text(self, tokens: list[int]) -> bool:
        """Whether a stop text stands in the last tokens: one that ended earlier would have stopped it then."""
        if not self.stop_texts:
            return False
        text = self.tokenizer.decode(tokens[-self._reach :], skip_special_tokens=True)
        return any(stop in text for stop in self.stop_texts)

    def text(self, tokens: list[int]) -> str:
        """Without special tokens, and up to the stop text."""
        text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        ends = [text.index(stop) for stop in self.stop_texts if stop in text]
        return text[: min(ends)] if ends else text
