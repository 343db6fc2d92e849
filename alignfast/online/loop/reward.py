"""The reward model's update: from the last one, on the round's votes, into a version of its own."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignfast.online.loop.folders import made_by, publish, work_folder
from alignfast.online.loop.votes import training_rows
from alignfast.online.store import Run
from alignfast.trainers.reward import RewardConfig, RewardTrainer

if TYPE_CHECKING:
    from alignfast.online.feedback import Judged
    from alignfast.online.loop.loop import OnlineLoop
    from alignfast.online.loop.round import Round


@dataclass(frozen=True)
class RewardUpdate:
    """What an update gave.

    Attributes:
        folder: of the new reward model, with its tokenizer.
        figures: `accuracy`, its interval and more, on votes that were held out.
    """

    folder: Path
    figures: dict[str, Any]


def learn_reward(loop: OnlineLoop, run: Run, round: Round) -> None:
    """Make the round's reward model, and note which votes it has used; again after a kill, without doing it twice."""
    store, config, name = loop.store, loop.config, round.reward_name
    final, work = config.folder / name, work_folder(config.folder, run.id) / "reward"
    before = loop.reward_model()  # itself, where a kill came after its promotion
    if made_by(final, run.id) is None:
        train, held_out = loop.judged(round.votes), loop.judged(round.held_out)
        start = config.reward_model or loop.start_policy().path if before is None else before.path
        found = update_reward(start, train, held_out, work, config.reward_options)
    else:
        found = RewardUpdate(work / "model", {})
    parents = [before.name] if before is not None and before.name != name else []
    publish(
        store, found.folder, config.folder, name, "reward",
        run=run.id, parents=parents, config=config.reward_options, figures=found.figures,
    )  # fmt: skip
    store.use_for(name, ids=[*round.votes, *round.held_out], fresh=False, replaced=True)
    if before is None or before.name != name:
        store.versions.promote(name)
    round.reward = name


def update_reward(
    start: str, train: list[Judged], held_out: list[Judged], output_dir: Path, options: dict[str, Any]
) -> RewardUpdate:
    """A reward model trained on the preferences among votes, from where another one left off."""
    rows, held = training_rows(train, "pairs"), training_rows(held_out, "pairs")
    if not rows:
        raise ValueError(
            f"none of {len(train)} votes compares two answers: a reward model learns from pairs and rankings"
        )
    given = {
        "num_train_epochs": 1,
        "report_to": "none",
        "save_steps": 50,
        "save_total_limit": 1,
        "disable_tqdm": True,
    }
    args = RewardConfig(**{**given, **options, "output_dir": str(output_dir)})
    trainer = RewardTrainer(start, args, train_dataset=rows, eval_dataset=held or None)
    trainer.train(resume_from_checkpoint=(output_dir / "checkpoints").exists())
    figures = trainer.evaluate() if held else {}
    shutil.rmtree(output_dir / "model", ignore_errors=True)
    trainer.save_model(str(output_dir / "model"))
    if not figures:
        return RewardUpdate(output_dir / "model", {})
    named = {"estimate": "eval_accuracy", "low": "eval_accuracy_low", "high": "eval_accuracy_high"}
    accuracy = {name: figures[of] for name, of in named.items()}
    return RewardUpdate(output_dir / "model", {"reward_accuracy": accuracy})
