"""Reward models: TRL's numbers, the same step however it is cut, ensembles, what is saved, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from models.test_reward import without_head
from trainers.tiny import make_llama, make_pairs, make_rankings, make_reward_llama, make_rows, make_tokenizer
from transformers import AutoModelForSequenceClassification

from alignfast import RewardTrainer
from alignfast.cli import main
from alignfast.data import DataError, load_rows
from alignfast.models import load_reward_model
from alignfast.trainers.metrics import read_metrics

RUN = dict(
    max_steps=4, logging_steps=1, learning_rate=1e-2, adam_epsilon=1e-3, save_strategy="no", report_to="none",
    disable_tqdm=True,
)  # fmt: skip
LORA = dict(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])


def trained(folder, model=None, rows=None, **options):
    heads = options.get("num_heads", 1)
    trainer = RewardTrainer(
        make_reward_llama(num_labels=heads) if model is None else model,
        train_dataset=make_rankings(13) if rows is None else rows, processing_class=make_tokenizer(),
        output_dir=str(folder), **{**RUN, **options},
    )  # fmt: skip
    trainer.train()
    return trainer


def figures(trainer):
    rows = trainer.state.log_history
    return [{k: v for k, v in row.items() if "second" not in k and "runtime" not in k} for row in rows]


def named(pairs, **columns):
    return [{**dict(zip(("prompt", "chosen", "rejected"), pair)), **columns} for pair in pairs]


@pytest.mark.parametrize("coefficient", [None, 0.1])
def test_trains_as_trl_does(tmp_path, coefficient):
    """TRL's own trainer beside ours, on pairs with margins, one too long: losses, metrics and weights."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    common = dict(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=4, logging_steps=1, learning_rate=1e-2,
        adam_epsilon=1e-3, save_strategy="no", report_to="none", disable_tqdm=True, bf16=False, max_length=13,
        center_rewards_coefficient=coefficient, train_sampling_strategy="sequential", gradient_checkpointing=False,
        use_cpu=True,
    )  # fmt: skip
    rows = [{**row, "margin": 0.25 * i} for i, row in enumerate(named(make_pairs(10)))]
    theirs = trl.RewardTrainer(
        make_reward_llama(), args=trl.RewardConfig(**common), processing_class=make_tokenizer(),
        train_dataset=datasets.Dataset.from_list(rows),
    )  # fmt: skip
    theirs.train()
    ours = RewardTrainer(
        make_reward_llama(), train_dataset=rows, processing_class=make_tokenizer(),
        **{**common, "optim": "adamw_torch"},
    )  # fmt: skip
    ours.train()
    assert ours.train_data.report.too_long_rows == 10 - len(theirs.train_dataset) > 0
    for mine, other in zip(ours.state.log_history[:4], theirs.state.log_history[:4]):
        ours_alone = {name for name in mine.keys() - other.keys() if not name.startswith("seconds/")}
        assert ours_alone == {"skipped_steps", "tokens_per_second"}
        assert {name: mine[name] for name in other} == pytest.approx(other, abs=2e-5)
    for p, q in zip(ours.model.parameters(), theirs.model.parameters()):
        assert (p - q).abs().max() < 1e-5


@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize(
    "cut",
    [
        dict(per_device_train_batch_size=1, gradient_accumulation_steps=6),
        dict(per_device_train_batch_size=6, max_tokens_per_batch=60),
        dict(per_device_train_batch_size=6, layout="packed"),
        dict(per_device_train_batch_size=6, layout="padded"),
    ],
    ids=["1x6", "tokens", "packed", "padded"],
)
def test_a_step_is_the_same_however_it_is_cut(tmp_path, cut, num_heads):
    """13 rankings in steps of 6: the third step of an epoch has a single row."""
    both = dict(
        num_heads=num_heads, eval_dataset=make_rankings(5, 3), eval_steps=2, center_rewards_coefficient=0.1
    )
    whole = trained(tmp_path / "whole", per_device_train_batch_size=6, **both)
    parts = trained(tmp_path / "parts", per_device_eval_batch_size=2, **both, **cut)
    for mine, theirs in zip(figures(whole), figures(parts)):
        assert theirs == pytest.approx(mine, abs=1e-5)
    for p, q in zip(whole.model.parameters(), parts.model.parameters()):
        assert (p - q).abs().max() < 1e-6


