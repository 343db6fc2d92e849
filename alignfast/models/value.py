"""A policy with its critic: what a completion is worth before each of its tokens, in the policy's own forward.

    V_t = w . hidden(row that predicts token t)

The hidden states are those of a trunk of the critic's own (`Critic`), or the policy's (`ValueHead`). A critic with a trunk
is a sequence classification model of one output, as a reward model is: it loads in transformers, and a reward model can
become one. Policy and critic are one module with one forward, so that DDP wraps both.

Letters: P predictions, D width.
Not done here: returns, and the loss on values (`alignfast.losses.ppo`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from alignfast.data.packing import Batch
from alignfast.models.attention import ModelRefused
from alignfast.models.four_bit import has_packed_weights
from alignfast.models.head import head_of, readout, weight_and_bias
from alignfast.models.load import load_reward_model
from alignfast.models.policy import Policy
from alignfast.models.reward import HEAD, RewardModel

_WAY_OUT = "give a value_model, or set critic='shared'"


class Critic(RewardModel):
    """A reward model that is read at each token, not at the last one alone."""

    def forward(self, batch: Batch) -> Tensor:  # type: ignore[override]
        """values_P, differentiable."""
        hidden_PD, _ = self.hidden(batch, batch.source_P)
        return self._rewards(hidden_PD)[:, 0]


class ValueHead(nn.Linear):
    """A critic that reads the policy's own hidden states; 0 until it is trained, so that the policy's first step is its own."""

    def __init__(self, policy: Policy) -> None:
        weight_VD = head_of(policy.base).weight_VD
        dtype = torch.promote_types(weight_VD.dtype, torch.float32)
        super().__init__(weight_VD.shape[1], 1, device=weight_VD.device, dtype=dtype)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden_PD: Tensor) -> Tensor:
        """values_P, differentiable."""
        return readout(hidden_PD, self.weight, self.bias)[:, 0]


class ActorCritic(Policy):
    """A policy and its critic.

    Args:
        policy: the policy; its model, layout and backend are taken over.
        critic: with a trunk of its own, or a head on the policy's.

    Raises:
        ValueError: the critic knows another number of tokens than the policy, or shares weights with it.
    """

    def __init__(self, policy: Policy, critic: Critic | ValueHead) -> None:
        super().__init__(policy.model, layout=policy.layout, backend=policy.backend)
        self.critic = critic
        if isinstance(critic, ValueHead):
            return
        if critic.vocabulary != self.vocabulary:
            raise ValueError(
                f"the critic knows {critic.vocabulary} tokens and the policy {self.vocabulary}: give a value_model of the "
                "policy's vocabulary, or none, for a copy of the policy"
            )
        if {id(p) for p in critic.parameters()} & {id(p) for p in self.model.parameters()}:
            raise ValueError(
                "the value_model shares weights with the model that is trained: leave it out for a copy, or set "
                "critic='shared' for a head on the policy's trunk"
            )

    def values_of(self, batch: Batch, hidden_PD: Tensor) -> Tensor:
        """values_P of the states in which a batch's tokens were written, differentiable."""
        return self.critic(hidden_PD) if isinstance(self.critic, ValueHead) else self.critic(batch)

    @torch.no_grad()
    def values(self, batch: Batch) -> Tensor:
        """values_P alone, without gradient."""
        if isinstance(self.critic, ValueHead):
            return self.critic(self.hidden(batch, batch.source_P)[0])
        return self.critic(batch)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Packed attention in force inside the block, in both trunks."""
        with super().attached():
            if isinstance(self.critic, ValueHead):
                yield
            else:
                with self.critic.attached():
                    yield

    def probe(self) -> None:
        """Compare this layout with each model's own forward.

        Raises:
            ModelRefused: it differs by more than rounding.
        """
        super().probe()
        if isinstance(self.critic, Critic):
            self.critic.probe()


def load_critic(model: Any, **loading: Any) -> Critic:
    """A critic with a trunk of its own; a fresh head is 0.

    Args:
        model: what `load_reward_model` takes: a reward model, a critic that was saved, a causal language model's name.
        **loading: the other options of `load_reward_model`.

    Raises:
        ValueError: it has several outputs, or a checkpoint lacks its head.
        ModelRefused: the model can't be trained this way.
    """
    found = load_reward_model(model, num_heads=1, **loading)
    critic = Critic(found.model, layout=found.layout, backend=found.backend, fresh_head=found.fresh_head)
    if found.fresh_head:
        for tensor in weight_and_bias(critic._head):
            if tensor is not None:
                nn.init.zeros_(tensor)
    return critic


def critic_like(policy: Policy, adapters_are_new: bool) -> Critic:
    """A critic on a copy of a policy's trunk, its head 0. Where the policy has adapters it has fresh ones like them.

    Args:
        policy: the policy, before it is trained.
        adapters_are_new: whether its adapters change nothing yet; otherwise the copy has them in its weights.

    Raises:
        ModelRefused: transformers has no sequence classification model of this architecture, or the adapters are on the
            head alone.
    """
    model, adapters = copy.deepcopy(policy.model), None
    if hasattr(model, "peft_config"):
        adapters = _adapters_like(policy)
        if has_packed_weights(model) and not adapters_are_new:
            raise ModelRefused(f"a critic would have the adapters merged into weights of 4 bits: {_WAY_OUT}")
        model = model.unload() if adapters_are_new else model.merge_and_unload()
    trunk = model.base_model
    config = trunk.config
    config.num_labels = 1
    try:
        with torch.device("meta"):  # its weights are not wanted
            made: Any = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise ModelRefused(
            f"transformers has no sequence classification model for {config.model_type}, which a critic of its own would be: "
            f"{_WAY_OUT}"
        ) from error
    if type(getattr(made, made.base_model_prefix, None)) is not type(trunk) or not isinstance(
        getattr(made, HEAD, None), nn.Linear
    ):
        raise ModelRefused(
            f"{type(made).__name__} is not the trunk of {type(model).__name__} with a head {HEAD}: {_WAY_OUT}"
        )
    setattr(made, made.base_model_prefix, trunk)
    made.config = config  # the trunk's own, so that both go by one attention setting
    weight_VD, theirs = head_of(policy.base).weight_VD, made.score
    made.score = nn.Linear(
        theirs.in_features, 1, theirs.bias is not None, device=weight_VD.device, dtype=weight_VD.dtype
    )
    for tensor in made.score.parameters():
        nn.init.zeros_(tensor)
    if adapters is not None:
        from peft import get_peft_model

        for name in ("is_loaded_in_4bit", "is_quantized", "quantization_method", "hf_quantizer"):
            if hasattr(model, name):  # by which PEFT knows how to adapt quantised layers
                setattr(made, name, getattr(model, name))
        made = get_peft_model(made, adapters)
    return Critic(made, layout=policy.layout, backend=policy.backend, fresh_head=True)


def _adapters_like(policy: Policy) -> Any:
    """The PEFT config of a policy as one for its critic: without the language model's head."""
    config: Any = copy.deepcopy(policy.model.active_peft_config)
    head = policy.base.get_output_embeddings()
    names = {name for name, module in policy.base.named_modules() if module is head}
    config.task_type, config.inference_mode = "SEQ_CLS", False
    for field in ("target_modules", "modules_to_save"):
        listed = getattr(config, field, None)
        if listed is not None and not isinstance(listed, str):
            setattr(config, field, type(listed)(name for name in listed if name not in names) or None)
    if not config.target_modules:
        raise ModelRefused(f"peft_config adapts the head alone, which a critic has not: {_WAY_OUT}")
    return config
