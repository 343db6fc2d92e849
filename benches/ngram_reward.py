"""What words alone tell: an n-gram Bradley-Terry model, and how much better a reward model does on the same rows.

    p(chosen beats rejected) = sigmoid(w . (f(chosen) - f(rejected)))        f: which words and pairs of words are in a text
    w = argmin mean_n softplus(-w . x_n) + l2 / 2 |w|^2

    python benches/ngram_reward.py --fold pairs_train.jsonl pairs_eval.jsonl eval.json

where eval.json is what `alignfast eval --model MODEL --dataset pairs_eval.jsonl --output eval.json` wrote of a reward model,
or of a policy, which then counts by its implicit reward; without it the n-grams stand alone. After several such files it is
the mean of their rewards that counts: an ensemble. Several `--fold`, each with reward models of its own, are
cross-validation: the figures are those of all held-out rows together.

Length of the n-grams, counts or mere presence, and l2 are those that are right most often in five-fold cross-validation by
prompt on a fold's training rows; then all of them are used. `--max_tokens 256 --tokenizer MODEL` trains on what a reward
model of that max_length sees.

Letters: N pairs, F features, E entries that are not 0.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from alignfast.data import load_rows
from alignfast.data.intervals import numbered, paired_difference, proportion

Features = Counter[tuple[str, ...]]
Row = dict[str, Any]
L2S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)


class Settings(NamedTuple):
    """Words of the longest n-gram, whether n-grams are counted or only noted, and the weight of |w|^2 / 2."""

    longest: int
    counted: bool
    l2: float


class Fold(NamedTuple):
    """Rows to train on, rows held out, and what `alignfast eval` says of reward models on some of those."""

    train: Sequence[Row]
    held_out: Sequence[Row]
    against: Sequence[dict[str, Any]] = ()


class Pairs(NamedTuple):
    """Pairs as what the chosen answer has more of than the rejected one."""

    differences: list[dict[tuple[str, ...], int]]

    def columns(self) -> dict[tuple[str, ...], int]:
        """A number for every n-gram of two pairs or more: what a single pair has can't be told from chance."""
        seen = Counter(feature for difference in self.differences for feature in difference)
        return {feature: i for i, feature in enumerate(f for f, n in seen.items() if n > 1)}

    def matrix(self, columns: dict[tuple[str, ...], int]) -> Tensor:
        """difference_NF, sparse."""
        entries = [
            (i, columns[feature], count)
            for i, difference in enumerate(self.differences)
            for feature, count in difference.items()
            if feature in columns
        ]
        entry_E3 = torch.tensor(entries).view(-1, 3)
        size = (len(self.differences), len(columns))
        return torch.sparse_coo_tensor(
            entry_E3[:, :2].T, entry_E3[:, 2].double(), size, check_invariants=False
        ).coalesce()


def pairs_of(rows: Sequence[Row], longest: int, counted: bool) -> Pairs:
    """The n-grams of rows of `chosen` and `rejected`."""
    differences = []
    for row in rows:
        chosen, rejected = (ngrams(row[name], longest, counted) for name in ("chosen", "rejected"))
        chosen.subtract(rejected)
        differences.append({feature: count for feature, count in chosen.items() if count})
    return Pairs(differences)


def ngrams(text: str, longest: int, counted: bool) -> Features:
    """The n-grams of a text's words and signs, up to so long.

    >>> sorted(ngrams("No, no!", longest=1, counted=True).items())
    [(('!',), 1), ((',',), 1), (('no',), 2)]
    """
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    found = Counter(
        tuple(words[start : start + n]) for n in range(1, longest + 1) for start in range(len(words) - n + 1)
    )
    return found if counted else Counter(found.keys())