def test_it_learns_what_is_preferred(tmp_path):
    """Answers with `happy` over those without, on held-out rows; the interval and the calibration come with it."""

    def rows(number, seed):
        pairs = zip(make_rows(number, seed), make_rows(number, seed + 1))
        return [(a["prompt"], a["completion"] + " happy", b["completion"] + " sad") for a, b in pairs]

    trainer = trained(tmp_path, rows=rows(64, 0), eval_dataset=rows(32, 7), max_steps=30, learning_rate=2e-2)
    last = trainer.evaluate()
    assert last["eval_accuracy"] > 0.95
    assert last["eval_accuracy_low"] < last["eval_accuracy"] <= last["eval_accuracy_high"]
    stored = json.loads((tmp_path / "calibration.json").read_text())
    assert stored["ece"] == last["eval_ece"] < 0.2
    assert stored["accuracy"]["estimate"] == pytest.approx(last["eval_accuracy"])
    assert sum(entry["pairs"] for entry in stored["bins"]) == 32


def test_heads_see_rows_of_their_own(tmp_path):
    """With the draw, a head's weights move by its rows alone; without it, heads that start alike stay alike."""

    def start():
        model = make_reward_llama(num_labels=2)
        model.score.weight.data[1] = model.score.weight.data[0]
        return model

    drawn = trained(tmp_path / "a", model=start(), num_heads=2)
    alike = trained(tmp_path / "b", model=start(), num_heads=2, bootstrap=False)
    first, second = drawn.model.score.weight
    assert (first - second).abs().max() > 1e-3
    first, second = alike.model.score.weight
    assert (first - second).abs().max() < 1e-7
    assert drawn.drawn_NH.sum(0).tolist() == [13, 13]
    again = trained(tmp_path / "c", model=start(), num_heads=2)
    assert torch.equal(again.drawn_NH, drawn.drawn_NH)
    log = [row for row in drawn.state.log_history if "loss" in row]
    assert log[0]["disagreement"] == 0 < log[-1]["disagreement"]


def scores_in_transformers(folder, texts):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = make_tokenizer()
    with torch.no_grad():
        one = [model(**tokenizer(text, return_tensors="pt")).logits[0].tolist() for text in texts]
        batch = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits.tolist()
    return one, batch


def test_the_saved_model_scores_alike_in_transformers(tmp_path):
    trainer = trained(tmp_path / "run", num_heads=2)
    trainer.save_model(str(tmp_path / "final"))
    texts = ["the cat sat <eos>", "a dog <eos>", "happy tree under the house <eos>"]
    rows = [(text.split()[0], " " + text.split(maxsplit=1)[1], " x") for text in texts]
    trees = trainer.prepare(load_rows(rows)).trees
    ours = trainer.module.score(trees)[::2].tolist()
    for theirs in scores_in_transformers(tmp_path / "final", texts):
        assert theirs == [pytest.approx(row, abs=1e-6) for row in ours]


def test_lora_is_saved_with_its_head(tmp_path):
    """From a language model's folder: the reloaded adapters give the same scores, and so does the merged model."""
    make_llama().save_pretrained(tmp_path / "lm")
    make_tokenizer().save_pretrained(tmp_path / "lm")
    trainer = trained(tmp_path / "run", model=str(tmp_path / "lm"), peft_config=LORA, num_heads=2)
    trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final" / "model.safetensors").exists()
    trees = trainer.train_data.trees
    expected = trainer.module.score(trees)
    again = load_reward_model(tmp_path / "final")
    assert (again.score(trees) == expected).all()
    fresh = load_reward_model(tmp_path / "lm", num_heads=2)
    assert abs(fresh.score(trees) - expected).max() > 1e-3
    assert main(["merge", str(tmp_path / "final"), str(tmp_path / "merged")]) == 0
    merged = load_reward_model(tmp_path / "merged")
    assert abs(merged.score(trees) - expected).max() < 1e-5


