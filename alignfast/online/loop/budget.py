"""How far a policy has gone from another one, in nats, and a limit on it while it trains.

    KL(pi || pi') ~ mean over tokens drawn from pi of  -d                    k1
                                                   of  exp(d) - 1 - d        k3, never below 0, which the budget goes by
    with d = log pi' - log pi

A round's budget is of the KL to the version that it began from, measured on fresh answers; the anchor to the start policy
is the trainer's own `beta`. Training ends after the first measurement at which the budget is spent, so that the policy
goes beyond it by what it moves in `every` steps. What training ends with is measured too, however short it was.

Letters: P tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from alignfast.data import Tree
from alignfast.evaluation.scores import MAX_TOKENS
from alignfast.kernels import kl_penalty
from alignfast.models import Policy
from alignfast.rollout import Completion, Sampling, make_engine


def fresh_answers(
    policy: Policy, tokenizer: Any, prompts: Sequence[Any], most_tokens: int, seed: int
) -> list[Completion]:
    """One answer to each prompt, at temperature 1; the same random numbers each time.

    Args:
        policy: that writes them.
        tokenizer: its tokenizer.
        prompts: texts or messages.
        most_tokens: of an answer.
        seed: of the random numbers.
    """
    sampling = Sampling(max_new_tokens=most_tokens, seed=seed)
    found = make_engine("native", policy, tokenizer).generate(list(prompts), sampling)
    return [completion for (completion,) in found]


def kl_to(other: Policy, completions: Sequence[Completion]) -> dict[str, float]:
    """The KL of the policy that drew completions at temperature 1 to another.

    Returns:
        `kl`, the mean of k1 over tokens, `kl_k3`, that of k3, and `kl_sequence`, the mean of k1's sum over a completion.
    """
    trees = [Tree(of.prompt_ids, (of.token_ids,), (of.mask,)) for of in completions]
    theirs_P = torch.cat([logps_P.double().cpu() for _, logps_P in other.over(trees, MAX_TOKENS)])
    written = [logp for of in completions for logp, wrote in zip(of.logps, of.mask) if wrote]
    ours_P = torch.tensor(written, dtype=torch.float64)
    k1_P, k3_P = (kl_penalty(ours_P, theirs_P, kind=kind) for kind in ("k1", "k3"))
    return {
        "kl": k1_P.mean().item(),
        "kl_k3": k3_P.mean().item(),
        "kl_sequence": k1_P.sum().item() / len(completions),
    }


class KlBudget(TrainerCallback, ExportableState):
    """Ends training when the policy has gone as far from another as it may; a checkpoint knows that it did.

    Args:
        trainer: whose policy it is.
        other: the version that the round began from.
        prompts: that answers are drawn to.
        most: nats a token.
        every: steps between two measurements.
        most_tokens: of an answer.

    Attributes:
        spent: the last measurement; None before the first.
        measured: the step after which it was made.
        ended: whether the budget ended training.
    """

    def __init__(
        self,
        trainer: Any,
        other: Policy,
        prompts: Sequence[Any],
        *,
        most: float,
        every: int,
        most_tokens: int,
    ) -> None:
        self.trainer, self.other, self.prompts = trainer, other, prompts
        self.most, self.every, self.most_tokens = most, every, most_tokens
        self.spent: float | None = None
        self.measured: int | None = None
        self.ended = False

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "args": {},
            "attributes": {"spent": self.spent, "measured": self.measured, "ended": self.ended},
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> Any:
        """A run whose budget was spent before a kill has ended."""
        control.should_training_stop = control.should_training_stop or self.ended
        return control

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> Any:
        """Measure where it is due."""
        if state.global_step % self.every == 0 and self._measure(args, state) >= self.most:
            self.ended = control.should_training_stop = True
            self.trainer.log.say(
                f"step {state.global_step}: the round's KL budget is spent, {self.spent:.3f} of {self.most:g}"
            )
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> Any:
        """Measure the policy that training ends with."""
        if self.measured != state.global_step:
            self._measure(args, state)
        return control

    def _measure(self, args: Any, state: Any) -> float:
        trainer = self.trainer
        with trainer.accelerator.autocast():
            found = fresh_answers(
                trainer.module, trainer.processing_class, self.prompts, self.most_tokens, args.seed
            )
            self.spent = spent = kl_to(self.other, found)["kl_k3"]
        self.measured = state.global_step
        return spent
