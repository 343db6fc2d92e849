"""A fused loss for any causal language model: `model(..., labels=...)` without logits.

    loss = -sum over labels of log p(label) / labels, or / num_items_in_batch        plus a mixture's router loss

`fuse(model)` gives the model a forward that, called with labels, runs the trunk and `linear_loss`: in three GEMMs, over
labelled positions alone, and with the gradient of the head when it returns. Called without labels it is the model's own, so
that generation and whoever wants logits are served as before. It stands for transformers' `ForCausalLMLoss`, so that
`transformers.Trainer`, its gradient accumulation (`num_items_in_batch`), `torch.compile` and PEFT work as they did.

Letters: B rows, L tokens of a row, T = B (L - 1) predictions, P of them labelled, D width.
Not done here: packing (`alignfast.SFTTrainer` packs); label smoothing, for which Trainer takes the logits itself.
"""

from __future__ import annotations

import types
from functools import wraps
from inspect import signature
from sys import modules
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

from alignfast.kernels import Stats, linear_loss
from alignfast.kernels.linear_loss import Metrics
from alignfast.models.attention import ModelRefused
from alignfast.models.head import head_of
from alignfast.models.policy import Policy

IGNORED = -100
_MARK = "fused_by_alignfast"
Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model, *, backend: str = "auto") -> Model:
    """Give a causal language model a fused loss; the model itself is changed, and returned. `unfuse` takes it back.

    With labels the output holds the loss and no logits: `compute_metrics` of a Trainer, which reads logits, needs an
    unfused model.

    Args:
        model: a transformers causal language model, or a PEFT model around one, before or after PEFT wraps it.
        backend: of the kernels: `auto`, `torch`, `native` or `triton`.

    Raises:
        ModelRefused: the model is fused already, has a loss of its own, or its head is not understood.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> model, ids = fuse(LlamaForCausalLM(config)), torch.tensor([[1, 2, 3]])
    >>> output = model(input_ids=ids, labels=ids)
    >>> output.loss.shape, output.logits
    (torch.Size([]), None)
    """
    base = _base(model)
    if "forward" in vars(base):
        raise ModelRefused(
            f"{type(base).__name__} has a forward of its own already (fused, or wrapped by another library); undo that, or "
            "fuse a fresh model"
        )
    if base.loss_function is not ForCausalLMLoss:
        raise ModelRefused(
            f"{type(base).__name__} has the loss {base.loss_function}, not transformers' ForCausalLMLoss"
        )
    modes = [(part, part.training) for part in base.modules()]
    try:
        Policy(base, layout="padded", backend=backend).probe()
    finally:
        for part, training in modes:  # the probe knows one mode for all
            part.training = training
    own, names = base.forward, [*signature(type(base).forward).parameters][1:]

    @wraps(type(base).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args)), **kwargs}
        labels, shift_labels = given.pop("labels", None), given.pop("shift_labels", None)
        if labels is None and shift_labels is None:
            return own(*args, **kwargs)
        return _with_loss(self, labels, shift_labels, given.pop("num_items_in_batch", None), given, backend)

    setattr(forward, _MARK, True)
    base.forward = types.MethodType(forward, base)
    return model


def unfuse(model: Model) -> Model:
    """Give a fused model its own forward back.

    Raises:
        ValueError: it is not fused.
    """
    base = _base(model)
    if not getattr(vars(base).get("forward"), _MARK, False):
        raise ValueError(f"{type(base).__name__} is not fused")
    del base.forward
    return model


def _base(model: Any) -> Any:
    """The model that PEFT wraps, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _with_loss(
    model: Any,
    labels: Tensor | None,
    shift_labels: Tensor | None,
    num_items: Tensor | int | None,
    kwargs: dict[str, Any],
    backend: str,
) -> Any:
    if kwargs.pop("logits_to_keep", 0):
        raise ValueError(
            "logits_to_keep has no meaning with labels: a fused loss makes no logits; leave it out"
        )
    return_dict = kwargs.pop("return_dict", None)
    if return_dict is None:
        return_dict = getattr(model.config, "return_dict", True)
    mixture = bool(kwargs.get("output_router_logits") or getattr(model.config, "output_router_logits", False))
    if mixture:
        kwargs["output_router_logits"] = True
    trunk = model.base_model(**kwargs, return_dict=True)
    if shift_labels is None:
        assert labels is not None
        shift_labels = pad(labels, (0, 1), value=IGNORED)[:, 1:]
    hidden_TD, target_T = (
        trunk.last_hidden_state.flatten(0, 1),
        shift_labels.flatten().to(trunk.last_hidden_state.device),
    )
    loss: Any = _nll(model, hidden_TD, target_T, num_items, backend)
    fields = {
        "past_key_values": trunk.get("past_key_values"), "hidden_states": trunk.get("hidden_states"),
        "attentions": trunk.get("attentions"),
    }  # fmt: skip
    if not mixture:
        output: Any = CausalLMOutputWithPast(loss=loss, **fields)
    else:
        balance = modules[type(model).__module__].load_balancing_loss_func  # type: ignore[attr-defined]
        router_loss = balance(
            trunk.router_logits, model.num_experts, model.num_experts_per_tok, kwargs.get("attention_mask")
        )
        output = MoeCausalLMOutputWithPast(
            loss=loss + model.router_aux_loss_coef * router_loss, aux_loss=router_loss, router_logits=trunk.router_logits,
            **fields,
        )  # fmt: skip
    return output if return_dict else output.to_tuple()


def _nll(
    model: Any, hidden_TD: Tensor, target_T: Tensor, num_items: Tensor | int | None, backend: str
) -> Tensor:
    """What `ForCausalLMLoss` gives: NaN where it does, of no labels and no count."""
    counts_T = target_T != IGNORED
    divisor: Any = counts_T.sum() if num_items is None else num_items
    if isinstance(divisor, Tensor):
        divisor = divisor.to(hidden_TD.device)
    # else shapes would follow the labels; there ignored rows are projected
    if not torch.compiler.is_compiling():
        hidden_TD, target_T = hidden_TD[counts_T], target_T[counts_T]
    head = head_of(model)

    def loss_fn(stats: Stats, rows: slice) -> tuple[Tensor, Metrics]:
        return -stats.logps.sum() / divisor, {}

    loss, _ = linear_loss(
        hidden_TD.to(head.weight_VD.dtype), head.weight_VD, target_T, loss_fn,
        bias_V=head.bias_V, scale=head.scale, softcap=head.softcap, backend=backend,
    )  # fmt: skip
    return loss
