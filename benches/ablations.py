"""What each means against imperfect feedback is worth: GRPO with it and without, on tasks of letters where it matters.

    shift    one of two rewards changes its scale and offset in mid-run      reward_normalization_decay
    sparse   one sample in a hundred is rewarded                             dynamic_sampling_rounds, at equally many samples
    late     half of the prompts are judged several updates later            late_max_age, with importance weights
             (late_fast: at a step size three times as large)
    hack     a reward ensemble trained on few noisy pairs                    disagreement_coef

    python benches/ablations.py [shift sparse late late_fast hack] [--seeds 8] [--out results.json]

The model is a Llama of 2 layers and width 32, made anew for each seed: a nearly uniform policy over ten tokens. Arms of a
seed share model, prompts and random numbers, so arms are compared by their differences within seeds: mean and 95 %
interval by Student's t. Results and their reading: docs/ablations.md.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from alignfast import GRPOTrainer, RewardTrainer
from alignfast.rewards import LATE, ClassifierScorer, ModelReward
from alignfast.trainers.judged import EVALUATION
from alignfast.trainers.on_policy import A_DRAW

LETTERS = "abcdefgh"
PROMPTS = [{"prompt": f"{a} {b}"} for a in LETTERS for b in LETTERS]
RUN: dict[str, Any] = dict(
    per_device_train_batch_size=64, num_generations=8, num_generations_eval=8, lr_scheduler_type="constant",
    logging_steps=1000, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, measure_kl=True,
    per_device_eval_batch_size=512,
)  # fmt: skip
# Student's t, 97.5 %, by degrees of freedom
T = [
    math.nan,
    12.71,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
]
Figures = dict[str, float]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Eight letters, an end and a pad."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def make_model(seed: int, kind: Any = LlamaForCausalLM, **options: Any) -> Any:
    """A model that knows nothing."""
    torch.manual_seed(seed)
    return kind(
        LlamaConfig(
            vocab_size=10, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64, eos_token_id=1, pad_token_id=0, bos_token_id=None,
            **options,
        )
    )  # fmt: skip


def train(
    reward_funcs: Any, gold: Callable[..., list[float]], seed: int, curve: int | None = None, **options: Any
) -> Figures:
    """One arm of one seed: the gold reward of 512 completions at the end, and what it cost.

    Args:
        reward_funcs: what is trained on.
        gold: what is meant.
        seed: of the model, the order of prompts and the samples.
        curve: steps between further evaluations, whose gold and KL become `curve`.
        **options: of GRPOTrainer.
    """
    with tempfile.TemporaryDirectory() as folder:
        callback = options.pop("callback", None)
        trainer = GRPOTrainer(
            make_model(seed), reward_funcs, train_dataset=PROMPTS, eval_dataset=PROMPTS, gold_reward_funcs=gold,
            processing_class=make_tokenizer(), output_dir=folder, seed=seed, callbacks=[callback] if callback else None,
            **{**RUN, **options, **({} if curve is None else dict(eval_strategy="steps", eval_steps=curve))},
        )  # fmt: skip
        began = time.process_time()
        trainer.train()
        figures = trainer.evaluate()
        seconds = time.process_time() - began
        found = {
            "gold": figures["eval_gold/reward"],
            "kl": figures["eval_kl_sequence"],
            "steps": trainer.state.global_step,
            "seconds": seconds,
        }
        if curve is not None:
            rows = [row for row in trainer.state.log_history if "eval_kl_sequence" in row]
            found["curve"] = [(row["eval_kl_sequence"], row["eval_gold/reward"]) for row in rows]
        return found


def wanted(prompt: str, length: int) -> list[str]:
    """What should follow a prompt: two letters by turns, which its first letter says."""
    first = LETTERS.index(prompt[0])
    return [LETTERS[(first + (3 if place % 2 else 1)) % len(LETTERS)] for place in range(length)]


def share(prompt: str, completion: str, places: Sequence[int]) -> float:
    """How many of these places have the letter that is wanted there."""
    letters, target = completion.split(), wanted(prompt, 1 + max(places))
    return sum(letters[i : i + 1] == [target[i]] for i in places) / len(places)


def shares(places: Sequence[int]) -> Callable[..., list[float]]:
    """`share` as a reward function."""
    return lambda prompts, completions, **columns: [share(p, c, places) for p, c in zip(prompts, completions)]


# --- shift ---


def shift(seed: int) -> dict[str, Figures]:
    """Two raters: one of the first three letters, of weight 3/4, and one of the last, of weight 1/4, with a little noise. A
    quarter into the run the second rates from 100 to 110 where it rated from 0 to 1, its noise with it."""
    shift_at, first = 20, shares((0, 1, 2))

    def arm(moves: bool, **options: Any) -> Figures:
        noise = random.Random(seed)

        def second(
            prompts: list[str], completions: list[str], trainer_state: Any, **columns: Any
        ) -> list[float]:
            rated = [share(p, c, (3,)) + noise.gauss(0, 0.1) for p, c in zip(prompts, completions)]
            return [100 + 10 * r for r in rated] if moves and trainer_state.global_step >= shift_at else rated

        return train(
            [first, second], shares(range(4)), seed, max_steps=80, max_completion_length=4, learning_rate=3e-3,
            reward_weights=[0.75, 0.25], judge=shares(range(4)), **options,
        )  # fmt: skip

    return {
        "no shift": arm(False),
        "shift, plain": arm(True),
        "shift, normalised": arm(True, reward_normalization_decay=0.9),
    }


# --- sparse ---


class SampleBudget(TrainerCallback):
    """Stops a run once so many completions were sampled; what was drawn again counts."""

    def __init__(self, limit: int) -> None:
        self.limit, self.sampled = limit, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        control.should_training_stop |= self.sampled >= self.limit


def sparse(seed: int) -> dict[str, Figures]:
    """1 where both letters of a completion are right, which a hundredth of the start policy's are, else 0."""
    gold = shares((0, 1))

    def both(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [float(right == 1) for right in gold(prompts, completions)]

    def arm(rounds: int, limit: int = 120 * 64) -> Figures:
        budget = SampleBudget(limit)

        def counted(
            prompts: list[str], completions: list[str], sample_ids: list[int], **columns: Any
        ) -> list[float]:
            budget.sampled += sum(number < EVALUATION for number in sample_ids)
            return both(prompts, completions)

        found = train(
            counted, both, seed, max_steps=120, max_completion_length=2, learning_rate=5e-3, callback=budget,
            dynamic_sampling_rounds=rounds, judge=both,
        )  # fmt: skip
        return {**found, "samples": budget.sampled}

    return {
        "plain": arm(0),
        "drawn again up to 3 times, as many samples": arm(3),
        "drawn again up to 3 times, as many steps": arm(3, 1 << 30),
    }


# --- late ---


def late(seed: int, learning_rate: float = 3e-3) -> dict[str, Figures]:
    """Every letter counts. Prompts that begin with one of the last four letters are judged `delay` updates later."""
    delay = 8

    def arm(waits: int, **options: Any) -> Figures:
        def rated(
            prompts: list[str],
            completions: list[str],
            sample_ids: list[int],
            trainer_state: Any,
            **columns: Any,
        ) -> list[Any]:
            now = trainer_state.global_step
            due = [
                now >= number // A_DRAW + (p[0] in "efgh") * waits for p, number in zip(prompts, sample_ids)
            ]
            return [share(p, c, range(4)) if ok else LATE for p, c, ok in zip(prompts, completions, due)]

        return train(
            rated, shares(range(4)), seed, max_steps=80, max_completion_length=4, learning_rate=learning_rate,
            judge=shares(range(4)), **{"late_max_age": 2 * delay, **options},
        )  # fmt: skip

    return {
        "in time": arm(0),
        "late, dropped": arm(delay, late_max_age=0),
        "late, as if new": arm(delay, late_importance_sampling_correction=False),
        "late, weighed by token": arm(delay),
        "late, weighed by sequence": arm(delay, late_importance_sampling_mode="sequence_truncate"),
    }


def late_fast(seed: int) -> dict[str, Figures]:
    """The same with a step size at which the policy of then is far from that of now."""
    return late(seed, 1e-2)


# --- hack ---


def hack(seed: int) -> dict[str, Figures]:
    """Meant: many `a` and `b`. The reward model has seen 48 pairs of random completions, a quarter of them turned round."""

    def meant(completion: str) -> float:
        return sum(letter in "ab" for letter in completion.split()) / 6

    def gold(completions: list[str], **columns: Any) -> list[float]:
        return [meant(completion) for completion in completions]

    draw = random.Random(seed)
    pairs = []
    while len(pairs) < 48:
        sides = sorted((" ".join(draw.choices(LETTERS, k=6)) for _ in range(2)), key=meant)
        if meant(sides[0]) < meant(sides[1]):
            rejected, chosen = reversed(sides) if draw.random() < 0.25 else sides
            pairs.append(
                {"prompt": draw.choice(PROMPTS)["prompt"], "chosen": " " + chosen, "rejected": " " + rejected}
            )
    with tempfile.TemporaryDirectory() as folder:
        trainer = RewardTrainer(
            make_model(seed, LlamaForSequenceClassification, num_labels=5), train_dataset=pairs, num_heads=5,
            processing_class=make_tokenizer(), output_dir=folder, seed=seed, max_steps=60, learning_rate=3e-3,
            per_device_train_batch_size=16, logging_steps=1000, report_to="none", save_strategy="no",
            disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer.train()
    scorer = ClassifierScorer(trainer.model, make_tokenizer())
    found = {
        name: train(
            ModelReward(scorer, disagreement_coef=coef),
            gold,
            seed,
            curve=20,
            max_steps=80,
            max_completion_length=6,
            learning_rate=3e-3,
        )
        for name, coef in (("mean", 0.0), ("mean - 1 spread", 1.0), ("mean - 3 spreads", 3.0))
    }
    reached = min(max(kl for kl, _ in figures["curve"]) for figures in found.values())
    for figures in found.values():
        figures["gold_at_equal_kl"] = at(reached, figures["curve"])
    return found


def at(kl: float, curve: Sequence[tuple[float, float]]) -> float:
    """Gold where a run first had this KL to its start, between evaluations on a straight line."""
    before = (0.0, curve[0][1])
    for point in curve:
        if point[0] >= kl:
            share_of_way = (kl - before[0]) / max(point[0] - before[0], 1e-9)
            return before[1] + share_of_way * (point[1] - before[1])
        before = point
    return before[1]


# What plain GRPO does with such feedback: the arm that others are compared with.
PLAIN = {
    "shift": "shift, plain", "sparse": "plain", "late": "late, dropped", "late_fast": "late, dropped", "hack": "mean",
}  # fmt: skip
ABLATIONS = {"shift": shift, "sparse": sparse, "late": late, "late_fast": late_fast, "hack": hack}


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """Of the 95 % interval of the mean."""
    n, mean = len(values), sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, n - 1))
    return mean, T[min(n - 1, len(T) - 1)] * spread / math.sqrt(n)


