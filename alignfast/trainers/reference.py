"""Where the reference's log-probs come from: adapters off or as given, a frozen model, a table on disk, or nowhere.

The table is computed once per model and data: its file is named by a hash of the reference's weights, the tokens,
and what else bears on the numbers. The layout does not, since all layouts give the same log-probs.

Letters: P predictions, N pairs, R rows of all data.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignfast.data import Batch
from alignfast.losses import ld_weights
from alignfast.models.load import load_policy
from alignfast.models.policy import Policy
from alignfast.trainers.batches import content_hash, pack_rows

if TYPE_CHECKING:
    from alignfast.trainers.dpo import DPOTrainer

PairLogps = tuple[Tensor | None, Tensor | None]


class Reference(Protocol):
    """What a preference trainer asks of its reference."""

    def pair_logps(self, batch: Batch) -> PairLogps:
        """(chosen_N, rejected_N): log-probs summed over each completion, float32; None where no loss wants them."""


class NoReference:
    """For losses that compare with nothing."""

    def pair_logps(self, batch: Batch) -> PairLogps:
        return None, None


class AdaptersOff:
    """The trained model without its adapters: no second model in memory."""

    def __init__(self, trainer: DPOTrainer) -> None:
        self.trainer = trainer

    def pair_logps(self, batch: Batch) -> PairLogps:
        trainer = self.trainer
        training = trainer.module.training
        trainer.policy.eval()  # the reference has no dropout
        with trainer.module.adapters_off():
            logps_P = trainer.policy(batch)
        trainer.policy.train(training)
        return pair_sums(logps_P, batch.lengths, trainer.args.ld_alpha)


class AdaptersAsGiven:
    """The trained model with the adapters that it came with: copies of them take their place for the pass."""

    def __init__(self, trainer: DPOTrainer) -> None:
        self.trainer = trainer
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        self.pairs = [(parameter, parameter.detach().clone()) for parameter in trained]

    def pair_logps(self, batch: Batch) -> PairLogps:
        trainer = self.trainer
        training = trainer.module.training
        trainer.policy.eval()
        self._swap()
        logps_P = trainer.policy(batch)
        self._swap()
        trainer.policy.train(training)
        return pair_sums(logps_P, batch.lengths, trainer.args.ld_alpha)

    def _swap(self) -> None:
        for parameter, copy in self.pairs:
            parameter.data, copy.data = copy.data, parameter.data


class FrozenModel:
    """A second model, run beside the first."""

    def __init__(self, trainer: DPOTrainer, policy: Policy) -> None:
        self.trainer = trainer
        self.policy = policy.to(trainer.accelerator.device).requires_grad_(False).eval()

    def pair_logps(self, batch: Batch) -> PairLogps:
        with self.policy.attached(), self.trainer.accelerator.autocast():
            logps_P = self.policy(batch)
        return pair_sums(logps_P, batch.lengths, self.trainer.args.ld_alpha)


class Table:
    """Log-probs computed beforehand for all rows that the trainer has read."""

    def __init__(self, logps_2R: Tensor) -> None:
        self.logps_2R = logps_2R

    def pair_logps(self, batch: Batch) -> PairLogps:
        if max(batch.rows) >= self.logps_2R.shape[1]:
            raise ValueError(
                "precompute_ref_log_probs=True knows the rows given when the trainer was made: pass an eval_dataset "
                "there, since the model that would be its reference has been trained since"
            )
        chosen_N, rejected_N = self.logps_2R[:, list(batch.rows)].to(batch.source_P.device)
        return chosen_N, rejected_N


def make_reference(trainer: DPOTrainer, ref_model: Any) -> Reference:
    """The reference that a trainer's options ask for; to be called while the model is as it was given.

    Raises:
        ValueError: a reference model is given where none can be used.
    """
    args, adapters = trainer.args, hasattr(trainer.model, "disable_adapter")
    if ref_model is not None and (ref_model is trainer.model or ref_model is trainer.module.base):
        raise ValueError("ref_model is the model that is trained: leave it out, or pass a copy of it")
    if not args.needs_reference:
        if ref_model is not None:
            raise ValueError(f"loss_type={args.loss_type!r} uses no reference: leave ref_model out")
        return NoReference()
    if ref_model is None and adapters and not args.precompute_ref_log_probs:
        if trainer.adapters_are_new:
            return AdaptersOff(trainer)
        if args.fsdp:
            raise ValueError(
                "the reference is the model with the adapters that it came with, and fsdp shards them: set "
                "precompute_ref_log_probs=True, or pass ref_model"
            )
        return AdaptersAsGiven(trainer)
    if ref_model is not None:
        policy = load_policy(
            ref_model,
            layout=args.layout,
            backend=args.backend,
            dtype=None if isinstance(ref_model, nn.Module) else args.dtype,
            trust_remote_code=args.trust_remote_code,
        )
    elif args.precompute_ref_log_probs:
        policy = trainer.module  # it still is the reference, so that no copy is needed
    else:
        trainer.log.say(
            "the reference is a frozen copy of the model; precompute_ref_log_probs=True gives the same without it"
        )
        policy = trainer.module.reference_copy()
    if not args.precompute_ref_log_probs:
        return FrozenModel(trainer, policy)
    table_2R = precomputed(trainer, policy, ref_model is None and adapters and trainer.adapters_are_new)
    return Table(table_2R)


def pair_sums(logps_P: Tensor, lengths: tuple[int, ...], ld_alpha: float | None) -> tuple[Tensor, Tensor]:
    """Per-token log-probs summed over completions, as (chosen_N, rejected_N), with LD-DPO's weights if any.

    >>> pair_sums(torch.tensor([-1.0, -2.0, -4.0]), (2, 1), None)
    (tensor([-3.]), tensor([-4.]))
    """
    if ld_alpha is not None:
        logps_P = logps_P * ld_weights(lengths, ld_alpha).to(logps_P.device)
    lengths_S = torch.tensor(lengths, device=logps_P.device)
    sums_S = torch.segment_reduce(logps_P, "sum", lengths=lengths_S, initial=0)
    return sums_S[::2], sums_S[1::2]


def precomputed(trainer: DPOTrainer, policy: Policy, adapters_off: bool) -> Tensor:
    """The table of a reference, read from disk or computed and written there; to be called on all ranks."""
    accelerator = trainer.accelerator
    file = trainer.args.folder / "reference" / f"{_key(trainer, policy, adapters_off)}.safetensors"
    # The first rank looks and reads for all: others may see another disk.
    found = [load_file(file)["logps_2R"] if accelerator.is_main_process and file.exists() else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
    if found[0] is not None:
        trainer.log.say(f"reference log-probs: {file}")
        return found[0]
    training = policy.training
    policy.to(accelerator.device).eval()
    with policy.attached(), accelerator.autocast():
        if adapters_off:
            with policy.adapters_off():
                logps_2R = _compute(trainer, policy)
        else:
            logps_2R = _compute(trainer, policy)
    policy.train(training)
    if accelerator.is_main_process:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        save_file({"logps_2R": logps_2R}, temporary)
        os.replace(temporary, file)
    return logps_2R


def _compute(trainer: DPOTrainer, policy: Policy) -> Tensor:
    accelerator, args = trainer.accelerator, trainer.args
    logps_2R = torch.zeros(2, sum(len(data.trees) for data in trainer.all_data), device=accelerator.device)
    for data in trainer.all_data:
        mine = range(accelerator.process_index, len(data.trees), accelerator.num_processes)
        for first in range(0, len(mine), args.per_device_eval_batch_size):
            rows = mine[first : first + args.per_device_eval_batch_size]
            batch = pack_rows(data, rows, args.layout, trainer.pad_id).to(accelerator.device)
            sums = pair_sums(policy(batch), batch.lengths, args.ld_alpha)
            logps_2R[:, list(batch.rows)] = torch.stack(sums).float()
    return accelerator.reduce(logps_2R, "sum").cpu()  # every row is zero on all ranks but one


def _key(trainer: DPOTrainer, policy: Policy, adapters_off: bool) -> str:
    digest = hashlib.sha256()
    _hash_weights(digest, policy.model)
    config = policy.base.config.to_dict()
    shape = {
        name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")
    }
    digest.update(json.dumps(shape, sort_keys=True, default=str).encode())
    for data in trainer.all_data:
        digest.update(content_hash(data.trees).encode())
    digest.update(repr((adapters_off, trainer.args.ld_alpha, trainer.accelerator.mixed_precision)).encode())
    return digest.hexdigest()[:32]


def _hash_weights(digest: Any, model: nn.Module) -> None:
    for name, tensor in _sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def _sorted(items: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    return sorted(items, key=lambda item: item[0])
