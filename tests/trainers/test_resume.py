"""Going on from a checkpoint is bit for bit the run that was never stopped; a damaged one is named and passed over."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from trainers.tiny import (
    make_gpt2_with_dropout,
    make_llama,
    make_pairs,
    make_rankings,
    make_rows,
    make_thumbs,
    make_tokenizer,
)
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    GPT2ForSequenceClassification,
    TrainerCallback,
)

from alignfast import DPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer
from alignfast.trainers import saving
from alignfast.trainers.checkpoint import DamagedCheckpoint
from alignfast.trainers.interrupt import INTERRUPTED_EXIT_CODE, TrainingInterrupted
from alignfast.trainers.metrics import read_metrics

# 11 rows in steps of 4, accumulated: epochs end after steps 3, 6, 9, each with a short step. Logs fall between
# checkpoints, so that half a window is carried over; dropout is on, so that random numbers matter.
RUN = dict(
    max_steps=8, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, warmup_steps=2,
    lr_scheduler_type="cosine", logging_steps=3, save_steps=1, report_to="none", disable_dropout=False,
    weight_decay=0.01,
)  # fmt: skip
LORA = dict(r=2, lora_alpha=4, target_modules=["c_attn"], lora_dropout=0.1)
CASES = {
    "sft": (SFTTrainer, make_rows, {}),
    "sft-lora": (SFTTrainer, make_rows, dict(peft_config=LORA)),
    "dpo": (DPOTrainer, make_pairs, {}),
    "dpo-lora": (DPOTrainer, make_pairs, dict(peft_config=LORA)),
    "dpo-precomputed": (DPOTrainer, make_pairs, dict(precompute_ref_log_probs=True)),
    "kto": (KTOTrainer, make_thumbs, {}),
    "kto-lora": (KTOTrainer, make_thumbs, dict(peft_config=LORA)),
    "reward": (RewardTrainer, make_rankings, dict(num_heads=2)),
    "reward-lora": (RewardTrainer, make_rankings, dict(peft_config=LORA)),
}


class CountSteps(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


def make_trainer(case, folder, **options):
    trainer_class, make, extra = CASES[case]
    heads = dict(kind=GPT2ForSequenceClassification, num_labels=extra.get("num_heads", 1))
    return trainer_class(
        make_gpt2_with_dropout(**(heads if trainer_class is RewardTrainer else {})), train_dataset=make(11), processing_class=make_tokenizer(),
        output_dir=str(folder), **{**RUN, **extra, **options},
    )  # fmt: skip


def figures(trainer):
    """The log without what depends on the clock."""
    return [
        {k: v for k, v in row.items() if "second" not in k and "runtime" not in k}
        for row in trainer.state.log_history
    ]


def same_bits(a, b):
    mine, theirs = a.model.state_dict(), b.model.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("case", CASES)
def test_resumed_at_every_step_equals_uninterrupted(tmp_path, case):
    whole = make_trainer(case, tmp_path / "whole")
    whole.train()
    for step in range(1, 8) if case in ("sft", "dpo") else (2, 5):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(
            tmp_path / "whole" / "checkpoints" / f"step-{step}", folder / "checkpoints" / f"step-{step}"
        )
        torch.manual_seed(1234)  # whatever state this process is in must not matter
        count = CountSteps()
        resumed = make_trainer(case, folder, callbacks=[count])
        resumed.train(resume_from_checkpoint=True)
        assert count.steps == list(range(step, 8))  # from the checkpoint, not from step 0
        assert same_bits(whole, resumed)
        # the last row is the mean over this process's steps
        assert figures(resumed)[:-1] == figures(whole)[:-1]
        for p, q in zip(whole.module.parameters(), resumed.module.parameters()):
            for name, value in whole.updater.optimizer.state.get(p, {}).items():
                assert torch.equal(value, resumed.updater.optimizer.state[q][name])


def test_a_run_that_was_not_resumed_differs(tmp_path):
    # the test above could not pass by training from the start: other random numbers give other weights
    whole, other = make_trainer("sft", tmp_path / "a"), make_trainer("sft", tmp_path / "b", seed=1)
    whole.train()
    other.train()
    assert not same_bits(whole, other)


def test_the_option_resumes_too_and_cuts_back_the_metrics(tmp_path):
    make_trainer("sft", tmp_path, logging_steps=1).train()
    shutil.rmtree(tmp_path / "checkpoints" / "step-8")
    shutil.rmtree(tmp_path / "checkpoints" / "step-7")
    make_trainer("sft", tmp_path, logging_steps=1, resume_from_checkpoint=True).train()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))
    times = [row["time"] for row in rows]
    assert times == sorted(times)


def test_a_finished_run_resumes_to_nothing(tmp_path):
    whole = make_trainer("sft", tmp_path)
    whole.train()
    count = CountSteps()
    again = make_trainer("sft", tmp_path, callbacks=[count])
    again.train(resume_from_checkpoint=True)
    assert count.steps == []
    assert same_bits(whole, again)


def test_nothing_to_resume_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no complete checkpoint"):
        make_trainer("sft", tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "change",
    [
        dict(seed=1), dict(per_device_train_batch_size=1), dict(max_steps=9), dict(learning_rate=0.5),
        dict(weight_decay=0.1), dict(max_length=5),
    ],
)  # fmt: skip
def test_another_run_s_checkpoint_is_refused(tmp_path, change):
    make_trainer("sft", tmp_path, max_steps=2).train()
    with pytest.raises(ValueError, match="another run"):
        make_trainer("sft", tmp_path, **{"max_steps": 2, **change}).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_an_option_that_the_checkpoint_does_not_know_yet_was_at_its_default(tmp_path, monkeypatch, value):
    def of_an_earlier_version(trainer):
        found = now(trainer)
        del found["weight_decay"]
        return found

    now = saving.fingerprint
    with monkeypatch.context() as patched:
        patched.setattr(saving, "fingerprint", of_an_earlier_version)
        make_trainer("sft", tmp_path, max_steps=2, save_steps=1, weight_decay=value).train()
    trainer = make_trainer("sft", tmp_path, max_steps=2, save_steps=1, weight_decay=value)
    with pytest.raises(ValueError, match="its weight_decay is") if value else nullcontext():
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "step-1"))


def test_other_rows_of_the_same_number_are_refused(tmp_path):
    make_trainer("sft", tmp_path, max_steps=2).train()
    trainer = SFTTrainer(
        make_gpt2_with_dropout(), train_dataset=make_rows(11, seed=5), processing_class=make_tokenizer(),
        output_dir=str(tmp_path), **{**RUN, "max_steps": 2},
    )  # fmt: skip
    with pytest.raises(ValueError, match="another run: its data is"):
        trainer.train(resume_from_checkpoint=True)


def test_other_labels_of_the_same_rows_are_refused(tmp_path):
    make_trainer("kto", tmp_path, max_steps=2).train()
    turned = [{**row, "label": not row["label"]} for row in make_thumbs(11)]
    trainer = KTOTrainer(
        make_gpt2_with_dropout(), train_dataset=turned, processing_class=make_tokenizer(), output_dir=str(tmp_path),
        **{**RUN, "max_steps": 2},
    )  # fmt: skip
    with pytest.raises(ValueError, match="another run: its data is"):
        trainer.train(resume_from_checkpoint=True)


def test_a_path_object_means_that_checkpoint(tmp_path):
    make_trainer("sft", tmp_path, max_steps=4, save_steps=2).train()
    trainer = make_trainer("sft", tmp_path, max_steps=4, save_steps=2)
    steps = CountSteps()
    trainer.add_callback(steps)
    trainer.train(resume_from_checkpoint=tmp_path / "checkpoints" / "step-2")
    assert steps.steps == [2, 3]


def test_another_model_s_checkpoint_is_refused(tmp_path):
    make_trainer("sft", tmp_path, max_steps=2).train()
    trainer = SFTTrainer(
        make_llama(), train_dataset=make_rows(11), processing_class=make_tokenizer(), output_dir=str(tmp_path),
        **{**RUN, "max_steps": 2},
    )  # fmt: skip
    with pytest.raises(ValueError, match="its model is GPT2LMHeadModel"):
        trainer.train(resume_from_checkpoint=True)


def test_damage_in_any_file_is_named_and_the_checkpoint_before_used(tmp_path, caplog):
    make_trainer("sft", tmp_path, max_steps=2).train()
    newest = tmp_path / "checkpoints" / "step-2"
    for file in sorted(newest.iterdir()):
        intact = file.read_bytes()
        file.write_bytes(intact[:-3] + bytes([intact[-3] ^ 4]) + intact[-2:])
        count = CountSteps()
        caplog.clear()
        trainer = make_trainer("sft", tmp_path, max_steps=2, save_strategy="no", callbacks=[count])
        trainer.train(resume_from_checkpoint=True)
        assert count.steps == [1]
        assert str(file) in caplog.text
        # a checkpoint asked for by name is used or refused
        with pytest.raises(DamagedCheckpoint, match=file.name):
            make_trainer("sft", tmp_path, max_steps=2).train(resume_from_checkpoint=str(newest))
        file.write_bytes(intact)


def test_a_checkpoint_loads_in_transformers(tmp_path):
    trainer = make_trainer("sft", tmp_path, max_steps=1)
    trainer.train()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoints" / "step-1")
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), again.parameters()))


def test_a_lora_checkpoint_is_an_adapter_that_loads(tmp_path):
    trainer = make_trainer("sft-lora", tmp_path, max_steps=1)
    trainer.train()
    folder = tmp_path / "checkpoints" / "step-1"
    assert not (folder / "model.safetensors").exists()
    ids, mine = torch.tensor([[3, 4, 5]]), trainer.model.eval()
    again = PeftModel.from_pretrained(make_gpt2_with_dropout(), folder).eval()
    assert torch.equal(mine(ids).logits, again(ids).logits)


@pytest.mark.parametrize(
    "options", [dict(dtype="bfloat16"), dict(bf16=True), dict(dtype="float32", layout="padded")]
)
def test_other_precisions_resume_bit_for_bit(tmp_path, options):
    make_llama().save_pretrained(tmp_path / "model")

    def make(folder):
        return SFTTrainer(
            str(tmp_path / "model"), train_dataset=make_rows(11), processing_class=make_tokenizer(),
            output_dir=str(folder), **{**RUN, "max_steps": 4, **options},
        )  # fmt: skip

    whole = make(tmp_path / "whole")
    whole.train()
    shutil.copytree(
        tmp_path / "whole" / "checkpoints" / "step-2", tmp_path / "run" / "checkpoints" / "step-2"
    )
    resumed = make(tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    assert same_bits(whole, resumed)
    assert figures(resumed)[:-1] == figures(whole)[:-1]


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path):
    make_trainer("sft", tmp_path, max_steps=1).train()
    suffixes = {file.suffix for file in (tmp_path / "checkpoints" / "step-1").iterdir()}
    assert suffixes == {".safetensors", ".json", ".yaml"}


def kept(folder):
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").iterdir())


class Choose(TrainerCallback):
    """Makes the evaluation at `best` the best: later ones only get worse."""

    def __init__(self, best):
        self.best = best

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_loss"] = 100.0 + abs(state.global_step - self.best)


def test_last_k_and_best_are_kept_and_the_best_is_put_back(tmp_path):
    trainer = make_trainer(
        "sft", tmp_path, eval_dataset=make_rows(4, 9), eval_steps=1, save_total_limit=2,
        load_best_model_at_end=True, callbacks=[Choose(best=3)],
    )  # fmt: skip
    trainer.train()
    assert kept(tmp_path) == [3, 8]
    assert trainer.state.best_global_step == 3
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoints" / "step-3")
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), best.parameters()))


def test_the_best_is_put_back_between_checkpoints_too(tmp_path):
    """Evaluated every 2 steps, saved every 4, best at 6."""
    weights = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            weights[state.global_step] = [p.detach().clone() for p in model.parameters()]

    trainer = make_trainer(
        "sft", tmp_path, eval_dataset=make_rows(4, 9), eval_steps=2, save_steps=4, load_best_model_at_end=True,
        callbacks=[Choose(best=6), Watch()],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 6
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), weights[6]))


def test_an_evaluation_without_a_number_is_never_the_best(tmp_path):
    class FirstIsNone(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] = float("nan") if state.global_step == 2 else 1.0

    trainer = make_trainer(
        "sft", tmp_path, eval_dataset=make_rows(4, 9), eval_steps=2, load_best_model_at_end=True,
        callbacks=[FirstIsNone()],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 4


def test_save_strategy_best_saves_at_new_bests_alone(tmp_path):
    make_trainer(
        "sft", tmp_path, eval_dataset=make_rows(4, 9), eval_steps=2, save_strategy="best",
        callbacks=[Choose(best=4)],
    ).train()  # fmt: skip
    assert kept(tmp_path) == [2, 4]


def test_early_stopping_goes_on_with_the_patience_it_had(tmp_path):
    def make(folder, callback):
        return make_trainer(
            "sft", folder, eval_dataset=make_rows(4, 9), eval_steps=1, load_best_model_at_end=True,
            metric_for_best_model="loss", greater_is_better=False, callbacks=[Choose(best=2), callback],
        )  # fmt: skip

    first = make(tmp_path / "a", EarlyStoppingCallback(early_stopping_patience=3))
    first.train()
    assert first.state.global_step == 5  # best at 2, no better at 3, 4, 5
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-5")
    second = make(tmp_path / "b", EarlyStoppingCallback(early_stopping_patience=3))
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 5


class SendSignal(TrainerCallback):
    def __init__(self, step, number, times=1):
        self.step, self.number, self.times = step, number, times

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "times"), [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 3)])
def test_a_signal_finishes_the_step_saves_and_leaves(tmp_path, number, times):
    before = signal.getsignal(number)
    whole = make_trainer("sft", tmp_path / "whole")
    whole.train()
    stopped = make_trainer("sft", tmp_path / "run", save_steps=100, callbacks=[SendSignal(5, number, times)])
    with pytest.raises(TrainingInterrupted) as leaving:
        stopped.train()
    assert leaving.value.code == INTERRUPTED_EXIT_CODE
    assert leaving.value.checkpoint.endswith("step-5")
    assert signal.getsignal(number) is before
    resumed = make_trainer("sft", tmp_path / "run", save_steps=100)
    resumed.train(resume_from_checkpoint=True)
    assert same_bits(whole, resumed)


def test_a_signal_during_evaluation_leaves_it(tmp_path):
    class DuringEvaluation(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = make_trainer(
        "sft", tmp_path, eval_dataset=make_rows(6, 9), eval_steps=2, per_device_eval_batch_size=1,
        save_strategy="no", callbacks=[DuringEvaluation()],
    )  # fmt: skip
    with pytest.raises(TrainingInterrupted):
        trainer.train()
    assert kept(tmp_path) == [2]
    assert not any("eval_loss" in row for row in trainer.state.log_history)
    resumed = make_trainer("sft", tmp_path, eval_dataset=make_rows(6, 9), eval_steps=2, save_strategy="no")
    resumed.train(resume_from_checkpoint=True)  # what was due at step 2 is made up for
    evaluated = [row["step"] for row in resumed.state.log_history if "eval_loss" in row]
    assert evaluated == [2, 4, 6, 8]
    assert "eval_loss" in resumed.evaluate()


SCRIPT = """
import sys
sys.path[:0] = [sys.argv[2]]
from trainers.test_resume import SendSignal, make_trainer
import signal
make_trainer("sft", sys.argv[1], save_steps=100, callbacks=[SendSignal(2, signal.SIGTERM)]).train()
"""


def test_the_process_ends_with_a_code_of_its_own(tmp_path):
    tests = str(Path(__file__).parents[1])
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), tests], capture_output=True, text=True, check=False
    )
    assert process.returncode == INTERRUPTED_EXIT_CODE, process.stderr
    assert "stopped by a signal after step 2" in process.stderr
    assert "Traceback" not in process.stderr
    assert kept(tmp_path) == [2]
