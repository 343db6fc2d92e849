"""Text of a completion as its tokens come: pieces that add up to it, none of which is ever taken back.

A token may hold half a character, and the start of a stop text may turn out to be plain text: such ends are held back
until the next tokens decide. A token's text is what it adds to the few tokens before it, since tokenizers write the first
token of a text without its space.

Not done here: deciding that a completion ends (finish.py).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

_HALF_A_CHARACTER = "\ufffd"


class Pieces:
    """The pieces of one completion.

    Args:
        tokenizer: to decode with; special tokens are left out.
        stop_texts: the text ends before the first of them.

    >>> class Words:
    ...     def decode(self, tokens, skip_special_tokens):
    ...         return " ".join("the cat sat on".split()[i] for i in tokens)
    >>> pieces = Pieces(Words(), stop_texts=("t on",))
    >>> [pieces.add(token) for token in (0, 1, 2, 3)], pieces.end()
    (['the', ' ca', 't sa', ''], '')
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_texts: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop_texts = tokenizer, stop_texts
        self._tokens: list[int] = []
        self._start = self._read = (
            0  # tokens before `read` have their text, those from `start` on are context
        )
        self._held = ""
        self._stopped = False

    def add(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self._tokens.append(token)
        new = self._new()
        if not new or new.endswith(_HALF_A_CHARACTER):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return self._certain(new)

    def end(self) -> str:
        """The rest, when no token follows."""
        rest = self._certain(self._new())
        rest, self._held = rest + self._held, ""
        return rest

    def _new(self) -> str:
        """Text of the tokens that were not read yet."""
        before = self._decode(self._tokens[self._start : self._read])
        return self._decode(self._tokens[self._start :])[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _certain(self, new: str) -> str:
        if self._stopped:
            return ""
        text = self._held + new
        ends = [text.index(stop) for stop in self.stop_texts if stop in text]
        if ends:
            self._stopped, self._held = True, ""
            return text[: min(ends)]
        kept = _start_of_a_stop(text, self.stop_texts)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _start_of_a_stop(text: str, stops: Collection[str]) -> int:
    """Length of the longest end of a text with which a stop text begins."""
    longest = min(len(text), max((len(stop) - 1 for stop in stops), default=0))
    return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0)
