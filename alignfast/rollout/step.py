"""Forward passes over a paged cache, and what is drawn from them: one token of each sequence that takes part.

Sequences of one pass may be drawn in different ways: the pass is one, then those that are drawn alike are drawn together.

Letters: L tokens of prompts, R prompts, S sequences, M pages of a sequence, D width, V vocabulary.
Not done here: which sequences take part (scheduler.py), and when one ends (finish.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from alignfast.kernels import PackedLayout, sample_tokens
from alignfast.models.policy import Policy
from alignfast.rollout.cache import PagedCache
from alignfast.rollout.graphs import StepGraphs
from alignfast.rollout.sampling import Sampling
from alignfast.rollout.scheduler import PromptState, Running, Started


class Step:
    """Forward passes of one engine.

    Args:
        policy: the model, under packed attention whenever a pass is made.
        cache: where keys and values lie.
        graphs: over this cache, for steps of decoding; None computes each step anew.
        most_pages: that any sequence of these passes may have; for the graphs.
    """

    def __init__(
        self, policy: Policy, cache: PagedCache, graphs: StepGraphs | None = None, most_pages: int = 0
    ) -> None:
        self.policy, self.cache = policy, cache
        self.graphs, self.most_pages = graphs, most_pages
        self.device = next(policy.parameters()).device
        self._prompt: PromptState | None = (
            None  # the one whose sequences have not all started, and its last row
        )
        self._hidden_1D = torch.empty(0)

    def prefill(self, started: Started) -> set[Running]:
        """Compute new prompts, and draw the first token of each new sequence.

        Returns:
            The sequences whose logits are no numbers, so that there was nothing to draw from.
        """
        row_of: dict[PromptState, int] = {}
        hidden_RD = self._hidden_1D
        if self._prompt is not None:
            row_of[self._prompt] = 0
        if started.prompts:
            new_RD = self._prompts(started.prompts)
            first = len(row_of)
            hidden_RD = torch.cat((self._hidden_1D, new_RD)) if first else new_RD
            row_of |= {prompt: first + i for i, prompt in enumerate(started.prompts)}
        sequences = started.sequences
        rows_S = torch.tensor([row_of[sequence.prompt] for sequence in sequences], device=self.device)
        if started.copies:
            self.cache.copy_pages(*zip(*started.copies))
        lost = self._draw(hidden_RD, sequences, rows_S)
        last = sequences[-1].prompt
        self._prompt = last if last.left else None
        if last.left:
            row = row_of[last]
            self._hidden_1D = hidden_RD[row : row + 1].clone()
        return lost

    def _prompts(self, prompts: list[PromptState]) -> Tensor:
        """Hidden state of each prompt's last token; their keys and values are stored."""
        layout = PackedLayout.of_sequences(len(prompt.ids) for prompt in prompts)
        ids_L = torch.tensor([*chain.from_iterable(prompt.ids for prompt in prompts)], device=self.device)
        rows = [_rows(prompt.pages, np.arange(len(prompt.ids)), self.cache.size) for prompt in prompts]
        self.cache.begin_prefill(self._there(np.concatenate(rows)))
        position_L = layout.positions().to(self.device)
        hidden_LD = self.policy.next_hidden(ids_L, position_L, self.cache, layout)
        last_R = torch.tensor([len(prompt.ids) for prompt in prompts], device=self.device).cumsum(0) - 1
        return hidden_LD[last_R]

    def decode(self, sequences: list[Running]) -> set[Running]:
        """Draw the next token of each sequence; returns those without numbers, as `prefill` does."""
        size = self.cache.size
        newest_S = np.array([sequence.length - 1 for sequence in sequences], np.int64)
        pages_SM = np.zeros((len(sequences), max(len(s.pages) for s in sequences)), np.int32)
        for row, sequence in zip(pages_SM, sequences):
            row[: len(sequence.pages)] = sequence.pages
        page_S = np.take_along_axis(pages_SM, newest_S[:, None] // size, 1)[:, 0].astype(np.int64)
        ids_S = np.array([sequence.tokens[-1] for sequence in sequences], np.int64)
        length_S = (newest_S + 1).astype(np.int32)
        row_S = page_S * size + newest_S % size
        if self.graphs is not None:
            hidden_SD = self.graphs.hidden(ids_S, newest_S, row_S, pages_SM, length_S, self.most_pages)
        else:
            self.cache.begin_step(*(self._there(x) for x in (row_S, pages_SM, length_S)))
            hidden_SD = self.policy.next_hidden(self._there(ids_S), self._there(newest_S), self.cache)
        return self._draw(hidden_SD, sequences)

    def _there(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(self.device)

    def _draw(
        self, hidden_RD: Tensor, sequences: list[Running], rows_S: Tensor | None = None
    ) -> set[Running]:
        """Draw a token of each sequence, from its own row or from the rows named."""
        groups: dict[tuple[float, ...], list[int]] = {}
        for place, sequence in enumerate(sequences):
            groups.setdefault(_way(sequence.sampling), []).append(place)
        lost: set[Running] = set()
        with self.policy.next_logits(hidden_RD) as logits_RV:
            for places in groups.values():
                rows = rows_S
                if len(groups) > 1:
                    rows = torch.tensor(places, device=self.device)
                    rows = rows if rows_S is None else rows_S[rows]
                alike = [sequences[place] for place in places]
                lost |= self._draw_alike(logits_RV if rows is None else logits_RV[rows], alike)
        return lost

    def _draw_alike(self, logits_SV: Tensor, sequences: list[Running]) -> set[Running]:
        """Draw a token of each sequence, all by the options of the first."""
        sampling = sequences[0].sampling
        numbers = ([s.number for s in sequences], [len(s.tokens) for s in sequences])
        sequence_S, position_S = (torch.tensor(x, device=self.device) for x in numbers)
        tokens_S, logps_S, sampled_logps_S = sample_tokens(
            logits_SV,
            temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p,
            seed=sampling.seed, sequence_B=sequence_S, position_B=position_S, backend=self.policy.backend,
        )  # fmt: skip
        lost = set()
        drawn = zip(sequences, tokens_S.tolist(), logps_S.tolist(), sampled_logps_S.tolist())
        for sequence, token, logp, sampled_logp in drawn:
            if token < 0:
                lost.add(sequence)
                continue
            sequence.tokens.append(token)
            sequence.logps.append(logp)
            sequence.sampled_logps.append(sampled_logp)
        return lost


def no_numbers(sequence: Running) -> str:
    """What is said of a sequence that could not be drawn."""
    return f"the model's logits after {sequence.length} tokens are no numbers: there is nothing to draw from"


def _way(sampling: Sampling) -> tuple[float, ...]:
    """What `sample_tokens` takes one value of in a call."""
    return (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.seed)


def _rows(pages: Sequence[int], positions: np.ndarray, size: int) -> np.ndarray:
    """Rows of the cache at which tokens of a sequence lie."""
    return np.asarray(pages, np.int64)[positions // size] * size + positions % size
