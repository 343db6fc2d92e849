"""Bases in 4 bits: what is refused, what a stand-in for packed weights meets in our code, and bitsandbytes itself if there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from trainers.tiny import make_llama, make_pairs, make_rankings, make_rows, make_thumbs, make_tokenizer
from transformers import AutoModelForCausalLM

from alignfast import DPOConfig, DPOTrainer, GRPOTrainer, KTOTrainer, PPOTrainer, RewardTrainer, SFTTrainer
from alignfast.models import ModelRefused, load_policy, load_reward_model
from alignfast.models.four_bit import FourBit, arithmetic_of, has_packed_weights, num_weights
from alignfast.models.head import head_of
from alignfast.trainers.estimate import describe_run

LORA = dict(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
RUN = dict(
    max_steps=2, per_device_train_batch_size=4, logging_steps=1, learning_rate=1e-2, report_to="none", save_steps=1,
    disable_tqdm=True,
)  # fmt: skip
REWARD = dict(reward_funcs=lambda completions, **_: [float(len(x)) for x in completions])
CASES = {
    "sft": (SFTTrainer, make_rows, {}),
    "dpo": (DPOTrainer, make_pairs, {}),
    "kto": (KTOTrainer, make_thumbs, {}),
    "reward": (RewardTrainer, make_rankings, {}),
    "grpo": (GRPOTrainer, make_rows, dict(REWARD, num_generations=4, beta=0.1, max_completion_length=4)),
    "ppo": (PPOTrainer, make_rows, dict(REWARD, max_completion_length=4)),
}


class Packed(nn.Linear):
    """As bitsandbytes' Linear4bit looks from outside: two codes a byte in a column, its shape in a state beside it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.scale = float(linear.weight.detach().abs().max() / 7)
        codes_N = ((linear.weight / self.scale).round() + 8).to(torch.uint8).flatten()
        packed: Any = nn.Parameter((codes_N[::2] * 16 + codes_N[1::2])[:, None], requires_grad=False)
        packed.quant_state = SimpleNamespace(shape=linear.weight.shape)
        self.weight, self.bias = packed, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantised(), self.bias)

    def dequantised(self) -> Tensor:
        codes_N2 = torch.stack((self.weight // 16, self.weight % 16), -1)
        return (codes_N2.view(self.out_features, self.in_features).float() - 8) * self.scale


def with_packed_trunk() -> Any:
    model = make_llama()
    for module in model.model.layers.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Packed(child))
    return model


def make(case: str, model: Any, folder: Any, **options: Any) -> Any:
    trainer_class, rows, more = CASES[case]
    return trainer_class(
        model, train_dataset=rows(8), processing_class=make_tokenizer(), output_dir=str(folder),
        **{**RUN, **more, **options},
    )  # fmt: skip


# --- refusals ---


def test_without_bitsandbytes_it_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("alignfast.models.four_bit.find_spec", lambda name: None)
    for load in (load_policy, load_reward_model):
        with pytest.raises(ValueError, match=r"needs bitsandbytes, .* pip install '\.\[qlora\]'"):
            load("no/such/model", peft_config=LORA, four_bit=FourBit())
    with pytest.raises(ValueError, match="needs bitsandbytes"):
        SFTTrainer("no/such/model", train_dataset=make_rows(2), load_in_4bit=True, peft_config=LORA)


def test_what_can_not_be_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(FourBit, "loading", lambda self: {})  # as if it were installed
    with pytest.raises(ValueError, match=r"can't be trained themselves: give peft_config"):
        load_policy(str(tmp_path), four_bit=FourBit())
    with pytest.raises(ValueError, match="load the model object yourself"):
        load_policy(make_llama(), peft_config=LORA, four_bit=FourBit())
    with pytest.raises(ValueError, match="fsdp must be off where load_in_4bit is on"):
        DPOConfig(load_in_4bit=True, fsdp=True)
    with pytest.raises(ValueError, match="bnb_4bit_quant_type must be one of nf4, fp4"):
        DPOConfig(bnb_4bit_quant_type="int4")
    assert DPOConfig().loading["four_bit"] is None
    given = DPOConfig(load_in_4bit=True, use_bnb_nested_quant=False, bnb_4bit_compute_dtype="float16")
    assert given.loading["four_bit"] == FourBit("nf4", False, "float16")


# --- packed weights in our code ---


def test_a_packed_model_is_trained_with_adapters_alone(tmp_path):
    with pytest.raises(ModelRefused, match=r"LlamaForCausalLM holds quantised weights, .* give peft_config"):
        make("sft", with_packed_trunk(), tmp_path)


@pytest.mark.parametrize("case", ["sft", "dpo", "kto", "grpo", "ppo"])
def test_packed_trains_as_what_it_stands_for(tmp_path, case):
    """Layouts, probe, native engine, reference, critic, checkpoint: all as with the same weights in float32."""
    plain = with_packed_trunk()
    for module in plain.model.layers.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, Packed):
                linear = nn.Linear(child.in_features, child.out_features, bias=False)
                linear.weight.data = child.dequantised()
                setattr(module, name, linear)
    runs = []
    for name, model in (("packed", with_packed_trunk()), ("plain", plain)):
        torch.manual_seed(3)
        runs.append(make(case, model, tmp_path / name, peft_config=LORA))
        runs[-1].train()
    packed, plain_run = runs
    assert has_packed_weights(packed.model)
    for mine, theirs in zip(packed.state.log_history, plain_run.state.log_history):
        for key in ("loss", "grad_norm"):
            if key in mine:
                assert mine[key] == pytest.approx(theirs[key], abs=1e-6)
    assert describe_run(packed)  # reads types and sizes of parameters
    sizes = [sum(map(num_weights, run.model.parameters())) for run in runs]
    assert sizes[0] == sizes[1] > sum(p.numel() for p in packed.model.parameters())