def fit(difference_NF: Tensor, l2: float) -> Tensor:
    """weight_F of the least loss."""
    weight_F = torch.zeros(difference_NF.shape[1], dtype=torch.float64, requires_grad=True)
    if not len(weight_F):  # nothing that two pairs have
        return weight_F.detach()
    optimizer = torch.optim.LBFGS([weight_F], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        lead_N = difference_NF @ weight_F
        loss = torch.nn.functional.softplus(-lead_N).mean() + l2 / 2 * weight_F.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight_F.detach()


def right(lead_N: ArrayLike) -> NDArray[np.float64]:
    """1 where the chosen answer leads, 0 where the rejected one does, 0.5 for a tie."""
    return (np.sign(lead_N) + 1) / 2


def choose(rows: Sequence[Row], folds: int = 5, seed: int = 0) -> Settings:
    """The settings that are right most often on a fifth of the prompts each, trained on the others."""
    prompt_N = numbered(row["prompt"] for row in rows)
    fold_N = np.random.default_rng(seed).permutation(prompt_N.max() + 1)[prompt_N] % folds
    hits: Counter[Settings] = Counter()
    for longest, counted, fold in itertools.product((1, 2, 3), (False, True), range(folds)):
        train, check = (
            pairs_of([rows[i] for i in np.flatnonzero(chosen_N)], longest, counted)
            for chosen_N in (fold_N != fold, fold_N == fold)
        )
        columns = train.columns()
        train_NF, check_NF = train.matrix(columns), check.matrix(columns)
        for l2 in L2S:
            hits[Settings(longest, counted, l2)] += right((check_NF @ fit(train_NF, l2)).numpy()).sum()
    return max(hits, key=lambda settings: hits[settings])


def leads(train: Sequence[Row], held_out: Sequence[Row], settings: Settings) -> NDArray[np.float64]:
    """Of each held-out pair, the chosen answer's reward less the rejected one's.

    >>> rows = [{"chosen": "a fine day", "rejected": "a foul day"}] * 2
    >>> print(leads(rows, rows[:1], Settings(longest=1, counted=False, l2=0.5)).round(2))
    [1.04]
    """
    seen, asked = (pairs_of(rows, settings.longest, settings.counted) for rows in (train, held_out))
    columns = seen.columns()
    return (asked.matrix(columns) @ fit(seen.matrix(columns), settings.l2)).numpy()


def leads_of(against: dict[str, Any]) -> list[float]:
    """The leads that `alignfast eval` wrote: a reward model's, or the implicit rewards' of a policy.

    >>> leads_of({"leads": {"implicit_reward": [0.5], "logps": [-1.0]}})
    [0.5]
    """
    found = against["leads"]
    if not isinstance(found, dict):
        return found
    if "implicit_reward" not in found:
        raise SystemExit(
            f"{against['name']}: a policy's own log-probs are no reward; evaluate it with --reference"
        )
    return found["implicit_reward"]


def mean_leads(against: Sequence[dict[str, Any]]) -> NDArray[np.float64]:
    """The leads by the mean reward of several models, which must have scored the same rows.

    >>> print(mean_leads([{"rows": [0, 2], "leads": [0.5, -1.0]}, {"rows": [0, 2], "leads": [-0.1, -1.0]}]))
    [ 0.2 -1. ]
    """
    for other in against[1:]:
        if other["rows"] != against[0]["rows"]:
            raise SystemExit(
                f"{against[0]['model']} and {other['model']} scored other rows, so that their rewards have no mean: "
                "evaluate them on one file with one --max_length"
            )
    return np.mean([leads_of(one) for one in against], axis=0)


def compare(folds: Sequence[Fold]) -> list[str]:
    """What is printed: the n-gram models' accuracy, and beside reward models' on the rows that those scored."""
    prompts: list[str] = []
    word_hits, model_hits, lines = [], [], []
    for train, held_out, against in folds:
        settings = choose(train)
        rows = against[0]["rows"] if against else range(len(held_out))
        asked = [held_out[i] for i in rows]
        prompts += [row["prompt"] for row in asked]
        word_hits.append(right(leads(train, asked, settings)))
        if against:
            model_hits.append(right(mean_leads(against)))
        lines.append(
            f"{len(train)} pairs to train on, {len(asked)} held out; "
            f"n-grams up to {settings.longest} words, {'counted' if settings.counted else 'noted once'}, l2 {settings.l2}"
        )
    hit_N = np.concatenate(word_hits)
    lines += [
        f"held out         {len(prompts)} pairs of {len(set(prompts))} prompts",
        f"n-grams          {proportion(hit_N, prompts)}",
    ]
    if model_hits:
        model_N = np.concatenate(model_hits)
        lines += [
            f"reward model     {proportion(model_N, prompts)}",
            f"their difference {paired_difference(model_N, hit_N, prompts)}",
        ]
    return lines


def no_longer(rows: Sequence[Row], tokenizer: str, max_tokens: int) -> list[Row]:
    """The rows of which no sequence has more tokens, an end token counted."""
    from alignfast.models import load_tokenizer

    length = load_tokenizer(tokenizer, tokenizer)
    return [
        row
        for row in rows
        if max(len(length(row["prompt"] + row[name]).input_ids) for name in ("chosen", "rejected"))
        < max_tokens
    ]


def main() -> None:
    """Read the files, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--fold",
        nargs="+",
        action="append",
        required=True,
        metavar="FILE",
        help="pairs to train on, pairs held out, and what `alignfast eval` wrote about those, of one or more reward models",
    )
    parser.add_argument("--max_tokens", type=int, help="leave longer training rows out")
    parser.add_argument("--tokenizer", help="what counts those tokens")
    options = parser.parse_args()
    if (options.max_tokens is None) != (options.tokenizer is None):
        parser.error("--max_tokens and --tokenizer go together")
    if min(map(len, options.fold)) < 2 or len({len(files) for files in options.fold}) > 1:
        parser.error("each --fold takes as many files: TRAIN HELD_OUT [EVAL ...]")
    folds = []
    for train_file, held_out_file, *eval_files in options.fold:
        train, held_out = (list(load_rows(name)) for name in (train_file, held_out_file))
        if options.max_tokens is not None:
            train = no_longer(train, options.tokenizer, options.max_tokens)
        folds.append(Fold(train, held_out, [json.loads(Path(name).read_text()) for name in eval_files]))
    print("\n".join(compare(folds)))


if __name__ == "__main__":
    main()
