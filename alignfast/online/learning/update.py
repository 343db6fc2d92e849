"""The reward model's update: a version's votes and some older ones in, the next version's folder and figures out.

    weigh (votes.py) -> say what they say (said.py) -> train (trainer.py) -> measure on voters who were held out

    reward_accuracy = share of held-out judgements that the model shares; a tie of rewards is half, ties of people are none

A judgement is a pair of answers, one of which somebody found better: of a comparison each two that are not tied; of thumbs
and ratings each one and the voter's next that differs from it. The interval takes a voter's judgements together.

Not done here: who is held out (the loop).
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from alignfast.evaluation.calibration import calibration
from alignfast.models import RewardModel
from alignfast.online.feedback import Judged
from alignfast.online.learning.said import Said, judged_leads, said_of
from alignfast.online.learning.trainer import FeedbackConfig, FeedbackTrainer, plant
from alignfast.online.learning.votes import Weighed, under_cap, weigh
from alignfast.online.voters import distinct
from alignfast.trainers.batches import longest_row

_QUIET = {"report_to": "none", "save_steps": 50, "save_total_limit": 1, "disable_tqdm": True}


@dataclass(frozen=True)
class RewardUpdate:
    """What an update gave.

    Attributes:
        folder: of the new reward model, with its tokenizer; of adapters where `peft` is given.
        figures: `reward_accuracy` with its interval on votes that were held out, `reward_accuracy_before` of the model
            that it started from, and how many votes taught what.
    """

    folder: Path
    figures: dict[str, Any]


def update_reward(
    start: str,
    train: Sequence[Judged],
    held_out: Sequence[Judged],
    output_dir: Path,
    options: dict[str, Any],
    replay: Sequence[Judged] = (),
) -> RewardUpdate:
    """A reward model that goes on from another one, trained on votes of all kinds.

    Called again with the same output_dir after a kill, it goes on from its last checkpoint.

    Args:
        start: folder or hub name of a reward model, or of a policy, which gets a fresh head.
        train: new votes, in the order in which they came.
        held_out: what it is measured with.
        output_dir: folder of the run; the model comes into `model` there.
        options: of FeedbackConfig.
        replay: votes that earlier versions have learned from; as many are drawn as `replay_ratio` says.

    Raises:
        ValueError: a vote is both trained on and held out, nothing can be learned from any, or `start` has other adapters
            than `peft` asks for.
        ValueError, TypeError: an option is wrong.

    >>> update = update_reward("reward-1", new, held_out, Path("work"), {"learning_rate": 1e-4})  # doctest: +SKIP
    >>> update.figures["reward_accuracy"]["estimate"]  # doctest: +SKIP
    """
    args = FeedbackConfig(**{**_QUIET, **options, "output_dir": str(output_dir)})
    both = {one.vote.id for one in held_out} & {one.vote.id for one in [*train, *replay]}
    if both:
        raise ValueError(f"{len(both)} votes are both trained on and held out, {min(both)!r} among them")
    # A flood of one voter's is no larger part of what is drawn than it may be of a round.
    replayable = list(under_cap(distinct(replay), args.vote_limits))
    old = _drawn(replayable, round(args.replay_ratio * len(train)), args.seed)
    found = weigh([*old, *train], args.vote_limits)
    said = said_of(found.kept, edit_kept=args.edit_kept, implicit_weight=args.implicit_weight)
    if not said:
        raise ValueError(
            f"none of {len(train)} votes says anything of an answer that has a word in it: wait for more, or give "
            "implicit_weight where there are hints alone"
        )
    adapted = _has_adapters(start, args.peft or {})
    trainer = FeedbackTrainer(start, args, train_dataset=said, peft_config=None if adapted else args.peft)
    held = said_of([Weighed(one, 1.0) for one in distinct(held_out)], edit_kept=args.edit_kept)
    figures: dict[str, Any] = {**found.figures, "votes_replayed": len(old)}
    figures["rows_too_long"] = trainer.train_data.report.too_long_rows
    if not trainer.module.fresh_head:
        before = held_out_figures(trainer.module, trainer.processing_class, held, args)
        figures |= {f"{name}_before": value for name, value in before.items() if name == "reward_accuracy"}
    trainer.train(resume_from_checkpoint=(output_dir / "checkpoints").exists())
    figures["users_contrary"] = len(trainer.find_contrary())
    figures |= held_out_figures(trainer.module, trainer.processing_class, held, args)
    shutil.rmtree(output_dir / "model", ignore_errors=True)
    trainer.save_model(str(output_dir / "model"))
    return RewardUpdate(output_dir / "model", figures)


def _has_adapters(start: str, asked: dict[str, Any]) -> bool:
    """Whether a folder is of adapters, which are then as the options say that are given.

    Raises:
        ValueError: they are not.
    """
    file = Path(start) / "adapter_config.json"
    if not file.is_file():
        return False
    there = json.loads(file.read_text())
    for name, value in asked.items():
        found = there.get(name)
        lists = isinstance(value, (list, tuple, set)) and isinstance(found, list)
        if (set(found) != set(value)) if lists else found != value:
            raise ValueError(
                f"the adapters in {start} have {name}={found!r} and peft asks for {value!r}: they are gone on from as they "
                "are, so give that, or merge them into their model first (alignfast merge)"
            )
    return True


def held_out_figures(
    model: RewardModel, tokenizer: PreTrainedTokenizerBase, said: Sequence[Said], args: FeedbackConfig
) -> dict[str, Any]:
    """Accuracy with its interval, calibration error and number of judgements; nothing where there are none.

    Args:
        model: the reward model; of several heads the mean counts.
        tokenizer: its tokenizer.
        said: held-out votes.
        args: for how long sequences may be.
    """
    longest = longest_row(args.max_length, model.positions)
    prepared = plant(said, tokenizer, longest, args.truncation_mode) if said else None
    if prepared is None or not prepared.trees:
        return {}
    rewards_S = model.score(prepared.trees).mean(1)
    each = np.split(rewards_S, np.cumsum([len(tree.answers) for tree in prepared.trees])[:-1])
    leads = list(judged_leads([said[row] for row in prepared.rows], each))
    if not leads:
        return {}
    found = calibration([lead for lead, _ in leads], [whole for _, whole in leads])
    return {
        "reward_accuracy": found.accuracy._asdict(),
        "reward_ece": found.ece,
        "reward_judgements": len(leads),
    }


def _drawn(judged: Sequence[Judged], most: int, seed: int) -> list[Judged]:
    """At most so many votes, in their order; the same ones again after a kill."""
    if len(judged) <= most:
        return list(judged)
    return [judged[i] for i in sorted(random.Random(seed).sample(range(len(judged)), most))]
