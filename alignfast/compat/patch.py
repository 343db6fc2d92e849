"""TRL 1.16's own trainers on our kernels, packed, prompts computed once: one line, and another that takes it back.

    import alignfast
    alignfast.patch_trl()

TRL's text trainers ask their model for one thing: the log-probs, entropies and so on of labelled tokens, which the model's
forward gives when it is called with `fused_lm_head=True`. That call is what is replaced: the padded batch is packed, its
prompts shared, and the head runs over labelled tokens alone. Losses, metrics and everything else stay TRL's own. The reward
trainer's model is given a forward of that kind that returns its rewards.

What is patched, and put back by `unpatch_trl`: the name `add_fused_lm_head` in the modules of the SFT, DPO, KTO, GRPO and
RLOO trainers, their `training_step` and the reward trainer's, and `RewardTrainer.__init__`. Trainers made before stay as
they are, and so do those made between the two calls.

A model or a call that the packed path does not serve takes TRL's own, and a warning says why, once; `strict=True` raises
instead. Compiled code can't say anything, so of `torch_compile` the first training step does.

Letters: B rows, L tokens of a row, P predictions, S sequences, D width.
Not done here: TRL's experimental and distillation trainers; sampling.
"""

from __future__ import annotations

import os
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.integrations import is_deepspeed_zero3_enabled

from alignfast.compat._padded import NotServed, labelled_trees, paired_trees, spans
from alignfast.data.packing import pack
from alignfast.kernels.linear_token_logps import linear_token_stats
from alignfast.models.attention import NAME, ModelRefused, attention_set
from alignfast.models.head import head_of
from alignfast.models.policy import Policy
from alignfast.models.reward import RewardModel

