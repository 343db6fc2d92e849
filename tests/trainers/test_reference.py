"""The reference: the same numbers from a copy, a given model, switched-off adapters or a table on disk."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from trainers.tiny import make_llama, make_pairs, make_rows, make_thumbs, make_tokenizer
from transformers import AutoModelForCausalLM, TrainerCallback

from alignfast import DPOConfig, DPOTrainer, GRPOTrainer, KTOTrainer, PPOTrainer
from alignfast.models import load_policy
from alignfast.trainers.reference import ReferenceOptions, make_reference

RUN = dict(max_steps=3, logging_steps=1, learning_rate=1e-2, save_strategy="no", report_to="none")
LORA = dict(r=2, lora_alpha=4, target_modules=["q_proj"])


def trained(folder, model=None, **options):
    trainer = DPOTrainer(
        make_llama() if model is None else model, train_dataset=make_pairs(6), processing_class=make_tokenizer(),
        output_dir=str(folder), **{**RUN, **options},
    )  # fmt: skip
    trainer.train()
    return trainer


def figures(trainer):
    skip = ("second", "runtime")
    rows = trainer.state.log_history
    return [{k: v for k, v in row.items() if not any(word in k for word in skip)} for row in rows]


def test_copy_given_model_and_table_train_alike(tmp_path):
    copy = trained(tmp_path / "copy")
    given = trained(tmp_path / "given", ref_model=make_llama())
    table = trained(tmp_path / "table", precompute_ref_log_probs=True)
    assert figures(copy) == figures(given)
    for mine, theirs in zip(figures(copy), figures(table)):
        assert theirs == pytest.approx(mine, abs=1e-6)
    before, after = (row["rewards/margins"] for row in copy.state.log_history[:2])
    assert abs(before) < 1e-6 < abs(after)  # before the first update they are one model


def test_another_reference_gives_other_numbers(tmp_path):
    other = trained(tmp_path, ref_model=make_llama(seed=1))
    assert abs(other.state.log_history[0]["rewards/margins"]) > 1e-3


def test_adapters_off_equal_the_base_model(tmp_path):
    off = trained(tmp_path / "off", peft_config=LORA)
    given = trained(tmp_path / "given", peft_config=LORA, ref_model=make_llama())
    table = trained(tmp_path / "table", peft_config=LORA, precompute_ref_log_probs=True)
    assert off.modules_in_memory == [off.module]
    for other in (given, table):
        for mine, theirs in zip(figures(off), figures(other)):
            assert theirs == pytest.approx(mine, abs=1e-6)


def with_trained_adapters():
    """A PEFT model whose adapters change something, as a fine-tuned one's do."""
    policy = load_policy(make_llama(), peft_config=LORA)
    torch.manual_seed(3)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    return policy.model


def test_adapters_that_came_with_the_model_are_part_of_its_reference(tmp_path):
    """Equal to a merged copy of it, and not to the base; one model in memory; its adapters are trained and saved."""
    merged = with_trained_adapters().merge_and_unload()
    given = trained(tmp_path / "given", model=with_trained_adapters(), ref_model=merged)
    own = trained(tmp_path / "own", model=with_trained_adapters())
    table = trained(tmp_path / "table", model=with_trained_adapters(), precompute_ref_log_probs=True)
    assert own.modules_in_memory == [own.module]
    for other in (given, table):
        for mine, theirs in zip(figures(own), figures(other)):
            assert theirs == pytest.approx(mine, abs=1e-5)
    assert abs(own.state.log_history[0]["rewards/margins"]) < 1e-6
    start = dict(with_trained_adapters().named_parameters())
    moved = {name: p for name, p in own.model.named_parameters() if p.requires_grad}
    assert all(not torch.equal(p, start[name]) for name, p in moved.items())


def test_what_is_no_model_is_no_reference(tmp_path):
    """As in TRL the second argument is the reference: a config there is told."""
    trainer = DPOTrainer(
        make_llama(), DPOConfig(), train_dataset=make_pairs(4), processing_class=make_tokenizer(),
        output_dir=str(tmp_path),
    )  # fmt: skip
    with pytest.raises(
        ValueError, match="expected a model, its folder or its name on the hub, got DPOConfig"
    ):
        trainer.train()


def test_the_model_itself_is_no_reference(tmp_path):
    model = make_llama()
    with pytest.raises(ValueError, match="ref_model is the model that is trained"):
        trained(tmp_path, model=model, ref_model=model)


def saved(folder, tokenizer=None, **options):
    """A model in a folder, with the tokenizer beside it if there is one."""
    make_llama(**options).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def other_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["zebra"])
    return tokenizer


ALL = pytest.mark.parametrize("trainer_class", [DPOTrainer, KTOTrainer, GRPOTrainer, PPOTrainer])


def a_trainer(folder, trainer_class, model=None):
    """One of those that have a reference."""
    rows = {DPOTrainer: make_pairs, KTOTrainer: make_thumbs}.get(trainer_class, make_rows)(6)
    rewards = dict(reward_funcs=lambda completions, **_: [0.0] * len(completions), max_completion_length=4)
    return trainer_class(
        make_llama() if model is None else model, train_dataset=rows, processing_class=make_tokenizer(),
        output_dir=str(folder), **RUN, **(rewards if trainer_class in (GRPOTrainer, PPOTrainer) else {}),
        **(dict(beta=0.1) if trainer_class is GRPOTrainer else {}),
    )  # fmt: skip


