"""The learner's rounds: stages in order, each begun again where a kill found it.

    collect -> reward -> policy -> evaluate -> gate -> canary -> promote -> watch
                                                 |        |                   |
                                              refused  refused          rolled back

Before a stage begins, the store knows the round's state; what a stage does it can do again: models are trained on from
their checkpoints, folders and rows are made once, by names that follow from the round's number. So a learner that is
killed at any moment goes on when it is started again, and what serves is the last promoted version all the while.

One learner at a time works on a database, and on an output_dir: locks, which the system takes back from the dead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from transformers import PreTrainedTokenizerBase

from alignfast.models import load_policy, load_tokenizer
from alignfast.online.feedback import Judged
from alignfast.online.loop.config import ANSWER_TOKENS, OnlineConfig
from alignfast.online.loop.evaluate import check_judges, evaluate_candidate
from alignfast.online.loop.folders import clear_work
from alignfast.online.loop.gate import pass_gate
from alignfast.online.loop.policy import learn_policy
from alignfast.online.loop.reward import learn_reward, says_something
from alignfast.online.loop.round import STAGES, NothingToLearn, Round
from alignfast.online.loop.serve import duel, promote, watch
from alignfast.online.loop.votes import Rows, first_of_each, is_held_out, prompts_of
from alignfast.online.server.versions import first_version
from alignfast.online.store import Run, Store, Version
from alignfast.online.store.lock import locked, one_learner
from alignfast.online.voters import distinct
from alignfast.rollout.prompts import encode_prompt

Step: TypeAlias = Literal["next", "wait", "end"]


class OnlineLoop:
    """Learns from the votes in a store, round after round.

    Args:
        config: the options; or give them here by name.
        store: instead of opening `config.db`.
        say: what is told goes here, a line at a time.
        **options: of OnlineConfig.

    Raises:
        TypeError: options are given twice, or one is unknown.
        ValueError: an option is out of range.

    >>> loop = OnlineLoop(model="my-model", method="dpo")  # doctest: +SKIP
    >>> loop.run(once=True)  # doctest: +SKIP
    """

    def __init__(
        self,
        config: OnlineConfig | None = None,
        *,
        store: Store | None = None,
        say: Callable[[str], None] = print,
        **options: Any,
    ) -> None:
        if config is not None and options:
            raise TypeError(
                f"give options in config or by name, not both: got config and {', '.join(options)}"
            )
        self.config = OnlineConfig(**options) if config is None else config
        self._opened = store is None
        self.store = Store.open(self.config.db) if store is None else store
        self._say, self._said = say, ""

    def close(self) -> None:
        """Let the database go, where this loop opened it."""
        if self._opened:
            self.store.close()

    def __enter__(self) -> OnlineLoop:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def device(self) -> torch.device:
        """Where models are measured."""
        cpu = self.config.policy_options.get("use_cpu", False) or not torch.cuda.is_available()
        return torch.device("cpu" if cpu else "cuda")

    # Rounds

    def run(self, *, once: bool = False) -> Round | None:
        """Go on with the round that is under way, or begin one.

        Args:
            once: return when the round is over, or where it has to wait for people; otherwise go on for ever.

        Returns:
            The round as it stands.

        Raises:
            LearnerAtWork: another one is, on this database or this folder.
            ValueError: no version serves and no model is given, or a stage can't do its work.
        """
        with self._alone():
            self.begin()
            check_judges(self)
            while True:
                run = self._run()
                round = Round.from_dict(run.state)
                step = self._advance(run, round)
                if once:
                    return round
                if step == "wait" or round.policy is None:  # there may be nothing to learn for as long
                    time.sleep(self.config.poll_seconds)

    def begin(self) -> Version:
        """The version that serves; the start policy becomes it where none does.

        Raises:
            ValueError: none serves, and no model is given.
        """
        return first_version(self.store, self.config.model)

    def _run(self) -> Run:
        unfinished = self.store.runs.unfinished()
        if unfinished:
            return self._in_this_folder(unfinished[0])
        serving = self.store.versions.serving()
        assert serving is not None
        names = {one.name for one in self.store.versions.all()}
        number = 1 + len(self.store.runs.all())
        while {f"reward-{number}", f"policy-{number}"} & names:
            number += 1
        begun = Round(number, serving.name, folder=str(self.config.folder))
        return self.store.runs.start(STAGES[0], begun.to_dict())

    def _in_this_folder(self, run: Run) -> Run:
        """A run that is under way, where this loop can go on with it.

        Raises:
            ValueError: its models lie elsewhere.
        """
        round = Round.from_dict(run.state)
        if run.stage == STAGES[0]:  # nothing is made yet
            return replace(run, state=replace(round, folder=str(self.config.folder)).to_dict())
        if round.folder != str(self.config.folder):
            raise ValueError(
                f"round {round.number} is under way ({run.stage}) with output_dir={round.folder}, and this is "
                f"{self.config.folder}: go on there, where its models are"
            )
        return run

    def _advance(self, run: Run, round: Round) -> Step:
        """Stage after stage, until one waits or ends the round."""
        for stage in STAGES[STAGES.index(run.stage) :]:
            step = _DO[stage](self, run, round)
            if step == "wait":
                if round.to_dict() != run.state:
                    self.store.runs.to_stage(run.id, stage, round.to_dict())
                return step
            if step == "end":
                break
            following = STAGES[STAGES.index(stage) + 1 :]
            if following:
                self.store.runs.to_stage(run.id, following[0], round.to_dict())
                run = replace(run, stage=following[0], state=round.to_dict())
        round.outcome = round.outcome or "done"
        self.say(f"round {round.number}: {round.outcome}")
        self.store.runs.to_stage(run.id, run.stage, round.to_dict())
        clear_work(self.config.folder, run.id)
        self.store.runs.end(run.id)
        return "end"

    @contextmanager
    def _alone(self) -> Iterator[None]:
        folder = self.config.folder
        folder.mkdir(parents=True, exist_ok=True)
        with one_learner(self.store.engine), locked(folder / ".lock", str(folder)):
            yield

    # What stages ask for

    def say(self, what: str) -> None:
        """Tell it, but not twice in a row: what waits is looked at every few seconds."""
        if what != self._said:
            self._say(what)
        self._said = what

    def judged(self, ids: Sequence[str]) -> list[Judged]:
        """Votes with what they are about, in the order in which they came; without repeats, and those deleted since."""
        wanted = set(ids)
        return distinct(
            self.store.judged([vote for vote in self.store.votes(current=False) if vote.id in wanted])
        )

    def reward_model(self) -> Version | None:
        """The newest reward model, from which the next one starts; None before the first."""
        return self.store.versions.serving("reward")

    def used(self, reward: Version) -> set[str]:
        """Ids of the votes that a reward model and those before it have learned from, or measured with."""
        known = {version.name: version for version in self.store.versions.all("reward")}
        found: set[str] = set()
        waiting = [reward.name]
        while waiting:
            name = waiting.pop()
            found |= {vote.id for vote in self.store.used_by(name)}
            waiting += [parent for parent in known[name].parents if parent in known]
        return found

    def start_policy(self) -> Version:
        """What the version that serves comes from in the end: the anchor of the KL."""
        found = self.line(self.begin().name)[-1]
        return self.store.versions.get(found)

    @cached_property
    def positions(self) -> int | None:
        """Tokens that the start policy can tell apart: a prompt with its answer has no more. None: any number."""
        return load_policy(self.start_policy().path).positions

    @property
    def answer_tokens(self) -> int:
        """Tokens of a fresh answer, which leave room for a prompt.

        Raises:
            ValueError: those that were asked for leave none.
        """
        asked, positions = self.config.max_completion_length, self.positions
        if asked is not None and positions is not None and asked >= positions:
            raise ValueError(
                f"max_completion_length={asked} leaves no room for a prompt in a model of {positions} positions: give a "
                "smaller one, or none"
            )
        return asked or (ANSWER_TOKENS if positions is None else min(ANSWER_TOKENS, positions // 2))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the start policy, and so of all that come from it."""
        return load_tokenizer(None, self.start_policy().path)

    def prompts(self, judged: Sequence[Judged], most: int, answer_tokens: int) -> Rows:
        """Prompts of votes that leave room for an answer; see `votes.prompts_of`."""
        return prompts_of(
            judged,
            most,
            longest=self.longest_prompt(answer_tokens),
            tokens_of=lambda prompt: len(encode_prompt(self.tokenizer, prompt)),
        )

    def longest_prompt(self, answer_tokens: int) -> int | None:
        """Tokens of a prompt that leaves room for an answer; None: any number."""
        return None if self.positions is None else self.positions - answer_tokens

    def line(self, name: str) -> list[str]:
        """A policy and those that it comes from, the newest first."""
        known = {version.name: version for version in self.store.versions.all("policy")}
        line = [name]
        while parents := [parent for parent in known[line[-1]].parents if parent in known]:
            line.append(parents[0])
        return line

    def ages(self, serving: str) -> dict[str, int]:
        """The versions whose answers a policy may learn from, and how many versions they lie behind."""
        return {name: age for age, name in enumerate(self.line(serving)) if age <= self.config.max_age}


