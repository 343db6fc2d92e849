"""The policy's update: grpo or ppo on fresh answers to logged prompts, dpo or kto straight from votes.

    trained from     the version that serves
    anchored to      the start policy, by the trainer's reference (`beta`, of ppo `kl_coef`)
    held to          the round's KL budget, to the version that serves

What comes out lies under the run's own folder until it is evaluated; only then is it a version.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignfast.models import load_policy, load_tokenizer
from alignfast.online.feedback import Judged
from alignfast.online.loop.budget import KlBudget
from alignfast.online.loop.config import ON_POLICY
from alignfast.online.loop.folders import begin_work, made_by, work_folder
from alignfast.online.loop.logged import LoggedGRPOTrainer, logged_groups, within_kl
from alignfast.online.loop.round import NothingToLearn, Round
from alignfast.online.loop.votes import prompts_of, training_rows
from alignfast.online.store import Run
from alignfast.trainers.dpo import DPOTrainer
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
        NothingToLearn: there is no row for the method.
    """
    config, folder = loop.config, candidate_folder(loop, run).parent
    if made_by(config.folder / round.policy_name, run.id) is not None or (folder / _FIGURES).exists():
        return
    ids = [one.vote.id for one in loop.judged(round.votes)]
    goes_on = begin_work(folder, [ids, config.method, config.policy_options, config.peft, round.serving])
    trainer, figures = _trainer(loop, round, folder)
    budget = _budget(loop, round, trainer)
    if budget is not None:
        trainer.add_callback(budget)  # type: ignore[arg-type]
    output = trainer.train(resume_from_checkpoint=goes_on)
    figures |= {"steps": output.global_step, "loss": output.training_loss}
    if budget is not None:
        figures["kl_budget"] = {"spent": budget.spent, "most": budget.most, "ended": budget.ended}
    trainer.save_model(str(folder / "model"))
    write_json(folder / f"{_FIGURES}.tmp", figures)
    os.replace(folder / f"{_FIGURES}.tmp", folder / _FIGURES)  # whole, once it is there


def note_uses(loop: OnlineLoop, round: Round) -> None:
    """Remember what the candidate was trained on: votes, or prompts."""
    judged = loop.judged(round.votes)
    if loop.config.method not in ON_POLICY or loop.config.uses_logged:
        loop.store.use_for(round.policy_name, ids=round.votes, fresh=False, replaced=True)
    loop.store.use_prompts(round.policy_name, [shown.id for one in judged for shown in one.answers])


def _trainer(loop: OnlineLoop, round: Round, folder: Path) -> tuple[Trainer, dict[str, Any]]:
    config, serving, start = loop.config, loop.store.versions.get(round.serving), loop.start_policy()
    args, judged = config.trainer_config(folder, loop.answer_tokens), loop.judged(round.votes)
    adapted = (Path(serving.path) / "adapter_config.json").is_file()
    shared: dict[str, Any] = {"args": args, "peft_config": None if adapted else config.peft}
    if config.method in ON_POLICY:
        assert round.reward is not None
        reward = loop.store.versions.get(round.reward).path
        rows = _prompts(loop, judged, args)
        shared |= {"train_dataset": [{"prompt": row["prompt"]} for row in rows]}
        if config.method == "ppo":
            return PPOTrainer(serving.path, reward, ref_model=start.path, **shared), {"prompts": len(rows)}
        logged, figures = _logged(loop, judged, serving.name, args) if config.uses_logged else ([], {})
        grpo = LoggedGRPOTrainer(serving.path, reward, logged=logged, **shared)
        grpo.ref_model = start.path if args.beta > 0 else None
        return grpo, {"prompts": len(rows), **figures}
    ages = loop.ages(serving.name)
    young = [one for one in judged if all(shown.policy_version in ages for shown in one.answers)]
    rows = training_rows(young, "pairs" if config.method == "dpo" else "kto")
    if not rows:
        raise NothingToLearn(f"none of {len(judged)} votes gives {config.method} a row to train on")
    if config.method == "kto" and len({row["label"] for row in rows}) < 2:
        raise NothingToLearn(f"all {len(rows)} thumbs are alike, and kto sets those up against those down")
    kind = DPOTrainer if config.method == "dpo" else KTOTrainer
    return kind(serving.path, start.path, train_dataset=rows, **shared), {
        "rows": len(rows),
        "too_old": len(judged) - len(young),
    }


def _prompts(loop: OnlineLoop, judged: list[Judged], args: Any) -> list[dict[str, Any]]:
    longest = loop.longest_prompt(args.max_completion_length)
    rows = prompts_of(judged, loop.config.max_prompts, longest)
    if not rows:
        raise NothingToLearn(f"none of the prompts of {len(judged)} votes leaves room for an answer")
    return rows


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
        f"from the policy now, votes {', '.join(f'{number} {why}' for why, number in left.items())}"
    )
    return groups, {"logged": {**figures, **left}}


def _budget(loop: OnlineLoop, round: Round, trainer: Trainer) -> KlBudget | None:
    config = loop.config
    if config.kl_budget is None:
        return None
    prompts = [row["prompt"] for row in prompts_of(loop.judged(round.votes), _KL_PROMPTS)]
    serving = loop.store.versions.get(round.serving)
    other = load_policy(serving.path).to(trainer.accelerator.device).requires_grad_(False).eval()
    return KlBudget(
        trainer, other, prompts, most=config.kl_budget, every=config.kl_every, most_tokens=loop.answer_tokens
    )  # fmt: skip


def load_version(path: str, device: Any) -> tuple[Any, Any]:
    """(policy, tokenizer) in a version's folder, to measure with."""
    policy = load_policy(path).to(device).requires_grad_(False).eval()
    return policy, load_tokenizer(None, path)
