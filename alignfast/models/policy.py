"""A language model as trainers see it: one module whose forward runs trunk and fused head.

DDP, FSDP2, DeepSpeed and torch.compile wrap this one forward and gather the head's weight by their own hooks;
calling the inner trunk and head past the wrapper would leave the ranks of DDP with different gradients.

Letters: B rows, L tokens of a row, T = B * L, P predictions, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from sys import modules
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignfast.data.packing import Batch, Tree, pack
from alignfast.kernels import PackedLayout, linear_loss, linear_token_logps
from alignfast.kernels._workspace import workspace
from alignfast.kernels.linear_loss import LossFn
from alignfast.models.attention import (
    NAME,
    KeyValueCache,
    ModelRefused,
    attention_set,
    check_layer_kinds,
    no_mask,
)
from alignfast.models.head import Head, head_of

# Largest difference between packed and plain logits that the probe takes for rounding, as a share of the largest
# logit. Trained models that packing gets wrong were off by 0.2 and more, tiny random ones by 2e-4. float64 is held no
# tighter than float32: the models round to that inside.
PROBE_TOLERANCE = {torch.float64: 2e-5, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class Policy(nn.Module):
    """A causal language model with its log-probs, in one of three layouts that give the same losses.

    Args:
        model: a transformers causal language model, or a PEFT model around one.
        layout: `shared` (prompts computed once), `packed` (no padding, no sharing) or `padded`.
        backend: backend of the kernels.

    Raises:
        ModelRefused: no trunk or head is found, or an adapter is of a kind that can't be honoured.
    """

    def __init__(self, model: nn.Module, *, layout: str = "shared", backend: str = "auto") -> None:
        super().__init__()
        self.model: Any = model  # transformers' or PEFT's: their attributes are theirs
        self.layout, self.backend = layout, backend
        adapter = getattr(self.model, "active_peft_config", None)
        if adapter is not None and adapter.is_prompt_learning:
            raise ModelRefused("prompt-learning adapters put tokens of their own before the prompt; use LoRA")
        if self.base.base_model is self.base:
            raise ModelRefused(
                f"{type(self.base).__name__} has no trunk beside its head; load a causal language model"
            )
        head_of(self.base)

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model, without PEFT around it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def vocabulary(self) -> int:
        """Token ids that the model has embeddings for."""
        embeddings: Any = self.base.get_input_embeddings()
        return int(embeddings.weight.shape[0])

    @property
    def positions(self) -> int | None:
        """Tokens of a sequence that the model was made for; None where its config does not say."""
        return getattr(self.base.config.get_text_config(), "max_position_embeddings", None)

    def forward(
        self,
        batch: Batch,
        loss_fn: LossFn | None = None,
        *,
        stats: Sequence[str] = ("logps",),
        group_sizes: Sequence[int] | None = None,
        router_weight: float = 1.0,
        temperature: float = 1.0,
    ) -> Any:
        """Log-probs of a batch, or a loss on them.

        Args:
            batch: what `alignfast.data.pack` made, in this policy's layout.
            loss_fn: see `alignfast.kernels.linear_loss`, over the batch's P predictions. None: return the log-probs.
            stats: the statistics that `loss_fn` reads.
            group_sizes: predictions that `loss_fn` must see together.
            router_weight: this batch's share of the step, by which a mixture's router loss is weighed.
            temperature: divisor of the logits: what the tokens were sampled at.

        Returns:
            (loss, metrics), or without a loss_fn logps_P in float32, without gradient.
        """
        if loss_fn is None:
            with torch.no_grad():
                hidden_PD, _ = self._hidden(batch)
                return self._token_logps(hidden_PD, batch.target_P, temperature)
        hidden_PD, router_loss = self._hidden(batch)
        head = head_of(self.base)
        loss, metrics = linear_loss(
            hidden_PD.to(head.weight_VD.dtype), head.weight_VD, batch.target_P, loss_fn,
            stats=stats, group_sizes=group_sizes, bias_V=head.bias_V, scale=head.scale, softcap=head.softcap,
            temperature=temperature, backend=self.backend,
        )  # fmt: skip
        if router_loss is not None:
            loss = loss + router_weight * router_loss
            metrics = {**metrics, "router_loss": router_weight * router_loss.detach()}
        return loss, metrics

    def _token_logps(self, hidden_PD: Tensor, target_P: Tensor, temperature: float) -> Tensor:
        head = head_of(self.base)
        logps_P = linear_token_logps(
            hidden_PD.to(head.weight_VD.dtype), head.weight_VD, target_P,
            bias_V=head.bias_V, scale=head.scale, softcap=head.softcap, temperature=temperature,
            backend=self.backend,
        )  # fmt: skip
        assert isinstance(logps_P, Tensor)
        return logps_P

    def _hidden(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Hidden states of the rows that predict, and the router loss of a mixture of experts."""
        keywords: dict[str, Any] = {"attention_mask": batch.attention_mask_BL, "use_cache": False}
        if batch.layout is not None:
            if self.base.config._attn_implementation != NAME:
                raise RuntimeError(
                    "a packed batch needs packed attention: run inside `with policy.attached():`"
                )
            keywords["attention_mask"] = no_mask(batch.input_ids_BL.device)
            keywords["packed_layout"], keywords["packed_backend"] = batch.layout, self.backend
        mixture = self.training and bool(getattr(self.base, "router_aux_loss_coef", 0))
        if mixture:
            keywords["output_router_logits"] = True
        output = self.base.base_model(
            input_ids=batch.input_ids_BL, position_ids=batch.position_ids_BL, **keywords
        )
        hidden_PD = output.last_hidden_state.flatten(0, 1).index_select(0, batch.source_P)
        return hidden_PD, self._router_loss(output, batch) if mixture else None

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

    def _router_loss(self, output: Any, batch: Batch) -> Tensor:
        """Load-balancing loss of the model's own kind, over the tokens computed."""
        balance = getattr(modules[type(self.base).__module__], "load_balancing_loss_func", None)
        if balance is None or getattr(output, "router_logits", None) is None:
            raise ModelRefused(
                f"{type(self.base).__name__} has a router loss that alignfast can't find; set router_aux_loss_coef=0 "
                "on the model to train without it"
            )
        base: Any = self.base
        loss = balance(
            output.router_logits, base.num_experts, base.num_experts_per_tok, batch.attention_mask_BL
        )
        return base.router_aux_loss_coef * loss

    def set_router_weight(self, coefficient: float) -> None:
        """What a mixture's balancing loss counts.

        Raises:
            ValueError: the model is no mixture of experts.
        """
        base: Any = self.base
        if not hasattr(base, "router_aux_loss_coef"):
            raise ValueError(
                f"router_aux_loss_coef: {type(base).__name__} is no mixture of experts; leave it out"
            )
        base.router_aux_loss_coef = coefficient

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Packed attention in force inside the block, the model's own outside.

        `padded` keeps the model's own inside too, unless that is sdpa and the scores have a softcap (Gemma 2), which
        transformers' sdpa drops: eager takes its place.
        """
        name = NAME if self.layout != "padded" else "eager" if drops_softcap(self.base) else None
        with nullcontext() if name is None else attention_set(self.base, name):
            yield

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """The model without its adapters: LoRA's own reference.

        Raises:
            ValueError: the model has no adapters.
        """
        if not hasattr(self.model, "disable_adapter"):
            raise ValueError("this model has no adapters to switch off; give a reference model")
        with self.model.disable_adapter():
            yield

    def reference_copy(self) -> Policy:
        """A frozen copy, in evaluation mode."""
        reference = Policy(copy.deepcopy(self.model), layout=self.layout, backend=self.backend)
        return reference.requires_grad_(False).eval()

    @torch.no_grad()
    def probe(self) -> None:
        """Compare this layout with the model's own forward on two short sequences that share a prefix.

        Raises:
            ModelRefused: the logits differ by more than rounding, so training would be silently wrong.
        """
        if self.layout != "padded":
            check_layer_kinds(self.base)
        vocabulary = int(head_of(self.base).weight_VD.shape[0])
        ids = [(7 * i * i + 3 * i + 2) % vocabulary for i in range(20)]
        prompt, answers = tuple(ids[:7]), (tuple(ids[7:15]), tuple(ids[15:20]))
        tree = Tree(prompt, answers, tuple((True,) * len(answer) for answer in answers))
        device = next(self.model.parameters()).device
        batch = pack([tree], [0], layout=self.layout, pad_id=0).to(device)
        training = self.training
        self.eval()
        try:
            with self.attached():
                hidden_PD, _ = self._hidden(batch)
            ours_PV = logits_of(hidden_PD, head_of(self.base))
            # eager is the model's own definition: stock sdpa drops Gemma 2's softcap
            with self.attached() if self.layout == "padded" else attention_set(self.base, "eager"):
                theirs_PV = torch.cat([self.plain_logits(prompt, answer, device) for answer in answers])
        except ModelRefused:
            raise
        except Exception as error:
            raise ModelRefused(
                f"{type(self.base).__name__} does not run with layout={self.layout!r}: {error}; use layout='padded'"
            ) from error
        finally:
            self.train(training)
        difference = float((ours_PV.float() - theirs_PV.float()).abs().max() / theirs_PV.float().abs().max())
        tolerance = PROBE_TOLERANCE[ours_PV.dtype]
        if not difference <= tolerance:
            remedy = "use layout='padded'" if self.layout != "padded" else "its head is not understood"
            raise ModelRefused(
                f"{type(self.base).__name__} gives other logits with layout={self.layout!r} than on its own: they differ "
                f"by {difference:.1e} of the largest (rounding explains {tolerance:.0e}); {remedy}"
            )

    def plain_logits(self, prompt: tuple[int, ...], answer: tuple[int, ...], device: torch.device) -> Tensor:
        """The logits that predict an answer, by the model's own forward."""
        output = self.base(input_ids=torch.tensor([prompt + answer], device=device))
        return output.logits[0, len(prompt) - 1 : -1]


def drops_softcap(base: PreTrainedModel) -> bool:
    """Whether the model's own attention leaves out a softcap that its config asks for."""
    softcap = getattr(base.config.get_text_config(), "attn_logit_softcapping", None)
    return softcap is not None and base.config._attn_implementation == "sdpa"


def logits_of(hidden_ND: Tensor, head: Head) -> Tensor:
    """The logits themselves, which training never forms: for the probe and for tests."""
    logits_NV = (
        nn.functional.linear(hidden_ND.to(head.weight_VD.dtype), head.weight_VD, head.bias_V) * head.scale
    )
    return logits_NV if head.softcap is None else head.softcap * torch.tanh(logits_NV / head.softcap)