def collect(loop: OnlineLoop, run: Run, round: Round) -> Step:
    """Enough votes, or enough time: then these votes are the round's, whatever comes later.

    Votes that teach nothing are waited with, for others: a round of them would end where it began.
    """
    config, before = loop.config, loop.reward_model()
    kinds: Any = config.kinds
    number = loop.store.unused(None if before is None else before.name, kinds)
    waited = config.max_wait is not None and time.time() - run.created >= config.max_wait
    if number < config.min_votes and not (waited and number):
        loop.say(f"round {round.number}: {number} of {config.min_votes} votes")
        return "wait"
    used = set() if before is None else loop.used(before)
    votes = [vote for vote in loop.store.votes(kinds=kinds) if vote.id not in used]
    judged, beyond = first_of_each(loop.store.judged(votes), config.votes_per_user)
    sides: dict[bool, list[Judged]] = {True: [], False: []}
    for one in judged:
        sides[is_held_out(one, config.held_out, config.held_out_by, config.seed)].append(one)
    if not says_something(sides[False], config.feedback):
        why = (
            "all are held out"
            if not sides[False]
            else "none says anything of an answer that has a word in it"
        )
        loop.say(f"round {round.number}: {len(judged)} votes, of which {why}; it waits for others")
        return "wait"
    round.beyond = beyond
    round.votes, round.held_out = ([one.vote.id for one in sides[out]] for out in (False, True))
    serving = loop.store.versions.serving()
    assert serving is not None
    round.serving = serving.name
    loop.say(f"round {round.number}: {len(round.votes)} votes to learn from, {len(round.held_out)} held out")
    return "next"


def _reward(loop: OnlineLoop, run: Run, round: Round) -> Step:
    return _unless_nothing(learn_reward, loop, run, round)


def _policy(loop: OnlineLoop, run: Run, round: Round) -> Step:
    return _unless_nothing(learn_policy, loop, run, round)


def _evaluate(loop: OnlineLoop, run: Run, round: Round) -> Step:
    return _unless_nothing(evaluate_candidate, loop, run, round)


def _unless_nothing(
    learn: Callable[[OnlineLoop, Run, Round], object], loop: OnlineLoop, run: Run, round: Round
) -> Step:
    try:
        learn(loop, run, round)
    except NothingToLearn as error:
        round.outcome = f"no candidate: {error}"
        return "end"
    return "next"


_DO: dict[str, Callable[[OnlineLoop, Run, Round], Step]] = {
    "collect": collect,
    "reward": _reward,
    "policy": _policy,
    "evaluate": _evaluate,
    "gate": pass_gate,
    "canary": duel,
    "promote": promote,
    "watch": watch,
}
