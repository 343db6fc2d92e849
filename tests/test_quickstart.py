"""The quickstart's parts: a grammar that knows its own sentences, judges and votes, and a whole passage in small."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignfast.cli import main
from alignfast.data import load_rows
from alignfast.data.intervals import Interval
from alignfast.models import load_policy
from alignfast.quickstart import grammar, words
from alignfast.quickstart.grammar import Topic
from alignfast.quickstart.judges import FLIPPED, second_judge, simulated_user, vote
from alignfast.quickstart.measure import Comparison, Measured, ask, measure, together
from alignfast.quickstart.model import make_model, make_tokenizer
from alignfast.quickstart.run import Passage, Sizes
from alignfast.quickstart.stages import METHODS
from alignfast.quickstart.summary import is_gain, seeds_won, verdict
from alignfast.rewards.model import ModelReward

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
    with pytest.raises(RuntimeError, match=r"pip install '\.\[quickstart\]'"):
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


def measured(scores: list[float], kl: float = 0.0) -> Measured:
    return Measured(scores, [kl] * len(scores), [True] * len(scores), 1.0)


def compared(seed: int, dpo: list[float], kl: float = 1.0) -> Comparison:
    topics = [f"{seed}: {i // 2}" for i in range(len(dpo))]
    base = [0.0] * len(dpo)
    return Comparison(topics, base, {"sft": measured(base), "dpo": measured(dpo, kl)})


def test_seeds_are_pooled_by_topic() -> None:
    one, other = compared(0, [1, 1, 1, 1, 0, -1], kl=1.0), compared(1, [1, 1, 1, 1, 1, -1], kl=3.0)
    both = together([one, other])
    assert both.rate("sft").rate.estimate == 0.5
    rate = both.rate("dpo")
    assert (rate.wins, rate.ties, rate.losses) == (9, 1, 2)
    assert rate.rate.low < rate.rate.estimate < rate.rate.high
    assert both.models["dpo"].kl == 2.0
    # the seeds' topics are different ones: their clusters are twice as many
    assert rate.rate.low > one.rate("dpo").rate.low


@pytest.mark.parametrize(
    ("scores", "kl", "beats"),
    [
        ([1.0] * 40, 1.0, True),
        ([1.0] * 40, 11.0, False),  # too far from the fine-tuned model
        ([1.0, 0.0, 0.0, 0.0] * 10, 1.0, False),  # intervals overlap
        ([-1.0] * 40, 1.0, False),
    ],
)
def test_a_gain_is_intervals_apart_near_the_model(scores: list[float], kl: float, beats: bool) -> None:
    assert compared(0, scores, kl).beats_sft("dpo") is beats


def test_a_gain_is_one_of_ppo_and_grpo_in_every_seed() -> None:
    def passage(seed: int, ppo: float, grpo: float) -> Passage:
        models = {"sft": [0.0] * 40, "dpo": [-1.0] * 40, "ppo": [ppo] * 40, "grpo": [grpo] * 40}
        comparison = Comparison(
            list(map(str, range(40))), [0.0] * 40, {name: measured(x) for name, x in models.items()}
        )
        return Passage(seed, comparison, 9, Interval(0.8, 0.7, 0.9), 1.0, [])

    assert is_gain([passage(0, 1.0, 1.0), passage(1, 1.0, 1.0)])
    shown = [passage(0, 1.0, 1.0), passage(1, 1.0, 0.0)]
    assert not is_gain(shown)
    assert seeds_won(shown) == {"dpo": 0, "ppo": 2, "grpo": 1}
    assert "in so many of 2 seeds: DPO 0, PPO 2, GRPO 1" in verdict(shown)


def test_the_kl_is_that_of_the_models_own_log_probs(tmp_path: Path) -> None:
    asked = grammar.questions(seed=0)[1][:2]
    tokenizer = make_tokenizer([question.text for question in asked], vocab_size=300)
    for seed in (0, 1):
        make_model(tokenizer, seed, hidden_size=32).save_pretrained(tmp_path / str(seed))
        tokenizer.save_pretrained(tmp_path / str(seed))
    answers = ask(tmp_path / "0", asked, 2, seed=0)
    itself = measure(answers, asked, load_policy(tmp_path / "0"), seconds=0.0)
    assert itself.log_ratios == pytest.approx([0.0] * 4, abs=1e-3)  # rounding of 56 log-probs of about 6 nats
    other = measure(answers, asked, load_policy(tmp_path / "1"), seconds=0.0)
    of = answers[1][0]
    logps = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name)(torch.tensor([of.prompt_ids + of.token_ids]))
        .logits[0, len(of.prompt_ids) - 1 : -1]
        .log_softmax(-1)[range(len(of.token_ids)), list(of.token_ids)]
        .sum()
        .item()
        for name in ("0", "1")
    ]
    assert other.log_ratios[2] == pytest.approx(logps[0] - logps[1], abs=1e-3)
    assert other.kl == pytest.approx(sum(other.log_ratios) / 4)


@pytest.mark.parametrize("sizes", [Sizes(draws=0), Sizes(completions=24)])
def test_sizes_that_make_no_sense_are_refused(sizes: Sizes) -> None:
    with pytest.raises(ValueError, match="completions a multiple of 16; got Sizes"):
        sizes.check()


SMALL = {"hidden_size": 32, "sft_rows": 64, "pairs": 32, "draws": 1, "completions": 16, "held_out": 6}


def test_a_whole_passage_in_small(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Too small to learn anything: what is written, what is said, and that no gain is claimed."""
    sizes = [text for name, value in SMALL.items() for text in (f"--{name}", str(value))]
    assert main(["quickstart", "--output", str(tmp_path), "--seeds", "2", *sizes]) == 0
    said = capfd.readouterr().out
    assert "alignfast dpo --model YOURS --train_dataset YOUR_PAIRS.jsonl\n" in said
    assert said.rstrip().endswith(
        "alignfast grpo --model YOURS --train_dataset YOUR_PROMPTS.jsonl --reward_funcs YOURS"
    )
    assert "No gain is shown" in said

    found = json.loads((tmp_path / "quickstart.json").read_text())
    assert found["gain"] is False
    assert [seed["seed"] for seed in found["seeds"]] == [0, 1]
    for name in ("sft", *METHODS):
        rates = [of[name]["win_rate"] for of in (found["all_seeds"], *(s["models"] for s in found["seeds"]))]
        assert rates[0]["wins"] == rates[1]["wins"] + rates[2]["wins"]
        assert sum(rates[0][count] for count in ("wins", "ties", "losses")) == 24
        assert said.count(f" {name.upper()} ") >= 3  # a line for all seeds, and for each

    for seed in (0, 1):
        folder = tmp_path / f"seed-{seed}"
        for name in ("sft", *METHODS):
            AutoModelForCausalLM.from_pretrained(folder / name)
            assert AutoTokenizer.from_pretrained(folder / name).chat_template
        assert ModelReward.load(folder / "reward").name == "reward"
        assert load_rows(folder / "sft.jsonl").format == "prompt_completion"
        # every vote is either trained on or held out
        votes = [load_rows(folder / f"{name}.jsonl") for name in ("pairs", "pairs_held_out")]
        assert {rows.format for rows in votes} == {"preference"}
        assert found["seeds"][seed]["votes"] == len(votes[0].items)
        assert len(votes[1].items) == max(1, round(0.1 * sum(len(rows.items) for rows in votes)))

    page = (tmp_path / "report.html").read_text()
    for caption in (
        "Win rate against the fine-tuned model",
        "Gold reward against KL",
        "GRPO: KL of a token",
    ):
        assert caption in page
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    for name in METHODS:
        assert main(["report", str(tmp_path / "seed-0" / name)]) == 0
        assert "step 0" in (tmp_path / "seed-0" / name / "report.html").read_text()


@pytest.mark.slow
def test_the_quickstart_shows_a_gain(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "alignfast", "quickstart", "--output", str(tmp_path)]
    subprocess.run(command, check=True)
    found = json.loads((tmp_path / "quickstart.json").read_text())
    assert found["gain"]
    for seed in found["seeds"]:
        models = seed["models"]
        for name in ("ppo", "grpo"):
            assert models[name]["win_rate"]["rate"]["low"] > models["sft"]["win_rate"]["rate"]["high"]
            assert models[name]["gold_reward"] > models["sft"]["gold_reward"]
            assert 0 < models[name]["kl"] < 10
    assert len(found["seeds"]) == 3
