"""The policy's update: grpo or ppo on fresh answers to logged prompts, dpo or kto straight from votes.

    trained from     the version that serves
    anchored to      the start policy, by the trainer's reference (`beta`, of ppo `kl_coef`)
    held to          the round's KL budget, to the version that serves

What comes out lies under the run's own folder until it is evaluated; only then is it a version.

Where votes train it themselves, those of refused rounds come again as long as their answers are young enough: nothing that
serves has learned from them. Nobody outweighs many here either: `voter_most`, an option of the reward model's update.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignfast.models import load_policy, load_tokenizer
from alignfast.online.feedback import Judged
from alignfast.online.loop.budget import KlBudget
from alignfast.online.loop.config import NOT_OF_TRAINING, ON_POLICY
from alignfast.online.loop.folders import begin_work, made_by, work_folder
from alignfast.online.loop.logged import LoggedGRPOTrainer, logged_groups, within_kl
from alignfast.online.loop.round import NothingToLearn, Round
from alignfast.online.loop.votes import is_held_out, outweighing_nobody, training_rows
from alignfast.online.store import Run
from alignfast.online.store.uses import Learned
from alignfast.trainers.dpo import DPOTrainer
from alignfast.trainers.interrupt import NonFiniteError
from alignfast.trainers.kto import KTOTrainer
from alignfast.trainers.loop import Trainer
from alignfast.trainers.ppo import PPOTrainer
from alignfast.trainers.state import read_json, write_json

if TYPE_CHECKING:
    from alignfast.online.loop.loop import OnlineLoop

_FIGURES, _KL_PROMPTS = "figures.json", 16


def candidate_folder(loop: OnlineLoop, run: Run) -> Path:
    """Where the model lies that the policy stage makes."""
    return work_folder(loop.config.folder, run.id) / "policy" / "model"


def training_figures(loop: OnlineLoop, run: Run) -> dict[str, Any]:
    """What its training measured."""
    found: dict[str, Any] = read_json(candidate_folder(loop, run).parent / _FIGURES)
    return found


def learn_policy(loop: OnlineLoop, run: Run, round: Round) -> None:
    """Train the round's candidate; a run that was killed goes on from its newest checkpoint.

    Raises:
        NothingToLearn: there is no row for the method, or its training diverges.
    """
    config, folder = loop.config, candidate_folder(loop, run).parent
    if made_by(config.folder / round.policy_name, run.id) is not None:
        return
    judged = votes_of_policy(loop, round)
    how = {name: value for name, value in asdict(config).items() if name not in NOT_OF_TRAINING}
    how |= {"serving": round.serving, "reward": round.reward}
    goes_on = begin_work(folder, _learned(loop, round, judged), how)
    if (folder / _FIGURES).exists():
        return
    trainer, figures = _trainer(loop, round, judged, folder)
    budget = _budget(loop, round, trainer)
    if budget is not None:
        trainer.add_callback(budget)  # type: ignore[arg-type]
    try:
        output = trainer.train(resume_from_checkpoint=goes_on)
    except NonFiniteError as error:
        raise NothingToLearn(f"its training diverged: {error}") from error
    figures |= {"steps": output.global_step, "loss": output.training_loss}
    report = trainer.train_data.report
    figures |= {"rows_cut": report.truncated_rows, "rows_dropped": report.dropped_rows}
    if budget is not None:
        figures["kl_budget"] = {"spent": budget.spent, "most": budget.most, "ended": budget.ended}
    shutil.rmtree(folder / "model", ignore_errors=True)  # half of one, where a kill came
    trainer.save_model(str(folder / "model"))
    write_json(folder / f"{_FIGURES}.tmp", figures)
    os.replace(folder / f"{_FIGURES}.tmp", folder / _FIGURES)  # whole, once it is there


def votes_of_policy(loop: OnlineLoop, round: Round) -> list[Judged]:
    """The votes that the round's candidate learns from, or to whose prompts it answers."""
    config, ids = loop.config, set(round.votes)
    if config.learns_from_votes:
        runs, line = loop.store.runs.all(), loop.line(round.serving)
        used = {vote.id for name in line for vote in loop.store.used_by(name)}
        ids |= {id for run in runs for id in run.state.get("votes", ())} - used
    wanted = [
        one
        for one in loop.judged(sorted(ids))
        if one.vote.kind in config.kinds
        and not is_held_out(one, config.held_out, config.held_out_by, config.seed)
    ]
    return outweighing_nobody(wanted, config.feedback.voter_most)