def table(runs: Sequence[dict[str, Figures]], plain: str) -> str:
    """Each arm's figures, and its differences from the plain arm of the seed, as Markdown."""
    arms = list(runs[0])
    names = [
        name
        for name in ("gold", "gold_at_equal_kl", "kl", "steps", "samples", "seconds")
        if name in runs[0][arms[0]]
    ]
    lines = [
        f"| arm | {' | '.join(names)} | gold less that of `{plain}` |",
        "| --- " * (len(names) + 2) + "|",
    ]
    for arm in arms:
        cells = [
            "{:.3g} ± {:.2g}".format(*mean_and_half_width([run[arm][name] for run in runs])) for name in names
        ]
        difference = [run[arm]["gold"] - run[plain]["gold"] for run in runs]
        cells.append("" if arm == plain else "{:+.3f} ± {:.3f}".format(*mean_and_half_width(difference)))
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run ablations, write their figures, print their tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[*ABLATIONS, []], help="all unless named")
    parser.add_argument("--seeds", type=int, default=8, help="2 to 16")
    parser.add_argument(
        "--out", type=Path, default=Path("ablations.json"), help="read first: what it has is not run again"
    )
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"runs": {}}
    found["versions"] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    for name in options.names or ABLATIONS:
        runs = found["runs"].setdefault(name, {})
        for seed in range(options.seeds):
            if str(seed) not in runs:
                runs[str(seed)] = ABLATIONS[name](seed)
                options.out.write_text(json.dumps(found, indent=1, allow_nan=False))
        print(f"## {name}: {len(runs)} seeds\n{table(list(runs.values()), PLAIN[name])}\n", flush=True)


if __name__ == "__main__":
    main()