@ALL
def test_advice_names_what_the_trainer_has(tmp_path, trainer_class, capsys):
    samples = trainer_class in (GRPOTrainer, PPOTrainer)
    a_trainer(tmp_path, trainer_class).wrap()
    said = "".join(capsys.readouterr())
    assert "the reference is a frozen copy of the model" in said
    assert ("precompute_ref_log_probs" in said, "LoRA" in said) == (not samples, samples)
    trainer = a_trainer(tmp_path, trainer_class, with_trained_adapters())
    trainer.args = SimpleNamespace(**{**trainer.args.to_dict(), "fsdp": True})
    with pytest.raises(ValueError, match=r"fsdp shards them: .*merge them") as refused:
        make_reference(trainer, None, ReferenceOptions())
    told = str(refused.value)
    assert ("precompute_ref_log_probs" in told, "pass ref_model" in told) == (
        not samples,
        trainer_class is not GRPOTrainer,
    )


@ALL
def test_a_reference_of_another_vocabulary_is_refused(tmp_path, trainer_class):
    """In each trainer that takes one (GRPOTrainer: as an attribute), before a step."""

    def run(ref_model):
        trainer = a_trainer(tmp_path / "run", trainer_class)
        trainer.ref_model = ref_model
        trainer.wrap()  # what train() does before its first step

    for size in (24, 40):  # fewer ids would be out of range, more would be other words
        with pytest.raises(ValueError, match=f"the reference knows {size} tokens and the policy 32"):
            run(make_llama(vocab_size=size))
    named = saved(tmp_path / "other", other_tokenizer())
    for ref_model in (named, AutoModelForCausalLM.from_pretrained(named)):
        with pytest.raises(
            ValueError, match=r"the reference reads .* the tokenizer of .*other is another one"
        ):
            run(ref_model)


def test_a_reference_may_pad_the_same_vocabulary_further(tmp_path):
    same = saved(tmp_path / "same", make_tokenizer(), vocab_size=40)
    trained(tmp_path / "run", ref_model=same, max_steps=1)
    unknown = saved(tmp_path / "unknown", vocab_size=40)
    with pytest.raises(ValueError, match="the reference knows 40 tokens"):
        trained(tmp_path / "run", ref_model=unknown)


def test_a_loss_without_a_reference_runs_no_second_model(tmp_path):
    trainer = trained(tmp_path, loss_type="simpo")
    assert trainer.modules_in_memory == [trainer.module]
    with pytest.raises(ValueError, match="uses no reference"):
        trained(tmp_path, loss_type="simpo", ref_model=make_llama())


class CountForwards(TrainerCallback):
    """Forwards of the model until training begins."""

    def __init__(self, model):
        self.number = 0
        model.model.register_forward_hook(self.count)

    def count(self, *_):
        self.number += 1

    def on_train_begin(self, args, state, control, **kwargs):
        self.before_training, self.number = self.number, 0


def test_the_table_is_read_again_and_only_for_the_same_model_and_data(tmp_path):
    def forwards(seed=0, folder="run", **options):
        model = make_llama(seed)
        count = CountForwards(model)
        trained(tmp_path / folder, model, precompute_ref_log_probs=True, callbacks=[count], **options)
        return count.before_training

    probes = forwards(loss_type="simpo")  # the comparison with the model's own forward, and no table
    first = forwards()
    assert first > probes
    assert forwards() == probes  # found on disk
    assert forwards(layout="packed") == probes  # whatever the layout
    assert forwards(seed=1) == first  # another model
    assert forwards(max_length=5) == first  # other tokens
    assert len(list((tmp_path / "run" / "reference").iterdir())) == 3


def test_layouts_and_batches_give_the_same_table(tmp_path):
    tables = []
    for layout, rows in (("shared", 8), ("packed", 1), ("padded", 4)):
        trainer = trained(
            tmp_path / layout, precompute_ref_log_probs=True, layout=layout, per_device_eval_batch_size=rows,
            eval_dataset=make_pairs(3, 9),
        )  # fmt: skip
        tables.append(trainer.reference.logps_RA)
    assert tables[0].shape == (9, 2)
    for table in tables[1:]:
        assert torch.allclose(table, tables[0], atol=1e-6)


def test_rows_that_the_table_does_not_know_are_refused(tmp_path):
    trainer = trained(tmp_path, precompute_ref_log_probs=True, eval_dataset=make_pairs(3, 9))
    assert "eval_loss" in trainer.evaluate()
    with pytest.raises(ValueError, match="pass an eval_dataset"):
        trainer.evaluate(make_pairs(2, 5))


def test_the_reference_has_no_dropout_and_is_never_trained(tmp_path):
    trainer = trained(tmp_path)
    reference = trainer.reference.policy
    assert not any(p.requires_grad for p in reference.parameters())
    assert all(torch.equal(a, b) for a, b in zip(reference.model.parameters(), make_llama().parameters()))
