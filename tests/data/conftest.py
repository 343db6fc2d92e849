"""Small tokenizers whose every id is known: the 256 byte symbols in sorted order, then the merges, then specials."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# "Ġ" is a space in the byte-level alphabet. The merges make tokens cross the border of prompt and completion:
# "a" + "b" is one token, and so is a space with the word after it.
MERGES = [("a", "b"), ("h", "e"), ("Ġ", "he"), ("Ġ", "a"), ("Ġa", "b"), ("o", "k")]
SPECIALS = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]


def build_tokenizer(
    *, add_bos: bool = False, add_eos: bool = False, chat_template: str | None = None, **special: Any
) -> PreTrainedTokenizerFast:
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in MERGES]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    if add_bos or add_eos:
        pieces = ["<s>"] * add_bos + ["$A"] + ["</s>"] * add_eos
        ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=ids)
    names = {"bos_token": "<s>", "eos_token": "</s>", **special}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = chat_template
    return fast


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return build_tokenizer
