"""What a run tells: callbacks, metrics, trackers, cards."""

from __future__ import annotations

import fnmatch
import math
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainers.tiny import make_llama, make_pairs, make_rows, make_tokenizer
from transformers import TrainerCallback

from alignfast import DPOTrainer, SFTTrainer
from alignfast.trainers.metrics import Meter, MetricsFile, read_metrics, to_json
from alignfast.trainers.progress import ProgressReport

RUN = dict(max_steps=4, per_device_train_batch_size=2, logging_steps=2, learning_rate=1e-2, report_to="none")


def make(folder, **options):
    return SFTTrainer(
        make_llama(), train_dataset=make_rows(6), processing_class=make_tokenizer(), output_dir=str(folder),
        **{**RUN, **options},
    )  # fmt: skip


class Record(TrainerCallback):
    """Names of the events, in order, with the keywords that transformers' callbacks rely on."""

    def __init__(self):
        self.events = []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def note(args, state, control, **kwargs):
            assert {"model", "processing_class", "optimizer", "lr_scheduler"} <= kwargs.keys()
            self.events.append((name, state.global_step))

        return note


def test_callbacks_hear_the_events_of_transformers_trainer(tmp_path):
    record = Record()
    make(tmp_path, callbacks=[record], eval_dataset=make_rows(2), eval_steps=2, save_steps=2).train()
    step = ["on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"]
    after = ["on_log", "on_prediction_step", "on_log", "on_evaluate", "on_save"]
    expected = [
        "on_init_end", "on_train_begin", "on_epoch_begin", *step, *step, *after, *step, "on_epoch_end",
        "on_epoch_begin", *step, *after, "on_log", "on_train_end",
    ]  # fmt: skip
    assert [name for name, _ in record.events] == expected


def test_control_is_honoured(tmp_path):
    class Ask(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = state.global_step == 1
            control.should_evaluate = state.global_step == 2
            control.should_training_stop = state.global_step == 3

    trainer = make(tmp_path, callbacks=[Ask], eval_dataset=make_rows(2), logging_steps=100)
    trainer.train()
    assert trainer.state.global_step == 3
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1"]
    assert [row["step"] for row in trainer.state.log_history if "eval_loss" in row] == [2]


def test_an_unsupported_control_is_refused(tmp_path):
    class Ask(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = True

    with pytest.raises(ValueError, match="should_epoch_stop"):
        make(tmp_path, callbacks=[Ask]).train()


@pytest.mark.parametrize("strategy", ["steps", "epoch", "no"])
def test_strategies_of_logging_evaluation_and_saving(tmp_path, strategy):
    trainer = make(
        tmp_path, max_steps=7, logging_strategy=strategy, eval_strategy=strategy, save_strategy=strategy,
        eval_steps=3, save_steps=3, logging_steps=3, eval_dataset=make_rows(2),
    )  # fmt: skip
    trainer.train()
    logged = [row["step"] for row in trainer.state.log_history if "loss" in row]
    evaluated = [row["step"] for row in trainer.state.log_history if "eval_loss" in row]
    saved = sorted(int(path.name[5:]) for path in (tmp_path / "checkpoints").glob("*"))
    # three steps an epoch; by steps, the last one counts too, as in transformers
    expected = {"steps": [3, 6, 7], "epoch": [3, 6], "no": []}[strategy]
    assert evaluated == saved == expected
    assert logged == ([3, 6, 7] if strategy != "no" else [])


def test_shares_of_the_run_are_intervals(tmp_path):
    trainer = make(tmp_path, max_steps=8, logging_steps=0.25, warmup_steps=0.5, save_strategy="no")
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.0025, 0.0075, 0.0075, 0.0025])


def test_several_evaluation_sets_have_names(tmp_path):
    trainer = make(tmp_path, eval_dataset={"easy": make_rows(2), "hard": make_rows(3, 5)})
    assert {"eval_easy_loss", "eval_hard_loss"} <= trainer.evaluate().keys()
    assert "test_loss" in trainer.evaluate(make_rows(2), metric_key_prefix="test")


def test_a_second_train_starts_the_plan_anew(tmp_path):
    trainer = make(tmp_path, save_strategy="no")
    first, second = trainer.train(), trainer.train()
    assert first.global_step == second.global_step == 4
    assert second.training_loss < first.training_loss  # the weights stay


def test_tensorboard_gets_the_metrics(tmp_path):
    make(tmp_path, report_to="tensorboard").train()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = events.Scalars("loss")
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert [(s.step, s.value) for s in scalars] == [(row["step"], pytest.approx(row["loss"])) for row in rows]


