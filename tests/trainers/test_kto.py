"""KTO: TRL's numbers, one reference point a step however it is cut, every kind of reference, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from trainers.tiny import make_llama, make_pairs, make_rows, make_thumbs, make_tokenizer

from alignfast import KTOTrainer
from alignfast.data import mismatched

RUN = dict(
    max_steps=4, logging_steps=1, learning_rate=1e-2, adam_epsilon=1e-3, save_strategy="no", report_to="none",
    disable_tqdm=True,
)  # fmt: skip
LORA = dict(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
SEED = 1  # with it the reference point leaves 0


def trained(folder, model=None, number=13, **options):
    trainer = KTOTrainer(
        make_llama() if model is None else model, train_dataset=make_thumbs(number),
        processing_class=make_tokenizer(), output_dir=str(folder), **{**RUN, **options},
    )  # fmt: skip
    trainer.train()
    return trainer


def figures(trainer):
    rows = trainer.state.log_history
    return [{k: v for k, v in row.items() if "second" not in k and "runtime" not in k} for row in rows]


def assert_alike(one, other, abs=1e-5):
    assert len(figures(one)) == len(figures(other))
    for mine, theirs in zip(figures(one), figures(other)):
        assert theirs == pytest.approx(mine, abs=abs)
    for p, q in zip(one.model.parameters(), other.model.parameters()):
        assert (p - q).abs().max() < 1e-6


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_trains_as_trl_does(tmp_path, loss_type):
    """TRL's own trainer beside ours: two batches of four rows, twice over; losses, metrics and weights."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    common = dict(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=4, logging_steps=1, learning_rate=1e-2,
        adam_epsilon=1e-3, save_strategy="no", report_to="none", disable_tqdm=True, beta=0.3, loss_type=loss_type,
        desirable_weight=1.2, undesirable_weight=0.7, train_sampling_strategy="sequential", bf16=False,
        gradient_checkpointing=False, use_cpu=True,
    )  # fmt: skip
    rows, tokenizer = make_thumbs(8, seed=SEED), make_tokenizer()
    theirs = trl.KTOTrainer(
        make_llama(), ref_model=make_llama(), args=trl.KTOConfig(**common), processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(rows),
    )  # fmt: skip
    theirs.train()
    ours = KTOTrainer(
        make_llama(), train_dataset=rows, processing_class=tokenizer, **{**common, "optim": "adamw_torch"}
    )
    ours.train()
    for mine, other in zip(ours.state.log_history[:4], theirs.state.log_history[:4]):
        ours_alone = {name for name in mine.keys() - other.keys() if not name.startswith("seconds/")}
        assert ours_alone == {"skipped_steps", "tokens_per_second"}
        assert {name: mine[name] for name in other} == pytest.approx(other, abs=2e-5)
    points = [row["kl"] for row in ours.state.log_history[:4]]
    assert max(points) > 1e-3 or loss_type != "kto"  # else a reference point of 0 would pass
    for p, q in zip(ours.model.parameters(), theirs.model.parameters()):
        assert (p - q).abs().max() < 1e-5


@pytest.mark.parametrize(
    "cut",
    [
        dict(per_device_train_batch_size=1, gradient_accumulation_steps=6),
        dict(per_device_train_batch_size=6, max_tokens_per_batch=20),
        dict(per_device_train_batch_size=6, layout="packed"),
        dict(per_device_train_batch_size=6, layout="padded"),
        dict(per_device_train_batch_size=6, precompute_ref_log_probs=True),
    ],
    ids=["1x6", "tokens", "packed", "padded", "precomputed"],
)
def test_a_step_is_the_same_however_it_is_cut(tmp_path, cut):
    """13 rows in steps of 6: the third step of an epoch has a single row. The reference point is the whole step's."""
    whole = trained(
        tmp_path / "whole", per_device_train_batch_size=6, eval_dataset=make_thumbs(5, 3), eval_steps=2
    )
    parts = trained(tmp_path / "parts", eval_dataset=make_thumbs(5, 3), eval_steps=2, **cut)
    assert any(row.get("kl", 0) > 1e-3 for row in whole.state.log_history)
    assert_alike(whole, parts)


def test_the_reference_point_is_the_mean_over_other_rows_answers(tmp_path):
    """Of the model after one step, by the models' own forward; held at 0 from below."""
    trainer = trained(tmp_path, number=5, per_device_train_batch_size=5, max_steps=2, max_length=None)
    before = make_llama()
    after = trained(tmp_path, number=5, per_device_train_batch_size=5, max_steps=1, max_length=None).model
    pairs = mismatched(trainer.train_data.trees, 5, None)

    def logps(model, tree):
        ids = torch.tensor([tree.prompt + tree.answers[0]])
        logps_V = model(ids).logits[0, :-1].log_softmax(-1)
        return logps_V.gather(1, ids[0, 1:, None])[len(tree.prompt) - 1 :].sum()

    with torch.no_grad():
        expected = sum(logps(after.eval(), tree) - logps(before, tree) for tree in pairs) / 5
    assert trainer.state.log_history[1]["kl"] == pytest.approx(max(0.0, expected.item()), abs=1e-5)
    assert trainer.state.log_history[0]["kl"] == 0


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_references_train_alike(tmp_path, peft_config):
    own = trained(tmp_path / "own", peft_config=peft_config)
    given = trained(tmp_path / "given", peft_config=peft_config, ref_model=make_llama())
    table = trained(tmp_path / "table", peft_config=peft_config, precompute_ref_log_probs=True)
    assert len(own.modules_in_memory) == (1 if peft_config else 2)
    assert table.modules_in_memory == [table.module]
    assert_alike(own, given)
    assert_alike(own, table)
    assert len(table.reference.logps_RA) == 26  # 13 rows, and each prompt with another's answer


