"""TRL's hook for people with an environment of their own: a function that makes completions in the engine's place.

    rollout_func(prompts, trainer) -> {"prompt_ids", "completion_ids", "logprobs", ...}

Prompts are those of this rank, as the rows have them; of each come `num_generations` completions, next to each other.
`env_mask` says which tokens the policy wrote (1) and which an environment did (0), which are never trained on; any other
field goes to the reward functions as a column.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from alignfast.rollout import Completion

RolloutFunc: TypeAlias = Callable[[list[Any], Any], dict[str, Any]]
_NEEDED = ("prompt_ids", "completion_ids", "logprobs")


def completions_of(
    output: dict[str, Any],
    num_prompts: int,
    n: int,
    tokenizer: PreTrainedTokenizerBase,
    end_tokens: Sequence[int],
) -> tuple[list[Completion], dict[str, list[Any]]]:
    """Completions, and the columns that the function adds.

    Args:
        output: what a rollout function returned.
        num_prompts: that it was given.
        n: completions of each.
        tokenizer: to decode with.
        end_tokens: a completion that ends in one was not cut.

    Raises:
        ValueError: a field is missing, or lists differ in length; the message names it.
    """
    missing = [name for name in _NEEDED if name not in output]
    if missing:
        raise ValueError(f"rollout_func must return {', '.join(_NEEDED)}; it left out {', '.join(missing)}")
    number = num_prompts * n
    wrong = {name: len(values) for name, values in output.items() if len(values) != number}
    if wrong:
        raise ValueError(
            f"rollout_func must return {number} items in each field, {n} for each of {num_prompts} prompts in turn; got {wrong}"
        )
    masks = output.get("env_mask") or [[1] * len(ids) for ids in output["completion_ids"]]
    found = []
    for index, (prompt, ids, logps, mask) in enumerate(zip(*(output[name] for name in _NEEDED), masks)):
        if not len(ids) == len(logps) == len(mask) or not ids or not prompt:
            raise ValueError(
                f"rollout_func: completion {index} has {len(prompt)} prompt ids, {len(ids)} ids, {len(logps)} log-probs and a "
                f"mask of {len(mask)}: all but the first must agree, and none be empty"
            )
        ended = ids[-1] in end_tokens
        found.append(
            Completion(
                prompt_ids=tuple(prompt),
                token_ids=tuple(ids),
                logps=tuple(map(float, logps)),
                sampled_logps=tuple(map(float, logps)),
                mask=tuple(map(bool, mask)),
                finish_reason="stop" if ended else "length",
                text=str(tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)),
            )
        )
    columns = {name: list(values) for name, values in output.items() if name not in (*_NEEDED, "env_mask")}
    return found, columns
