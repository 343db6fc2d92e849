"""What a candidate is worth beside the version that serves, on what nobody was trained on.

    preference    on held-out pairs: how often the candidate gives the chosen answer more log-prob than the serving version
                  does, compared with the rejected one; 1/2 is no change
    reward        of the round's reward model, on fresh answers of both to the same prompts and random numbers
    win rate      of these answers, by a judge that is not that reward model
    kl            to the start policy, on the candidate's answers; a token, and a completion
    length        tokens of an answer, also of the start policy's; cut: share that did not end
    suites        the operator's own: candidate, serving
    satisfaction  so far, with the version that serves

Prompts are those of held-out votes; where these are few, those of the others fill up. A figure that has nothing to be
measured on is left out; one that is no finite number is too, and its name stands under `not_finite`, at which the gate refuses.
Intervals take a voter's votes together, and a prompt's where the voter is anybody.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alignfast.data import load_rows
from alignfast.data.intervals import proportion
from alignfast.evaluation import distinct_n, length_figures, load_judge, preference_accuracy, win_rate
from alignfast.evaluation.preference import IMPLICIT
from alignfast.online.loop.budget import fresh_answers, kl_to
from alignfast.online.loop.folders import clear_work, made_by, publish
from alignfast.online.loop.policy import candidate_folder, learn_policy, load_version, training_figures
from alignfast.online.loop.round import NothingToLearn
from alignfast.online.loop.votes import training_rows
from alignfast.online.store import Run
from alignfast.online.store.stats import satisfaction
from alignfast.online.store.uses import Forgotten
from alignfast.online.voters import unit_of
from alignfast.rewards import RewardSet, load_reward
from alignfast.rollout import Completion
from alignfast.rollout.prompts import encode_prompt

if TYPE_CHECKING:
    from alignfast.online.loop.loop import OnlineLoop
    from alignfast.online.loop.round import Round

_JUDGE_SECONDS = 300.0  # that a reward function which judges may take

Answer = Callable[[Sequence[Any]], list[str]]


def evaluate_candidate(loop: OnlineLoop, run: Run, round: Round) -> None:
    """Measure the candidate, and make it a version with its figures in the manifest.

    Raises:
        NothingToLearn: there is no prompt to measure it on.
    """
    config, name, model = loop.config, round.policy_name, candidate_folder(loop, run)
    assert round.reward is not None
    while True:
        made = made_by(config.folder / name, run.id)
        figures = (
            made["figures"] if made else _finite(training_figures(loop, run) | measure(loop, run, round))
        )
        try:
            publish(
                loop.store, model.parent, model, config.folder, name, "policy",
                run=run.id, parents=[round.serving, round.reward], config=_config(loop), figures=figures,
            )  # fmt: skip
            break
        except Forgotten as error:
            loop.say(f"{error}: it is trained anew without them")
            learn_policy(loop, run, round)
    clear_work(config.folder, run.id)  # samples in it are of people's prompts
    round.policy, round.figures = name, figures


def measure(loop: OnlineLoop, run: Run, round: Round) -> dict[str, Any]:
    """All figures of a candidate."""
    config, held_out = loop.config, loop.judged(round.held_out)
    serving, start = loop.store.versions.get(round.serving), loop.start_policy()
    prompts = _prompts(loop, round)
    figures: dict[str, Any] = {"prompts": len(prompts)}
    sides: dict[str, list[Completion]] = {}
    suites: dict[str, dict[str, float]] = {}
    for side, path in (("candidate", str(candidate_folder(loop, run))), ("serving", serving.path)):
        policy, tokenizer = load_version(path, loop.device)
        sides[side] = fresh_answers(policy, tokenizer, prompts, loop.answer_tokens, config.seed)
        suites[side] = _run_suites(loop, policy, tokenizer)
        if side == "candidate":
            pairs, figures["held_out_left_out"] = training_rows(held_out, "pairs", config.feedback.edit_kept)
            figures |= _preference(loop, policy, tokenizer, pairs, serving.path)
        del policy
        gc.collect()  # before the next one is loaded
    assert round.reward is not None
    accuracy = loop.store.versions.get(round.reward).figures.get("reward_accuracy")
    if accuracy is not None:
        figures["reward_accuracy"] = accuracy
    other, tokenizer = load_version(start.path, loop.device)
    figures |= kl_to(other, sides["candidate"])
    sides["start"] = (
        sides["serving"]
        if start.name == serving.name
        else fresh_answers(other, tokenizer, prompts, loop.answer_tokens, config.seed)
    )
    for side, completions in sides.items():
        ids = [of.token_ids for of in completions]
        found = length_figures([len(of) for of in ids], [of.finish_reason == "stop" for of in completions])
        suffix = "" if side == "candidate" else f"_{side}"
        figures[f"length{suffix}"], figures[f"cut{suffix}"] = found["mean_length"], found["clipped_ratio"]
        distinct = distinct_n(ids, 2)
        if distinct == distinct:  # of no two tokens, nothing is distinct
            figures[f"distinct_2{suffix}"] = distinct
    figures |= _rewards(loop, round, prompts, sides) | _judged(loop, round, prompts, sides)
    figures["suites"] = {
        name: {
            **{side: found[name] for side, found in suites.items()},
            "safety": name in config.safety_suites,
        }
        for name in suites["candidate"]
    }
    thumbs = satisfaction(loop.store).get(round.serving)
    if thumbs is not None:
        figures["satisfaction_serving"] = thumbs.rate._asdict()
    return figures


def _finite(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures that are numbers, and the names of the others; a database can't hold them, and no limit refuses a NaN."""
    broken = [name for name, value in figures.items() if not _is_finite(value)]
    kept = {name: value for name, value in figures.items() if name not in broken}
    return {**kept, "not_finite": broken} if broken else kept


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    return not isinstance(value, float) or math.isfinite(value)


