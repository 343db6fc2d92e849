"""Models that can't be packed: refused before the first step, trained in the padded layout."""

from __future__ import annotations

import math

import pytest
import torch
from models import zoo
from trainers.tiny import make_pairs, make_rows, make_tokenizer

from alignfast import DPOTrainer, SFTTrainer
from alignfast.models import ModelRefused

RUN = dict(max_steps=2, logging_steps=1, learning_rate=1e-3, save_strategy="no", report_to="none")


@pytest.mark.parametrize("name", zoo.REFUSED)
def test_refused_before_the_first_step(tmp_path, name):
    model = zoo.make(name, torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    trainer = SFTTrainer(
        model, train_dataset=make_rows(8), processing_class=make_tokenizer(), output_dir=str(tmp_path), **RUN
    )
    with pytest.raises(ModelRefused, match="layout='padded'"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before))


@pytest.mark.parametrize("trainer_class", [SFTTrainer, DPOTrainer])
@pytest.mark.parametrize("name", zoo.REFUSED)
def test_the_way_out_trains(tmp_path, name, trainer_class):
    rows = make_rows(8) if trainer_class is SFTTrainer else make_pairs(8)
    model = zoo.make(name, torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    trainer = trainer_class(
        model, train_dataset=rows, processing_class=make_tokenizer(), output_dir=str(tmp_path), layout="padded",
        **RUN,
    )  # fmt: skip
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before))
