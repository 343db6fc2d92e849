"""Evaluation of trainers that sample: its figures by the model's own logits and by hand, and what resumption keeps."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from trainers.test_grpo import ROWS, logged, make_trainer, share_of_the
from trainers.tiny import make_llama

from alignfast.evaluation import JudgeError, distinct_n, win_rate

HELD_OUT = [
    {"prompt": "the dog", "answer": "a"},
    {"prompt": "a", "answer": "b"},
    {"prompt": "on mat", "answer": "c"},
]
EVALUATED = dict(eval_dataset=HELD_OUT, num_generations_eval=3, eval_strategy="no")


def make_evaluated(folder, reward_funcs=share_of_the, **options):
    return make_trainer(folder, reward_funcs, **{**EVALUATED, **options})


def num_letters(completions, **columns):
    return [float(len(text)) for text in completions]


def drawn_by(trainer):
    return trainer.judged._draw(trainer.eval_data[""])


class Pairwise:
    """A judge that compares; `verdict(completion, other)` says how."""

    name = "pairwise"

    def __init__(self, verdict):
        self.verdict, self.checks, self.pairs = verdict, 0, []

    def check(self):
        self.checks += 1

    def compare(self, prompts, completions, others):
        self.pairs += zip(prompts, completions, others)
        return [self.verdict(a, b) for a, b in zip(completions, others)]


# --- tokens ---


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_kl_and_entropy_are_those_of_the_models_own_logits(tmp_path, layout):
    trainer = make_evaluated(
        tmp_path, beta=0.05, temperature=0.8, learning_rate=3e-2, layout=layout, per_device_eval_batch_size=2
    )
    trainer.train()
    figures, drawn = trainer.evaluate(), drawn_by(trainer)
    tokens, sums = 0, dict.fromkeys(("entropy", "kl", "kl_k3"), 0.0)
    models = copy.deepcopy(trainer.model).double().eval(), make_llama().double().eval()
    for of in drawn:
        prompt, answer = of.completion.prompt_ids, of.completion.token_ids
        with torch.no_grad():
            logps_LV, ref_LV = (
                (model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / 0.8).log_softmax(-1)
                for model in models
            )
        d_L = (ref_LV - logps_LV).gather(1, torch.tensor(answer)[:, None])[:, 0]
        sums["kl"] += -d_L.sum().item()
        sums["kl_k3"] += (d_L.exp() - 1 - d_L).sum().item()
        sums["entropy"] += -(logps_LV.exp() * logps_LV).sum().item()
        tokens += len(answer)
    assert abs(sums["kl"] / tokens) > 0.01  # it moved
    for name, total in sums.items():
        assert figures[f"eval_{name}"] == pytest.approx(total / tokens, rel=1e-4, abs=1e-6)
    assert figures["eval_kl_sequence"] == pytest.approx(sums["kl"] / len(drawn), rel=1e-4)
    for n in (1, 2):
        assert figures[f"eval_distinct_{n}"] == distinct_n([of.completion.token_ids for of in drawn], n)


@pytest.mark.parametrize(
    ("options", "measured"),
    [
        ({}, False),  # a frozen copy is memory that nobody asked for
        (dict(measure_kl=True), True),
        (dict(peft_config=dict(r=2, target_modules=["q_proj"])), True),
        (dict(peft_config=dict(r=2, target_modules=["q_proj"]), measure_kl=False), False),
        (dict(beta=0.1), True),
    ],
    ids=["none", "asked", "lora", "lora-not", "beta"],
)
def test_kl_is_measured_where_it_is_asked_or_free(tmp_path, options, measured):
    figures = make_evaluated(tmp_path, **options).evaluate()
    assert ("eval_kl" in figures) == measured
    assert figures.get("eval_kl", 0.0) == pytest.approx(0, abs=1e-6)


def test_evaluation_leaves_training_as_it_was(tmp_path):
    """Nothing that is measured is learned from."""
    plain, measured = (
        make_trainer(tmp_path / "plain"),
        make_evaluated(
            tmp_path / "measured", judge=num_letters, gold_reward_funcs=[num_letters, "exact"], measure_kl=True,
            eval_strategy="steps", eval_steps=1, eval_on_start=True,
            rows=ROWS,
        ),
    )  # fmt: skip
    plain.train()
    measured.train()
    for a, b in zip(plain.model.parameters(), measured.model.parameters()):
        assert torch.equal(a, b)
    assert len(logged(measured, "eval_reward")) == 4


# --- win rate ---


def test_the_start_policy_ties_with_itself(tmp_path):
    figures = make_evaluated(tmp_path).evaluate()
    assert figures["eval_win_rate"] == 0.5
    assert figures["eval_win_rate_low"] < 0.5 < figures["eval_win_rate_high"]
    assert figures["eval_unjudged"] == 0


def test_the_win_rate_is_against_what_the_start_policy_drew(tmp_path):
    untrained = make_evaluated(tmp_path / "start")
    untrained.wrap()
    start = drawn_by(untrained)
    trainer = make_evaluated(tmp_path, max_steps=25, per_device_train_batch_size=16, learning_rate=3e-2)
    trainer.train()
    figures, drawn = trainer.evaluate(), drawn_by(trainer)
    expected = win_rate(
        [of.reward for of in drawn], [of.reward for of in start], [of.group for of in drawn]
    ).rate
    assert (figures["eval_win_rate"], figures["eval_win_rate_low"], figures["eval_win_rate_high"]) == expected
    assert figures["eval_win_rate"] > 0.7


def test_a_judge_that_scores(tmp_path):
    seen = []

    def judge(prompts, completions, answer):
        seen.append((prompts, answer))
        return [
            -text.split().count("the") if "dog" in prompt else None
            for prompt, text in zip(prompts, completions)
        ]

    trainer = make_evaluated(
        tmp_path, judge=judge, max_steps=25, per_device_train_batch_size=16, learning_rate=3e-2
    )
    trainer.train()
    figures = trainer.evaluate()
    assert figures["eval_win_rate"] < 0.5  # it likes the opposite
    assert figures["eval_unjudged"] == pytest.approx(2 / 3)
    assert len(seen) == 2  # before the first step, and now
    assert seen[0] == seen[1] == ([row["prompt"] for row in HELD_OUT for _ in range(3)], list("aaabbbccc"))


def test_a_judge_that_compares(tmp_path):
    start = make_evaluated(tmp_path / "start")
    start.wrap()
    before = [of.completion.text for of in drawn_by(start)]
    judge = Pairwise(lambda a, b: None if a == b else float(len(a) > len(b)))
    trainer = make_evaluated(tmp_path, judge=judge)
    trainer.train()
    assert judge.checks == 1
    assert judge.pairs == []
    figures, after = trainer.evaluate(), [of.completion.text for of in drawn_by(trainer)]
    assert [pair[1:] for pair in judge.pairs] == list(zip(after, before))
    known = [(a, b) for a, b in zip(after, before) if a != b]
    assert figures["eval_win_rate"] == pytest.approx(sum(len(a) > len(b) for a, b in known) / len(known))
    assert figures["eval_unjudged"] == pytest.approx(1 - len(known) / len(after))


def test_a_judge_that_can_not_judge_is_told_before_training(tmp_path):
    class Deaf(Pairwise):
        def check(self):
            raise JudgeError("no such key")

    trainer = make_evaluated(tmp_path, judge=Deaf(None))
    with pytest.raises(JudgeError, match="no such key"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_figures_of_your_own(tmp_path):
    """Of what was drawn, with its rewards and the rows' columns; resumed, they are those of the run."""
    seen = []

    def longest(prompts, completions, completion_ids, sample_ids, rewards, answer, trainer_state):
        seen.append((prompts, completions, completion_ids, rewards, answer, trainer_state.global_step))
        assert len(set(sample_ids)) == 9
        return {"longest": max(map(len, completion_ids)), "best": max(rewards)}

    trainer = make_evaluated(
        tmp_path, compute_metrics=longest, max_steps=2, eval_strategy="steps", eval_steps=2
    )
    trainer.train()
    figures, drawn = trainer.evaluate(), drawn_by(trainer)
    assert figures["eval_longest"] == max(len(of.completion.token_ids) for of in drawn)
    assert figures["eval_best"] == pytest.approx(max(of.reward for of in drawn))
    assert logged(trainer, "eval_longest") == [figures["eval_longest"]] * 2  # of the run, and of now
    assert [step for *_, step in seen] == [2, 2]
    prompts, completions, ids, _, answers, _ = seen[0]
    assert (prompts, answers) == ([row["prompt"] for row in HELD_OUT for _ in range(3)], list("aaabbbccc"))
    assert completions == [of.completion.text for of in drawn]
    assert ids == [list(of.completion.token_ids) for of in drawn]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completions: 3.0, "must return a dict of numbers, got 3.0"),
        (lambda completions: {"most": "many"}, "must return a dict of numbers, got {'most': 'many'}"),
        (lambda rewards: {"reward": 1.0}, "has a figure 'reward' already; rename it"),
    ],
)
def test_figures_that_are_none_are_told(tmp_path, function, message):
    with pytest.raises(ValueError, match=message):
        make_evaluated(tmp_path, compute_metrics=function).evaluate()