def test_a_packed_head_is_refused():
    model = make_llama()
    model.lm_head = Packed(model.lm_head)
    with pytest.raises(ModelRefused, match="leave the head out of quantisation"):
        head_of(model)


def test_the_arithmetic_of_a_quantised_model_is_its_coarsest():
    def of(dtype):
        return SimpleNamespace(
            config=SimpleNamespace(quantization_config=SimpleNamespace(bnb_4bit_compute_dtype=dtype))
        )

    assert arithmetic_of(of(torch.bfloat16), torch.float32) == torch.bfloat16
    assert arithmetic_of(of(torch.float32), torch.bfloat16) == torch.bfloat16
    assert arithmetic_of(of(torch.float16), torch.float32) == torch.float16
    assert arithmetic_of(make_llama(), torch.float32) == torch.float32


# --- bitsandbytes ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("whole")
    make_llama(hidden_size=64, intermediate_size=64).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("case", CASES)
def test_every_trainer_trains_and_resumes_on_4_bits(saved, tmp_path, case):
    options = dict(load_in_4bit=True, peft_config=LORA, use_cpu=True)
    whole = make(case, saved, tmp_path, **options)
    kinds = {type(module).__name__ for module in whole.module.base.base_model.layers.modules()}
    assert "Linear4bit" in kinds
    if case != "reward":
        assert type(whole.module.base.lm_head) is nn.Linear
    whole.train()
    again = make(case, saved, tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "step-1"))
    mine, theirs = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    if case == "sft":
        whole.save_model(str(tmp_path / "model"))
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved), tmp_path / "model")


def test_its_numbers_are_those_of_the_weights_that_the_codes_stand_for(saved, tmp_path):
    """Also after an evaluation, in which bitsandbytes would compute in bfloat16 on some CPUs, and lose the gradient."""
    import bitsandbytes as bnb

    runs = []
    for four_bit in (True, False):
        model: Any = saved
        if not four_bit:
            source, model = (
                load_policy(saved, four_bit=FourBit(), peft_config=LORA).base,
                AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32),
            )
            quantised = {name.replace(".base_layer", ""): m for name, m in source.named_modules()}
            for name, module in model.named_modules():
                if isinstance(quantised[name], bnb.nn.Linear4bit):
                    weight = quantised[name].weight
                    module.weight.data = bnb.functional.dequantize_4bit(
                        weight.data, weight.quant_state
                    ).float()
        torch.manual_seed(5)
        runs.append(
            make("sft", model, tmp_path / str(four_bit), load_in_4bit=four_bit, peft_config=LORA, use_cpu=True,
                 eval_dataset=make_rows(4, 3), eval_on_start=True, eval_steps=1)
        )  # fmt: skip
        runs[-1].train()
    for mine, theirs in zip(*(run.state.log_history for run in runs)):
        for key in ("loss", "grad_norm", "eval_loss"):
            if key in mine:
                assert mine[key] == pytest.approx(theirs[key], rel=1e-4)
