"""The one loop. A trainer is its config, how its rows become trees, and `compute_loss(batch)`; all else is here.

    step = per_device_train_batch_size x gradient_accumulation_steps rows on each rank
         = micro-batches, each packed, forward and backward, divided by the counts of the whole step on all ranks
         = one clipped AdamW step, or none where loss or gradient is no number

Which rows make a step is plan.py's affair, how ranks share them batches.py's, what is written saving.py's. DDP and
FSDP2 average gradients over ranks, so losses are multiplied by the number of ranks.

Not done here: reading data, the model's forward, the maths of a loss.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, set_seed
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback
from transformers.trainer_utils import TrainOutput

from alignfast.data import Batch, load_rows
from alignfast.kernels._targets import bad_targets_seen
from alignfast.models.four_bit import check_trainable
from alignfast.models.load import load_tokenizer
from alignfast.trainers.batches import NO_DATA, Data, join_data, pack_rows, share_out
from alignfast.trainers.config import TrainerConfig, one_of, resolve_config, resume_option
from alignfast.trainers.hooks import Hooks
from alignfast.trainers.interrupt import EvaluationStopped, NonFiniteError, StopRequest, TrainingInterrupted
from alignfast.trainers.machine import keep_cpu_memory, make_accelerator, wrap
from alignfast.trainers.model_card import model_card, push_folder
from alignfast.trainers.plan import lay_out
from alignfast.trainers.progress import duration
from alignfast.trainers.runlog import RunLog
from alignfast.trainers.saving import find_checkpoint, load_best, load_checkpoint, note_best, save_checkpoint
from alignfast.trainers.stages import Stages
from alignfast.trainers.state import save_weights
from alignfast.trainers.update import Update, Updater

MAX_SKIPPED_IN_A_ROW = 3


class Trainer(Hooks):
    """What SFTTrainer, DPOTrainer and the others have in common.

    Args:
        model: a folder, a hub name, a transformers model or a PEFT model.
        args: the trainer's config; or give its options here by name, after the others.
        train_dataset: rows in a format of the trainer's: a file, a `datasets.Dataset`, a list. `dataset` is the same.
        eval_dataset: rows to evaluate on; a dict of several names each one's metrics.
        processing_class: the tokenizer, or its name; `tokenizer` is the same. None: the one beside the model.
        callbacks: transformers' TrainerCallback objects or classes.
        peft_config: a PEFT config, or a mapping of LoraConfig's options, to train an adapter.

    Raises:
        TypeError: an option is unknown, or given twice.
        DataError: a row can't be used; the message names it.
        ModelRefused: the model can't be trained this way.
    """

    module: Any  # a Trunk: the model with its log-probs, or with its rewards
    policy: Any  # the module as it is called: in DDP, FSDP2 or autocast; None before the first use
    state: TrainerState  # transformers', as its callbacks know it; so is control
    control: TrainerControl
    log: RunLog
    updater: Updater

    def __init__(
        self,
        model: Any,
        args: TrainerConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
        peft_config: Any = None,
        *,
        dataset: Any = None,
        tokenizer: Any = None,
        **options: Any,
    ) -> None:
        self.args = args = resolve_config(self.config_class, args, options)
        set_seed(args.seed)
        self.accelerator = make_accelerator(args)
        self.module = self.load(model, peft_config)
        check_trainable(self.module.model)
        if args.router_aux_loss_coef is not None:
            self.module.set_router_weight(args.router_aux_loss_coef)
        self.policy, self.model = None, self.module.model
        self.adapters_are_new = peft_config is not None
        given = one_of("processing_class", processing_class, "tokenizer", tokenizer)
        self.processing_class = load_tokenizer(given, model, trust_remote_code=args.trust_remote_code)
        self.all_data: list[Data] = []
        self.train_data = self._read(one_of("train_dataset", train_dataset, "dataset", dataset))
        named = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
        self.eval_data = {name: self._read(rows) for name, rows in named.items() if rows is not None}
        if args.eval_strategy != "no" and not self.eval_data:
            raise ValueError(f"eval_strategy={args.eval_strategy!r} needs an eval_dataset")
        self.checkpoints: Path = args.folder / "checkpoints"
        self.stages = Stages(self.accelerator.device)
        self.handler: Any = CallbackHandler(
            [DefaultFlowCallback, *(callbacks or [])], self.model, self.processing_class, None, None
        )
        self.stop = StopRequest()
        self._last: Update  # what became of the last step
        self._reset()
        self.control = self.handler.on_init_end(self.args, self.state, self.control)

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Run the steps of the plan.

        Args:
            resume_from_checkpoint: True goes on from the newest complete checkpoint of output_dir, a path from that
                one; as the option of the same name.

        Returns:
            transformers' TrainOutput: steps done, mean loss, and the run's figures.

        Raises:
            NonFiniteError: loss or gradient was no number in three steps in a row.
            TrainingInterrupted: SIGTERM or SIGINT came; the checkpoint is written. A SystemExit of code 75.
            ModelRefused: the model can't be trained in this layout.
        """
        if self.train_data is NO_DATA:
            raise ValueError("train() needs a train_dataset")
        if not self.train_data.trees:
            raise ValueError(f"no row of train_dataset is left: {self.train_data.report.summary()}")
        args, mode = self.args, self.model.training
        if args.keep_cpu_memory and self.accelerator.device.type == "cpu":
            keep_cpu_memory()
        self._reset()
        self.plan = lay_out(args, len(self.train_data.trees), *self.draw_size(), self.state)
        resume = resume_option(resume_from_checkpoint)
        resume = args.resume_from_checkpoint if resume is None else resume
        folder = find_checkpoint(self, resume) if resume else None
        self.wrap()
        self.updater = Updater(args, self.accelerator, self.module, self.plan.num_steps)
        self.handler.optimizer, self.handler.lr_scheduler = self.updater.optimizer, self.updater.scheduler
        if folder is not None:
            load_checkpoint(self, folder)
        with ExitStack() as stack:
            self.stop = stack.enter_context(StopRequest())
            stack.enter_context(self.module.attached())
            stack.callback(self.module.train, mode)
            self.log.open(stack, self.plan.num_steps, self.state.global_step)
            self.log.say(self.describe())
            if folder is not None:
                self.log.say(f"going on from {folder}, after step {self.state.global_step}")
            return self._run()

    def _reset(self) -> None:
        """Forget an earlier run of this trainer; the weights stay."""
        self.state = TrainerState(
            is_local_process_zero=self.accelerator.is_local_main_process,
            is_world_process_zero=self.accelerator.is_main_process,
        )
        self.control = TrainerControl()
        self.log = RunLog(self.args, self.accelerator)

    def wrap(self) -> None:
        """Make `policy`, which is what is called: DDP, FSDP2 or autocast around the module."""
        if self.policy is not None:
            return
        self.module.to(self.accelerator.device)
        self.module.probe()
        self.before_training()
        self.policy = wrap(self.module, self.args, self.accelerator)

    def _run(self) -> TrainOutput:
        args, state, began, first = self.args, self.state, time.perf_counter(), self.state.global_step
        self.control = self.handler.on_train_begin(args, state, self.control)
        if args.eval_on_start and first == 0:
            self.control.should_evaluate = True
        self._evaluate_and_save(stop=False)  # also what an interrupted run had left to do
        losses, taken = 0.0, 0
        while state.global_step < self.plan.num_steps and not self.control.should_training_stop:
            if self.plan.ends_epoch(state.global_step):
                self.control = self.handler.on_epoch_begin(args, state, self.control)
            self.control = self.handler.on_step_begin(args, state, self.control)
            loss, stop = self._step()
            if self._last.taken:
                losses, taken = losses + loss, taken + 1
            self.control = self.handler.on_step_end(args, state, self.control)
            if self.plan.ends_epoch(state.global_step):
                self.control = self.handler.on_epoch_end(args, state, self.control)
            self._log()
            self._evaluate_and_save(stop)
        if args.load_best_model_at_end:
            load_best(self)
        seconds, steps = time.perf_counter() - began, state.global_step - first
        figures = {
            "train_runtime": seconds,
            "train_steps_per_second": steps / seconds,
            "train_samples_per_second": steps * self.plan.rows_per_step / self.plan.steps_per_draw / seconds,
            "train_loss": losses / max(1, taken),
        }
        if steps:  # a run that had ended keeps its figures
            self._tell(figures)
        self.log.say(f"{steps} steps in {duration(seconds)}")
        self.control = self.handler.on_train_end(args, state, self.control)
        if args.push_to_hub:
            self.push_to_hub()
        return TrainOutput(state.global_step, figures["train_loss"], figures)

    def _step(self) -> tuple[float, bool]:
        """One step: (its loss, whether a signal asked any rank to stop)."""
        began, args, accelerator = time.perf_counter(), self.args, self.accelerator
        data, rows = self.rows_of(self.state.global_step)
        share = share_out(data, rows, args.per_device_train_batch_size, args, accelerator, self.count)
        loss_here, stages = torch.zeros((), dtype=torch.float64, device=accelerator.device), self.stages
        self.policy.train()
        with stages.of("forward"):
            self.before_step(data, share)
        for i, run in enumerate(share.runs):
            weight = float(i < share.num_real)
            # DDP adds up over ranks once a step; FSDP2 each time, or every rank would hold the whole gradient.
            apart = getattr(self.policy, "no_sync", nullcontext) if i + 1 < len(share.runs) else nullcontext
            with apart():
                batch = self.pack(data, run)
                with stages.of("forward"):
                    loss, metrics = self.compute_loss(batch, share.counts, weight / share.counts["batches"])
                with stages.of("backward"):
                    accelerator.backward(loss * (weight * accelerator.num_processes))
            self.log.meter.add({"loss": loss, **metrics}, counts=bool(weight))
            if weight:
                loss_here += loss.detach()
        loss_value, stop = accelerator.reduce(loss_here, "sum").item(), self.stop.of_any_rank(accelerator)
        self.control = self.handler.on_pre_optimizer_step(args, self.state, self.control)
        with stages.of("optimizer"):
            self._last = self.updater.step(loss_value)
        self.control = self.handler.on_optimizer_step(args, self.state, self.control)
        self.state.global_step += 1
        self.state.epoch = self.plan.epoch(self.state.global_step)
        self.log.stages(stages.read())
        self.log.step_done(self.state.global_step, share.counts["tokens"], time.perf_counter() - began)
        if not self._last.taken:
            self._skipped(loss_value)
        return loss_value, stop

    def _skipped(self, loss: float) -> None:
        times = self.updater.skipped_in_a_row
        what = f"step {self.state.global_step}: loss {loss}, gradient norm {self._last.grad_norm}"
        if self.accelerator.device.type == "cuda" and bad_targets_seen(self.accelerator.device):
            what += "; a token id was outside the vocabulary, which gives NaN: is it the model's tokenizer?"
        self.log.warn(f"{what}; the step is skipped and the weights are as before ({times} in a row)")
        if times >= MAX_SKIPPED_IN_A_ROW:
            self.control.should_log = True
            self._log()
            raise NonFiniteError(
                f"{what}; {times} steps in a row gave no number. The weights are those before them. Lower "
                "learning_rate or max_grad_norm, look at the rows of these steps, or go on from an earlier checkpoint"
            )

    def _log(self) -> None:
        """Report the steps since the last log where a callback asks for it; always the last step."""
        last_step = self.state.global_step >= self.plan.num_steps
        if self.args.logging_strategy == "no" or not (self.control.should_log or last_step):
            return
        _, grad_norm, learning_rate = self._last
        last = dict(grad_norm=grad_norm, learning_rate=learning_rate, skipped_steps=self.updater.skipped)
        row = self.log.log_steps(self.state, last)
        self.control = self.handler.on_log(self.args, self.state, self.control, row)
        self.after_log()

    def _tell(self, figures: dict[str, float]) -> None:
        self.log.write(self.state, figures)
        self.control = self.handler.on_log(self.args, self.state, self.control, figures)

    def _evaluate_and_save(self, stop: bool) -> None:
        """Evaluate and save where the callbacks ask for it; where a signal does, save and leave."""
        if self.control.should_epoch_stop:
            raise ValueError("control.should_epoch_stop is not supported: rows follow from the step alone")
        if self.control.should_evaluate and self.eval_data and not stop:
            try:
                note_best(self, self.evaluate())
            except EvaluationStopped:
                stop = True
        if stop:
            folder = save_checkpoint(self, interrupted=True)
            self.log.warn(f"stopped by a signal after step {self.state.global_step}: {folder} is written")
            raise TrainingInterrupted(str(folder))
        if self.control.should_save:
            save_checkpoint(self)
            self.control = self.handler.on_save(self.args, self.state, self.control)

    # Evaluation

    def evaluate(self, eval_dataset: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss and metrics on held-out rows: means over all of them, however they are cut into batches.

        Args:
            eval_dataset: rows; None takes those given to the trainer.
            metric_key_prefix: what names begin with.

        Raises:
            ValueError: there are no rows.
        """
        known = len(self.all_data)
        data = self.eval_data if eval_dataset is None else {"": self._read(eval_dataset)}
        if not data:
            raise ValueError("evaluate() needs an eval_dataset, here or when the trainer is made")
        self.wrap()
        metrics: dict[str, float] = {}
        for name, prepared in data.items():
            prefix = f"{metric_key_prefix}_{name}_" if name else f"{metric_key_prefix}_"
            metrics |= {prefix + key: value for key, value in self.evaluate_on(prepared).items()}
        del self.all_data[known:]
        self._tell(metrics)
        self.control = self.handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Results

    def save_model(self, output_dir: str | None = None) -> None:
        """Write model (the adapter alone for PEFT), tokenizer and model card; the folder loads in transformers.

        To be called on all ranks.
        """
        folder = Path(output_dir) if output_dir is not None else self.args.folder
        folder.mkdir(parents=True, exist_ok=True)
        self.write_model(folder)
        if self.accelerator.is_main_process:
            (folder / "README.md").write_text(model_card(self))

    def write_model(self, folder: Path) -> None:
        """Write model and tokenizer into a folder that exists; to be called on all ranks."""
        save_weights(self.model, folder, self.accelerator.is_main_process)
        if self.accelerator.is_main_process:
            self.processing_class.save_pretrained(folder)

    def push_to_hub(self) -> None:
        """Push model, tokenizer and model card to `hub_model_id`; to be called on all ranks."""
        self.save_model()
        if self.accelerator.is_main_process:
            push_folder(self.args)

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Add one more of transformers' callbacks."""
        self.handler.add_callback(callback)

    @property
    def modules_in_memory(self) -> list[nn.Module]:
        """The models that a step uses."""
        return [self.module]

    @property
    def pad_id(self) -> int:
        """What fills padded rows; masked, so that any id will do."""
        return self.processing_class.pad_token_id or 0

    def _read(self, source: Any) -> Data:
        if source is None:
            return NO_DATA
        prepared, module = self.prepare(load_rows(source, formats=self.formats)), self.module
        return join_data(self.all_data, prepared, self.args, module.vocabulary, module.positions)

    def pack(self, data: Data, rows: list[int]) -> Batch:
        return pack_rows(data, rows, self.args.layout, self.pad_id).to(self.accelerator.device)