def test_figures_of_columns_that_are_not_there_are_told_before_training(tmp_path):
    with pytest.raises(
        ValueError, match=r"compute_metrics is called as a reward function is: .* needs 'gold'"
    ):
        make_evaluated(tmp_path, compute_metrics=lambda completions, gold: {})


@pytest.mark.parametrize(
    "judge", [Pairwise(lambda a, b: None), lambda completions, **columns: [None] * len(completions)]
)
def test_without_a_verdict_there_is_no_rate(tmp_path, judge, caplog):
    figures = make_evaluated(tmp_path, judge=judge).evaluate()
    assert "eval_win_rate" not in figures
    assert "judged none of 9 pairs" in caplog.text


def test_prompts_that_the_start_policy_never_saw_have_no_rate(tmp_path, caplog):
    trainer = make_trainer(tmp_path)
    trainer.train()
    figures = trainer.evaluate(HELD_OUT)
    assert "eval_win_rate" not in figures
    assert "eval_reward" in figures
    assert "the start policy was not sampled on these prompts" in caplog.text


@pytest.mark.parametrize("option", ["judge", "gold_reward_funcs"])
def test_unknown_functions_are_told_before_training(tmp_path, option):
    with pytest.raises(ValueError, match="there is no reward 'numerik'"):
        make_evaluated(tmp_path, **{option: "numerik"})
    with pytest.raises(ValueError, match="answer"):
        make_trainer(tmp_path, rows=[{"prompt": "a"}], **{option: "exact"})


