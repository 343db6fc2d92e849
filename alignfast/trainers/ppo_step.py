"""One step of PPO as a function, for loops of your own: sample, score, and improve on it a few times.

    A_n = (reward_n - mean) / std                      the baseline is the mean of the call's rewards
    loss = -mean over tokens of min(r A, clip(r, 1 - c, 1 + c) A),   r = pi(token) / pi_old(token)

The log-probs of pi_old are those that the tokens were drawn with, and stay as they are through all iterations.

Letters: N completions, P predictions.
Not done here: a critic (every token of a completion has its advantage), a KL to a reference, micro-batches, ranks,
checkpoints: PPOTrainer has all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from alignfast.data import Tree, pack
from alignfast.kernels import group_advantages
from alignfast.losses.grpo import POLICY_STATS
from alignfast.losses.ppo import ppo_counts, ppo_objective
from alignfast.models.policy import Policy
from alignfast.rollout import Completion, Sampling, make_engine
from alignfast.rollout.prompts import evaluating
from alignfast.trainers.metrics import means


def ppo_step(
    model: Any,
    reward: Callable[..., Any],
    optimizer: torch.optim.Optimizer,
    prompts: Any,
    num_iterations: int = 5,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    cliprange: float = 0.2,
    max_grad_norm: float | None = 1.0,
) -> dict[str, float]:
    """Sample a completion of each prompt, score them, and take `num_iterations` steps of clipped policy gradient.

    Args:
        model: a transformers causal language model, a PEFT model, or a `Policy` (`load_policy(model, layout="padded")` for
            one that can't be packed). It is trained in place, without dropout; its mode is put back.
        reward: `reward(prompts, completions)` gives a number for each, as a list or a tensor; NaN or None leaves one out.
            It gets texts where there is a tokenizer, else lists of token ids.
        optimizer: over the model's parameters.
        prompts: two or more: texts, lists of token ids, a tensor of ids, or what a tokenizer returns, with its mask.
        num_iterations: steps on these completions, >= 1.
        tokenizer: the model's; needed for texts.
        max_new_tokens: a completion ends here at the latest.
        temperature: of the samples, and of the log-probs, > 0.
        cliprange: how far a ratio may move where that gains.
        max_grad_norm: gradients are scaled down to this norm; None leaves them.

    Returns:
        `reward`, `reward_std`, `length`; and of the last iteration `loss`, `val/ratio`, `policy/clipfrac_avg`,
        `policy/approxkl_avg`, `policy/entropy_avg` and others of PPOTrainer's. Draws follow torch.manual_seed.

    Raises:
        ValueError: there are fewer than two prompts, an option is out of range, or the reward is no function or does not fit.
        ModelRefused: the model can't be packed.

    >>> rate = lambda prompts, completions: [text.count("!") for text in completions]
    >>> ppo_step(model, rate, optimizer, ["Hello", "Well"], tokenizer=tokenizer)["reward"]  # doctest: +SKIP
    0.5
    """
    if num_iterations < 1 or not temperature > 0:
        raise ValueError(
            f"expected num_iterations >= 1 and temperature > 0, got {num_iterations} and {temperature}"
        )
    policy = model if isinstance(model, Policy) else Policy(model)
    device = next(policy.parameters()).device
    with evaluating(policy):
        policy.probe()
        # of its own for each call, by torch's generator
        seed = int(torch.randint(1 << 31, ()))
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        completions, rewards_N = _draw(policy, reward, _prompts(prompts, tokenizer), tokenizer, sampling)
        advantages_N = group_advantages(rewards_N, torch.zeros(len(rewards_N), dtype=torch.int64))
        trees = [Tree(c.prompt_ids, (c.token_ids,), (c.mask,)) for c in completions]
        batch = pack(trees, range(len(trees)), policy.layout, pad_id=0).to(device)
        lengths_N = torch.tensor(batch.lengths)
        objective = ppo_objective(
            batch.lengths,
            advantages_N.float().repeat_interleave(lengths_N).to(device),
            torch.tensor([logp for c in completions for logp in c.logps], device=device),
            num_items=sum(batch.lengths),
            epsilon=cliprange,
            backend=policy.backend,
        )
        with policy.attached():
            for _ in range(num_iterations):
                optimizer.zero_grad(set_to_none=True)
                loss, sums = policy(batch, objective, stats=POLICY_STATS, temperature=temperature)
                loss.backward()
                if max_grad_norm is not None:
                    nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
                optimizer.step()
    known_N = rewards_N[~rewards_N.isnan()]
    return {
        "reward": known_N.mean().item(),
        "reward_std": known_N.std().item() if len(known_N) > 1 else 0.0,
        "length": lengths_N.double().mean().item(),
        "loss": loss.item(),
        **{name: x.item() for name, x in means(sums, ppo_counts(list(sums), sum(batch.lengths))).items()},
    }


def _draw(
    policy: Policy, reward: Callable[..., Any], prompts: list[Any], tokenizer: Any, sampling: Sampling
) -> tuple[list[Completion], Tensor]:
    """A completion of each prompt, and rewards_N.

    Raises:
        ValueError: the reward is no function, or does not fit.
    """
    if not callable(reward):
        raise ValueError(f"reward must be a function reward(prompts, completions), got {reward!r}")
    name = "transformers" if policy.layout == "padded" else "native"
    engine = make_engine(name, policy, _NoTokenizer() if tokenizer is None else tokenizer)  # type: ignore[arg-type]
    completions = [group[0] for group in engine.generate(prompts, sampling)]
    if tokenizer is None:
        found = reward(prompts, [list(completion.token_ids) for completion in completions])
    else:
        texts = [x if isinstance(x, str) else tokenizer.decode(x, skip_special_tokens=True) for x in prompts]
        found = reward(texts, [completion.text for completion in completions])
    return completions, _rewards(found, len(prompts))


class _NoTokenizer:
    """What an engine asks of a tokenizer, where prompts are token ids and so are completions."""

    eos_token_id = pad_token_id = None

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        """No text."""
        return ""


def _prompts(prompts: Any, tokenizer: Any) -> list[Any]:
    """Texts, or lists of token ids without their padding.

    Raises:
        ValueError: there are fewer than two, or texts without a tokenizer.
    """
    if isinstance(prompts, Mapping):
        ids_BL = torch.as_tensor(prompts["input_ids"])
        mask_BL = torch.as_tensor(prompts.get("attention_mask", torch.ones_like(ids_BL))).bool()
        found: list[Any] = [row_L[real_L].tolist() for row_L, real_L in zip(ids_BL, mask_BL)]
    else:
        found = prompts.tolist() if isinstance(prompts, Tensor) else list(prompts)
    if isinstance(prompts, str) or len(found) < 2:
        raise ValueError(
            f"the baseline is the mean of several completions: give a list of two or more prompts, got {prompts!r}"
        )
    if tokenizer is None and isinstance(found[0], str):
        raise ValueError("prompts are texts: give their tokenizer")
    return found


def _rewards(found: Any, number: int) -> Tensor:
    """rewards_N as float64 on the CPU, NaN for none.

    Raises:
        ValueError: there is not one finite number for each completion, or none at all.
    """
    listed = found.tolist() if hasattr(found, "tolist") else list(found)
    if not isinstance(listed, list) or len(listed) != number or any(isinstance(x, list) for x in listed):
        raise ValueError(f"reward must give {number} numbers, one for each completion, got {found!r}")
    rewards_N = torch.tensor([float("nan") if x is None else float(x) for x in listed], dtype=torch.float64)
    if rewards_N.isinf().any() or rewards_N.isnan().all():
        raise ValueError(f"reward must give finite numbers, got {listed}")
    return rewards_N
