"""Answers to the same prompts before and after a training, in samples.jsonl of its folder: what the report shows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignfast.rollout import Prompt
    from alignfast.trainers.loop import Trainer

_NEW_TOKENS = 128
_BY_DEFAULT = 3


def first_prompts(
    source: Any, number: int | None, formats: Sequence[str], num_processes: int = 1
) -> list[Prompt]:
    """The first different prompts of a dataset in one of the formats; None for `number` is 3, where they can be had
    and answered.

    Raises:
        ValueError: its rows have no prompt.
    """
    if number == 0 or (number is None and num_processes > 1):
        return []
    from alignfast.data import load_rows

    rows = load_rows(source, formats=formats)
    if number is None:
        number = _BY_DEFAULT if "prompt" in rows[0] else 0
    elif "prompt" not in rows[0]:
        raise ValueError(
            f"sample_prompts needs rows with a prompt; {rows.name} holds rows of {rows.format!r}"
        )
    found = {json.dumps(row["prompt"], sort_keys=True): row["prompt"] for row in rows}
    return list(found.values())[:number]


def write_samples(trainer: Trainer, prompts: list[Prompt]) -> None:
    """Add the likeliest answers of the model as it is now; of no prompts, nothing.

    Raises:
        ValueError: the training runs on several ranks, of which none may hold the whole model.
    """
    if not prompts:
        return
    from alignfast.rollout import Sampling, make_engine
    from alignfast.trainers.metrics import lines_up_to

    if trainer.accelerator.num_processes > 1:
        raise ValueError(
            "sample_prompts is for one process: set it to 0, and use `alignfast generate` afterwards"
        )
    engine = "transformers" if trainer.module.layout == "padded" else "native"
    policy = trainer.module.to(trainer.accelerator.device)
    # Plain prompts are trained on as they are, so that they are answered as they are.
    found = make_engine(engine, policy, trainer.processing_class).generate(
        prompts, Sampling(max_new_tokens=_NEW_TOKENS, temperature=0)
    )
    file = Path(trainer.args.folder) / "samples.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    step = trainer.state.global_step
    kept = lines_up_to(file, step) if step and file.exists() else []
    # a run that goes on where it had ended answers at the same step again
    kept = [line for line in kept if "reward" in (row := json.loads(line)) or row["step"] < step]
    new = [
        {"step": step, "prompt": prompt, "completion": completion.text}
        for prompt, (completion,) in zip(prompts, found)
    ]
    lines = [*kept, *(json.dumps(row, ensure_ascii=False) for row in new)]
    file.write_text("".join(line + "\n" for line in lines))