def test_pairs_are_taken_apart(tmp_path):
    """As TRL does it: a thumb up for each chosen answer, then one down for each rejected one."""
    trainer = KTOTrainer(
        make_llama(),
        train_dataset=make_pairs(4),
        processing_class=make_tokenizer(),
        output_dir=str(tmp_path),
        **RUN,
    )
    trainer.train()
    assert [tree.label for tree in trainer.train_data.trees] == [1, 1, 1, 1, 0, 0, 0, 0]
    assert trainer.state.log_history[-1]["step"] == 4


def test_a_table_knows_no_rows_that_come_later(tmp_path):
    trainer = trained(tmp_path, precompute_ref_log_probs=True, eval_dataset=make_thumbs(3, 9))
    assert "eval_kl" in trainer.evaluate()
    with pytest.raises(ValueError, match="pass an eval_dataset"):
        trainer.evaluate(make_thumbs(4, 5))
    later = trained(tmp_path / "later").evaluate(make_thumbs(4, 5))
    assert math.isfinite(later["eval_loss"])


def test_a_side_without_rows_counts_in_no_mean(tmp_path):
    """One row a step, thumbs up and down: a log of two steps has the mean of the one that has the side."""
    rows = make_rows(2)
    thumbs = [{**rows[0], "label": True}, {**rows[1], "label": False}]
    logs = {}
    for logging_steps in (1, 2):
        trainer = KTOTrainer(
            make_llama(), train_dataset=thumbs, processing_class=make_tokenizer(), output_dir=str(tmp_path),
            per_device_train_batch_size=1, train_sampling_strategy="sequential",
            **{**RUN, "max_steps": 2, "logging_steps": logging_steps},
        )  # fmt: skip
        trainer.train()
        logs[logging_steps] = [row for row in trainer.state.log_history if "loss" in row]
    (up, down), (both,) = logs[1], logs[2]
    assert "logps/rejected" not in up
    assert "logps/chosen" not in down
    assert both["logps/chosen"] == pytest.approx(up["logps/chosen"])
    assert both["logps/rejected"] == pytest.approx(down["logps/rejected"])
    assert both["loss"] == pytest.approx((up["loss"] + down["loss"]) / 2)


def test_mismatched_answers_respect_lengths():
    """Cut to the limit at the end that the option says, and to the model's positions where nothing else cuts."""
    long, short = " ".join(["cat"] * 9), "dog"
    rows = [
        dict(prompt=long, completion=" " + short, label=True),
        dict(prompt=short, completion=" " + long, label=False),
    ]
    trainer = KTOTrainer(
        make_llama(max_position_embeddings=12), train_dataset=rows, processing_class=make_tokenizer(),
        max_length=None, report_to="none",
    )  # fmt: skip
    lengths = [len(tree.prompt) + len(tree.answers[0]) for tree in trainer.mismatched[0].trees]
    assert lengths == [12, 3]  # 19 are needed
    trees = trainer.train_data.trees
    uncut = mismatched(trees, 8, None)
    for end in (False, True):
        for tree, whole in zip(mismatched(trees, 8, 11, keep_end=end), uncut):
            ids, all_ids = tree.prompt + tree.answers[0], whole.prompt + whole.answers[0]
            assert ids == (all_ids[-11:] if end else all_ids[:11])
            assert [len(mask) for mask in tree.trained] == [len(answer) for answer in tree.answers]


# --- refusals, each when the trainer is made ---


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**row, "label": True} for row in make_rows(3)], "all 3 rows have label true.*rows of both"),
        ([{**row, "label": 1} for row in make_rows(3)], "'label' must be true or false, got 1"),
        ([{**row, "label": "good"} for row in make_rows(3)], "'label' must be true or false, got 'good'"),
        (make_thumbs(3)[:1], "two rows at least, got 1"),
        (make_rows(3), "make no format that is taken here: prompt.completion.label, chosen.rejected"),
        ([*make_thumbs(2), {"prompt": "the cat", "label": True}], "index 2: column 'completion' is missing"),
    ],
    ids=["one sign", "number", "word", "one row", "no label", "no completion"],
)  # fmt: skip
def test_wrong_rows(rows, message):
    with pytest.raises(ValueError, match=message):
        KTOTrainer(make_llama(), train_dataset=rows, processing_class=make_tokenizer(), report_to="none")


def test_another_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"token id \d+ and the model knows 9 tokens"):
        trained(tmp_path, model=make_llama(vocab_size=9))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(loss_type="sigmoid"), "not one of kto, apo_zero_unpaired"),
        (dict(beta=-1.0), "beta must be positive"),
        (dict(max_prompt_length=3), "max_length bounds prompt and completion together"),
        (dict(sync_ref_model=True), "the reference stays the first one"),
    ],
)
def test_wrong_options(tmp_path, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        trained(tmp_path, **options)


def test_unbalanced_weights_are_told(tmp_path, caplog):
    trained(tmp_path, max_steps=1)
    up = sum(row["label"] for row in make_thumbs(13))
    assert f"{up} thumbs up and {13 - up} down, with these weights {up / (13 - up):.2f} to 1" in caplog.text
    caplog.clear()
    trained(tmp_path, max_steps=1, desirable_weight=1.1 * (13 - up) / up)
    assert "thumbs up" not in caplog.text