def test_num_completions_to_print_is_at_least_1(tmp_path):
    with pytest.raises(ValueError, match="num_completions_to_print must be at least 1"):
        make_trainer(tmp_path, num_completions_to_print=0)


# --- gold ---


def test_gold_rewards_by_hand(tmp_path):
    def cats(prompts, completions, **columns):
        return [
            1.0 if "cat" in text else None if "dog" in prompt else 0.0
            for prompt, text in zip(prompts, completions)
        ]

    trainer = make_evaluated(tmp_path, gold_reward_funcs=[num_letters, cats])
    figures, drawn = trainer.evaluate(), drawn_by(trainer)
    letters = [float(len(of.completion.text)) for of in drawn]
    told = cats([HELD_OUT[of.group]["prompt"] for of in drawn], [of.completion.text for of in drawn])
    known = [value for value in told if value is not None]
    assert figures["eval_gold/rewards/num_letters/mean"] == pytest.approx(sum(letters) / len(letters))
    assert figures["eval_gold/rewards/cats/mean"] == pytest.approx(sum(known) / len(known))
    assert figures["eval_gold/reward"] == pytest.approx((sum(letters) + sum(known)) / len(letters))
    assert figures["eval_gold/unscored"] == 0


def test_without_a_gold_reward_there_are_no_figures(tmp_path, caplog):
    figures = make_evaluated(
        tmp_path, gold_reward_funcs=lambda completions, **columns: [None] * len(completions)
    ).evaluate()
    assert not [name for name in figures if "gold" in name]
    assert "no completion got a gold reward" in caplog.text


# --- resumption ---


