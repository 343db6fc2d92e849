"""policy_loss against TRL 1.16 itself, where it is installed: loss, gradient and metrics of each of its losses.

Letters: T tokens, B rows, L steps of a padded row.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ops.policies import Tokens
from torch import Tensor

from alignfast.kernels._policy import LEVELS, LOSSES


def trl_loss(tokens: Tokens, name: str, level: str, options: dict[str, Any], entropy: float) -> tuple:
    """(loss, its gradient, metrics) by `GRPOTrainer._compute_loss` of the tokens as padded rows, called on a stand-in for the trainer."""
    trainers = pytest.importorskip("trl.trainer.grpo_trainer")
    logps = tokens.logps_T.requires_grad_()

    def padded(x_T: Tensor) -> Tensor:
        parts = [x_T.nan_to_num().split(tokens.lengths)[i] for i in range(len(tokens.lengths))]
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)

    mask_BL, logps_BL = padded(tokens.mask_T.double()), padded(logps)
    B, L = mask_BL.shape
    arguments = {"delta": None, "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.25} | options
    accelerator = SimpleNamespace(
        num_processes=1, sync_gradients=False, gather=lambda x: x, reduce=lambda x, reduction: x
    )
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps_BL, -logps_BL, None),
        args=SimpleNamespace(steps_per_generation=1, **arguments),
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        _metrics={"train": defaultdict(list)},
        loss_type=name,
        importance_sampling_level=level,
        beta=arguments["beta"],
        epsilon_low=0.2,
        epsilon_high=arguments["epsilon_high"],
        max_completion_length=50,
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        aux_loss_enabled=False,
        use_adaptive_entropy=False,
        _entropy_bonus_enabled=entropy != 0,
        entropy_coef=entropy,
    )
    ones_BL = torch.ones(B, L, dtype=torch.int64)
    inputs = {
        "prompt_ids": ones_BL, "prompt_mask": ones_BL, "completion_ids": ones_BL, "completion_mask": mask_BL,
        "advantages": padded(tokens.advantages_T), "old_per_token_logps": padded(tokens.old_T),
        "ref_per_token_logps": padded(tokens.ref_T), "num_items_in_batch": mask_BL.sum(),
        "importance_sampling_ratio": padded(torch.linspace(0.5, 2, len(logps), dtype=torch.float64)),
    }  # fmt: skip
    loss = trainers.GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss, torch.autograd.grad(loss, logps)[0], trainer._metrics["train"]


VARIANTS = {name: ["plain", "kl", "corrected kl"] for name in LOSSES if name != "ppo"}
for name in ("grpo", "bnpo", "dr_grpo", "dapo"):
    VARIANTS[name].append("delta")
# for others TRL's entropy is averaged apart from the loss, ours as the loss
for name in ("bnpo", "dapo", "cispo"):
    VARIANTS[name].append("entropy")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("name", "variant"), [(name, v) for name in VARIANTS for v in VARIANTS[name]])
def test_against_trl(name: str, variant: str, level: str) -> None:
    """Loss, gradient and metrics of TRL 1.16 itself, where it is installed."""
    tokens = Tokens([9, 30, 1, 16], torch.float64, spread=0.5)
    tokens.mask_T[39] = True  # a row without a token is 0 / 0 in TRL's metrics
    for x_T in (tokens.logps_T, tokens.old_T, tokens.ref_T, tokens.advantages_T):
        x_T.nan_to_num_(-1.0)
    options: dict[str, Any] = {"beta": 0.0, "use_bias_correction_kl": variant == "corrected kl"}
    options |= {"epsilon_high": 1.5 if name == "cispo" else 0.28}
    options |= {"delta": 1.6} if variant == "delta" else {"beta": 0.2 * (variant[-2:] == "kl")}
    coef = 0.1 * (variant == "entropy")
    expected, expected_T, theirs = trl_loss(tokens, name, level, options, coef)
    if name == "sapo":  # 1.25: TRL rounds temperatures to float32
        options = {key: options[key] for key in ("beta", "use_bias_correction_kl")} | {
            "sapo_temperature_neg": 1.25
        }
    logps_T = tokens.logps_T.detach().requires_grad_()
    weights_T = torch.linspace(0.5, 2, len(logps_T), dtype=torch.float64)
    loss_T, metrics = tokens.call(
        logps_T, name, "torch", importance_sampling_level=level, importance_weights_T=weights_T,
        entropy_T=-logps_T, entropy_coef=coef, **options,
    )  # fmt: skip
    assert loss_T.sum().item() == pytest.approx(expected.item(), rel=1e-12)
    (gradient_T,) = torch.autograd.grad(loss_T.sum(), logps_T)
    assert torch.allclose(gradient_T, expected_T, rtol=1e-11, atol=1e-15)
    counted = {"kl": "tokens", "entropy": "tokens"}
    for metric in ("kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean",
                   "cispo_clip_ratio"):  # fmt: skip
        assert (metric in metrics) == (metric in theirs)
        if metric in metrics:
            by_tokens = level == "token" or metric in counted
            denominator = tokens.mask_T.sum() if by_tokens else len(tokens.lengths)
            assert (metrics[metric] / denominator).item() == pytest.approx(theirs[metric][0], rel=1e-5)
