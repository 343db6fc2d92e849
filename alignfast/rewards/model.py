"""A reward model as a reward function: the score of its head on a completion's last token.

    r = mean_k s_k - disagreement_coef * std_k s_k        over the K heads of an ensemble; std with divisor K

Where heads that learned the same disagree, they have not seen the like, and a policy that went there would be rewarded
for the model's mistake (arXiv 2310.02743). Prompt and completion are tokenised by the reward model's own tokenizer, as
in its training: plain text with an end-of-sequence token, so that a completion that was cut short is scored as if it
ended there. Batches are right-padded and masked, and the score is taken at the last token by its place: transformers'
own head looks for the last token that is not the pad, which is one too early where pad and end of sequence are one.

Letters: N completions, K heads, B rows, L tokens, D width.
Not done here: training one; encoders and encoder-decoders; cutting what is too long.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from alignfast.data import encode_completions
from alignfast.models import ModelRefused, load_tokenizer
from alignfast.models.attention import attention_set
from alignfast.models.trunk import drops_softcap
from alignfast.rewards.protocol import Estimate, Text

MAX_TOKENS = 8192  # of one batch, padding included


class Scorer(Protocol):
    """Whatever scores completions."""

    def score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> Tensor:
        """(N,) or, of an ensemble, (N, K) scores; the higher the better."""


class ModelReward:
    """A scorer as a reward function.

    Args:
        scorer: a `ClassifierScorer`, or anything with its `score`.
        disagreement_coef: what the spread of an ensemble's heads costs, >= 0; 0 takes their mean. None for a scorer
            of one head, which has no spread.
        name: what it is called in metrics.

    Raises:
        ValueError: the coefficient does not go with the number of heads.
    """

    def __init__(
        self, scorer: Scorer, *, disagreement_coef: float | None = None, name: str = "reward_model"
    ) -> None:
        if disagreement_coef is not None and not 0 <= disagreement_coef < float("inf"):
            raise ValueError(f"disagreement_coef must be a number >= 0, got {disagreement_coef}")
        self.scorer, self.disagreement_coef, self.name = scorer, disagreement_coef, name
        if hasattr(scorer, "num_heads"):
            self._check_heads(scorer.num_heads)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        disagreement_coef: float | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
    ) -> ModelReward:
        """The reward model that lies in a folder with its tokenizer.

        Args:
            folder: of a sequence classification model with a decoder's trunk, as `save_pretrained` writes it.
            disagreement_coef: see `ModelReward`; a model of several labels needs it.
            dtype: of the parameters; None is float32.
            device: where it shall be; None: the CPU.
            trust_remote_code: run code that comes with the model; off unless asked for.

        Raises:
            ModelRefused: there is no reward model in it, or one that can't be scored with here.
            ValueError: model and tokenizer, or heads and coefficient, do not fit.
        """
        folder = Path(folder).expanduser()
        model = _load(folder, dtype or torch.float32, trust_remote_code).to(device or "cpu")
        tokenizer = load_tokenizer(None, folder, trust_remote_code=trust_remote_code)
        try:
            scorer = ClassifierScorer(model, tokenizer)
            return cls(scorer, disagreement_coef=disagreement_coef, name=folder.resolve().name)
        except ValueError as error:  # ModelRefused is one
            raise type(error)(f"{folder}: {error}") from error

    def require(self, columns: Collection[str], conversational: bool) -> None:
        """Raise ValueError unless the scorer can read such rows."""
        if hasattr(self.scorer, "require"):
            self.scorer.require(conversational)

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
    ) -> list[float | None]:
        """The reward of each completion; an ensemble's say how far its heads lie apart."""
        scores = self.scorer.score(prompts, completions)
        if scores.ndim not in (1, 2) or len(scores) != len(completions):
            raise ValueError(
                f"expected ({len(completions)},) or ({len(completions)}, K) scores, got {tuple(scores.shape)}"
            )
        scores_NK = scores.float().reshape(len(completions), -1)
        self._check_heads(scores_NK.shape[1])
        mean_N = scores_NK.mean(1)
        if scores_NK.shape[1] == 1:
            return mean_N.tolist()
        spread_N = scores_NK.std(1, correction=0)
        rewards_N = mean_N - (self.disagreement_coef or 0.0) * spread_N
        return [Estimate(r, disagreement=s) for r, s in zip(rewards_N.tolist(), spread_N.tolist())]

    def _check_heads(self, K: int) -> None:
        if K > 1 and self.disagreement_coef is None:
            raise ValueError(
                f"the reward model has {K} labels. If they are an ensemble of reward heads, say what their disagreement "
                "costs: disagreement_coef=0 takes their mean; if they are classes, it is no reward model"
            )
        if K == 1 and self.disagreement_coef:
            raise ValueError(
                f"disagreement_coef={self.disagreement_coef} needs an ensemble of heads, and the reward model has one"
            )


