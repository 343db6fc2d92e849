"""Text in pieces: it adds up to the whole, and nothing is ever taken back."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from trainers.tiny import make_tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from alignfast.rollout.finish import Finish
from alignfast.rollout.pieces import Pieces


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, so that most characters of most scripts take several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Words that carry their space and lose it at the start of a text, as SentencePiece's do."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "▁the", "▁cat", "s", "▁sat", "."])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


def pieces_of(
    tokenizer: PreTrainedTokenizerBase, tokens: list[int], stops: tuple[str, ...] = ()
) -> list[str]:
    pieces = Pieces(tokenizer, stops)
    return [*(pieces.add(token) for token in tokens), pieces.end()]


@pytest.mark.parametrize("text", ["the cat", "naïve café", "猫が座った。", "🙂👩‍👩‍👧 ok", "a\ufffdb"])
def test_characters_of_several_tokens_come_whole(text: str) -> None:
    tokenizer = byte_tokenizer()
    found = pieces_of(tokenizer, tokenizer(text)["input_ids"])
    assert "".join(found) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in found)


def test_half_a_character_at_the_end_is_shown_as_the_whole_text_shows_it() -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenizer("cat 猫")["input_ids"][:-1]
    assert "".join(pieces_of(tokenizer, tokens)) == tokenizer.decode(tokens)


@pytest.mark.parametrize("make", [make_tokenizer, byte_tokenizer, metaspace_tokenizer])
def test_pieces_add_up_to_the_text_that_the_engine_says(make: object) -> None:
    tokenizer, draw = make(), random.Random(0)  # type: ignore[operator]
    vocabulary = len(tokenizer)
    for _ in range(300):
        tokens = draw.choices(range(vocabulary), k=draw.randint(1, 12))
        whole = tokenizer.decode(tokens, skip_special_tokens=True)
        ends = [draw.randrange(len(whole)) for _ in range(2) if whole]
        for stops in ((), tuple(whole[end : end + draw.randint(1, 4)] for end in ends)):
            finish = Finish(tokenizer, frozenset(), stops)
            last = next((n for n in range(1, 12) if finish.stopped_by_text(tokens[:n])), 12)
            assert "".join(pieces_of(tokenizer, tokens[:last], stops)) == finish.text(tokens[:last])


def test_what_may_begin_a_stop_text_is_held_back_until_it_is_decided() -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenizer("a\n\nb\nUser")["input_ids"]
    assert pieces_of(tokenizer, tokens, ("\nUser:",)) == ["a", "", "\n", "\nb", "", "", "", "", "", "\nUser"]
    assert "".join(pieces_of(tokenizer, tokens, ("\nUser",))) == "a\n\nb"