VERSION = "1.16"
TRAINERS = {
    "sft": "SFTTrainer", "dpo": "DPOTrainer", "kto": "KTOTrainer", "grpo": "GRPOTrainer", "rloo": "RLOOTrainer",
    "reward": "RewardTrainer",
}  # fmt: skip
# TRL's name of a statistic: ours
STATISTICS = {
    "log_probs": "logps", "entropy": "entropy", "log_sum_sq_probs": "sum_sq_probs", "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}  # fmt: skip
# What may come with a call that is served: the sequences' borders are read from the position ids
_HARMLESS = {
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "return_dict", "seq_idx", "use_cache",
}  # fmt: skip


@dataclass(frozen=True)
class _Options:
    """What `patch_trl` was asked for."""

    layout: str
    backend: str
    strict: bool


_originals: dict[tuple[Any, str], Any] = {}
_options = _Options("shared", "auto", False)
_said: set[str] = set()
_patched: WeakSet[torch.nn.Module] = WeakSet()  # models whose forward is ours
_step: ContextVar[ExitStack | None] = ContextVar("alignfast_trl_step", default=None)


def patch_trl(*, layout: str = "shared", backend: str = "auto", strict: bool = False) -> None:
    """Have the SFT, DPO, KTO, GRPO, RLOO and Reward trainers of TRL 1.16 that are made from here on use alignfast.

    Called again it changes the options alone.

    Args:
        layout: `shared` (prompts computed once) or `packed` (no padding, no sharing).
        backend: of the kernels: `auto`, `torch`, `native` or `triton`.
        strict: raise where TRL's own code would be taken, instead of a warning.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: it is of another version, or lacks something that is to be replaced, which is named.
        ValueError: the layout is unknown.
    """
    global _options
    if layout not in ("shared", "packed"):
        raise ValueError(
            f"layout={layout!r} is not one of shared, packed; TRL's own is padded: do not patch for that"
        )
    try:
        import trl
    except ImportError as error:
        raise ImportError(
            "patch_trl patches TRL, which is not installed: pip install 'trl==1.16.*'"
        ) from error
    if not f"{trl.__version__}.".startswith(f"{VERSION}."):
        raise RuntimeError(
            f"patch_trl knows TRL {VERSION}, and this is {trl.__version__}, whose trainers may work another way: install "
            f"'trl=={VERSION}.*', or use alignfast's own trainers, which take the same options"
        )
    _options = _Options(layout, backend, strict)
    _said.clear()
    if _originals:
        return
    for owner, name, wrapper in _targets(trl.__version__):
        _replace(owner, name, wrapper(getattr(owner, name)))


def _targets(version: str) -> list[tuple[Any, str, Callable[..., Any]]]:
    """(where, name, what wraps it) of all that is replaced; found before anything is, so that it is all or nothing."""
    found: list[tuple[Any, str, Callable[..., Any]]] = []
    for stem, trainer in TRAINERS.items():
        module = import_module(f"trl.trainer.{stem}_trainer")
        owner = getattr(module, trainer, None)
        found.append((owner, "training_step", _training_step))
        found.append(
            (owner, "__init__", _reward_init)
            if stem == "reward"
            else (module, "add_fused_lm_head", _add_fused_lm_head)
        )
        for where, name, _ in found[-2:]:
            if where is None or name not in vars(where):
                place = f"{module.__name__}{'' if where is module else f'.{trainer}'}"
                raise RuntimeError(
                    f"TRL {version} has no {place}.{name}, which patch_trl replaces, so nothing is patched: install another "
                    f"TRL {VERSION}, or use alignfast's own {trainer}, which takes the same options"
                )
    return found


def unpatch_trl() -> None:
    """Put back what `patch_trl` replaced; without effect where nothing is."""
    for (owner, name), original in _originals.items():
        setattr(owner, name, original)
    _originals.clear()


def _replace(owner: Any, name: str, new: Any) -> None:
    _originals[owner, name] = vars(owner)[name]
    setattr(owner, name, new)


def _training_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """What a checkpointed forward sets holds until the step's backward has computed it again."""

    @wraps(original)
    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.args.torch_compile and any(part in _patched for part in self.model.modules()):
            with _or_theirs(_options):
                raise NotServed("torch_compile=True, which traces TRL's own forward")
        with ExitStack() as stack:
            token = _step.set(stack)
            try:
                return original(self, *args, **kwargs)
            finally:
                _step.reset(token)

    return training_step


def _add_fused_lm_head(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def add_fused_lm_head(
        model: Any,
        temperature: float = 1.0,
        cast_lm_head_to_fp32: bool = False,
        outputs: tuple[str, ...] = ("log_probs",),
    ) -> None:
        options = _options
        served = _served(model, options, Policy)
        original(model, temperature=temperature, cast_lm_head_to_fp32=cast_lm_head_to_fp32, outputs=outputs)
        if not served:
            return
        theirs = model.forward

        @wraps(type(model).forward)
        def forward(
            self: Any, *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: Any
        ) -> Any:
            if not fused_lm_head:
                return theirs(*args, **kwargs, **({} if labels is None else {"labels": labels}))
            if not torch.compiler.is_compiling():
                with _or_theirs(options):
                    if args:
                        raise NotServed("arguments without a name")
                    return _token_outputs(
                        self, options, labels, kwargs, temperature=temperature, wide=cast_lm_head_to_fp32, outputs=outputs
                    )  # fmt: skip
            return theirs(*args, fused_lm_head=True, labels=labels, **kwargs)

        model.forward = types.MethodType(forward, model)
        _patched.add(model)

    return add_fused_lm_head


def _reward_init(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        options, model = _options, self.model
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not _served(model, options, RewardModel):
            return
        theirs = model.forward

        @wraps(type(model).forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            # Without a mask this is somebody's own call; the trainer's have one
            if not args and kwargs.get("attention_mask") is not None and not torch.compiler.is_compiling():
                with _or_theirs(options):
                    return _rewards(self, options, kwargs)
            return theirs(*args, **kwargs)

        model.forward = types.MethodType(forward, model)
        _patched.add(model)

    return __init__


def _served(model: Any, options: _Options, kind: type[Policy] | type[RewardModel]) -> bool:
    """Whether the packed path serves the model; if not, it is said why."""
    with _or_theirs(options):
        if is_deepspeed_zero3_enabled() or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
            raise NotServed("weights sharded by FSDP or ZeRO-3")
        if any(isinstance(p, DTensor) or p.is_meta for p in model.parameters()):
            raise NotServed("weights that are not whole on this rank")
        if model.config.get_text_config() is not model.config:
            raise NotServed(f"{type(model).__name__}, which has more than text")
        modes = [(part, part.training) for part in model.modules()]
        try:
            kind(model, layout=options.layout, backend=options.backend).probe()
        finally:
            for part, training in modes:  # a reference in evaluation mode stays in it
                part.training = training
        return True
    return False


@contextmanager
def _or_theirs(options: _Options) -> Iterator[None]:
    """Leave the block for what stands behind it where the packed path does not serve."""
    try:
        yield
    except (NotServed, ModelRefused) as reason:
        if options.strict:
            raise NotServed(f"patch_trl(strict=True): {reason}") from reason
        if str(reason) not in _said:
            _said.add(str(reason))
            warnings.warn(f"alignfast leaves this to TRL's own code: {reason}", stacklevel=4)


def _token_outputs(
    model: Any,
    options: _Options,
    labels: Tensor | None,
    kwargs: dict[str, Any],
    *,
    temperature: float,
    wide: bool,
    outputs: tuple[str, ...],
) -> Any:
    """TRL's `FusedCausalLMOutput` of a padded batch."""
    from trl.trainer.utils import FusedCausalLMOutput

    known = {"input_ids", "attention_mask", "position_ids", "num_items_in_batch", *_HARMLESS}
    _check_keywords(model, kwargs, known)
    ids_BL: Tensor = kwargs["input_ids"]
    if labels is None or labels.shape != ids_BL.shape:
        raise NotServed("labels of another shape than the input's")
    found = spans(kwargs.get("attention_mask"), kwargs.get("position_ids"), ids_BL.shape)
    trees = labelled_trees(ids_BL.cpu().numpy(), labels.cpu().numpy(), found)
    if not trees:  # TRL's gives a zero that is connected to the model
        raise NotServed("a batch without a label")
    policy = Policy(model, layout=options.layout, backend=options.backend)
    batch = pack(trees, range(len(trees)), options.layout).to(ids_BL.device)
    policy.training = False  # of this object, not of the model: no router loss is asked for
    with _attention(model):
        hidden_PD, _ = policy.hidden(batch, batch.source_P)
    head = head_of(model)
    weight_VD, bias_V = (
        None if x is None else x.float() if wide else x for x in (head.weight_VD, head.bias_V)
    )
    assert weight_VD is not None
    with torch.autocast(ids_BL.device.type, enabled=False) if wide else nullcontext():
        stats = linear_token_stats(
            hidden_PD.to(weight_VD.dtype), weight_VD, batch.target_P,
            stats=tuple(STATISTICS[name] for name in ("log_probs", *outputs) if name in STATISTICS),
            bias_V=bias_V, scale=head.scale, softcap=head.softcap, temperature=temperature, backend=options.backend,
        )  # fmt: skip
    mask = labels[:, 1:] != -100
    fields = {name: _field(name, getattr(stats, STATISTICS[name]), mask) for name in {"log_probs", *outputs}}
    count = kwargs.get("num_items_in_batch")
    loss = -stats.logps.sum() / (mask.sum() if count is None else count)
    return FusedCausalLMOutput(loss=loss, label_mask=mask, **fields)


def _field(name: str, statistic_P: Tensor, mask: Tensor) -> Tensor:
    """A statistic in its padded place, as TRL has it: 0 where there is no label."""
    if name == "log_sum_sq_probs":
        statistic_P = statistic_P.log()
    if name == "is_top1":
        statistic_P = statistic_P != 0
    if name not in ("log_probs", "entropy"):
        statistic_P = statistic_P.detach()
    return statistic_P.new_zeros(mask.shape).masked_scatter(mask, statistic_P)


def _rewards(model: Any, options: _Options, kwargs: dict[str, Any]) -> Any:
    """What transformers' sequence classifiers return, of a padded batch: each row's reward at its last token that is not the
    pad token, be that the end token or not."""
    from transformers.modeling_outputs import SequenceClassifierOutputWithPast

    _check_keywords(model, kwargs, {"input_ids", "attention_mask", "margin", *_HARMLESS})
    ids_BL: Tensor = kwargs["input_ids"]
    pad_id = model.config.get_text_config().pad_token_id
    if pad_id is None:
        raise NotServed("a model without a pad token")
    found, ids = spans(kwargs["attention_mask"], None, ids_BL.shape), ids_BL.cpu().numpy()
    sequences: list[tuple[int, ...]] = []
    for row, start, stop in found:
        last = (ids[row] != pad_id).nonzero()[0]
        if not len(last) or not start <= last[-1] < stop:
            raise NotServed("a row whose last token that is not the pad token is masked")
        sequences.append(tuple(ids[row, start : last[-1] + 1].tolist()))
    if len(sequences) != len(ids):
        raise NotServed("a row without a token")
    trees = paired_trees(sequences)
    reward_model = RewardModel(model, layout=options.layout, backend=options.backend)
    batch = pack(trees, range(len(trees)), options.layout).to(ids_BL.device)
    reward_model.training = False  # as in _token_outputs
    with _attention(model):
        rewards_SH, _ = reward_model(batch, lambda rewards_SH: (rewards_SH, {}))
    return SequenceClassifierOutputWithPast(logits=rewards_SH)


def _check_keywords(model: Any, kwargs: dict[str, Any], known: set[str]) -> None:
    unknown = sorted(name for name, value in kwargs.items() if value is not None and name not in known)
    mixture = kwargs.get("output_router_logits") or getattr(model.config, "output_router_logits", False)
    if mixture:
        raise NotServed(
            "the router loss of a mixture of experts, which depends on how often a prompt is computed"
        )
    if unknown:
        raise NotServed(f"the argument {unknown[0]}")
    if kwargs.get("input_ids") is None or kwargs.get("use_cache"):
        raise NotServed("embeddings in place of tokens, as prompt learning gives them, or a cache")


def _attention(model: Any) -> AbstractContextManager[None]:
    """Packed attention in force: for this forward, or, where its backward will run layers again, for the training step."""
    if model.config._attn_implementation == NAME:
        return nullcontext()
    again = torch.is_grad_enabled() and model.training and model.is_gradient_checkpointing
    if not again:
        return attention_set(model, NAME)
    stack = _step.get()
    if stack is None:
        raise NotServed("gradient checkpointing outside of the trainer's training_step")
    stack.enter_context(attention_set(model, NAME))
    return nullcontext()