def _learned(loop: OnlineLoop, round: Round, judged: list[Judged]) -> Learned:
    votes = [one.vote.id for one in judged]
    return Learned(
        votes=votes,
        responses=list(dict.fromkeys(shown.id for one in judged for shown in one.answers)),
        seen=list(dict.fromkeys([*round.votes, *votes])) if loop.config.learns_from_votes else (),
    )


def _trainer(
    loop: OnlineLoop, round: Round, judged: list[Judged], folder: Path
) -> tuple[Trainer, dict[str, Any]]:
    config, serving, start = loop.config, loop.store.versions.get(round.serving), loop.start_policy()
    args = config.trainer_config(folder, loop.answer_tokens, loop.positions)
    adapted = (Path(serving.path) / "adapter_config.json").is_file()
    shared: dict[str, Any] = {"args": args, "peft_config": None if adapted else config.peft}
    if config.method in ON_POLICY:
        assert round.reward is not None
        reward = loop.store.versions.get(round.reward).path
        rows, left = loop.prompts(judged, config.max_prompts, args.max_completion_length)
        if not rows:
            raise NothingToLearn(f"none of the prompts of {len(judged)} votes leaves room for an answer")
        figures: dict[str, Any] = {"prompts": len(rows), "left_out": left}
        shared |= {"train_dataset": [{"prompt": row["prompt"]} for row in rows]}
        if config.method == "ppo":
            return PPOTrainer(serving.path, reward, ref_model=start.path, **shared), figures
        logged, more = _logged(loop, judged, serving.name, args) if config.uses_logged else ([], {})
        grpo = LoggedGRPOTrainer(serving.path, reward, logged=logged, **shared)
        grpo.ref_model = start.path if args.beta > 0 else None
        return grpo, {**figures, **more}
    ages = loop.ages(serving.name)
    young = [one for one in judged if all(shown.policy_version in ages for shown in one.answers)]
    rows, left = training_rows(young, "pairs" if config.method == "dpo" else "kto", config.feedback.edit_kept)
    left["too_old"] = len(judged) - len(young)
    loop.say(f"{config.method}: {len(rows)} rows of {len(judged)} votes; left out: {_told(left)}")
    if not rows:
        raise NothingToLearn(f"none of {len(judged)} votes gives {config.method} a row to train on")
    if config.method == "kto" and len({row["label"] for row in rows}) < 2:
        raise NothingToLearn(f"all {len(rows)} thumbs are alike, and kto sets those up against those down")
    kind = DPOTrainer if config.method == "dpo" else KTOTrainer
    return kind(serving.path, start.path, train_dataset=rows, **shared), {"rows": len(rows), "left_out": left}


def _told(left: dict[str, int]) -> str:
    return ", ".join(f"{number} {why}" for why, number in left.items() if number) or "none"


def _logged(
    loop: OnlineLoop, judged: list[Judged], serving: str, args: Any
) -> tuple[list[Any], dict[str, Any]]:
    groups, left = logged_groups(judged, loop.ages(serving), args.num_generations)
    policy = load_policy(loop.store.versions.get(serving).path).to(loop.device)
    groups, figures = within_kl(
        groups, policy, loop.config.max_logged_kl, args.late_importance_sampling_clip_max
    )
    loop.say(
        f"logged answers: {figures['answers']}, effective {figures.get('ess', 0):.0%}; left out: {figures['too_far']} too far "
        f"from the policy now, votes: {_told(left)}"
    )
    return groups, {"logged": {**figures, **left}}


def _budget(loop: OnlineLoop, round: Round, trainer: Trainer) -> KlBudget | None:
    config = loop.config
    if config.kl_budget is None:
        return None
    rows, _ = loop.prompts(loop.judged(round.votes), _KL_PROMPTS, loop.answer_tokens)
    if not rows:
        raise NothingToLearn("no prompt leaves room for the answers that its KL would be measured on")
    prompts = [row["prompt"] for row in rows]
    serving = loop.store.versions.get(round.serving)
    other = load_policy(serving.path).to(trainer.accelerator.device).requires_grad_(False).eval()
    return KlBudget(
        trainer, other, prompts, most=config.kl_budget, every=config.kl_every, most_tokens=loop.answer_tokens
    )  # fmt: skip


def load_version(path: str, device: Any) -> tuple[Any, Any]:
    """(policy, tokenizer) in a version's folder, to measure with."""
    policy = load_policy(path).to(device).requires_grad_(False).eval()
    return policy, load_tokenizer(None, path)