def check_judges(loop: OnlineLoop) -> None:
    """Make sure, before a round is spent, that the judge and the suites are there, and that the judge is not the loop's own.

    Raises:
        ValueError: the judge is a reward model of this loop, or judge or suite can't be loaded.
        JudgeError: the judge gives no verdict.
    """
    config, spec = loop.config, loop.config.judge
    for name, path in {**config.task_suites, **config.safety_suites}.items():
        try:
            load_reward(path)
        except (ValueError, TypeError) as error:
            raise ValueError(f"the suite {name!r}: {error}") from error
    if spec is None:
        return
    folder, own = Path(spec).expanduser().resolve(), [config.folder]
    own += [Path(version.path).resolve() for version in loop.store.versions.all("reward")]
    if any(folder.is_relative_to(one) for one in own):
        raise ValueError(f"judge={spec!r} is a reward model of this loop: give another one, or api:MODEL")
    judge = load_judge(spec, timeout=_JUDGE_SECONDS)
    if not isinstance(judge, RewardSet):
        judge.check()


def _config(loop: OnlineLoop) -> dict[str, Any]:
    # which may hold a password
    return {name: value for name, value in asdict(loop.config).items() if name != "db"}


def _prompts(loop: OnlineLoop, round: Round) -> list[Any]:
    config = loop.config
    rows, _ = loop.prompts(loop.judged(round.held_out), config.eval_prompts, loop.answer_tokens)
    if len(rows) < config.eval_prompts:
        known = [row["prompt"] for row in rows]
        more, _ = loop.prompts(loop.judged(round.votes), config.eval_prompts, loop.answer_tokens)
        rows += [row for row in more if row["prompt"] not in known]
    if not rows:
        raise NothingToLearn(
            f"it can't be measured: no prompt leaves room for an answer of {loop.answer_tokens} tokens"
        )
    return [row["prompt"] for row in rows[: config.eval_prompts]]


def _preference(
    loop: OnlineLoop, policy: Any, tokenizer: Any, all_rows: list[dict[str, Any]], serving: str
) -> dict[str, Any]:
    room = loop.longest_prompt(1)
    fitting = [
        row for row in all_rows if room is None or len(encode_prompt(tokenizer, row["prompt"])) <= room
    ]
    if not fitting:
        return {"pairs": 0, "pairs_dropped": len(all_rows)}
    reference, _ = load_version(serving, loop.device)
    rows = [{**row, "unit": unit_of(row["user"], row["prompt"])} for row in fitting]
    found = preference_accuracy(
        policy, tokenizer, load_rows(rows), reference=reference, max_length=loop.positions, together="unit"
    )
    dropped = len(all_rows) - found.pairs
    return {"preference": found.accuracy[IMPLICIT]._asdict(), "pairs": found.pairs, "pairs_dropped": dropped}


def _rewards(
    loop: OnlineLoop, round: Round, prompts: list[Any], sides: dict[str, list[Completion]]
) -> dict[str, Any]:
    assert round.reward is not None
    coefficient = loop.config.policy_options.get("disagreement_coef")
    model = load_reward(loop.store.versions.get(round.reward).path, disagreement_coef=coefficient)
    found = {side: model(prompts, _texts(prompts, completions)) for side, completions in sides.items()}
    ours_N, theirs_N = (np.array(found[side], np.float64) for side in ("candidate", "serving"))
    return {
        "reward": float(ours_N.mean()), "reward_serving": float(theirs_N.mean()),
        "reward_wins": proportion((np.sign(ours_N - theirs_N) + 1) / 2)._asdict(),
    }  # fmt: skip


def _judged(
    loop: OnlineLoop, round: Round, prompts: list[Any], sides: dict[str, list[Completion]]
) -> dict[str, Any]:
    """The win rate, where there is a judge."""
    spec = loop.config.judge
    if spec is None:
        return {}
    judge = load_judge(spec, timeout=_JUDGE_SECONDS)
    ours, theirs = (_texts(prompts, sides[side]) for side in ("candidate", "serving"))
    if isinstance(judge, RewardSet):
        scores = [judge.score(prompts, texts, {}).rewards_N.numpy() for texts in (ours, theirs)]
    else:
        verdicts = judge.compare(prompts, ours, theirs)
        scores = [np.array([np.nan if v is None else v for v in verdicts]), np.full(len(verdicts), 0.5)]
    known_N = np.isfinite(scores[0]) & np.isfinite(scores[1])
    if not known_N.any():
        return {"judge": spec, "unjudged": 1.0}
    found = win_rate(scores[0][known_N], scores[1][known_N])
    return {"judge": spec, "unjudged": float(1 - known_N.mean()), "win_rate": found.rate._asdict()}


def _texts(prompts: Sequence[Any], completions: Sequence[Completion]) -> list[Any]:
    return [
        of.text if isinstance(prompt, str) else [{"role": "assistant", "content": of.text}]
        for prompt, of in zip(prompts, completions)
    ]


def _run_suites(loop: OnlineLoop, policy: Any, tokenizer: Any) -> dict[str, float]:
    """The share that each of the operator's suites gives.

    Raises:
        ValueError: a suite can't be imported, or gives no number in [0, 1].
    """
    config = loop.config

    def answer(prompts: Sequence[Any]) -> list[str]:
        found = fresh_answers(policy, tokenizer, prompts, loop.answer_tokens, config.seed)
        return [of.text for of in found]

    shares = {}
    for name, path in {**config.task_suites, **config.safety_suites}.items():
        suite: Any = load_reward(path)
        share = suite(answer)
        if not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise ValueError(f"the suite {name!r} must give a share in [0, 1], got {share!r}")
        shares[name] = float(share)
    return shares
