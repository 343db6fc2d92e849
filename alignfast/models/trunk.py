"""A decoder's trunk as trainers see it: one forward over a packed batch, in one of three layouts.

What reads the hidden states stands in policy.py (log-probs of tokens) and in reward.py (rewards of sequences). Each is
one module whose forward runs trunk and head inside, so that DDP, FSDP2, DeepSpeed and torch.compile wrap one forward;
calling the inner parts past the wrapper would leave the ranks of DDP with different gradients.

Letters: B rows, L tokens of a row, T = B * L, N rows that are read, D width, X numbers that a probe compares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from sys import modules
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignfast.data.packing import Batch, Tree, cut, pack
from alignfast.models.attention import (
    NAME,
    ModelRefused,
    attention_set,
    check_layer_kinds,
    no_mask,
)
from alignfast.models.four_bit import arithmetic_of

# Largest difference between packed and plain numbers that the probe takes for rounding, as a share of the largest.
# Trained models that packing gets wrong were off by 0.2 and more, tiny random ones by 2e-4. float64 is held no
# tighter than float32: the models round to that inside.
PROBE_TOLERANCE = {torch.float64: 2e-5, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class Trunk(nn.Module):
    """A transformers decoder with a head, or a PEFT model around one.

    Args:
        model: the model.
        layout: `shared` (prompts computed once), `packed` (no padding, no sharing) or `padded`.
        backend: backend of the kernels.

    Raises:
        ModelRefused: no trunk is found, or an adapter is of a kind that can't be honoured.
    """

    kind: str  # what a model must be loaded as
    probed: str  # what the probe compares

    def __init__(self, model: nn.Module, *, layout: str = "shared", backend: str = "auto") -> None:
        super().__init__()
        self.model: Any = model  # transformers' or PEFT's: their attributes are theirs
        self.layout, self.backend = layout, backend
        adapter = getattr(self.model, "active_peft_config", None)
        if adapter is not None and adapter.is_prompt_learning:
            raise ModelRefused("prompt-learning adapters put tokens of their own before the prompt; use LoRA")
        if self.base.base_model is self.base:
            raise ModelRefused(f"{type(self.base).__name__} has no trunk beside its head; load a {self.kind}")

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

    def hidden(self, batch: Batch, rows_N: Tensor) -> tuple[Tensor, Tensor | None]:
        """Hidden states of rows among the batch's B * L, and the router loss of a mixture of experts."""
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
        hidden_ND = output.last_hidden_state.flatten(0, 1).index_select(0, rows_N)
        return hidden_ND, self._router_loss(output, batch) if mixture else None

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

    @torch.no_grad()
    def over(self, trees: Sequence[Tree], max_tokens: int) -> Iterator[tuple[Batch, Any]]:
        """Batches of trees with what forward says of each, in evaluation mode; mode and attention are put back.

        Args:
            trees: at least one.
            max_tokens: tokens of one batch; a tree that is longer is a batch of its own.

        Raises:
            ModelRefused: the model can't be run in this layout.
        """
        device, training = next(self.parameters()).device, self.training
        # Padding costs a tree most, so that every tree fits by that measure.
        longest = max(len(tree.answers) * (len(tree.prompt) + max(map(len, tree.answers))) for tree in trees)
        self.eval()
        try:
            self.probe()
            with self.attached():
                for run in cut(trees, self.layout, max(max_tokens, longest)):
                    batch = pack([trees[i] for i in run], list(run), self.layout, pad_id=0).to(device)
                    yield batch, self(batch)
        finally:
            self.train(training)

    @torch.no_grad()
    def probe(self) -> None:
        """Compare this layout with the model's own forward on two short sequences that share a prefix.

        Raises:
            ModelRefused: what the head reads differs by more than rounding, so training would be silently wrong.
        """
        if self.layout != "padded":
            check_layer_kinds(self.base)
        ids = [(7 * i * i + 3 * i + 2) % self.vocabulary for i in range(20)]
        prompt, answers = tuple(ids[:7]), (tuple(ids[7:15]), tuple(ids[15:20]))
        tree = Tree(prompt, answers, tuple((True,) * len(answer) for answer in answers))
        device = next(self.model.parameters()).device
        batch = pack([tree], [0], layout=self.layout, pad_id=0).to(device)
        training = self.training
        self.eval()
        try:
            with self.attached():
                ours_NX = self._probe_of(self.hidden(batch, batch.source_P)[0])
            # eager is the model's own definition: stock sdpa drops Gemma 2's softcap
            with self.attached() if self.layout == "padded" else attention_set(self.base, "eager"):
                sequences = [torch.tensor([prompt + answer], device=device) for answer in answers]
                theirs = [self._plain_probe(ids_1L)[len(prompt) - 1 : -1] for ids_1L in sequences]
                theirs_NX = torch.cat(theirs)
        except ModelRefused:
            raise
        except Exception as error:
            raise ModelRefused(
                f"{type(self.base).__name__} does not run with layout={self.layout!r}: {error}; use layout='padded'"
            ) from error
        finally:
            self.train(training)
        difference = float((ours_NX.float() - theirs_NX.float()).abs().max() / theirs_NX.float().abs().max())
        tolerance = PROBE_TOLERANCE[arithmetic_of(self.base, ours_NX.dtype)]
        if not difference <= tolerance:
            remedy = "use layout='padded'" if self.layout != "padded" else "its head is not understood"
            raise ModelRefused(
                f"{type(self.base).__name__} gives other {self.probed} with layout={self.layout!r} than on its own: they differ "
                f"by {difference:.1e} of the largest (rounding explains {tolerance:.0e}); {remedy}"
            )

    def _probe_of(self, hidden_ND: Tensor) -> Tensor:
        """What the probe compares, made of hidden states."""
        raise NotImplementedError

    def _plain_probe(self, ids_1L: Tensor) -> Tensor:
        """The same of every token of one sequence, by the model's own forward."""
        raise NotImplementedError


def drops_softcap(base: PreTrainedModel) -> bool:
    """Whether the model's own attention leaves out a softcap that its config asks for."""
    softcap = getattr(base.config.get_text_config(), "attn_logit_softcapping", None)
    return softcap is not None and base.config._attn_implementation == "sdpa"
