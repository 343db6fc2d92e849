"""`patch_trl`: TRL's own trainers before and after on the same data, what is left to TRL and why, and the way back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from trainers.tiny import WORDS, make_llama, make_reward_llama, make_tokenizer

import alignfast
from alignfast.compat import patch

trl = pytest.importorskip("trl", reason="TRL is not installed")
datasets = pytest.importorskip("datasets")
STEPS, ROWS = 20, 4
COMMON = dict(
    per_device_train_batch_size=ROWS, max_steps=STEPS, logging_steps=1, learning_rate=2e-3, adam_epsilon=1e-3,
    save_strategy="no", report_to="none", disable_tqdm=True, bf16=False, gradient_checkpointing=False, use_cpu=True,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    yield
    alignfast.unpatch_trl()


def words(draw: random.Random, low: int, high: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))


def rows(number: int, *completions: str) -> Any:
    """Prompts of 9 to 14 words, long enough to be shared, and completions of uneven lengths."""
    draw = random.Random(0)
    return datasets.Dataset.from_list(
        [
            {"prompt": words(draw, 9, 14), **{name: " " + words(draw, 1, 9) for name in completions}}
            for _ in range(number)
        ]
    )


def make_model(**options: Any) -> Any:
    return make_llama(**options)


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text) % 7) for text in completions]


def stored(prompt_ids: list[list[int]]) -> list[list[int]]:
    """Completions that depend on the prompt and on its place alone."""
    draws = (random.Random(f"{ids}{i}") for i, ids in enumerate(prompt_ids))
    return [draw.choices(range(3, 23), k=draw.randint(1, 9)) for draw in draws]


def sft(folder: Path, model: Any = None, **options: Any) -> Any:
    return trl.SFTTrainer(
        model or make_model(), args=trl.SFTConfig(str(folder), **COMMON | options), processing_class=make_tokenizer(),
        train_dataset=rows(STEPS * ROWS, "completion"),
    )  # fmt: skip


def dpo(folder: Path, model: Any = None, **options: Any) -> Any:
    return trl.DPOTrainer(
        model or make_model(), ref_model=make_model(seed=1), args=trl.DPOConfig(str(folder), **COMMON | options),
        processing_class=make_tokenizer(), train_dataset=rows(STEPS * ROWS, "chosen", "rejected"),
    )  # fmt: skip


def kto(folder: Path, model: Any = None, **options: Any) -> Any:
    data = rows(STEPS * ROWS, "completion")
    return trl.KTOTrainer(
        model or make_model(), ref_model=make_model(seed=1), args=trl.KTOConfig(str(folder), **COMMON | options),
        processing_class=make_tokenizer(), train_dataset=data.add_column("label", [i % 3 > 0 for i in range(len(data))]),
    )  # fmt: skip


def reward_trainer(folder: Path, model: Any = None, **options: Any) -> Any:
    return trl.RewardTrainer(
        model or make_reward_llama(), args=trl.RewardConfig(str(folder), **COMMON | options),
        processing_class=make_tokenizer(), train_dataset=rows(STEPS * ROWS, "chosen", "rejected"),
    )  # fmt: skip


def sampled(kind: Any, config: Any) -> Callable[..., Any]:
    """A trainer that samples, given stored completions instead: 2 of each prompt."""

    def make(folder: Path, model: Any = None, **options: Any) -> Any:
        tokenizer = make_tokenizer()
        tokenizer.padding_side = "left"
        start = folder / "start"  # these load their reference by name
        make_model().save_pretrained(start)
        model = model or make_model().from_pretrained(start)
        trainer = kind(
            model, reward, processing_class=tokenizer, train_dataset=rows(STEPS * ROWS // 2),
            args=config(str(folder), **COMMON | dict(num_generations=2, beta=0.1, max_completion_length=9) | options),
        )  # fmt: skip
        with_logps = kind is trl.GRPOTrainer
        trainer._generate_single_turn = lambda ids, *_: (stored(ids), None) if with_logps else stored(ids)
        return trainer

    return make


MAKERS: dict[str, Callable[..., Any]] = {
    "sft": sft,
    "dpo": dpo,
    "kto": kto,
    "reward": reward_trainer,
    "grpo": sampled(trl.GRPOTrainer, trl.GRPOConfig),
    "rloo": sampled(trl.RLOOTrainer, trl.RLOOConfig),
}


def run(make: Callable[..., Any], folder: Path, **options: Any) -> tuple[list[dict[str, float]], Any]:
    """What a trainer logged, but for times, and the trainer."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    trainer = make(folder, **options)
    trainer.train()
    timed = ("runtime", "second", "flos", "step_time")
    logged = [
        {name: value for name, value in row.items() if not any(word in name for word in timed)}
        for row in trainer.state.log_history
    ]
    return logged, trainer