class ClassifierScorer:
    """Scores by a sequence classification model of transformers on a decoder's trunk.

    Args:
        model: with a linear head `score`; it stays where it is, its mode is put back after each call.
        tokenizer: the model's own; it needs no pad token.
        max_tokens: tokens of one batch, padding included; a longer completion is a batch of its own.

    Raises:
        ModelRefused: the model has no such head, or is no decoder.
        ValueError: the tokenizer is another model's.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int = MAX_TOKENS
    ) -> None:
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens
        head = getattr(model, "score", None)
        if not isinstance(head, nn.Linear) or getattr(model.config, "is_encoder_decoder", False):
            raise ModelRefused(
                f"{type(model).__name__} has no linear head `score` on a decoder's last token; expected a model as "
                "AutoModelForSequenceClassification makes of a causal language model"
            )
        self.head = head
        if model.config.num_labels != self.num_heads:
            raise ModelRefused(
                f"the config says num_labels={model.config.num_labels} and the head has {self.num_heads} outputs: one "
                "of them is another model's"
            )
        embeddings: Any = model.get_input_embeddings()
        largest, known = max(tokenizer.get_vocab().values(), default=-1), embeddings.weight.shape[0]
        if largest >= known:
            raise ValueError(
                f"the tokenizer gives token ids up to {largest} and the reward model knows {known} tokens: take the "
                "reward model's own tokenizer"
            )

    @property
    def num_heads(self) -> int:
        """Scores of one completion."""
        return self.head.out_features

    def require(self, conversational: bool) -> None:
        """Raise ValueError unless the tokenizer can put such rows into tokens."""
        prompt: Any = "a"
        completion: Any = "b"
        if conversational:
            prompt = [{"role": "user", "content": "a"}]
            completion = [{"role": "assistant", "content": "b"}]
        try:
            encode_completions([prompt], [completion], self.tokenizer)
        except ValueError as error:
            raise ValueError(f"the reward model can't read such rows: {error}") from error

    @torch.no_grad()
    def score(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Tensor:
        """(N, K) scores, float32 on the CPU; a completion's do not depend on what is scored beside it.

        Raises:
            ValueError: a completion is too long for the model, or has no token.
        """
        ids = encode_completions(prompts, completions, self.tokenizer)
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        for index, tokens in enumerate(ids):
            if not tokens or (limit is not None and len(tokens) > limit):
                raise ValueError(
                    f"completion {index} has {len(tokens)} tokens with its prompt; the reward model takes 1 to {limit}"
                )
        scores_NK = torch.empty(len(ids), self.num_heads)
        training = self.model.training
        self.model.eval()
        # stock sdpa drops Gemma 2's softcap
        eager = attention_set(self.model, "eager") if drops_softcap(self.model) else nullcontext()
        try:
            with eager:
                for rows in _batches([len(tokens) for tokens in ids], self.max_tokens):
                    scores_NK[rows] = self._score([ids[row] for row in rows])
        finally:
            self.model.train(training)
        return scores_NK

    def _score(self, ids: list[list[int]]) -> Tensor:
        device = self.head.weight.device
        lengths_B = torch.tensor([len(tokens) for tokens in ids], device=device)
        longest = max(map(len, ids))
        # Any id will do as padding: it is masked, and comes after what is read.
        ids_BL = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in ids], device=device)
        mask_BL = (torch.arange(longest, device=device) < lengths_B[:, None]).long()
        trunk: Any = self.model.base_model
        hidden_BLD = trunk(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).last_hidden_state
        last_BD = hidden_BLD[torch.arange(len(ids), device=device), lengths_B - 1]
        return self.head(last_BD.to(self.head.weight.dtype)).float().cpu()


def _batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Rows of like length together, as many as fit when all are padded to the longest.

    >>> _batches([5, 1, 4, 2], max_tokens=10)
    [[1, 3], [2, 0]]
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if batches and (len(batches[-1]) + 1) * lengths[row] <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _load(folder: Path, dtype: str | torch.dtype, trust_remote_code: bool) -> Any:
    if not (folder / "config.json").is_file():
        if find_adapter_config_file(str(folder)) is not None:
            raise ModelRefused(f"{folder} holds adapters; merge them into their reward model first")
        raise ModelRefused(f"{folder} holds no reward model: there is no config.json")
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ModelRefused(f"{folder} holds no reward model: {error}") from error
    # transformers makes up what is missing, and a made-up head scores at random.
    missing = sorted(found["missing_keys"]) + sorted(str(key) for key in found["mismatched_keys"])
    if missing:
        raise ModelRefused(
            f"{folder} holds no reward model: {', '.join(missing[:3])} is not in its weights (a language model has no "
            "reward head; train one with `alignfast reward`)"
        )
    return model
