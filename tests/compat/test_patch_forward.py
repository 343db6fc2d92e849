"""The forward that `patch_trl` gives a model against TRL's own, on one padded batch: statistics, gradients, models, refusals."""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models.zoo import make
from torch import Tensor
from trainers.tiny import make_gpt2_with_dropout, make_llama, make_reward_llama

import alignfast
from alignfast.compat import patch
from alignfast.compat._padded import NotServed, labelled_trees, paired_trees, spans

trl = pytest.importorskip("trl", reason="TRL is not installed")
OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
PROMPT, ANSWERS = list(range(3, 14)), ([20, 21, 22, 4], [20, 5], [6, 7, 8, 9, 10, 11])


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    yield
    alignfast.unpatch_trl()


def padded(side: str = "right") -> dict[str, Tensor]:
    """Three answers to one prompt, and a text that is all labels."""
    sequences = [PROMPT + answer for answer in ANSWERS] + [[5, 9, 30, 2]]
    cuts, width = [len(PROMPT)] * 3 + [0], max(map(len, sequences)) + 1
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, cut in zip(sequences, cuts):
        pad = width - len(ids)
        left = 0 if side == "right" else pad
        for name, values, fill in (
            ("input_ids", ids, 0),
            ("attention_mask", [1] * len(ids), 0),
            ("labels", [-100] * cut + ids[cut:], -100),
        ):
            batch[name].append([fill] * left + values + [fill] * (pad - left))
    if side == "left":
        batch["labels"][3][width - 4] = -100  # TRL would predict it from a pad token
    return {name: torch.tensor(values) for name, values in batch.items()}


def hooked(model: Any, **options: Any) -> Any:
    trl.trainer.dpo_trainer.add_fused_lm_head(model, **{"outputs": OUTPUTS} | options)
    return model


