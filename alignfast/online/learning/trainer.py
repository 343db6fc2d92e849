"""A reward model trained on votes of all kinds at once.

    loss = sum over the step's votes of  w_i loss_i / votes of the step

What loss_i is: `alignfast.losses.feedback` and `alignfast.losses.ranking_loss`. A win or a tie is Davidson's; a ranking
of more answers without a tie is Plackett and Luce's; one with ties is taken apart into its K (K - 1) / 2 pairs at the weight 2 / K
each, which is that of the K - 1 choices of a ranking.

Levels, offsets of voters and nu follow from the rewards of all votes (levels.py). These are computed once before training,
and each is noted anew when its vote is trained on, before the step that learns it: they are as old as an epoch at most, and a
checkpoint holds them. By the same rewards users are found whose votes contradict them by more than chance: most answers are
seen by one user alone, so that people can be compared by the model only. In the first pass no vote has taught the reward that
it is compared with.

Not done here: several ranks; held-out accuracy, which is of judgements and not of this loss (update.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from alignfast.data import Batch
from alignfast.data.forest import Forest, Prepared
from alignfast.data.formats import Rows
from alignfast.data.tokenize import Encoder
from alignfast.losses import comparison_loss, ranking_loss, verdict_loss
from alignfast.online.learning.levels import fit_levels, fit_ties
from alignfast.online.learning.said import Said, find_contrary, pairs_of
from alignfast.online.learning.votes import DAY, VoteLimits
from alignfast.trainers.batches import NO_DATA, Counts, Data, Share, join_data, longest_row
from alignfast.trainers.config import config
from alignfast.trainers.metrics import Metrics, means
from alignfast.trainers.reward import RewardConfig, RewardTrainer
from alignfast.trainers.state import read_json, write_json

_SEEN = "rewards_seen.json"


@config
class FeedbackConfig(RewardConfig):
    """Options of FeedbackTrainer, and of a reward model's update."""

    num_train_epochs: float = 1.0
    """Passes over the votes of a round and what is replayed with them."""
    voter_prior: float = 1.0
    """Standard deviation of the offsets of voters, in nats, > 0: how differently pleased they are taken to be."""
    level_period: float | None = None
    """Seconds after which thumbs and ratings get levels of their own, so that a shift of everybody's mood is not taken for
    one of the answers'. None: one level for ever."""
    edit_kept: float = 0.5
    """Share of an edit that must be the original's, by runs of three characters, in [0, 1]; it is another text otherwise."""
    implicit_weight: float = 0.0
    """Weight of a hint (copied, regenerated, stopped), by that of a vote, in [0, 1]; 0 learns nothing of them."""
    voter_most: float = 20.0
    """What all votes of one voter weigh together at most, > 0; one alone weighs 1."""
    voter_cap: int = 100
    """Votes of one voter in a period that count at all, >= 1."""
    voter_period: float = DAY
    """That period in seconds, > 0."""
    flagged_weight: float = 1.0
    """What votes of a flagged user weigh, by those of others, in [0, 1]; 0 leaves them out."""
    contrary_weight: float = 1.0
    """What votes of a user weigh who says the reverse of what the model learns from the others, in [0, 1]."""
    replay_ratio: float = 1.0
    """Old votes trained on again, by the number of new ones at most, >= 0."""
    peft: dict[str, Any] | None = None
    """LoraConfig's options: adapters and the head are trained, added on the first update. None: the whole model, or the
    adapters that it came with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.voter_prior > 0, "voter_prior", "above 0")
        self._require(self.level_period is None or self.level_period > 0, "level_period", "above 0, or None")
        for name in ("edit_kept", "implicit_weight", "contrary_weight"):
            self._require(0 <= getattr(self, name) <= 1, name, "in [0, 1]")
        self._require(self.replay_ratio >= 0, "replay_ratio", "at least 0")
        _ = self.vote_limits  # tells a wrong option

    @property
    def vote_limits(self) -> VoteLimits:
        """How much one voter may count."""
        return VoteLimits(
            most=self.voter_most, cap=self.voter_cap, period=self.voter_period, flagged=self.flagged_weight
        )


class FeedbackTrainer(RewardTrainer):
    """A RewardTrainer whose rows are what people said.

    Args:
        model: as of RewardTrainer.
        args: a FeedbackConfig.
        train_dataset: a list of Said.

    Raises:
        ValueError: it is started on several ranks.
    """

    args: FeedbackConfig
    config_class: ClassVar[type[FeedbackConfig]] = FeedbackConfig

    def __init__(self, model: Any, args: FeedbackConfig | None = None, *more: Any, **rest: Any) -> None:
        self.contrary: frozenset[str] = frozenset()  # users whose votes contradict what the others' teach
        self.said: dict[int, Said] = {}  # by the number of the row
        self.seen: dict[int, list[float]] = {}  # mean over heads of each answer's reward, likewise
        super().__init__(model, args, *more, **rest)
        if self.accelerator.num_processes > 1:
            raise ValueError(
                "votes are learned from in one process: start the learner without torchrun or accelerate launch"
            )

    def before_training(self) -> None:
        """What the model says of all answers as it is."""
        super().before_training()
        trees = self.train_data.trees
        if trees:
            rewards_S = self.module.score(trees).mean(1)
            each = np.split(rewards_S, np.cumsum([len(tree.answers) for tree in trees])[:-1])
            self.seen = {self.train_data.first + row: found.tolist() for row, found in enumerate(each)}

    def before_step(self, data: Data, share: Share) -> None:
        """Levels, offsets and nu from the rewards as they were last seen."""
        self.contrary = self.find_contrary()
        weights = {number: self.weight(one) for number, one in self.said.items()}
        self.shared = _Shared.fit(self.said, weights, self.seen, self.args)

    def compute_loss(self, batch: Batch, counts: Counts, router_weight: float) -> tuple[Tensor, Metrics]:
        """The weighted loss of votes, a mean over the step's and over heads."""
        rows = [self.said[number] for number in batch.rows]
        drawn_NH = self.drawn_NH

        def loss_fn(rewards_SH: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            each = rewards_SH.split(batch.num_answers)
            for number, rewards_KH in zip(batch.rows, each):
                self.seen[number] = rewards_KH.detach().mean(1).tolist()
            loss_NH = _losses(rows, batch.rows, each, self.shared)
            weight_N = torch.tensor([self.weight(said) for said in rows]).to(loss_NH)
            loss_NH = loss_NH * weight_N[:, None]
            if drawn_NH is not None:
                loss_NH = loss_NH * drawn_NH[list(batch.rows)].to(loss_NH)
            loss = loss_NH.mean(1).sum() / counts["rows"]
            return loss, {"mean_reward": rewards_SH.detach().mean(1).sum()}

        loss, sums = self.policy(batch, loss_fn)
        return loss, means(sums, {"mean_reward": counts["answers"]})

    def find_contrary(self) -> frozenset[str]:
        """Users whose votes contradict the rewards as they were last seen."""
        return find_contrary(list(self.said.values()), [self.seen[number] for number in self.said])

    def weight(self, said: Said) -> float:
        """Of a vote, less where its user is contrary."""
        return said.weight * (self.args.contrary_weight if said.user in self.contrary else 1.0)

    def save_more(self, folder: Path) -> None:
        """The rewards as they were last seen."""
        super().save_more(folder)
        write_json(folder / _SEEN, {str(number): rewards for number, rewards in self.seen.items()})

    def load_more(self, folder: Path) -> None:
        """The same."""
        super().load_more(folder)
        self.seen = {int(number): rewards for number, rewards in read_json(folder / _SEEN).items()}

    def _read(self, source: Any) -> Data:
        if source is None:
            return NO_DATA
        said: Sequence[Said] = source
        longest = longest_row(self.args.max_length, self.module.positions)
        prepared = plant(said, self.processing_class, longest, self.args.truncation_mode)
        data = join_data(self.all_data, prepared, self.args, self.module.vocabulary, self.module.positions)
        self.said |= {data.first + at: said[row] for at, row in enumerate(prepared.rows)}
        return data


def plant(
    said: Sequence[Said],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    truncation_mode: str = "drop",
) -> Prepared:
    """Trees of a prompt with the answers that a vote is about; texts first, then conversations.

    Args:
        said: the votes.
        tokenizer: the model's.
        max_length: longest prompt with answer in tokens; None cuts nothing.
        truncation_mode: as of RewardConfig.

    Raises:
        DataError: a template fails.
        ValueError: the tokenizer lacks what the votes need.
    """
    forest = Forest(max_length, truncation_mode)
    for conversational in (False, True):
        indices = [i for i, one in enumerate(said) if isinstance(one.prompt, list) == conversational]
        items = [
            {"prompt": said[i].prompt, "completion": [{"role": "assistant", "content": text}] if conversational else text}
            for i in indices
            for text in said[i].texts
        ]  # fmt: skip
        if not items:
            continue
        numbers, columns = list(range(len(items))), ("prompt", "completion")
        rows = Rows("votes", "prompt_completion", conversational, items, "answer", numbers, columns)
        encoder = Encoder(rows, tokenizer)
        prompts, sequences = encoder.prompts(numbers), encoder.sequences(numbers, "completion")[0]
        at = 0
        for i in indices:
            end = at + len(said[i].texts)
            forest.plant(i, prompts[at], sequences[at:end], None)
            at = end
    return forest.prepared()


class _Shared(NamedTuple):
    """What votes share beside rewards: reward at which each vote's levels lie, by the number of its row; and log nu."""

    cuts: dict[int, list[float]]
    log_nu: float

    @classmethod
    def fit(
        cls,
        said: dict[int, Said],
        weights: dict[int, float],
        seen: dict[int, list[float]],
        args: FeedbackConfig,
    ) -> _Shared:
        """Those under which the votes are likeliest, each at its weight in the loss, where the levels of a vote share it."""
        levels: dict[Any, int] = defaultdict(lambda: len(levels))
        voters: dict[str, int] = defaultdict(lambda: len(voters))
        verdicts: list[tuple[int, float, bool, int, int, float]] = []
        duels: list[tuple[float, bool, float]] = []
        for number, one in said.items():
            if one.above:
                period = 0 if args.level_period is None else one.created // args.level_period
                verdicts += [
                    (
                        number,
                        seen[number][0],
                        above,
                        levels[one.kind, period, k],
                        voters[one.user],
                        weights[number] / len(one.above),
                    )
                    for k, above in enumerate(one.above)
                ]
            elif (len(one.texts) == 2 and one.kind != "edit") or one.tied:
                duels += [
                    (seen[number][i] - seen[number][j], tied, weights[number] * 2 / len(one.texts))
                    for i, j, tied in pairs_of(one)
                ]
        cuts: dict[int, list[float]] = defaultdict(list)
        if verdicts:
            numbers, *columns = zip(*verdicts)
            reward_M, above_M, level_M, voter_M, weight_M = map(np.asarray, columns)
            found = fit_levels(
                reward_M.astype(np.float64), above_M, level_M, voter_M, weight_M, prior=args.voter_prior
            )
            for number, cut in zip(numbers, found.level_K[level_M] + found.offset_V[voter_M]):
                cuts[number].append(float(cut))
        log_nu = fit_ties(*map(np.asarray, zip(*duels))) if duels else -np.inf
        return cls(dict(cuts), log_nu)


def _losses(rows: list[Said], numbers: Sequence[int], each: Sequence[Tensor], shared: _Shared) -> Tensor:
    """loss_NH of votes, those of one shape as one tensor."""
    alike: dict[tuple[str, int], list[int]] = defaultdict(list)
    for at, one in enumerate(rows):
        if one.above:
            alike["verdict", len(one.above)].append(at)
        else:
            duel = one.tied or (len(one.texts) == 2 and one.kind != "edit")
            alike["duel" if duel else "ranking", len(one.texts)].append(at)
    found: list[Tensor] = []
    for (kind, _number), places in alike.items():
        rewards_NKH = torch.stack([each[at] for at in places])
        if kind == "verdict":
            above_NK = torch.tensor([rows[at].above for at in places], device=rewards_NKH.device)
            cut_NK = torch.tensor([shared.cuts[numbers[at]] for at in places])
            found.append(verdict_loss(rewards_NKH[:, 0], above_NK, cut_NK))
        elif kind == "ranking":
            found.append(ranking_loss(rewards_NKH, rewards_NKH.new_zeros(len(places))))
        else:
            found.append(_duels([rows[at] for at in places], rewards_NKH, shared.log_nu))
    order = [at for places in alike.values() for at in places]
    return torch.cat(found)[torch.tensor(order, device=found[0].device).argsort()]


def _duels(rows: list[Said], rewards_NKH: Tensor, log_nu: float) -> Tensor:
    """loss_NH of comparisons taken apart into pairs."""
    pairs = [pairs_of(one) for one in rows]
    first_NQ = torch.tensor([[i for i, _, _ in of] for of in pairs])
    second_NQ = torch.tensor([[j for _, j, _ in of] for of in pairs])
    tied_NQ = torch.tensor([[tied for _, _, tied in of] for of in pairs], device=rewards_NKH.device)
    row_N1 = torch.arange(len(rows))[:, None]
    lead_NQH = rewards_NKH[row_N1, first_NQ] - rewards_NKH[row_N1, second_NQ]
    loss_RH = comparison_loss(lead_NQH.flatten(0, 1), tied_NQ.flatten(), log_nu)
    return loss_RH.view_as(lead_NQH).sum(1) * (2 / rewards_NKH.shape[1])
