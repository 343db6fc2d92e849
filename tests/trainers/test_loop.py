"""The loop: what a step is, however it is cut; what it logs; what it does with numbers that are none."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys

import pytest
import torch
from trainers.tiny import make_gpt2_with_dropout, make_llama, make_pairs, make_rows, make_tokenizer
from transformers import AutoModelForCausalLM, TrainerCallback

from alignfast import DPOTrainer, SFTConfig, SFTTrainer
from alignfast.trainers.interrupt import NonFiniteError
from alignfast.trainers.metrics import read_metrics

STEPS = dict(max_steps=4, logging_steps=1, learning_rate=1e-2, save_strategy="no", report_to="none")
# AdamW divides by sqrt(v) + epsilon. With 1e-8, where a gradient is rounding itself, so are the first steps.
STEADY = dict(adam_epsilon=1e-3)
TRAINERS = {"sft": (SFTTrainer, make_rows), "dpo": (DPOTrainer, make_pairs)}


def trained(method, folder, *, seed=0, num_rows=13, model=None, **options):
    trainer_class, make = TRAINERS[method]
    trainer = trainer_class(
        make_llama(seed) if model is None else model,
        train_dataset=make(num_rows),
        processing_class=make_tokenizer(),
        output_dir=str(folder),
        **{**STEPS, **options},
    )
    trainer.train()
    return trainer


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def largest_difference(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a.model.parameters(), b.model.parameters()))


@pytest.mark.parametrize("method", TRAINERS)
@pytest.mark.parametrize(
    "cut",
    [
        dict(per_device_train_batch_size=1, gradient_accumulation_steps=8),
        dict(per_device_train_batch_size=2, gradient_accumulation_steps=4),
        dict(per_device_train_batch_size=8, max_tokens_per_batch=40),
    ],
    ids=["1x8", "2x4", "tokens"],
)
def test_a_step_is_the_same_however_it_is_cut(tmp_path, method, cut):
    # 13 rows in steps of 8: the second step of each epoch is short
    whole = trained(method, tmp_path / "whole", per_device_train_batch_size=8, **STEADY)
    parts = trained(method, tmp_path / "parts", **cut, **STEADY)
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-6)
    assert largest_difference(whole, parts) < 1e-6
    for row_whole, row_parts in zip(whole.state.log_history, parts.state.log_history):
        for name in row_whole:
            if "runtime" not in name and "second" not in name:
                assert row_parts[name] == pytest.approx(row_whole[name], abs=1e-5), name


@pytest.mark.parametrize("method", TRAINERS)
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_layouts_train_alike(tmp_path, method, layout):
    shared = trained(method, tmp_path / "shared", **STEADY)
    other = trained(method, tmp_path / layout, layout=layout, **STEADY)
    assert losses(other) == pytest.approx(losses(shared), abs=1e-6)
    assert largest_difference(shared, other) < 1e-6


def test_the_loss_is_the_mean_over_the_tokens_of_the_step(tmp_path):
    rows, model, tokenizer = make_rows(5), make_llama(), make_tokenizer()
    expected, num_tokens = 0.0, 0
    for row in rows:
        ids = torch.tensor([tokenizer(row["prompt"] + row["completion"] + "<eos>")["input_ids"]])
        prompt = len(tokenizer(row["prompt"])["input_ids"])
        labels = torch.where(torch.arange(ids.shape[1]) < prompt, -100, ids[0])[None]
        tokens = ids.shape[1] - prompt
        expected += model(ids, labels=labels).loss.item() * tokens
        num_tokens += tokens
    trainer = SFTTrainer(
        model, train_dataset=rows, processing_class=tokenizer, output_dir=str(tmp_path), eval_dataset=rows,
        per_device_train_batch_size=5, **{**STEPS, "max_steps": 1},
    )  # fmt: skip
    for batch_size in (1, 2, 5):
        object.__setattr__(trainer.args, "per_device_eval_batch_size", batch_size)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected / num_tokens, abs=1e-6)
    trainer.train()
    assert losses(trainer) == pytest.approx([expected / num_tokens], abs=1e-6)


def test_metrics_file_has_a_strict_json_line_a_log(tmp_path):
    trainer = trained("dpo", tmp_path, max_steps=5, logging_steps=2)
    with (tmp_path / "metrics.jsonl").open() as file:
        lines = [json.loads(line, parse_constant=pytest.fail) for line in file]
    rows = [row for row in lines if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 5]  # the last step is always logged
    names = {
        "time", "loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "tokens_per_second", "skipped_steps",
        "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
        "logps/rejected", "logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy",
    }  # fmt: skip
    assert all(names <= row.keys() for row in rows)
    times = [row["time"] for row in lines]
    assert times == sorted(times)
    assert trainer.state.log_history[0]["loss"] == rows[0]["loss"]


def test_a_second_run_in_the_folder_keeps_the_first_one_s_metrics(tmp_path):
    trained("sft", tmp_path)
    first = (tmp_path / "metrics.jsonl").read_text()
    trained("sft", tmp_path)
    assert (tmp_path / "metrics.1.jsonl").read_text() == first


class Poison(TrainerCallback):
    """Make the loss of the given steps no number, by a weight that is none while they run."""

    def __init__(self, steps, value):
        self.steps, self.value = steps, value

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.intact = None
        if state.global_step + 1 in self.steps:
            weight = model.get_output_embeddings().weight.data
            self.intact = weight[5].clone()
            weight[5] = self.value

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.intact is not None:
            model.get_output_embeddings().weight.data[5] = self.intact


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_without_a_number_is_skipped_and_logged_as_it_is(tmp_path, value):
    trainer = trained("sft", tmp_path, max_steps=6, callbacks=[Poison({2, 3, 5}, value)])
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert [math.isfinite(row["loss"]) for row in rows] == [True, False, False, True, False, True]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 2, 2, 3, 3]
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


def test_a_gradient_without_a_number_is_skipped_though_the_loss_has_one(tmp_path):
    class PoisonGradient(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                next(p for p in model.parameters() if p.grad is not None).grad[0] = math.nan

    trainer = trained("sft", tmp_path, max_steps=3, callbacks=[PoisonGradient()])
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert [math.isfinite(row["grad_norm"]) for row in rows] == [True, False, True]
    assert rows[-1]["skipped_steps"] == 1
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


def test_the_mean_loss_of_a_run_leaves_skipped_steps_out(tmp_path):
    poisoned = trained("sft", tmp_path, max_steps=3, callbacks=[Poison({2}, math.nan)])
    rows = [row["loss"] for row in poisoned.state.log_history if math.isfinite(row.get("loss", math.nan))]
    assert poisoned.state.log_history[-1]["train_loss"] == pytest.approx(sum(rows) / 2)


def test_an_evaluation_after_the_run_is_in_its_metrics_too(tmp_path):
    trainer = trained("sft", tmp_path, max_steps=1)
    trainer.evaluate(make_rows(2, 5))
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["eval_loss"] > 0
    assert len(trainer.all_data) == 1  # rows that were only evaluated are let go


def test_a_skipped_step_leaves_weights_and_optimizer_alone(tmp_path):
    seen = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            moments = [
                optimizer.state[p]["exp_avg"].clone() for g in optimizer.param_groups for p in g["params"]
            ]
            seen[state.global_step] = [p.detach().clone() for p in model.parameters()] + moments

    trained("sft", tmp_path, callbacks=[Poison({3}, math.nan), Watch()])
    assert all(torch.equal(a, b) for a, b in zip(seen[2], seen[3]))
    assert not all(torch.equal(a, b) for a, b in zip(seen[3], seen[4]))


def test_three_steps_in_a_row_without_a_number_stop_the_run(tmp_path):
    model, seen = make_llama(), {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen[state.global_step] = [p.detach().clone() for p in model.parameters()]

    poison = Poison({3, 4, 5}, math.nan)
    with pytest.raises(NonFiniteError, match=r"step 5.*3 steps in a row"):
        trained("sft", tmp_path, model=model, max_steps=9, save_strategy="steps", save_steps=1,
                callbacks=[poison, Watch()])  # fmt: skip
    model.get_output_embeddings().weight.data[5] = poison.intact
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), seen[2]))
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["step"] == 5
    assert math.isnan(last["loss"])
    for folder in (tmp_path / "checkpoints").iterdir():
        saved = AutoModelForCausalLM.from_pretrained(folder)
        assert all(torch.isfinite(p).all() for p in saved.parameters())


def test_two_in_a_row_then_one_good_then_two_go_on(tmp_path):
    trainer = trained("sft", tmp_path, max_steps=6, callbacks=[Poison({1, 2, 4, 5}, math.nan)])
    assert trainer.state.global_step == 6


def test_dropout_is_off_where_asked_and_on_where_not(tmp_path):
    rows = dict(num_rows=4, max_steps=1, per_device_train_batch_size=4)
    off = [losses(trained("sft", tmp_path, model=make_gpt2_with_dropout(), disable_dropout=True, seed=s, **rows))
           for s in (0, 0)]  # fmt: skip
    on = losses(trained("sft", tmp_path, model=make_gpt2_with_dropout(), **rows))
    assert off[0] == off[1]
    assert on != off[0]


def test_the_model_object_stays_usable(tmp_path):
    model, tokenizer = make_llama().eval(), make_tokenizer()
    implementation = model.config._attn_implementation
    pairs = [("the cat", " sat", " ran near"), ("a dog", " sang", " sad")]
    trainer = DPOTrainer(
        model=model, tokenizer=tokenizer, dataset=pairs, beta=0.1, output_dir=str(tmp_path), max_steps=2,
        report_to="none",
    )  # fmt: skip
    trainer.train()
    assert model.config._attn_implementation == implementation
    assert not model.training
    model.save_pretrained(tmp_path / "fine-tuned")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "fine-tuned")
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_saved_model_loads_in_transformers(tmp_path):
    trainer = trained("sft", tmp_path)
    trainer.save_model(str(tmp_path / "final"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), again.parameters()))
    card = (tmp_path / "final" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers")
    assert "| learning_rate | 0.01 |" in card


def test_config_yaml_gives_the_config_again(tmp_path):
    import yaml

    trainer = trained("sft", tmp_path)
    assert SFTConfig(**yaml.safe_load((tmp_path / "config.yaml").read_text())) == trainer.args


def test_layers_without_a_gradient_are_left_alone(tmp_path):
    model = make_llama()
    model.get_input_embeddings().weight.requires_grad_(False)
    before = model.get_input_embeddings().weight.clone()
    trained("sft", tmp_path, model=model)
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_nothing_to_train_is_refused(tmp_path):
    with pytest.raises(ValueError, match="all are frozen"):
        trained("sft", tmp_path, model=make_llama().requires_grad_(False))


def test_decay_leaves_norms_and_biases_alone(tmp_path):
    trainer = trained("sft", tmp_path, weight_decay=0.1)
    decay = {id(p): g["weight_decay"] for g in trainer.updater.optimizer.param_groups for p in g["params"]}
    by_name = {name: decay[id(p)] for name, p in trainer.model.named_parameters()}
    assert {value for name, value in by_name.items() if "norm" in name} == {0.0}
    assert {value for name, value in by_name.items() if "norm" not in name} == {0.1}


def test_gradients_are_clipped_to_the_norm_and_no_further(tmp_path):
    loose = trained("sft", tmp_path / "loose", max_steps=1, max_grad_norm=0.0)
    tight = trained("sft", tmp_path / "tight", max_steps=1, max_grad_norm=0.01)
    for trainer, expected in ((loose, loose.state.log_history[0]["grad_norm"]), (tight, 0.01)):
        moments = [state["exp_avg"] for state in trainer.updater.optimizer.state.values()]
        assert torch.nn.utils.get_total_norm(moments).item() == pytest.approx(0.1 * expected, rel=1e-4)
    # before clipping
    assert loose.state.log_history[0]["grad_norm"] == tight.state.log_history[0]["grad_norm"]


PAGE_FAULTS = """
import resource, sys
import torch
from alignfast.trainers.machine import keep_cpu_memory

if sys.argv[1] == "keep":
    print(keep_cpu_memory())
for _ in range(4):  # the heap takes a block or three to find its size, by where its memory happens to lie
    torch.empty(1 << 24).fill_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(16):
    torch.empty(1 << 24).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_kept_memory_faults_no_more():
    def run(what):
        command = [sys.executable, "-c", PAGE_FAULTS, what]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    left, (kept, faults) = int(run("leave")[0]), run("keep")
    assert kept == "True"
    assert left > 16 * 10_000  # 64 MB of 4 kB pages, each time anew
    assert int(faults) < left / 8
