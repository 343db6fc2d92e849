"""A reward model: a decoder whose head turns the last token's hidden state into a reward, or several heads into several.

    reward_h = w_h . hidden(last token of prompt and answer)

The last token is the last one that the sequence has, whatever its id: transformers looks for the last one that is not
the pad token, and where that is the end token too it reads one token before the end.

Letters: S answers, H heads, D width, L tokens of a sequence.
Not done here: rewards of single tokens; a loss on rewards (`alignfast.losses.reward_loss`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from alignfast.data.packing import Batch, Tree
from alignfast.models.attention import ModelRefused, attention_set
from alignfast.models.four_bit import arithmetic_of
from alignfast.models.head import readout, weight_and_bias
from alignfast.models.trunk import PROBE_TOLERANCE, Trunk

RewardFn = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]
HEAD = "score"  # what transformers' decoders for sequence classification call it


class RewardModel(Trunk):
    """A sequence classification model with one output a head, packed and shared like a policy.

    Args:
        model: a transformers decoder for sequence classification, or a PEFT model around one.
        layout: `shared` (prompts computed once), `packed` (no padding, no sharing) or `padded`.
        backend: backend of the kernels.
        fresh_head: whether the head was made when the model was loaded, and knows nothing yet.

    Raises:
        ModelRefused: no trunk or head is found, or adapters leave the head frozen.
    """

    kind = "sequence classification model"
    probed = "hidden states"

    def __init__(
        self, model: nn.Module, *, layout: str = "shared", backend: str = "auto", fresh_head: bool = False
    ) -> None:
        super().__init__(model, layout=layout, backend=backend)
        self.fresh_head = fresh_head
        if not isinstance(getattr(self.base, HEAD, None), nn.Module):
            raise ModelRefused(
                f"{type(self.base).__name__} has no head named {HEAD}; load a decoder for sequence classification, or "
                "give the path of a causal language model, to which a head is added"
            )
        if hasattr(self.model, "peft_config") and not hasattr(self._head, "modules_to_save"):
            raise ModelRefused(
                f"the head {HEAD} would not be saved with the adapters: set task_type='SEQ_CLS' or "
                f"modules_to_save=['{HEAD}'] in peft_config, and leave it out of target_modules"
            )

    @property
    def num_heads(self) -> int:
        """Rewards of an answer."""
        return int(weight_and_bias(self._head)[0].shape[0])

    def forward(self, batch: Batch, loss_fn: RewardFn | None = None) -> Any:
        """Rewards of a batch's sequences, or a loss on them.

        Args:
            batch: what `alignfast.data.pack` made, in this model's layout.
            loss_fn: takes rewards_SH, tree by tree and answer by answer; None returns them.

        Returns:
            What loss_fn gives, or without one rewards_SH in float32 or float64, without gradient.
        """
        if loss_fn is None:
            with torch.no_grad():
                return self._rewards(self.hidden(batch, batch.last_S)[0])
        return loss_fn(self._rewards(self.hidden(batch, batch.last_S)[0]))

    def score(self, trees: Sequence[Tree], max_tokens: int = 4096) -> NDArray[np.float64]:
        """rewards_SH of every answer of every tree, in evaluation mode, in batches of so many tokens.

        Raises:
            ValueError: there are no trees.
            ModelRefused: the model can't be run in this layout.
        """
        if not trees:
            raise ValueError("there is nothing to score: no row has a token")
        return np.concatenate(
            [rewards_SH.double().cpu().numpy() for _, rewards_SH in self.over(trees, max_tokens)]
        )

    def set_pad_token(self, *candidates: int | None, eos_id: int | None) -> int | None:
        """Tell the model's own forward which token is padding: the first candidate that does not end sequences too.

        Returns:
            That token. None where there is none: transformers then scores sequences one at a time, and refuses batches,
            where it would read their rewards before their end tokens.
        """
        pad_id = next((id for id in candidates if id is not None and id != eos_id), None)
        self.base.config.get_text_config().pad_token_id = pad_id
        return pad_id

    @torch.no_grad()
    def probe(self) -> None:
        """Compare this layout, and the head, with the model's own forward.

        Raises:
            ModelRefused: they differ by more than rounding.
        """
        super().probe()
        config, training = self.base.config.get_text_config(), self.training
        pad_id, config.pad_token_id = config.pad_token_id, None  # one sequence: its last token is the last
        self.eval()
        try:
            ids_1L = torch.arange(2, 9, device=next(self.parameters()).device)[None] % self.vocabulary
            with attention_set(self.base, "eager"):
                theirs_1H = self.base(input_ids=ids_1L).logits
                hidden_1D = self._plain_probe(ids_1L)[-1:]
        finally:
            config.pad_token_id = pad_id
            self.train(training)
        ours_1H = self._rewards(hidden_1D)
        # Products of a dot product may cancel: rounding is a share of their sizes, not of what is left.
        norm = float(weight_and_bias(self._head)[0].float().norm(dim=1).max())
        size = float(hidden_1D.float().norm()) * norm + 1e-9
        difference = float((ours_1H.float() - theirs_1H.float()).abs().max()) / size
        if (
            theirs_1H.shape != ours_1H.shape
            or not difference <= PROBE_TOLERANCE[arithmetic_of(self.base, hidden_1D.dtype)]
        ):
            raise ModelRefused(
                f"{type(self.base).__name__} gives other rewards than its head {HEAD} on the last token's hidden state; its "
                "head is not understood"
            )

    @property
    def _head(self) -> Any:
        return getattr(self.base, HEAD)

    def _rewards(self, hidden_SD: Tensor) -> Tensor:
        return readout(hidden_SD, *weight_and_bias(self._head))

    def _probe_of(self, hidden_ND: Tensor) -> Tensor:
        return hidden_ND

    def _plain_probe(self, ids_1L: Tensor) -> Tensor:
        return self.base.base_model(input_ids=ids_1L).last_hidden_state[0]