def test_dpo_metrics_are_means_over_pairs(tmp_path):
    trainer = DPOTrainer(
        make_llama(), ref_model=make_llama(seed=1), train_dataset=make_pairs(6), eval_dataset=make_pairs(6),
        processing_class=make_tokenizer(), output_dir=str(tmp_path), per_device_eval_batch_size=4, **RUN,
    )  # fmt: skip
    metrics = trainer.evaluate()
    margin = metrics["eval_rewards/chosen"] - metrics["eval_rewards/rejected"]
    assert metrics["eval_rewards/margins"] == pytest.approx(margin, abs=1e-6)
    assert metrics["eval_rewards/accuracies"] * 6 == pytest.approx(
        round(metrics["eval_rewards/accuracies"] * 6)
    )
    alone = [trainer.evaluate([pair])["eval_rewards/margins"] for pair in make_pairs(6)]
    assert metrics["eval_rewards/margins"] == pytest.approx(sum(alone) / 6, abs=1e-6)


def test_meter_sums_and_takes_extremes():
    accelerator = Accelerator(cpu=True)
    meter = Meter(torch.device("cpu"))
    for step in ((1.0, 2.0), (3.0,)):
        for value in step:
            meter.add(
                {"loss": torch.tensor(value), "max_kl": torch.tensor(value), "min_kl": torch.tensor(value)}
            )
        meter.end_step()
    assert meter.read(accelerator) == {"loss": 3.0, "max_kl": 3.0, "min_kl": 1.0}
    other = Meter(torch.device("cpu"))
    other.load(meter.state(accelerator), is_main=True)
    assert other.read(accelerator) == meter.read(accelerator)


def test_numbers_that_are_none_survive_strict_json(tmp_path):
    file = MetricsFile(tmp_path, 0)
    file.write({"step": 1, "loss": math.nan, "norm": math.inf, "low": -math.inf})
    row = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert math.isnan(row["loss"])
    assert (row["norm"], row["low"]) == (math.inf, -math.inf)
    assert to_json("text") == "text"


def test_a_half_written_last_line_is_dropped_on_resuming(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    MetricsFile(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    make(tmp_path, save_strategy="no").train()
    said = capsys.readouterr().err
    assert "6 rows, " in said
    assert "estimates: " in said
    assert "step 4/4  loss " in said
    assert "tokens/s" in said
    assert "\x1b" not in said


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with ProgressReport(10, 0, bar=True, silent=False) as report:
        assert report.bar is not None
        report.log({"loss": 0.5, "tokens_per_second": 1234.0}, 5.0)
        report.advance(3)
    shown = capsys.readouterr().err
    for part in ("3/10", "loss 0.5", "1,234 tokens/s", "left"):
        assert part in shown
    with ProgressReport(10, 0, bar=False, silent=False) as report:  # disable_tqdm
        assert report.bar is None


def test_share_saved_by_sharing_is_told(tmp_path, capsys):
    pairs = [("the cat the dog the bird", " sat", " ran")] * 4
    DPOTrainer(
        make_llama(), train_dataset=pairs, processing_class=make_tokenizer(), output_dir=str(tmp_path), **RUN
    ).train()
    # 4 pairs of 6 + 2 and 6 + 2 tokens; shared 6 + 2 + 2
    assert (
        "4 rows, 64 tokens, of which 40 are computed (38% saved by sharing prompts)"
        in capsys.readouterr().err
    )


def test_model_card(tmp_path):
    trainer = make(tmp_path, run_name="little")
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header == {"library_name": "transformers", "tags": ["alignfast", "sft"]}
    assert "# little" in card
    assert "4 steps" in card


def test_the_hub_gets_the_model_and_not_the_checkpoints(tmp_path, monkeypatch):
    calls = {}

    class Hub:
        def __init__(self, token):
            calls["token"] = token

        def create_repo(self, name, **options):
            calls["repo"] = (name, options)
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, repo_id, folder_path, ignore_patterns):
            patterns = [fnmatch.filter([str(p.relative_to(folder_path)) for p in folder_path.rglob("*")], ignored)
                        for ignored in ignore_patterns]  # fmt: skip
            left_out = {name for names in patterns for name in names}
            files = {str(p.relative_to(folder_path)) for p in folder_path.rglob("*") if p.is_file()}
            calls["upload"] = (repo_id, files - left_out)

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    options = dict(push_to_hub=True, hub_model_id="little", hub_private_repo=True, hub_token="secret")
    make(tmp_path, save_strategy="steps", save_steps=2, **options).train()
    assert calls["token"] == "secret"
    assert calls["repo"] == ("little", {"private": True, "exist_ok": True})
    repo, files = calls["upload"]
    assert repo == "me/little"
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= files
    assert not any(name.startswith("checkpoints/") for name in files)
    assert "secret" not in "".join((tmp_path / name).read_text() for name in ("README.md", "config.yaml"))


def test_pushing_offline_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    trainer = make(tmp_path, push_to_hub=True, hub_model_id="someone/little", save_strategy="no")
    with pytest.raises(RuntimeError, match=r"could not push to someone/little.*the model lies in"):
        trainer.train()
    assert (tmp_path / "model.safetensors").exists()