def test_a_tokenizer_without_a_pad_token_of_its_own(tmp_path, caplog):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = make_reward_llama(pad_token_id=1)
    trainer = RewardTrainer(
        model, train_dataset=make_pairs(4), processing_class=tokenizer, output_dir=str(tmp_path), **RUN
    )
    assert "one sequence at a time" in caplog.text
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final").eval()
    (tree,) = trainer.train_data.trees[:1]
    with torch.no_grad():
        theirs = [again(torch.tensor([tree.prompt + answer])).logits.item() for answer in tree.answers]
        assert trainer.module.score([tree])[:, 0].tolist() == pytest.approx(theirs, abs=1e-6)
        with pytest.raises(ValueError, match="batch sizes > 1"):
            again(torch.tensor([tree.prompt] * 2))


def test_the_command_trains_evaluates_and_reports(tmp_path, capsys):
    make_llama().save_pretrained(tmp_path / "lm")
    make_tokenizer().save_pretrained(tmp_path / "lm")
    for name, rows in (("train", make_rankings(12)), ("held_out", make_rankings(6, 5))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out, run = str(tmp_path / "held_out.jsonl"), str(tmp_path / "run")
    words = ["reward", "--model", str(tmp_path / "lm"), "--train_dataset", str(tmp_path / "train.jsonl")]
    options = ["--output_dir", run, "--max_steps", "2", "--num_heads", "2", "--use_cpu"]
    assert main([*words, "--eval_dataset", held_out, *options]) == 0
    assert "a fresh head of 2 outputs was added" in capsys.readouterr().err
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Reliability" in page
    assert "Disagreement of heads" in page
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    output = tmp_path / "figures.json"
    assert main(["eval", "--model", run, "--dataset", held_out, "--output", str(output), "--use_cpu"]) == 0
    told = json.loads(output.read_text())
    assert told["calibration"]["accuracy"]["estimate"] == pytest.approx(last["eval_accuracy"])
    assert told["calibration"]["ece"] == pytest.approx(last["eval_ece"], abs=1e-6)
    assert main([*words, *options, "--sample_prompts", "2"]) == 2


# --- refusals, each when the trainer is made ---


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "the", "ranking": [" cat"]}], "'ranking' must list 2 or more completions, best first"),
        (make_rows(3), "make no format that is taken here: chosen.rejected, prompt.ranking"),
        (named(make_pairs(2), margin="much"), "index 0: column 'margin' must be a number, got 'much'"),
        (named(make_pairs(2), margin=float("nan")), "column 'margin' must be a number, got nan"),
        ([{**row, "margin": 1.0} for row in make_rankings(2)], "column 'margin' is for pairs"),
    ],
    ids=["one completion", "no pairs", "word", "nan", "margin of a ranking"],
)
def test_wrong_rows(rows, message):
    with pytest.raises(DataError, match=message):
        RewardTrainer(
            make_reward_llama(), train_dataset=rows, processing_class=make_tokenizer(), report_to="none"
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_heads=0, model=make_reward_llama()), "num_heads must be at least 1, got 0"),
        (dict(center_rewards_coefficient=-1.0), "center_rewards_coefficient must be at least 0"),
        (dict(truncation_mode="keep_middle"), "truncation_mode must be one of drop, keep_start, keep_end"),
        (dict(beta=0.1), "RewardConfig has no option 'beta'"),
        (dict(num_heads=3, model=make_reward_llama()), "has 1 outputs and num_heads=3"),
        (dict(model=make_llama()), "LlamaForCausalLM has no head named score"),
        (dict(model=make_reward_llama(vocab_size=9)), r"token id \d+ and the model knows 9 tokens"),
        (
            dict(max_length=1),
            r"no row of train_dataset is left: (?s:.*)13 rows longer than max_length left out",
        ),
    ],
)
def test_wrong_options(tmp_path, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        trained(tmp_path, **options)


def test_a_checkpoint_that_lost_its_head(tmp_path):
    with pytest.raises(ValueError, match=r"lacks score.weight"):
        trained(tmp_path / "run", model=str(without_head(tmp_path)))