def outputs(model: Any, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the forward gives, and gradients of a loss that reads log-probs and entropies."""
    model.zero_grad()
    found = model(**inputs, fused_lm_head=True)
    weights = torch.linspace(0.5, 2.0, found.log_probs.numel()).view(found.log_probs.shape)
    ((found.log_probs + 0.3 * found.entropy) * weights).sum().backward()
    fields = {name: x.detach() for name, x in found.items() if name != "loss"}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**fields, "loss": found.loss.detach()}, gradients


def compare(model: Any, inputs: dict[str, Any], **options: Any) -> None:
    theirs = outputs(hooked(model, **options), inputs)
    del model.forward  # the class's own again
    alignfast.patch_trl(strict=True, layout=options.pop("layout", "shared"))
    ours = outputs(hooked(model, **options), inputs)
    for mine, other in zip(ours, theirs):
        assert mine.keys() == other.keys()
        for name in mine:
            assert mine[name].dtype == other[name].dtype
            size = max(float(other[name].float().abs().max()), 1e-3)
            torch.testing.assert_close(
                mine[name], other[name], rtol=0, atol=2e-5 * size, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize(
    "name", ["llama", "llama_tied", "qwen3", "mistral", "gemma2", "cohere", "granite", "gpt2"]
)
def test_models(name: str) -> None:
    model = make(name, dtype=torch.float32).eval()
    if name == "gemma2":  # TRL's sdpa would drop the softcap of its attention
        model.set_attn_implementation("eager")
    compare(model, padded())


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.7}, {"cast_lm_head_to_fp32": True}, {"outputs": ("log_probs", "entropy")}],
    ids=str,
)
def test_options_of_the_head(options: dict[str, Any]) -> None:
    compare(make_llama(vocab_size=97), padded(), **options)


def test_padding_on_the_left_and_a_count_of_the_step() -> None:
    compare(make_llama(vocab_size=97), {**padded("left"), "num_items_in_batch": torch.tensor(17)})


def test_rows_without_padding_and_without_a_mask() -> None:
    ids = torch.tensor([PROMPT + ANSWERS[0], PROMPT + ANSWERS[0][::-1]])
    compare(make_llama(vocab_size=97), {"input_ids": ids, "labels": ids})


def test_texts_in_one_row() -> None:
    """Padding-free batches: positions that start again tell texts apart."""
    sequences = [PROMPT + ANSWERS[0], PROMPT + ANSWERS[1], [5, 9, 30]]
    ids = torch.tensor([functools.reduce(operator.iadd, sequences, [])])
    positions = torch.cat([torch.arange(len(ids)) for ids in sequences])[None]
    labels = ids.masked_fill(positions == 0, -100)
    compare(make_llama(vocab_size=97), {"input_ids": ids, "labels": labels, "position_ids": positions})


@pytest.mark.parametrize("pad_is_end", [False, True])
def test_rewards(pad_is_end: bool) -> None:
    """Also where the pad token ends sequences: transformers then reads the token before."""
    model = make_reward_llama(vocab_size=97, num_labels=1).eval()
    sequences = [[*PROMPT, 20, 1], [*PROMPT, 5, 6, 1], [*PROMPT, 20, 8, 1], [*PROMPT, 5, 1]]
    pad = model.config.pad_token_id = 1 if pad_is_end else 0
    ids = torch.tensor([s + [pad] * (14 - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (14 - len(s)) for s in sequences])
    expected = model(input_ids=ids, attention_mask=mask).logits
    found = patch._rewards(
        model, patch._Options("shared", "auto", True), {"input_ids": ids, "attention_mask": mask}
    ).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_other_calls_are_the_models_own() -> None:
    plain, model = make_llama(vocab_size=97), make_llama(vocab_size=97)
    alignfast.patch_trl(strict=True)
    hooked(model)
    inputs = padded()
    torch.testing.assert_close(model(**inputs).loss, plain(**inputs).loss, rtol=0, atol=0)
    ids = inputs["input_ids"][:1, :11]
    generated = [m.generate(ids, max_new_tokens=4, do_sample=False) for m in (model, plain)]
    assert torch.equal(*generated)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"inputs_embeds": torch.zeros(1, 1, 16)}, "inputs_embeds"),
    ({"input_ids": None}, "embeddings"),
    ({"shift_labels": torch.zeros(1, 1)}, "shift_labels"),
    ({"pixel_values": torch.zeros(1)}, "pixel_values"),
    ({"output_router_logits": True}, "router loss"),
    ({"position_ids": torch.zeros(1, 1)}, "together"),
    ({"attention_mask": torch.tensor([[1, 0, 1]])}, "holes"),
    ({"attention_mask": torch.tensor([[1, 1, 0]])}, "masked tokens"),
    ({"labels": torch.tensor([[-100, 3, 4]])}, "other tokens"),
    ({"labels": torch.full((1, 3), -100)}, "without a label"),
    ({"attention_mask": None, "position_ids": torch.tensor([[0, 1, 0]])}, "begins its sequence"),
    ({"attention_mask": None, "position_ids": torch.tensor([[0, 2, 3]])}, "count from 0"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_a_call_that_is_not_served(change: dict[str, Any], words: str) -> None:
    """Named where that is asked for, TRL's own otherwise."""
    ids = torch.tensor([[5, 6, 7]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} | change
    alignfast.patch_trl(strict=True)
    with pytest.raises(NotServed, match=words):
        hooked(make_llama())(**inputs, fused_lm_head=True)


def test_what_is_left_to_trl_is_said_once() -> None:
    alignfast.patch_trl()
    model, ids = hooked(make_llama()), torch.tensor([[5, 6, 7]])
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.tensor([[1, 0, 1]])}
    with pytest.warns(UserWarning, match="holes") as said:
        found = [model(**inputs, fused_lm_head=True).log_probs for _ in range(2)]
    assert len([w for w in said if "holes" in str(w.message)]) == 1
    alignfast.unpatch_trl()
    assert torch.equal(found[1], hooked(make_llama())(**inputs, fused_lm_head=True).log_probs)


def test_dropped_attention_is_left_to_trl() -> None:
    alignfast.patch_trl()
    model, inputs = hooked(make_llama(vocab_size=97, attention_dropout=0.1).train()), padded()
    with pytest.warns(UserWarning, match="drops attention weights"):
        model(**inputs, fused_lm_head=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(**inputs, fused_lm_head=True)  # served: nothing is dropped


def test_a_model_that_can_not_be_packed_is_left_to_trl() -> None:
    """Found when the trainer is made."""
    model = make("lfm2", dtype=torch.float32)
    own = type(model).forward
    alignfast.patch_trl()
    with pytest.warns(UserWarning, match="layers of kind"):
        hooked(model)
    alignfast.patch_trl(strict=True)
    with pytest.raises(NotServed, match="layers of kind"):
        hooked(make("lfm2", dtype=torch.float32))
    assert type(model).forward is own


@pytest.mark.parametrize("training", [True, False])
def test_modes_stay(training: bool) -> None:
    """A reference in evaluation mode that came out of the probe in training mode would drop at random."""
    model = make_gpt2_with_dropout().train(training)
    model.transformer.h[0].train(not training)
    before = [part.training for part in model.modules()]
    alignfast.patch_trl(strict=True)
    assert [part.training for part in hooked(model).modules()] == before


def test_checkpointing_outside_of_a_step_is_not_served() -> None:
    """Layers that run again in the backward pass would find the model's own attention."""
    alignfast.patch_trl(strict=True)
    model = hooked(make_llama(vocab_size=97).train())
    model.gradient_checkpointing_enable()
    with pytest.raises(NotServed, match="training_step"):
        model(**padded(), fused_lm_head=True)
    with torch.no_grad():
        model(**padded(), fused_lm_head=True)


def test_there_and_back() -> None:
    from trl.trainer import dpo_trainer, reward_trainer

    def state() -> list[Any]:
        found = [getattr(trl, name).training_step for name in patch.TRAINERS.values()]
        return [*found, dpo_trainer.add_fused_lm_head, reward_trainer.RewardTrainer.__init__]

    before = state()
    alignfast.patch_trl()
    once = state()
    assert not set(map(id, before)) & set(map(id, once))
    alignfast.patch_trl(layout="packed")
    assert state() == once
    alignfast.unpatch_trl()
    assert state() == before
    alignfast.unpatch_trl()
    assert state() == before


def test_another_version_and_another_layout_are_refused(monkeypatch: Any) -> None:
    with pytest.raises(ValueError, match="layout='padded'"):
        alignfast.patch_trl(layout="padded")
    for version in ("1.15.0", "1.160.0", "2.0.0"):
        monkeypatch.setattr(trl, "__version__", version)
        with pytest.raises(RuntimeError, match=version):
            alignfast.patch_trl()
    assert not patch._originals


@pytest.mark.parametrize(("stem", "name"), [("kto", "add_fused_lm_head"), ("reward", "RewardTrainer")])
def test_what_a_version_lacks_is_named_and_nothing_is_patched(stem: str, name: str, monkeypatch: Any) -> None:
    from trl.trainer import sft_trainer

    before = sft_trainer.add_fused_lm_head
    monkeypatch.delattr(f"trl.trainer.{stem}_trainer.{name}")
    with pytest.raises(RuntimeError, match=rf"no trl\.trainer\.{stem}_trainer\.{name}.*nothing is patched"):
        alignfast.patch_trl()
    assert sft_trainer.add_fused_lm_head is before
    assert not patch._originals


def test_padded_batches_as_trees() -> None:
    inputs = padded()
    found = spans(inputs["attention_mask"], None, inputs["input_ids"].shape)
    trees = labelled_trees(inputs["input_ids"].numpy(), inputs["labels"].numpy(), found)
    assert [len(tree.prompt) for tree in trees] == [11, 11, 11, 0]
    assert [list(tree.answers[0]) for tree in trees] == [*ANSWERS, [5, 9, 30, 2]]
    assert trees[3].trained == ((False, True, True, True),)


def test_common_prompts_leave_each_answer_a_token() -> None:
    same = tuple(range(12))
    assert [len(tree.prompt) for tree in paired_trees([same, same])] == [11, 11]
    assert [len(tree.prompt) for tree in paired_trees([same, same[:5]])] == [0, 0]
    assert [len(tree.prompt) for tree in paired_trees([same, same, same])] == [0, 0, 0]
