"""A small model, and sums of six numbers for it to learn: python arithmetic.py FOLDER.

What SFT and GRPO make of them, and with which options, stands in docs/real-run-rl.md.
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alignfast.rewards import arithmetic

HELD_OUT, DEMONSTRATIONS, TASKS = 500, 8192, 32768


def make_tokenizer():
    """A token for every character, with or without a space before it."""
    characters = [space + c for space in ("", " ") for c in "0123456789+-="]
    ids = {token: i for i, token in enumerate(["<|pad|>", "<|end|>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<|pad|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\S"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")


def make_model(tokenizer):
    """A Llama of half a million parameters that has learned nothing yet."""
    torch.manual_seed(0)
    shape = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=3, max_position_embeddings=64)
    heads = dict(num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True)
    ends = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **heads, **ends))


def main(folder):
    sums = arithmetic(HELD_OUT + DEMONSTRATIONS + TASKS, digits=1, terms=6)  # none comes twice
    files = {
        "held_out": sums[:HELD_OUT],
        "tasks": sums[HELD_OUT:-DEMONSTRATIONS],
        "demonstrations": [
            {"prompt": row["prompt"], "completion": f" {row['answer']}"} for row in sums[-DEMONSTRATIONS:]
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    make_model(tokenizer).save_pretrained(folder / "model")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
