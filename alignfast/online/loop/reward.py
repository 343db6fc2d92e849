"""The reward model's stage: from the last one, on the round's votes and some older ones, into a version of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from alignfast.models import load_tokenizer
from alignfast.models.classifier import load_adapters
from alignfast.online.feedback import Judged
from alignfast.online.learning.said import said_of
from alignfast.online.learning.trainer import FeedbackConfig
from alignfast.online.learning.update import RewardUpdate, update_reward
from alignfast.online.learning.votes import weigh
from alignfast.online.loop.folders import begin_work, made_by, publish, work_folder
from alignfast.online.loop.round import NothingToLearn, Round
from alignfast.online.loop.votes import is_held_out
from alignfast.online.store import Run
from alignfast.online.store.uses import Forgotten, Learned

if TYPE_CHECKING:
    from alignfast.online.loop.loop import OnlineLoop


def learn_reward(loop: OnlineLoop, run: Run, round: Round) -> None:
    """Make the round's reward model, and note which votes it has used; again after a kill, without doing it twice.

    Raises:
        NothingToLearn: no vote says anything of an answer.
    """
    store, config, name = loop.store, loop.config, round.reward_name
    work = work_folder(config.folder, run.id) / "reward"
    before = loop.reward_model()  # itself, where a kill came after its promotion
    while True:
        if made_by(config.folder / name, run.id) is None:
            found = _update(loop, round, work)
        else:
            found = RewardUpdate(work / "model", {})
        try:
            publish(
                store, work, found.folder, config.folder, name, "reward", run=run.id,
                parents=[before.name] if before is not None and before.name != name else [],
                config=config.reward_options, figures=found.figures,
            )  # fmt: skip
            break
        except Forgotten as error:
            loop.say(f"{error}: it is trained anew without them")
    if before is None or before.name != name:
        store.versions.promote(name)
    round.reward = name


def says_something(judged: Sequence[Judged], args: FeedbackConfig) -> bool:
    """Whether votes teach a reward model anything."""
    kept = weigh(judged, args.vote_limits).kept
    return bool(said_of(kept, edit_kept=args.edit_kept, implicit_weight=args.implicit_weight))


def _update(loop: OnlineLoop, round: Round, work: Path) -> RewardUpdate:
    config, before = loop.config, loop.reward_model()
    start = config.reward_model or loop.start_policy().path if before is None else before.path
    train, held_out = loop.judged(round.votes), loop.judged(round.held_out)
    args = config.feedback
    if not says_something(train, args):
        raise NothingToLearn(f"none of {len(train)} votes says anything of an answer that has a word in it")
    replay = [] if before is None else _replayable(loop, loop.used(before))
    learned = Learned(
        votes=[one.vote.id for one in (*train, *held_out, *replay)],
        seen=[*round.votes, *round.held_out, *round.beyond],
    )
    begin_work(work, learned, {"start": start, "options": config.reward_options, "replayed": len(replay)})
    found = update_reward(start, train, held_out, work, config.reward_options, replay)
    return RewardUpdate(_merged(found.folder), found.figures)


def _replayable(loop: OnlineLoop, ids: set[str]) -> list[Judged]:
    """Votes of earlier rounds that were trained on: what is held out, or was beyond a voter's number, stays so."""
    config = loop.config
    beyond = {id for run in loop.store.runs.all() for id in run.state.get("beyond", ())}
    return [
        one
        for one in loop.judged(sorted(ids - beyond))
        if not is_held_out(one, config.held_out, config.held_out_by, config.seed)
    ]


def _merged(folder: Path) -> Path:
    """A reward model's folder; of adapters, one with them added to the weights, as what scores and the next update want."""
    if not (folder / "adapter_config.json").is_file():
        return folder
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    merged = load_adapters(str(folder), None, "auto", False, base).merge_and_unload(safe_merge=True)
    merged.save_pretrained(folder / "merged")
    load_tokenizer(None, folder).save_pretrained(folder / "merged")
    return folder / "merged"
