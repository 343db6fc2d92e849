"""When another engine drew the tokens: the policy's own log-probs for the ratios, and weights for the difference.

    w = pi(token) / engine(token), by token or by sequence, cut at a cap     a constant factor on the token's loss

Letters: P trained tokens of all completions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alignfast.data import Batch
from alignfast.losses import importance_weights
from alignfast.trainers.experience import Drawn, Experience

if TYPE_CHECKING:
    from alignfast.trainers.on_policy import OnPolicyTrainer

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def correct(trainer: OnPolicyTrainer, experience: Experience, drawn: list[Drawn]) -> None:
    """Put the policy's log-probs in the place of the engine's, and their ratio beside them; on all ranks."""
    args = trainer.args
    trainer.policy.eval()  # as the engine samples

    def by_the_policy(batch: Batch) -> Tensor:
        logps_P: Tensor = trainer.policy(batch, temperature=args.temperature)
        return logps_P

    experience.old_logps = trainer.of_tokens(experience, by_the_policy)
    if not args.vllm_importance_sampling_correction:
        return
    lengths = [len(logps) for logps in experience.old_logps]
    then = [
        logp
        for of, tree in zip(drawn, experience.trees)
        for logp, trained in zip(of.completion.sampled_logps, tree.trained[0])
        if trained
    ]
    level, mode = args.vllm_importance_sampling_mode.split("_")
    found = importance_weights(
        torch.cat(experience.old_logps), torch.tensor(then), lengths, level=level, mode=mode,
        cap=args.vllm_importance_sampling_clip_max, floor=args.vllm_importance_sampling_clip_min,
    )  # fmt: skip
    experience.more["importance_weights"] = list(found.weights_P.split(lengths))
    experience.metrics |= {name: value.item() for name, value in found.metrics.items()}
