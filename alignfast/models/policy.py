"""A language model as trainers see it: the log-probs of its tokens, trunk and fused head in one forward.

Letters: L tokens, P predictions, N rows, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alignfast.data.packing import Batch
from alignfast.kernels import PackedLayout, linear_loss, linear_token_logps
from alignfast.kernels._workspace import workspace
from alignfast.kernels.linear_loss import LossFn
from alignfast.models.attention import KeyValueCache, no_mask
from alignfast.models.head import Head, head_of
from alignfast.models.trunk import Trunk

ValueFn = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]


class Policy(Trunk):
    """A causal language model with its log-probs, in one of three layouts that give the same losses.

    Args:
        model: a transformers causal language model, or a PEFT model around one.
        layout: `shared` (prompts computed once), `packed` (no padding, no sharing) or `padded`.
        backend: backend of the kernels.

    Raises:
        ModelRefused: no trunk or head is found, or an adapter is of a kind that can't be honoured.
    """

    kind = "causal language model"
    probed = "logits"

    def __init__(self, model: nn.Module, *, layout: str = "shared", backend: str = "auto") -> None:
        super().__init__(model, layout=layout, backend=backend)
        head_of(self.base)

    def forward(
        self,
        batch: Batch,
        loss_fn: LossFn | None = None,
        *,
        stats: Sequence[str] = ("logps",),
        group_sizes: Sequence[int] | None = None,
        router_weight: float = 1.0,
        temperature: float = 1.0,
        value_fn: ValueFn | None = None,
    ) -> Any:
        """Log-probs of a batch, or a loss on them.

        Args:
            batch: what `alignfast.data.pack` made, in this policy's layout.
            loss_fn: see `alignfast.kernels.linear_loss`, over the batch's P predictions. None: return the log-probs.
            stats: the statistics that `loss_fn` reads.
            group_sizes: predictions that `loss_fn` must see together.
            router_weight: this batch's share of the step, by which a mixture's router loss is weighed.
            temperature: divisor of the logits: what the tokens were sampled at.
            value_fn: a loss on the critic's values_P with its metrics, added to loss_fn's; for a policy that has a critic.

        Returns:
            (loss, metrics), or without a loss_fn logps_P in float32, without gradient.
        """
        if loss_fn is None:
            with torch.no_grad():
                hidden_PD, _ = self.hidden(batch, batch.source_P)
                return self._token_logps(hidden_PD, batch.target_P, temperature)
        hidden_PD, router_loss = self.hidden(batch, batch.source_P)
        head = head_of(self.base)
        loss, metrics = linear_loss(
            hidden_PD.to(head.weight_VD.dtype), head.weight_VD, batch.target_P, loss_fn,
            stats=stats, group_sizes=group_sizes, bias_V=head.bias_V, scale=head.scale, softcap=head.softcap,
            temperature=temperature, backend=self.backend,
        )  # fmt: skip
        if value_fn is not None:
            value_loss, of_values = value_fn(self.values_of(batch, hidden_PD))
            loss, metrics = loss + value_loss, {**metrics, **of_values}
        if router_loss is not None:
            loss = loss + router_weight * router_loss
            metrics = {**metrics, "router_loss": router_weight * router_loss.detach()}
        return loss, metrics

    def values_of(self, batch: Batch, hidden_PD: Tensor) -> Tensor:
        """values_P of the states in which a batch's tokens were written: what a policy with a critic has."""
        raise NotImplementedError(f"{type(self).__name__} has no critic")

    def _token_logps(self, hidden_PD: Tensor, target_P: Tensor, temperature: float) -> Tensor:
        head = head_of(self.base)
        logps_P = linear_token_logps(
            hidden_PD.to(head.weight_VD.dtype), head.weight_VD, target_P,
            bias_V=head.bias_V, scale=head.scale, softcap=head.softcap, temperature=temperature,
            backend=self.backend,
        )  # fmt: skip
        assert isinstance(logps_P, Tensor)
        return logps_P

    def next_hidden(
        self,
        ids_L: Tensor,
        position_L: Tensor,
        cache: KeyValueCache,
        layout: PackedLayout | None = None,
    ) -> Tensor:
        """Hidden states, for generation: of whole prompts in a layout, or without one of each sequence's newest token.

        To be called under packed attention, without gradients; keys and values go into the cache.
        """
        output = self.base.base_model(
            input_ids=ids_L[None], position_ids=position_L[None], attention_mask=no_mask(ids_L.device), use_cache=False,
            packed_layout=layout, packed_cache=cache, packed_backend=self.backend,
        )  # fmt: skip
        return output.last_hidden_state[0]

    @contextmanager
    def next_logits(self, hidden_ND: Tensor) -> Iterator[Tensor]:
        """Logits of hidden rows, in memory that is lent for the block."""
        head = head_of(self.base)
        if head.scale != 1 or head.softcap is not None or head.bias_V is not None:
            yield logits_of(hidden_ND, head)
            return
        shape = (len(hidden_ND), len(head.weight_VD))
        with workspace(shape, head.weight_VD.dtype, hidden_ND.device) as logits_NV:
            yield torch.mm(hidden_ND.to(head.weight_VD.dtype), head.weight_VD.T, out=logits_NV)

    def reference_copy(self) -> Policy:
        """A frozen copy, in evaluation mode."""
        reference = Policy(copy.deepcopy(self.model), layout=self.layout, backend=self.backend)
        return reference.requires_grad_(False).eval()

    def _probe_of(self, hidden_ND: Tensor) -> Tensor:
        return logits_of(hidden_ND, head_of(self.base))

    def _plain_probe(self, ids_1L: Tensor) -> Tensor:
        return self.plain_logits(ids_1L)

    def plain_logits(self, ids_1L: Tensor) -> Tensor:
        """logits_LV of one sequence, by the model's own forward."""
        return self.base(input_ids=ids_1L).logits[0]


def logits_of(hidden_ND: Tensor, head: Head) -> Tensor:
    """The logits themselves, which training never forms: for the probe and for tests."""
    logits_NV = (
        nn.functional.linear(hidden_ND.to(head.weight_VD.dtype), head.weight_VD, head.bias_V) * head.scale
    )
    return logits_NV if head.softcap is None else head.softcap * torch.tanh(logits_NV / head.softcap)
