"""Where the reference's log-probs come from: adapters off or as given, a frozen model, a table on disk, or nowhere.

The table is computed once per model and data: its file is named by a hash of the reference's weights, the tokens,
and what else bears on the numbers. The layout does not, since all layouts give the same log-probs.

Letters: P predictions, S answers, R rows of all data, A answers of a row.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignfast.data import Batch
from alignfast.losses import ld_weights
from alignfast.models.load import load_policy
from alignfast.models.policy import Policy
from alignfast.trainers.batches import content_hash, pack_rows
from alignfast.trainers.vocabulary import check_reference

if TYPE_CHECKING:
    from alignfast.trainers.loop import Trainer


class Reference(Protocol):
    """What a trainer asks of its reference."""

    def answer_logps(self, batch: Batch) -> Tensor | None:
        """logps_S: log-probs summed over each of the batch's answers, float32; None where no loss wants them."""


class TokenReference(Reference, Protocol):
    """A reference that knows the log-prob of each token: a model, not a table."""

    def token_logps(self, batch: Batch) -> Tensor:
        """logps_P of the batch's predictions, float32."""


class ReferenceOptions(NamedTuple):
    """What of a trainer's options bears on its reference."""

    needed: bool = True  # whether the loss compares with a reference at all
    precompute: bool = False
    ld_alpha: float | None = None  # LD-DPO's weight
    temperature: float = 1.0  # of the log-probs


class NoReference:
    """For losses that compare with nothing."""

    def answer_logps(self, batch: Batch) -> None:
        return None


