"""Evaluation of one set of rows: means over all of them, however they are cut into batches."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from alignfast.trainers.batches import Data, share_out
from alignfast.trainers.interrupt import EvaluationStopped
from alignfast.trainers.metrics import Meter

if TYPE_CHECKING:
    from alignfast.trainers.loop import Trainer


def evaluate_on(trainer: Trainer, data: Data) -> dict[str, float]:
    """Loss and metrics of a trainer on its rows `data`. To be called on all ranks.

    Raises:
        EvaluationStopped: a signal asked any rank to stop.
    """
    began, args, meter = time.perf_counter(), trainer.args, Meter(trainer.accelerator.device)
    rows, max_rows = range(len(data.trees)), args.per_device_eval_batch_size
    share = share_out(data, rows, max_rows, args, trainer.accelerator, trainer.count)
    trainer.policy.eval()
    with torch.no_grad(), trainer.module.attached():
        trainer.before_step(data, share)
        for i, run in enumerate(share.runs):
            loss, metrics = trainer.compute_loss(trainer.pack(data, run), share.counts, 0.0)
            meter.add({"loss": loss, **metrics}, counts=i < share.num_real)
            trainer.control = trainer.handler.on_prediction_step(args, trainer.state, trainer.control)
            if trainer.stop.of_any_rank(trainer.accelerator):
                raise EvaluationStopped
    figures = {**meter.read(trainer.accelerator), **trainer.after_evaluation(data)}
    seconds = time.perf_counter() - began
    return {**figures, "runtime": seconds, "samples_per_second": len(rows) / seconds}
