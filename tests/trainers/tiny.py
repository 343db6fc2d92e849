"""A tokenizer of a few words and models of a few thousand parameters, made on the spot."""

from __future__ import annotations

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

WORDS = "the a cat dog bird sat ran sang on under near mat tree house happy sad very not and then".split()


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def make_llama(seed: int = 0, kind: type = LlamaForCausalLM, **options: object) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    return kind(LlamaConfig(**{**sizes, **options}))


def make_reward_llama(seed: int = 0, num_labels: int = 1, **options: object) -> PreTrainedModel:
    return make_llama(seed, LlamaForSequenceClassification, num_labels=num_labels, **options)


def make_gpt2_with_dropout(seed: int = 0, kind: type = GPT2LMHeadModel, **options: object) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1
    )
    return kind(GPT2Config(**sizes, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.0, **options))


def make_rows(number: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompt and completion of uneven lengths."""
    draw = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    return [{"prompt": words(1, 6), "completion": " " + words(1, 9)} for _ in range(number)]


def make_thumbs(number: int, seed: int = 0) -> list[dict[str, str | bool]]:
    draw = random.Random(seed)
    ups = [True, False, *(draw.random() < 0.6 for _ in range(number))]  # both, also of two
    return [{**row, "label": up} for row, up in zip(make_rows(number, seed), ups)]


def make_rankings(number: int, seed: int = 0) -> list[dict[str, object]]:
    """Two to four answers each."""
    rows = make_rows(4 * number, seed)
    return [
        {
            "prompt": rows[4 * i]["prompt"],
            "ranking": [row["completion"] for row in rows[4 * i :][: 2 + i % 3]],
        }
        for i in range(number)
    ]


def make_pairs(number: int, seed: int = 0) -> list[tuple[str, str, str]]:
    chosen, rejected = make_rows(number, seed), make_rows(number, seed + 1)
    return [(a["prompt"], a["completion"], b["completion"]) for a, b in zip(chosen, rejected)]