def alike(make: Callable[..., Any], folder: Path, monkeypatch: Any, **options: Any) -> list[Any]:
    """TRL's trainer before and after, on the same data; returns the batches that were packed."""
    before, theirs = run(make, folder, **options)
    batches: list[Any] = []
    plain = patch.pack
    monkeypatch.setattr(patch, "pack", lambda *args: batches.append(plain(*args)) or batches[-1])
    alignfast.patch_trl(strict=True)
    after, ours = run(make, folder, **options)
    assert len(before) == len(after) > 1
    for mine, other in zip(after, before):
        assert mine.keys() == other.keys()
        assert mine == pytest.approx(other, abs=1e-4, rel=1e-4)
    for p, q in zip(ours.model.parameters(), theirs.model.parameters()):
        assert (p - q).abs().max() < 1e-4
    return batches


@pytest.mark.parametrize("name", list(MAKERS))
def test_losses_and_metrics_are_trls(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Twenty steps in float32: losses, gradient norms and every metric, and the weights in the end."""
    batches = alike(MAKERS[name], tmp_path, monkeypatch)
    assert len(batches) >= STEPS
    shared = any(batch.num_tokens < batch.num_tokens_unshared for batch in batches)
    assert shared == (name not in ("sft", "kto"))  # those have no two answers to a prompt


OPTIONS = [
    ("sft", dict(padding_free=True, max_length=None, loss_type="dft")),
    ("sft", dict(gradient_accumulation_steps=2, per_device_train_batch_size=2)),
    ("dpo", dict(gradient_checkpointing=True, loss_type=["sigmoid", "sft"], ld_alpha=0.5)),
    ("dpo", dict(use_weighting=True, precompute_ref_log_probs=True)),
    ("grpo", dict(gradient_checkpointing=True, cast_lm_head_to_fp32=True, temperature=0.7, entropy_coef=0.1)),
    ("grpo", dict(num_iterations=2, loss_type="grpo", importance_sampling_level="sequence")),
    ("reward", dict(gradient_checkpointing=True, center_rewards_coefficient=0.1)),
]
QUICK = (0, 2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(*case, id=f"{case[0]} {' '.join(case[1])}", marks=[] if i in QUICK else pytest.mark.slow)
        for i, case in enumerate(OPTIONS)
    ],
)
def test_options_are_obeyed(name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    alike(MAKERS[name], tmp_path, monkeypatch, max_steps=3, **options)


@pytest.mark.parametrize("name", [pytest.param("dpo", marks=pytest.mark.slow), "reward"])
def test_lora(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    """The policy is its own reference without its adapters, and the reward model trains its head whole."""
    import peft

    kind = "SEQ_CLS" if name == "reward" else "CAUSAL_LM"

    def make(folder: Path, **options: Any) -> Any:
        model = make_reward_llama() if name == "reward" else make_model()
        lora = peft.LoraConfig(
            r=2, task_type=kind, target_modules=["q_proj", "up_proj"], init_lora_weights=False
        )
        if name == "reward":
            return MAKERS[name](folder, peft.get_peft_model(model, lora), **options)
        trainer = trl.DPOTrainer(
            model, args=trl.DPOConfig(str(folder), **COMMON | options), processing_class=make_tokenizer(),
            train_dataset=rows(STEPS * ROWS, "chosen", "rejected"), peft_config=lora,
        )  # fmt: skip
        return trainer

    assert alike(make, tmp_path, monkeypatch, max_steps=3)


def test_attention_is_the_models_own_again(tmp_path: Path) -> None:
    """Between steps and after training, also where layers are run again in the backward pass."""
    alignfast.patch_trl(strict=True)
    seen = []

    class Look(trl.DPOTrainer):  # type: ignore[misc, name-defined]
        def log(self, *args: Any, **kwargs: Any) -> None:
            seen.append(self.model.config._attn_implementation)
            super().log(*args, **kwargs)

    for checkpointing in (False, True):
        trainer = Look(
            make_model(), ref_model=make_model(), processing_class=make_tokenizer(),
            args=trl.DPOConfig(str(tmp_path), **COMMON | dict(max_steps=2, gradient_checkpointing=checkpointing)),
            train_dataset=rows(8, "chosen", "rejected"),
        )  # fmt: skip
        trainer.train()
        assert trainer.model.config._attn_implementation == "sdpa"
    assert len(seen) > 2
    assert set(seen) == {"sdpa"}


@pytest.mark.parametrize("make", [sft, reward_trainer])
def test_compiled_training_is_left_to_trl_and_said(make: Callable[..., Any], tmp_path: Path) -> None:
    alignfast.patch_trl()
    trainer = make(tmp_path, torch_compile=True, torch_compile_backend="eager", max_steps=1)
    with pytest.warns(UserWarning, match="torch_compile=True"):
        trainer.train()
    alignfast.patch_trl(strict=True)
    with pytest.raises(patch.NotServed, match="torch_compile=True"):
        trainer.train()
