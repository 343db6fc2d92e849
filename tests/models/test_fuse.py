"""`alignfast.fuse`: the loss of transformers without its logits, in its Trainer, under PEFT and torch.compile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models.zoo import make
from torch import Tensor
from trainers.tiny import make_llama
from transformers import Trainer, TrainingArguments

import alignfast
from alignfast.models import ModelRefused

GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(3, 30, (3, 9), generator=GENERATOR)
LABELS = IDS.masked_fill(torch.rand(3, 9, generator=GENERATOR) < 0.3, -100)
MASK = torch.ones_like(IDS)
MASK[1, 6:] = 0
LABELS[1, 6:] = -100


def outcome(model: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    (2 * loss).backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(model: Any, tolerance: float = 2e-6, **inputs: Any) -> None:
    """The loss and every gradient, before and after, as a share of the largest of each."""
    inputs = {"input_ids": IDS, "labels": LABELS, "attention_mask": MASK} | inputs
    loss, gradients = outcome(model, **inputs)
    assert alignfast.fuse(model) is model
    fused_loss, fused_gradients = outcome(model, **inputs)
    torch.testing.assert_close(fused_loss.to(loss.dtype), loss, rtol=tolerance, atol=0)
    assert gradients.keys() == fused_gradients.keys()
    for name, gradient in gradients.items():
        size = float(gradient.abs().max())
        torch.testing.assert_close(
            fused_gradients[name], gradient, rtol=0, atol=10 * tolerance * max(size, 1e-3)
        )


@pytest.mark.parametrize(
    "name", ["llama", "llama_tied", "gemma2", "cohere", "granite", "gpt2", "phi", "lfm2"]
)
def test_models(name: str) -> None:
    """Scales, caps and biases of the head too, and a model that can't be packed."""
    model = make(name, dtype=torch.float32).eval()
    if name == "gemma2":
        model.set_attn_implementation("eager")
    same(model)


@pytest.mark.parametrize("training", [False, True])
def test_a_mixture_of_experts(training: bool) -> None:
    same(make("mixtral", dtype=torch.float32).train(training), output_router_logits=True)


@pytest.mark.parametrize("inputs", [{"num_items_in_batch": 40}, {"num_items_in_batch": torch.tensor(7)}, {
    "shift_labels": IDS, "labels": None}], ids=str)  # fmt: skip
def test_counts_and_shifted_labels(inputs: dict[str, Any]) -> None:
    model = make_llama()
    if "shift_labels" not in inputs:
        same(model, **inputs)
        return
    expected = torch.nn.functional.cross_entropy(model(input_ids=IDS).logits.flatten(0, 1), IDS.flatten())
    alignfast.fuse(model)
    torch.testing.assert_close(model(input_ids=IDS, **inputs).loss, expected)


def test_no_labels_are_nan_there_and_here() -> None:
    model, labels = make_llama(), torch.full_like(IDS, -100)
    assert model(input_ids=IDS, labels=labels).loss.isnan()
    assert alignfast.fuse(model)(input_ids=IDS, labels=labels).loss.isnan()


def test_no_logits_with_labels_and_the_models_own_without() -> None:
    plain, model = make_llama(), alignfast.fuse(make_llama())
    output = model(IDS, MASK, labels=LABELS, output_hidden_states=True)
    assert output.logits is None
    assert len(output.hidden_states) == 3
    assert model(IDS, MASK, labels=LABELS, return_dict=False)[0].shape == ()
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    generated = [m.generate(IDS[:1], max_new_tokens=3, do_sample=False) for m in (model, plain)]
    assert torch.equal(*generated)


def test_positional_labels() -> None:
    """As the sixth argument, where transformers has them."""
    plain, model = make_llama(), alignfast.fuse(make_llama())
    arguments = (IDS, MASK, None, None, None, LABELS)
    torch.testing.assert_close(model(*arguments).loss, plain(*arguments).loss)


def test_there_and_back() -> None:
    model = make_llama()
    own = model.forward
    alignfast.unfuse(alignfast.fuse(model))
    assert model.forward == own
    with pytest.raises(ValueError, match="not fused"):
        alignfast.unfuse(model)
    alignfast.fuse(model)
    with pytest.raises(ModelRefused, match="forward of its own"):
        alignfast.fuse(model)


def test_what_is_refused() -> None:
    model = make_llama()
    with pytest.raises(ValueError, match="logits_to_keep"):
        alignfast.fuse(model)(IDS, labels=LABELS, logits_to_keep=2)
    other = make_llama()
    other.loss_function = lambda **_: 0
    with pytest.raises(ModelRefused, match="ForCausalLMLoss"):
        alignfast.fuse(other)


@pytest.mark.parametrize("kind", ["lora", "lora on the head", "prompt"])
def test_peft(kind: str) -> None:
    """Prompt learning hands embeddings on, with labels for its own tokens."""
    import peft

    model = make_llama()
    if kind == "prompt":
        config: Any = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    else:
        targets = ["q_proj", *(["lm_head"] if "head" in kind else [])]
        config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=targets, init_lora_weights=False)
    torch.manual_seed(0)
    same(peft.get_peft_model(model, config))


def test_compiled() -> None:
    model = make_llama()
    loss, gradients = outcome(model, input_ids=IDS, labels=LABELS)
    alignfast.fuse(model)
    compiled = torch.compile(model, backend="aot_eager")
    again, fused_gradients = outcome(compiled, input_ids=IDS, labels=LABELS)
    torch.testing.assert_close(again, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused_gradients[f"_orig_mod.{name}"], gradient, rtol=1e-4, atol=1e-6)


class Rows(torch.utils.data.Dataset):
    """Texts of 5 to 9 tokens, padded, so that micro-batches differ in labels."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        n = 5 + i % 5
        ids = torch.arange(9) * (i + 3) % 27 + 3
        counts = torch.arange(9) < n
        return {"input_ids": ids, "attention_mask": counts.long(), "labels": ids.masked_fill(~counts, -100)}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_trainer_under_accumulation(tmp_path: Path, compiled: bool) -> None:
    """transformers' Trainer before and after: losses, and weights in the end."""
    found = []
    for fused in (False, True):
        model = make_llama()
        args = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=4, logging_steps=1,
            learning_rate=1e-2, adam_epsilon=1e-3, report_to="none", save_strategy="no", use_cpu=True,
            disable_tqdm=True, torch_compile=compiled and fused, eval_strategy="steps", eval_steps=4,
        )  # fmt: skip
        trainer = Trainer(
            alignfast.fuse(model) if fused else model, args, train_dataset=Rows(), eval_dataset=Rows()
        )
        trainer.train()
        losses = [row.get("loss", row.get("eval_loss")) for row in trainer.state.log_history]
        found.append(([x for x in losses if x is not None], list(model.parameters())))
    assert len(found[0][0]) == 5
    assert found[1][0] == pytest.approx(found[0][0], abs=2e-5)
    for p, q in zip(found[0][1], found[1][1]):
        assert (p - q).abs().max() < 1e-5
