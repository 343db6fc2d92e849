"""The quickstart's parts: a grammar that knows its own sentences, judges and votes, and a whole passage in small."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignfast.cli import main
from alignfast.data import load_rows
from alignfast.quickstart import grammar, words
from alignfast.quickstart.grammar import Topic
from alignfast.quickstart.judges import FLIPPED, second_judge, simulated_user, vote
from alignfast.quickstart.model import make_model, make_tokenizer
from alignfast.quickstart.run import Measured, together

CAFE = Topic("food", "harbour cafe", "soup")


def test_questions_held_out_are_of_other_topics() -> None:
    train, held_out = grammar.questions(seed=1)
    assert {question.topic for question in train}.isdisjoint(question.topic for question in held_out)
    assert len({question.text for question in train + held_out}) == len(train) + len(held_out)
    assert len(held_out) == pytest.approx(0.2 * len(train + held_out), rel=0.02)


def test_every_answer_is_well_formed_and_its_words_are_several_hundred() -> None:
    rng = random.Random(0)
    seen: set[str] = set()
    for question in grammar.questions(seed=0)[0]:
        answer = grammar.answer(question.topic, rng)
        assert grammar.is_well_formed(question.topic, answer), answer
        seen |= set(answer.lower().replace(".", "").replace(",", "").split())
    assert len(seen) > 300


@pytest.mark.parametrize(
    "text",
    [
        "The soup was very rude. The manager was kind too.",  # a thing can't be rude
        "The bread was very fresh. The manager was kind too.",  # another thing than asked about
        "The soup was very fresh. The manager was kind too. I recommend the book shop to everyone.",  # another place
        "The soup was very fresh.",  # no second sentence
        "The soup was very fresh. The manager was kind too. And",
        "The manager was kind too. The soup was very fresh.",  # the wrong order
        "The soup was very fresh. The manager was dirty too.",
        "",
    ],
)
def test_what_is_not_of_the_grammar_is_told(text: str) -> None:
    assert grammar.is_well_formed(CAFE, "The soup was very fresh. The manager was kind too.")
    assert not grammar.is_well_formed(CAFE, text)


@pytest.mark.parametrize("sentiment", words.SENTIMENTS)
def test_judges_agree_on_the_grammars_moods(sentiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "SENTIMENTS", (sentiment,))
    rng = random.Random(0)
    answers = [grammar.answer(CAFE, rng) for _ in range(100)]
    for judge, unit in ((simulated_user(), 1), (second_judge(), 10)):
        mean = sum(map(judge, answers)) / len(answers) / unit
        if sentiment == words.NEUTRAL:
            assert abs(mean) < 0.1
        else:
            assert (mean > 0.4) if sentiment == words.POSITIVE else (mean < -0.4)


def test_words_of_no_mood_have_none() -> None:
    """Else a place or a person would decide a vote. (Questions are not judged, so that their words don't matter.)"""
    plain = [*words.OTHERS, *words.PEOPLE, *words.TIMES, *words.ADVERBS]
    plain += [name for things in words.ASPECTS.values() for name in things]
    plain += [name for places in words.PLACES.values() for name in places]
    plain += [word for kind in words.ADJECTIVES.values() for word in kind[words.NEUTRAL]]
    for judge in (simulated_user(), second_judge()):
        assert [text for text in plain if judge(text) != 0] == []


def test_a_tenth_of_the_votes_is_flipped() -> None:
    prompts = [f"question {i}" for i in range(2000)]
    rows = vote(prompts, [["It was great.", "It was awful."]] * 2000, simulated_user(), random.Random(0))
    flipped = sum("awful" in row["chosen"][0]["content"] for row in rows) / 2000
    # four standard deviations of 2,000 draws
    assert abs(flipped - FLIPPED) < 4 * (FLIPPED * (1 - FLIPPED) / 2000) ** 0.5
    assert load_rows(rows).conversational
    assert vote(["question"], [["It was grey.", "It was long."]], lambda text: 0.0, random.Random(0)) == []


def test_a_missing_judge_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "afinn", None)
    with pytest.raises(RuntimeError, match=r"pip install 'alignfast\[quickstart\]'"):
        second_judge()


def test_the_tokenizer_writes_and_reads_chats() -> None:
    tokenizer = make_tokenizer(["The soup was fresh, very fresh."] * 3, vocab_size=300)
    chat = [{"role": "user", "content": "The soup?"}, {"role": "assistant", "content": "very fresh, é"}]
    ids = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    assert tokenizer.decode(ids["input_ids"]) == "<|user|>The soup?<|end|><|assistant|>very fresh, é<|end|>"
    spoken = [token for token, mine in zip(ids["input_ids"], ids["assistant_masks"]) if mine]
    assert tokenizer.decode(spoken) == "very fresh, é<|end|>"
    model = make_model(tokenizer, seed=0, hidden_size=32)
    assert model.config.vocab_size == len(tokenizer)


def test_seeds_are_pooled_by_topic() -> None:
    def measured(seed: int, after: list[float]) -> Measured:
        topics = [f"{seed}: {i // 2}" for i in range(6)]
        return Measured(seed, topics, [0.0] * 6, [0.0] * 6, after, (1.0, 1.0), [], 9)

    before, after = together([measured(0, [1, 1, 1, 1, 0, -1]), measured(1, [1, 1, 1, 1, 1, -1])])
    assert before.rate.estimate == 0.5
    assert (after.wins, after.ties, after.losses) == (9, 1, 2)
    assert after.rate.low < after.rate.estimate < after.rate.high


def test_a_whole_passage_in_small(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Too small to learn anything: what is written, what is said, and that no gain is claimed."""
    sizes = ["--hidden_size", "32", "--sft_rows", "64", "--pairs", "32", "--held_out", "6", "--samples", "2"]
    assert main(["quickstart", "--output", str(tmp_path / "out"), "--seeds", "2", *sizes]) == 0
    said = capfd.readouterr().out
    assert said.rstrip().endswith("alignfast dpo --model YOURS --train_dataset YOURS.jsonl")
    assert "No gain is shown" in said
    found = json.loads((tmp_path / "out" / "quickstart.json").read_text())
    assert found["gain"] is False
    assert [seed["seed"] for seed in found["seeds"]] == [0, 1]
    assert found["all_seeds"]["after"]["wins"] == sum(seed["after"]["wins"] for seed in found["seeds"])
    assert sum(found["all_seeds"]["after"][name] for name in ("wins", "ties", "losses")) == 24
    for seed in (0, 1):
        folder = tmp_path / "out" / f"seed-{seed}"
        AutoModelForCausalLM.from_pretrained(folder / "dpo")
        assert AutoTokenizer.from_pretrained(folder / "dpo").chat_template
        assert load_rows(folder / "pairs.jsonl").format == "preference"
        assert load_rows(folder / "sft.jsonl").format == "prompt_completion"
        assert "step 4/4" in (folder / "log.txt").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Win rate against the fine-tuned model" in page
    assert (tmp_path / "out" / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert main(["report", str(tmp_path / "out" / "seed-0" / "dpo")]) == 0
    assert "step 0" in (tmp_path / "out" / "seed-0" / "dpo" / "report.html").read_text()


@pytest.mark.slow
def test_the_quickstart_shows_a_gain(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "alignfast", "quickstart", "--output", str(tmp_path)]
    subprocess.run(command, check=True)
    found = json.loads((tmp_path / "quickstart.json").read_text())
    assert found["gain"]
    assert found["all_seeds"]["after"]["rate"]["low"] > found["all_seeds"]["before"]["rate"]["high"]
    assert len(found["seeds"]) == 3
