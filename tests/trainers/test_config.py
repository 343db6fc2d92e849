"""Options: TRL's names and defaults, every other one refused with what to do instead."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys

import jsonargparse
import pytest
from trainers.tiny import make_llama, make_pairs, make_rows, make_tokenizer

import alignfast
from alignfast import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    KTOConfig,
    PPOConfig,
    RewardConfig,
    SFTConfig,
    SFTTrainer,
)  # fmt: skip
from alignfast.trainers.plan import Plan, steps_per_epoch
from alignfast.trainers.refused import REFUSED

# As in TRL 1.16 and transformers 5.17. Ours differ in bf16, report_to and eval_strategy, and KTO's in
# train_sampling_strategy; their texts say so.
DEFAULTS = dict(
    output_dir=None, per_device_train_batch_size=8, per_device_eval_batch_size=8, gradient_accumulation_steps=1,
    num_train_epochs=3.0, max_steps=-1, lr_scheduler_type="linear", warmup_steps=0, weight_decay=0.0,
    adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, max_grad_norm=1.0, optim="adamw_torch_fused",
    logging_steps=10, save_steps=500, save_strategy="steps", save_total_limit=None, seed=42, max_length=1024,
    truncation_mode="keep_start", gradient_checkpointing=True, bf16=None, fp16=False, push_to_hub=False,
    load_best_model_at_end=False, train_sampling_strategy="random", dataloader_drop_last=False,
)  # fmt: skip
OWN = {
    SFTConfig: dict(learning_rate=2e-5, completion_only_loss=None, assistant_only_loss=False, loss_type="nll"),
    DPOConfig: dict(
        learning_rate=1e-6, beta=0.1, label_smoothing=0.0, precompute_ref_log_probs=False, disable_dropout=True,
        f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5, discopop_tau=0.05, use_weighting=False,
        ld_alpha=None, loss_weights=None,
    ),
    KTOConfig: dict(
        learning_rate=1e-6, beta=0.1, loss_type="kto", desirable_weight=1.0, undesirable_weight=1.0,
        precompute_ref_log_probs=False, disable_dropout=True,
    ),
    RewardConfig: dict(
        learning_rate=1e-4, center_rewards_coefficient=None, disable_dropout=True, truncation_mode="drop",
    ),
}  # fmt: skip


@pytest.mark.parametrize("config_class", OWN)
def test_defaults_are_trl_s(config_class):
    config = config_class()
    expected = {**DEFAULTS, **OWN[config_class]}
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("config_class", [*OWN, GRPOConfig, PPOConfig])
def test_nan_is_no_value_of_any_option(config_class):
    names = [field.name for field in dataclasses.fields(config_class) if str(field.type).startswith("float")]
    assert "learning_rate" in names
    for name in names:
        with pytest.raises(ValueError, match=f"{name} must be a number, got nan"):
            config_class(**{name: float("nan")})


@pytest.mark.parametrize("name", ["learning_rate", "per_device_train_batch_size", "num_iterations"])
def test_none_is_for_options_whose_default_it_is(name):
    with pytest.raises(ValueError, match=f"{name} must be at least [01], got None"):
        GRPOConfig(**{name: None})
    assert GRPOConfig(steps_per_generation=None).micro_batches_per_draw == 1


@pytest.mark.parametrize(
    ("config", "options", "without"),
    [
        (alignfast.SFTConfig, {"bnb_4bit_quant_type": "fp4"}, "load_in_4bit"),
        (alignfast.RewardConfig, {"bootstrap": False}, "num_heads of 2 or more"),
        (alignfast.GRPOConfig, {"vllm_importance_sampling_clip_min": 0.5}, "engine='vllm'"),
        (alignfast.GRPOConfig, {"engine": "transformers", "decode_backend": "flash"}, "engine='native'"),
        (alignfast.GRPOConfig, {"num_completions_to_print": 3}, "log_completions"),
        (alignfast.PPOConfig, {"kl_horizon": 5}, "target_kl"),
        (alignfast.PPOConfig, {"kl_coef": 0.0, "kl_estimator": "k2"}, "kl_coef above 0"),
    ],
)
def test_options_of_what_is_off_are_refused(config, options, without):
    """Taken, they would not be obeyed."""
    *_, name = options
    with pytest.raises(ValueError, match=f"^{name}=.* has no meaning without {without}: "):
        config(**options)


@pytest.mark.parametrize("name", REFUSED)
def test_options_without_a_counterpart_are_refused_with_the_reason(name):
    assert name not in {field.name for field in dataclasses.fields(SFTConfig)}
    with pytest.raises(TypeError, match=f"SFTConfig does not take '{name}': "):
        SFTConfig(**{name: True})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(learning_rat=1), "did you mean 'learning_rate'"),
        (dict(layot="packed"), "did you mean 'layout'"),
        (dict(layout="flat"), "layout must be one of shared, packed, padded, got 'flat'"),
        (dict(max_steps=0), "max_steps must be at least 1, or -1"),
        (dict(gradient_accumulation_steps=0), "gradient_accumulation_steps must be at least 1"),
        (dict(bf16=True, fp16=True), "bf16 must be off where fp16 is on"),
        (dict(load_best_model_at_end=True), "eval_strategy must be"),
        (dict(loss_type="nil"), "loss_type must be one of nll, dft"),
        (dict(max_length=0), "max_length must be at least 1, or None"),
    ],
)
def test_wrong_options_say_what_was_expected(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        SFTConfig(**options)


@pytest.mark.parametrize(
    "options",
    [dict(beta=0.0), dict(loss_type="sigmoyd"), dict(loss_type=["sigmoid"], loss_weights=[1.0, 2.0])],
)
def test_wrong_losses_are_told_before_any_training(options):
    with pytest.raises(ValueError, match=r"beta|sigmoyd|loss_weights"):
        DPOConfig(**options)


def test_a_config_is_frozen_and_can_be_copied():
    config = SFTConfig("out", seed=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 4
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config
    assert dataclasses.replace(config, seed=4).seed == 4


def test_jsonargparse_sees_the_options():
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(DPOConfig)
    options = parser.parse_args(["--beta", "0.3", "--loss_type", "ipo", "--learning_rate", "2e-6"])
    assert DPOConfig(**options) == DPOConfig(beta=0.3, loss_type="ipo", learning_rate=2e-6)


def make(trainer_class, tmp_path, **options):
    rows = make_rows(4) if trainer_class is SFTTrainer else make_pairs(4)
    return trainer_class(make_llama(), train_dataset=rows, processing_class=make_tokenizer(), **options)


def test_both_spellings_give_the_same_trainer(tmp_path):
    options = dict(output_dir=str(tmp_path), beta=0.3, seed=7)
    one = make(DPOTrainer, tmp_path, args=DPOConfig(**options))
    two = DPOTrainer(model=make_llama(), tokenizer=make_tokenizer(), dataset=make_pairs(4), **options)
    assert one.args == two.args
    assert one.train_data == two.train_data


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(tokenizer="x"), "processing_class and tokenizer are the same"),
        (dict(dataset=[]), "train_dataset and dataset are the same"),
        (dict(args=SFTConfig(), seed=1), "not both: got args and seed"),
        (dict(args=DPOConfig()), "args must be a SFTConfig, got DPOConfig"),
        (dict(data_collator=1), "does not take 'data_collator'"),
        (dict(beta=0.1), "SFTConfig has no option 'beta'"),
        (dict(router_aux_loss_coef=0.1), "is no mixture of experts"),
        (dict(eval_steps=2), "needs an eval_dataset"),
        (dict(report_to="tensorbord"), "report_to='tensorbord' is not one of"),
        (dict(report_to="wandb"), "needs a package that is not installed"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make(SFTTrainer, tmp_path, **options)


def test_the_default_folder_is_trl_s():
    assert SFTConfig().folder.name == "trainer_output"


def test_a_token_that_the_model_does_not_know_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"token id .* and the model knows 12 tokens"):
        SFTTrainer(make_llama(vocab_size=12), train_dataset=make_rows(8), processing_class=make_tokenizer())


def test_a_row_longer_than_the_positions_or_the_budget_is_refused_when_read(tmp_path):
    rows = [{"prompt": "the cat", "completion": " sat"}, {"prompt": "the cat", "completion": " sat" * 80}]
    options = dict(train_dataset=rows, processing_class=make_tokenizer(), output_dir=str(tmp_path))
    with pytest.raises(
        ValueError, match="row 1 has 83 tokens and the model's positions end at 64: set max_length"
    ):
        SFTTrainer(make_llama(), **options)
    with pytest.raises(ValueError, match=r"row 1 alone has 64 tokens.*over max_tokens_per_batch=50"):
        SFTTrainer(make_llama(), **options, max_length=64, max_tokens_per_batch=50)


def test_paths_may_be_path_objects(tmp_path):
    make_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    trainer = SFTTrainer(
        tmp_path / "model",
        train_dataset=make_rows(2),
        output_dir=tmp_path / "run",
        max_steps=1,
        report_to="none",
    )
    trainer.train()
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_importing_alignfast_leaves_torch_and_transformers_alone():
    code = "import sys, alignfast; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'SFTTrainr'"):
        _ = alignfast.SFTTrainr


def test_an_epoch_is_a_permutation_that_the_next_one_changes():
    plan = Plan(num_rows=10, rows_per_step=4, num_steps=6, seed=3, shuffled=True, drop_last=False)
    epochs = [[row for step in range(first, first + 3) for row in plan.rows(step)] for first in (0, 3)]
    assert [sorted(rows) for rows in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]
    assert [len(plan.rows(step)) for step in range(3)] == [4, 4, 2]
    assert dataclasses.replace(plan, seed=4).rows(0) != plan.rows(0)
    dropped = dataclasses.replace(plan, drop_last=True)
    assert dropped.steps_per_epoch == 2
    assert len(dropped.rows(1)) == 4


def test_too_few_rows_for_a_step_are_refused():
    with pytest.raises(ValueError, match="3 rows make no step of 4 rows"):
        steps_per_epoch(3, 4, drop_last=True)
