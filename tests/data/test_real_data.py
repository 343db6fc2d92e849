"""Real preferences and worked answers: every row is read, tokenised, packed, and accounted for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from alignfast.data import check_file, cut, load_rows, pack, prepare_preference, prepare_sft

FOLDER = os.environ.get("ALIGNFAST_DATA")
pytestmark = pytest.mark.skipif(FOLDER is None, reason="ALIGNFAST_DATA does not name the folder of real data")

PAIRS = ["hh_harmless/eval.jsonl", "gsm8k/pairs_eval.jsonl"]


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(FOLDER or "")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    """As GPT-2's: byte-level, one special token, no pad token."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = "<|endoftext|>"
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=alphabet, special_tokens=[special], show_progress=False
    )
    inner.train_from_iterator((row["chosen"] for file in PAIRS for row in load_rows(folder / file)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=special, eos_token=special)


@pytest.mark.parametrize("file", PAIRS)
def test_pairs_decode_to_what_was_written(file: str, folder: Path, tokenizer: Any) -> None:
    rows = load_rows(folder / file)
    prepared = prepare_preference(rows, tokenizer, max_length=None)
    assert prepared.report.rows == len(rows)
    for row, tree in zip(rows, prepared.trees):
        for column, answer in zip(("chosen", "rejected"), tree.answers):
            text = tokenizer.decode([*tree.prompt, *answer], clean_up_tokenization_spaces=False)
            assert text == row["prompt"] + row[column] + tokenizer.eos_token


@pytest.mark.parametrize("file", PAIRS)
def test_pairs_pack_alike_in_all_layouts(file: str, folder: Path, tokenizer: Any) -> None:
    trees = prepare_preference(load_rows(folder / file), tokenizer, max_length=512).trees
    for run in cut(trees, "padded", 8192):
        batches = [
            pack([trees[i] for i in run], run, layout, pad_id=0) for layout in ("shared", "packed", "padded")
        ]
        shared, packed, padded = batches
        assert shared.lengths == packed.lengths == padded.lengths
        assert shared.target_P.tolist() == packed.target_P.tolist() == padded.target_P.tolist()
        assert shared.num_tokens < packed.num_tokens == padded.num_tokens <= 8192


def test_completions_are_accounted_for(folder: Path, tokenizer: Any) -> None:
    rows = load_rows(folder / "gsm8k/eval.jsonl")
    whole = prepare_sft(rows, tokenizer, max_length=None).report
    short = prepare_sft(rows, tokenizer, max_length=128).report
    assert short.truncated_rows > 0
    assert short.tokens + short.tokens_lost == whole.tokens
    assert short.rows + short.dropped_rows == whole.rows == len(rows)


@pytest.mark.parametrize("file", PAIRS)
def test_an_ngram_model_learns_something_from_real_pairs(file: str, folder: Path) -> None:
    found = check_file(folder / file).model_noise
    assert found is not None
    assert 0.55 < found.accuracy.estimate < 0.7  # about 0.6 on both, as is known of them