class _OfAModel:
    """Sums over answers, from the log-probs of tokens."""

    options: ReferenceOptions

    def token_logps(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def answer_logps(self, batch: Batch) -> Tensor:
        return answer_sums(self.token_logps(batch), batch.lengths, self.options.ld_alpha)


class AdaptersOff(_OfAModel):
    """The trained model without its adapters: no second model in memory."""

    def __init__(self, trainer: Trainer, options: ReferenceOptions) -> None:
        self.trainer, self.options = trainer, options

    def token_logps(self, batch: Batch) -> Tensor:
        trainer = self.trainer
        training = trainer.module.training
        trainer.policy.eval()  # the reference has no dropout
        with trainer.module.adapters_off():
            logps_P = trainer.policy(batch, temperature=self.options.temperature)
        trainer.policy.train(training)
        return logps_P


class AdaptersAsGiven(_OfAModel):
    """The trained model with the adapters that it came with: copies of them take their place for the pass."""

    def __init__(self, trainer: Trainer, options: ReferenceOptions) -> None:
        self.trainer, self.options = trainer, options
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        self.pairs = [(parameter, parameter.detach().clone()) for parameter in trained]

    def token_logps(self, batch: Batch) -> Tensor:
        trainer = self.trainer
        training = trainer.module.training
        trainer.policy.eval()
        self._swap()
        logps_P = trainer.policy(batch, temperature=self.options.temperature)
        self._swap()
        trainer.policy.train(training)
        return logps_P

    def _swap(self) -> None:
        for parameter, copy in self.pairs:
            parameter.data, copy.data = copy.data, parameter.data


class FrozenModel(_OfAModel):
    """A second model, run beside the first."""

    def __init__(self, trainer: Trainer, options: ReferenceOptions, policy: Policy) -> None:
        self.trainer, self.options = trainer, options
        self.policy = policy.to(trainer.accelerator.device).requires_grad_(False).eval()

    def token_logps(self, batch: Batch) -> Tensor:
        with self.policy.attached(), self.trainer.accelerator.autocast():
            return self.policy(batch, temperature=self.options.temperature)


class Table:
    """Log-probs computed beforehand for all rows that the trainer has read."""

    def __init__(self, logps_RA: Tensor) -> None:
        self.logps_RA = logps_RA

    def answer_logps(self, batch: Batch) -> Tensor:
        if max(batch.rows) >= len(self.logps_RA):
            raise ValueError(
                "precompute_ref_log_probs=True knows the rows given when the trainer was made: pass an eval_dataset "
                "there, since the model that would be its reference has been trained since"
            )
        return self.logps_RA[list(batch.rows)].flatten().to(batch.source_P.device)


def make_reference(trainer: Trainer, ref_model: Any, options: ReferenceOptions) -> Reference:
    """The reference that a trainer's options ask for; to be called while the model is as it was given.

    Args:
        trainer: who asks; all its rows have the same number of answers.
        ref_model: the reference; None is the model as given.
        options: what bears on the reference.

    Raises:
        ValueError: a reference model is given where none can be used, or one of another vocabulary.
    """
    args, adapters = trainer.args, hasattr(trainer.model, "disable_adapter")
    if ref_model is not None and (ref_model is trainer.model or ref_model is trainer.module.base):
        raise ValueError("ref_model is the model that is trained: leave it out, or pass a copy of it")
    if not options.needed:
        if ref_model is not None:
            raise ValueError(f"loss_type={args.loss_type!r} uses no reference: leave ref_model out")
        return NoReference()
    if ref_model is None and adapters and not options.precompute:
        if trainer.adapters_are_new:
            return AdaptersOff(trainer, options)
        if args.fsdp:
            raise ValueError(
                "the reference is the model with the adapters that it came with, and fsdp shards them: "
                f"{_ways_out(trainer)}merge them (alignfast merge) and give peft_config"
            )
        return AdaptersAsGiven(trainer, options)
    if ref_model is not None:
        policy = load_policy(
            ref_model,
            layout=args.layout,
            backend=args.backend,
            dtype=None if isinstance(ref_model, nn.Module) else args.dtype,
            trust_remote_code=args.trust_remote_code,
        )
        check_reference(ref_model, policy, trainer.module, trainer.processing_class, args.trust_remote_code)
    elif options.precompute:
        policy = trainer.module  # it still is the reference, so that no copy is needed
    else:
        way = "precompute_ref_log_probs=True gives the same without it"
        advice = way if _can_precompute(trainer) else "with LoRA it is the base, which is there anyway"
        trainer.log.say(f"the reference is a frozen copy of the model; {advice}")
        policy = trainer.module.reference_copy()
    if not options.precompute:
        return FrozenModel(trainer, options, policy)
    adapters_off = ref_model is None and adapters and trainer.adapters_are_new
    return Table(precomputed(trainer, options, policy, adapters_off))


def _can_precompute(trainer: Trainer) -> bool:
    """Whether the trainer knows its rows beforehand: one that samples does not."""
    return hasattr(trainer.args, "precompute_ref_log_probs")


def _ways_out(trainer: Trainer) -> str:
    """What of a trainer's own options gives it another reference."""
    ways = ["set precompute_ref_log_probs=True"] * _can_precompute(trainer)
    ways += ["pass ref_model"] * ("ref_model" in vars(trainer))  # of GRPOTrainer it is no argument
    return "".join(f"{way}, or " for way in ways)


def answer_sums(logps_P: Tensor, lengths: tuple[int, ...], ld_alpha: float | None = None) -> Tensor:
    """logps_S: per-token log-probs summed over each answer, with LD-DPO's weights if any, which pairs alone have.

    >>> answer_sums(torch.tensor([-1.0, -2.0, -4.0]), (2, 1))
    tensor([-3., -4.])
    """
    if ld_alpha is not None:
        logps_P = logps_P * ld_weights(lengths, ld_alpha).to(logps_P.device)
    lengths_S = torch.tensor(lengths, device=logps_P.device)
    return torch.segment_reduce(logps_P, "sum", lengths=lengths_S, initial=0)


def precomputed(trainer: Trainer, options: ReferenceOptions, policy: Policy, adapters_off: bool) -> Tensor:
    """The table of a reference, read from disk or computed and written there; to be called on all ranks."""
    accelerator = trainer.accelerator
    name = _key(trainer, options, policy, adapters_off)
    file = trainer.args.folder / "reference" / f"{name}.safetensors"
    # The first rank looks and reads for all: others may see another disk.
    found = [load_file(file)["logps_RA"] if accelerator.is_main_process and file.exists() else None]
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
                logps_RA = _compute(trainer, options, policy)
        else:
            logps_RA = _compute(trainer, options, policy)
    policy.train(training)
    if accelerator.is_main_process:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        save_file({"logps_RA": logps_RA}, temporary)
        os.replace(temporary, file)
    return logps_RA


def _compute(trainer: Trainer, options: ReferenceOptions, policy: Policy) -> Tensor:
    accelerator, args = trainer.accelerator, trainer.args
    shape = sum(len(data.trees) for data in trainer.all_data), len(trainer.all_data[0].trees[0].answers)
    logps_RA = torch.zeros(shape, device=accelerator.device)
    for data in trainer.all_data:
        mine = range(accelerator.process_index, len(data.trees), accelerator.num_processes)
        for first in range(0, len(mine), args.per_device_eval_batch_size):
            rows = mine[first : first + args.per_device_eval_batch_size]
            batch = pack_rows(data, rows, args.layout, trainer.pad_id).to(accelerator.device)
            sums_S = answer_sums(policy(batch), batch.lengths, options.ld_alpha)
            logps_RA[list(batch.rows)] = sums_S.float().view(len(rows), -1)
    return accelerator.reduce(logps_RA, "sum").cpu()  # every row is zero on all ranks but one


def _key(trainer: Trainer, options: ReferenceOptions, policy: Policy, adapters_off: bool) -> str:
    digest = hashlib.sha256()
    _hash_weights(digest, policy.model)
    config = policy.base.config.to_dict()
    shape = {
        name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")
    }
    digest.update(json.dumps(shape, sort_keys=True, default=str).encode())
    for data in trainer.all_data:
        digest.update(content_hash(data.trees).encode())
    precision = trainer.accelerator.mixed_precision
    digest.update(repr((adapters_off, options.ld_alpha, precision)).encode())
    return digest.hexdigest()[:32]


def _hash_weights(digest: Any, model: nn.Module) -> None:
    for name, tensor in _sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def _sorted(items: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    return sorted(items, key=lambda item: item[0])