@pytest.mark.parametrize("pairwise", [False, True])
def test_a_resumed_run_keeps_the_start_completions(tmp_path, pairwise):
    def judge():
        return Pairwise(lambda a, b: float(len(a) > len(b)) if a != b else 0.5) if pairwise else num_letters

    options = dict(
        max_steps=4, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, beta=0.1,
        steps_per_generation=2, per_device_train_batch_size=4,
    )  # fmt: skip
    whole = make_evaluated(tmp_path, judge=judge(), **options)
    whole.train()
    for step in (1, 2):
        resumed = make_evaluated(tmp_path, judge=judge(), **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / f"step-{step}"))
        assert resumed.judged.starts == whole.judged.starts
        for a, b in zip(whole.model.parameters(), resumed.model.parameters()):
            assert torch.equal(a, b)
        names = {name for row in whole.state.log_history for name in row if name.startswith("eval_")}
        for name in names - {"eval_runtime"}:
            assert logged(whole, name) == logged(resumed, name), name


def test_a_start_without_a_score_survives_the_disk(tmp_path):
    judge = lambda prompts, completions: [None if "dog" in p else 1.0 for p in prompts]  # noqa: E731
    options = dict(judge=judge, save_strategy="steps", save_steps=1, max_steps=2)
    make_evaluated(tmp_path, **options).train()
    resumed = make_evaluated(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "step-1"))
    (start,) = resumed.judged.starts.values()
    assert [math.isnan(score) for score in start.scores] == [True] * 3 + [False] * 6


def test_another_judge_can_not_go_on(tmp_path):
    options = dict(save_strategy="steps", save_steps=1, max_steps=2)
    make_evaluated(tmp_path, **options).train()
    with pytest.raises(ValueError, match="judged by share_of_the, this run's by num_letters"):
        make_evaluated(tmp_path, judge=num_letters, **options).train(
            resume_from_checkpoint=str(tmp_path / "checkpoints" / "step-1")
        )


# --- samples ---


def samples(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().split("\n") if line]


def test_samples_of_a_draw_with_their_rewards(tmp_path):
    trainer = make_trainer(tmp_path, [share_of_the, num_letters], logging_steps=2, max_steps=4)
    trainer.train()
    rows = samples(tmp_path)
    assert [row["step"] for row in rows] == [2] * 4 + [4] * 4
    for row in rows:
        assert row["prompt"] in [of["prompt"] for of in ROWS]
        (letters,), (the,) = num_letters([row["completion"]]), share_of_the([row["completion"]])
        assert row["rewards"] == pytest.approx({"share_of_the": the, "num_letters": letters})
        assert row["reward"] == pytest.approx(the + letters)


def test_a_draw_is_told_once_and_a_reward_that_is_none_is_null(tmp_path):
    trainer = make_trainer(
        tmp_path, lambda completions, **columns: [None, *range(1, len(completions))], max_steps=4,
        steps_per_generation=2, per_device_train_batch_size=4,
    )  # fmt: skip
    trainer.train()
    assert [row["step"] for row in samples(tmp_path)] == [1] * 4 + [3] * 4
    assert [row["reward"] for row in samples(tmp_path)][:4] == [None, 1, 2, 3]


def test_a_resumed_run_cuts_and_goes_on_with_the_samples(tmp_path):
    options = dict(
        max_steps=4, save_strategy="steps", save_steps=1, steps_per_generation=2, per_device_train_batch_size=4,
        logging_steps=2,
    )  # fmt: skip
    make_trainer(tmp_path, **options).train()
    whole = samples(tmp_path)
    for step in (1, 2, 3):
        resumed = make_trainer(tmp_path, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / f"step-{step}"))
        assert samples(tmp_path) == whole
    before = {"step": 0, "prompt": "a", "completion": "b\u2028c"}  # as the command line writes them
    with (tmp_path / "samples.jsonl").open("a") as lines:
        lines.write(json.dumps(before, ensure_ascii=False) + "\n")
    make_trainer(tmp_path, **options).train()
    assert samples(tmp_path) == [before, *whole]


@pytest.mark.parametrize(("number", "printed"), [(None, 8), (2, 2), (6, 6)])
def test_completions_are_printed_where_asked(tmp_path, number, printed, capfd):
    make_trainer(tmp_path, max_steps=1, log_completions=True, num_completions_to_print=number).train()
    assert capfd.readouterr().err.count("  completion: ") == printed
    assert len(samples(tmp_path)) == 4
