"""Our packed attention as an attention backend of transformers, named `alignfast`.

The layout travels to every attention layer as the forward keyword `packed_layout`, and in generation the cache as
`packed_cache`: with a layout a layer's keys and values are stored in it, without one each token is a sequence's newest
and attends to what is stored. A call with neither behaves exactly as `sdpa`, so that the user's own forward and generate
stay right while a model is attached.

Keywords are a whitelist: one that changes the result is obeyed, one that can't is ignored, any other that is not
None is refused. Models were seen to pass sinks or biases through this interface and come out silently wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from alignfast.kernels import PackedLayout, packed_attention

NAME = "alignfast"
_WAY_OUT = "use layout='padded'"
# Keywords that say nothing about the result of one attention layer in training.
_HARMLESS = frozenset(
    {
        "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "is_causal", "logits_to_keep", "max_length_k",
        "max_length_q", "num_items_in_batch", "output_attentions", "output_hidden_states", "output_router_logits",
        "position_ids", "position_embeddings", "return_dict", "seq_idx", "use_cache",
    }
)  # fmt: skip


class KeyValueCache(Protocol):
    """Where generation keeps keys and values; letters as in `attention_forward`, T tokens of this forward pass."""

    def store(self, layer: int, key_TKE: Tensor, value_TKE: Tensor) -> None:
        """Keep a layer's keys and values."""

    def attend(
        self, layer: int, query_THE: Tensor, scale: float | None, window: int | None, softcap: float | None
    ) -> Tensor:
        """Attention of each sequence's newest token over what is stored of it."""


class ModelRefused(ValueError):
    """A model can't be trained the way that was asked for; the message says why and names the way out."""


def attention_forward(
    module: nn.Module,
    query_BHTE: Tensor,
    key_BKTE: Tensor,
    value_BKTE: Tensor,
    attention_mask: Tensor | None,
    packed_layout: PackedLayout | None = None,
    packed_cache: KeyValueCache | None = None,
    packed_backend: str = "auto",
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in place of its own attention; see its documentation of attention backends.

    Raises:
        ModelRefused: the layer asks for something that packed attention does not do.
    """
    if packed_layout is None and packed_cache is None:
        return sdpa_attention_forward(
            module, query_BHTE, key_BKTE, value_BKTE, attention_mask,
            dropout=dropout, scaling=scaling, sliding_window=sliding_window, softcap=softcap, **kwargs,
        )  # fmt: skip
    _check_layer(module, query_BHTE, key_BKTE, value_BKTE, dropout, sliding_window, kwargs)
    states = [x_BHTE[0].transpose(0, 1) for x_BHTE in (query_BHTE, key_BKTE, value_BKTE)]
    device = query_BHTE.device.type
    if torch.is_autocast_enabled(device):  # rotary embeddings hand on float32 queries and keys
        states = [x_THE.to(torch.get_autocast_dtype(device)) for x_THE in states]
    layer: Any = module.layer_idx
    if packed_cache is not None:
        packed_cache.store(layer, states[1], states[2])
        if packed_layout is None:
            return packed_cache.attend(layer, states[0], scaling, sliding_window, softcap)[None], None
    assert packed_layout is not None
    out_THE = packed_attention(
        *states, packed_layout, scale=scaling, window=sliding_window, softcap=softcap, backend=packed_backend,
    )  # fmt: skip
    return out_THE[None], None


def _check_layer(
    module: nn.Module,
    query_BHTE: Tensor,
    key_BKTE: Tensor,
    value_BKTE: Tensor,
    dropout: float,
    sliding_window: int | None,
    kwargs: dict[str, Any],
) -> None:
    layer = type(module).__name__
    for name, value in kwargs.items():
        if value is not None and name not in _HARMLESS:
            raise ModelRefused(
                f"{layer} passes {name} to its attention, which packed attention lacks; {_WAY_OUT}"
            )
    if dropout:
        raise ModelRefused(
            f"{layer} drops attention weights with probability {dropout}, which packed attention lacks; "
            f"set disable_dropout=True or {_WAY_OUT}"
        )
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise ModelRefused(f"{layer} is not causal; {_WAY_OUT}")
    if key_BKTE.shape != value_BKTE.shape or key_BKTE.shape[2:] != query_BHTE.shape[2:]:
        raise ModelRefused(
            f"{layer} has queries {tuple(query_BHTE.shape)}, keys {tuple(key_BKTE.shape)} and values "
            f"{tuple(value_BKTE.shape)}, which must agree in tokens and head width; {_WAY_OUT}"
        )
    kinds = getattr(getattr(module, "config", None), "layer_types", None)
    if kinds and kinds[module.layer_idx] == "sliding_attention" and sliding_window is None:
        raise ModelRefused(f"{layer} is a sliding-window layer but does not say its window; {_WAY_OUT}")


def check_layer_kinds(model: PreTrainedModel) -> None:
    """Refuse models that name layers of another kind than full or sliding attention: those carry state from token
    to token by other ways (convolutions, state spaces, chunks), across the borders of packed sequences.

    Raises:
        ModelRefused: names the kinds.
    """
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    strange = sorted(kinds - {"full_attention", "sliding_attention"})
    if strange:
        raise ModelRefused(f"{type(model).__name__} has layers of kind {', '.join(strange)}; {_WAY_OUT}")


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


def no_mask(device: torch.device) -> Tensor:
    """A mask of four dimensions that no one reads: given one, transformers makes none of size T x T."""
    return torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=device)


@contextmanager
def attention_set(model: PreTrainedModel, name: str) -> Iterator[None]:
    """The attention backend `name` in force inside the block; each part of the model has its own setting back outside.

    Raises:
        ModelRefused: the model's attention does not go through transformers' attention interface.
    """
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            raise ModelRefused(
                f"{type(model).__name__} does not take its attention from transformers' attention interface, so its "
                f"sequences can't be packed; {_WAY_OUT}"
            )
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
