"""What of a trainer goes into a checkpoint, and back: the bridge from the loop to state.py and checkpoint.py.

step-N/  model and tokenizer as save_pretrained writes them      loads in transformers as it is
         optimizer.{safetensors,json}  rng-RANK.{safetensors,json}
         trainer_state.json            transformers' TrainerState, schedule, open metrics, counts
         config.yaml  manifest.json
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerState
from transformers.trainer_callback import ExportableState

from alignfast.trainers import checkpoint
from alignfast.trainers.batches import content_hash
from alignfast.trainers.metrics import from_json, to_json
from alignfast.trainers.state import (
    load_optimizer,
    load_rng,
    load_weights,
    read_json,
    save_optimizer,
    save_rng,
    write_json,
)

if TYPE_CHECKING:
    from alignfast.trainers.loop import Trainer

STATE = "trainer_state.json"
# Options that a run which goes on may change: where things go, what is told, how a step is cut up. How many rows and
# steps there are is compared by itself.
MAY_CHANGE = frozenset(
    """output_dir per_device_train_batch_size gradient_accumulation_steps max_tokens_per_batch per_device_eval_batch_size
    num_train_epochs max_steps layout backend gradient_checkpointing use_cpu fsdp keep_cpu_memory logging_steps
    logging_strategy logging_first_step report_to run_name disable_tqdm eval_strategy eval_steps eval_delay eval_on_start
    save_strategy save_steps save_total_limit load_best_model_at_end resume_from_checkpoint push_to_hub hub_model_id
    hub_token hub_private_repo trust_remote_code precompute_ref_log_probs seed data_seed measure_kl
    log_completions num_completions_to_print""".split()
)
_OF_THIS_PROCESS = ("is_local_process_zero", "is_world_process_zero")


def save_checkpoint(trainer: Trainer, interrupted: bool = False) -> Path:
    """Write the checkpoint of the current step, then delete old ones. To be called on all ranks.

    Args:
        trainer: between two steps.
        interrupted: what is due after this step is left to the run that goes on.
    """
    accelerator, state, parent = trainer.accelerator, trainer.state, trainer.checkpoints
    final = parent / f"step-{state.global_step}"
    if state.best_global_step == state.global_step:
        state.best_model_checkpoint = str(final)
    if accelerator.is_main_process:
        checkpoint.begin(parent, state.global_step)
    accelerator.wait_for_everyone()
    temporary = checkpoint.temporary_folder(parent, state.global_step)
    trainer.write_model(temporary)
    save_optimizer(trainer.module, trainer.updater.optimizer, temporary, accelerator.is_main_process)
    save_rng(temporary, accelerator.process_index)
    progress = _progress(trainer, interrupted)
    if accelerator.is_main_process:
        write_json(temporary / STATE, progress)
        trainer.save_more(temporary)
        (temporary / "config.yaml").write_text(trainer.args.to_yaml())
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        checkpoint.finish(temporary)
        best = [Path(state.best_model_checkpoint)] if state.best_model_checkpoint else []
        checkpoint.rotate(parent, trainer.args.save_total_limit, best)
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(trainer: Trainer, folder: Path) -> None:
    """Put a trainer into the state in which the checkpoint was written. To be called on all ranks.

    Raises:
        ValueError: the checkpoint is of another run.
    """
    progress = read_json(folder / STATE)
    known = _defaults(trainer) | progress["fingerprint"]
    for name, value in fingerprint(trainer).items():
        before = known.get(name)
        if before != value:
            raise ValueError(
                f"{folder} is of another run: its {name} is {before}, this one's is {value}. Give what it had, or start "
                "anew in another output_dir"
            )
    load_weights(trainer.model, folder)
    load_optimizer(trainer.module, trainer.updater.optimizer, folder)
    trainer.updater.load(progress["updater"])
    trainer.log.load(progress["log"])
    state = TrainerState(**progress["state"])
    for name in _OF_THIS_PROCESS:
        setattr(state, name, getattr(trainer.state, name))
    state.log_history = [from_json(row) for row in state.log_history]
    if state.best_model_checkpoint:  # the run's folder may have been moved
        state.best_model_checkpoint = str(trainer.checkpoints / Path(state.best_model_checkpoint).name)
    trainer.state = state
    trainer.control.should_evaluate = "evaluate" in progress["due"]
    trainer.control.should_save = "save" in progress["due"]
    for callback in trainer.handler.callbacks:
        saved = progress["callbacks"].get(type(callback).__name__)
        if isinstance(callback, ExportableState) and saved is not None:
            vars(callback).update(saved["attributes"])
    trainer.load_more(folder)
    load_rng(folder, trainer.accelerator.process_index)


def _progress(trainer: Trainer, interrupted: bool) -> dict[str, Any]:
    state, control = dataclasses.asdict(trainer.state), trainer.control
    state["log_history"] = [
        {name: to_json(value) for name, value in row.items()} for row in state["log_history"]
    ]
    due = {"evaluate": control.should_evaluate, "save": control.should_save} if interrupted else {}
    return {
        "state": {name: to_json(value) for name, value in state.items()},
        "updater": trainer.updater.state(),
        "log": trainer.log.state(),
        "due": [name for name, is_due in due.items() if is_due],
        "callbacks": {
            type(callback).__name__: callback.state()
            for callback in trainer.handler.callbacks
            if isinstance(callback, ExportableState)
        },
        "fingerprint": fingerprint(trainer),
    }


def fingerprint(trainer: Trainer) -> dict[str, Any]:
    """What must not change between a checkpoint and the run that goes on from it."""
    plan, base = trainer.plan, trainer.module.base
    options = {name: value for name, value in trainer.args.to_dict().items() if name not in MAY_CHANGE}
    return {
        "model": f"{type(base).__name__} of {base.num_parameters()} parameters",
        "rows": plan.num_rows,
        "rows_per_step": plan.rows_per_step,
        "steps": plan.num_steps,
        "seed": plan.seed,
        "data": content_hash(trainer.train_data.trees),
        **json.loads(json.dumps(options)),  # tuples as the lists that they are in a file
    }


def _defaults(trainer: Trainer) -> dict[str, Any]:
    """What options did before there were such options: a checkpoint of an earlier version does not name them."""
    return {
        field.name: field.default
        for field in dataclasses.fields(trainer.args)
        if field.default is not dataclasses.MISSING
    }


def find_checkpoint(trainer: Trainer, wanted: str | bool) -> Path:
    """The folder that `resume_from_checkpoint` means, every file of it checked. To be called on all ranks.

    Raises:
        ValueError: there is no complete checkpoint.
        DamagedCheckpoint: the one that was named is not what was written.
    """
    found: list[Any] = [None]
    if trainer.accelerator.is_main_process:
        try:
            found = [_find(trainer, wanted)]
        except (ValueError, checkpoint.DamagedCheckpoint) as error:
            found = [error]
    if trainer.accelerator.num_processes > 1:
        broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _find(trainer: Trainer, wanted: str | bool) -> Path:
    if isinstance(wanted, str):
        checkpoint.read_manifest(Path(wanted)).check_contents()
        return Path(wanted)
    newest = checkpoint.find_newest(trainer.checkpoints, trainer.log.warn)
    if newest is None:
        raise ValueError(
            f"resume_from_checkpoint=True, and there is no complete checkpoint in {trainer.checkpoints}: "
            "leave it out to start anew, or give the path of one"
        )
    return newest


def note_best(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Remember the step of the best evaluation so far, and ask for a checkpoint where it will be wanted.

    Raises:
        ValueError: the metric that decides is not among `metrics`.
    """
    args, state = trainer.args, trainer.state
    name, greater = args.best_metric
    if name not in metrics:
        if not args.load_best_model_at_end and args.save_strategy != "best":
            return
        raise ValueError(f"metric_for_best_model={name!r} is not among {', '.join(sorted(metrics))}")
    best, value = state.best_metric, metrics[name]
    if math.isfinite(value) and (best is None or (value > best if greater else value < best)):
        state.best_metric, state.best_global_step = value, state.global_step
        if args.save_strategy == "best" or args.load_best_model_at_end:
            trainer.control.should_save = True


def load_best(trainer: Trainer) -> None:
    """Put back the weights of the best evaluation. To be called on all ranks."""
    best = trainer.state.best_model_checkpoint
    if best is None:
        trainer.log.warn(
            "load_best_model_at_end: no checkpoint was saved at the best evaluation; the last weights stay"
        )
        return
    load_weights(trainer.model, find_checkpoint(trainer, best))
    trainer.log.say(f"put back the best model, of step {trainer.state.best_global_step}: {best}")
