"""Scores against the model's own logits, one sequence at a time; rates against counts by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from trainers.tiny import make_gpt2_with_dropout, make_llama, make_pairs, make_rows, make_tokenizer

from alignfast.data import load_rows, prepare_preference
from alignfast.evaluation import perplexity, preference_accuracy, win_rate
from alignfast.evaluation.preference import SECTIONS
from alignfast.evaluation.scores import answer_scores
from alignfast.models import Policy

TOKENIZER = make_tokenizer()


def plain_logp(model: torch.nn.Module, prompt: str, answer: str) -> tuple[float, int]:
    """Log-prob of an answer (and its end) by the model's own forward, in float64."""
    ids = TOKENIZER(prompt + answer + TOKENIZER.eos_token)["input_ids"]
    start = len(TOKENIZER(prompt)["input_ids"])
    with torch.no_grad():
        logps_LV = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logps_LV[i - 1, ids[i]].item() for i in range(start, len(ids))), len(ids) - start


def spaced(pairs: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """The word-level tokenizer needs the space between prompt and end token to be its own."""
    return [(p, c + " ", r + " ") for p, c, r in pairs]


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("max_tokens", [1, 40, 4096])  # every pair alone, a few together, all together
def test_scores_are_the_models_own(layout: str, max_tokens: int) -> None:
    model = make_llama(1)
    pairs = spaced(make_pairs(7))
    prepared = prepare_preference(load_rows(pairs), TOKENIZER, max_length=None)
    scores = answer_scores(Policy(model, layout=layout), prepared.trees, max_tokens)
    expected = [plain_logp(model, pair[0], answer) for pair in pairs for answer in pair[1:]]
    assert scores.lengths_S.tolist() == [length for _, length in expected]
    np.testing.assert_allclose(scores.sums_S, [logp for logp, _ in expected], rtol=2e-6)


def test_scoring_leaves_the_model_as_it_was() -> None:
    model = make_llama().train()
    before = model.config._attn_implementation
    prepared = prepare_preference(load_rows(spaced(make_pairs(2))), TOKENIZER, max_length=None)
    answer_scores(Policy(model), prepared.trees)
    assert model.training
    assert model.config._attn_implementation == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_scores_are_without_dropout() -> None:
    policy = Policy(make_gpt2_with_dropout().train())
    prepared = prepare_preference(load_rows(spaced(make_pairs(5))), TOKENIZER, max_length=None)
    once, again = (answer_scores(policy, prepared.trees).sums_S for _ in range(2))
    np.testing.assert_array_equal(once, again)


def test_accuracy_by_three_measures() -> None:
    model, reference = make_llama(1), make_llama(2)
    pairs = spaced(make_pairs(40))
    report = preference_accuracy(
        Policy(model), TOKENIZER, load_rows(pairs), reference=Policy(reference), beta=0.5
    )
    own = [[plain_logp(model, p, a) for a in answers] for p, *answers in pairs]
    ref = [[plain_logp(reference, p, a)[0] for a in answers] for p, *answers in pairs]
    margins = [0.5 * ((c[0] - rc) - (r[0] - rr)) for (c, r), (rc, rr) in zip(own, ref)]
    assert report.accuracy["implicit_reward"].estimate == np.mean([margin > 0 for margin in margins])
    assert report.accuracy["logps"].estimate == np.mean([c[0] > r[0] for c, r in own])
    assert report.accuracy["logps_per_token"].estimate == np.mean([c[0] / c[1] > r[0] / r[1] for c, r in own])
    assert report.margin == pytest.approx(np.mean(margins), rel=1e-4)
    assert report.rows == list(range(40))
    np.testing.assert_allclose(report.leads["implicit_reward"], margins, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(report.leads["logps"], [c[0] - r[0] for c, r in own], rtol=1e-4, atol=1e-5)
    assert len({interval.estimate for interval in report.accuracy.values()}) > 1  # the measures differ here


def test_an_equal_reference_is_a_tie() -> None:
    model = make_llama(1)
    report = preference_accuracy(
        Policy(model), TOKENIZER, load_rows(spaced(make_pairs(9))), reference=Policy(model)
    )
    assert report.accuracy["implicit_reward"].estimate == 0.5
    assert report.margin == 0


def test_without_a_reference_there_is_no_implicit_reward() -> None:
    report = preference_accuracy(Policy(make_llama()), TOKENIZER, load_rows(spaced(make_pairs(5))))
    assert report.reference is None
    assert "implicit_reward" not in report.accuracy


def test_adapters_are_measured_against_the_model_without_them() -> None:
    base = make_llama(1)
    rows = load_rows(spaced(make_pairs(30)))
    torch.manual_seed(0)
    adapted = get_peft_model(make_llama(1), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    by_switch = preference_accuracy(Policy(adapted), TOKENIZER, rows)
    by_model = preference_accuracy(Policy(adapted), TOKENIZER, rows, reference=Policy(base))
    assert by_switch.reference == "the model without its adapters"
    assert by_switch.accuracy == by_model.accuracy
    assert by_switch.margin == pytest.approx(by_model.margin, rel=1e-5)
    assert by_switch.margin != 0


def test_repeated_prompts_widen_the_interval() -> None:
    pairs = spaced(make_pairs(20))
    model = Policy(make_llama(1))
    once = preference_accuracy(model, TOKENIZER, load_rows(pairs)).accuracy["logps"]
    copied = preference_accuracy(model, TOKENIZER, load_rows(pairs * 10)).accuracy["logps"]
    assert copied.estimate == once.estimate
    assert copied.high - copied.low == pytest.approx(once.high - once.low, rel=0.05)


def test_subsets_and_sections() -> None:
    names = [name for members in SECTIONS.values() for name in members]
    pairs = spaced(make_pairs(3 * len(names)))
    rows = [
        dict(zip(("prompt", "chosen", "rejected"), pair), subset=names[i % len(names)])
        for i, pair in enumerate(pairs)
    ]
    rows += [{**rows[0], "subset": "hep-rust"}]
    report = preference_accuracy(Policy(make_llama(1)), TOKENIZER, load_rows(rows))
    rates = {name: report.subsets[name]["logps"].estimate for name in names}
    assert set(report.subsets) == set(names)
    assert report.sections["Chat"]["logps"] == pytest.approx(np.mean([rates[n] for n in SECTIONS["Chat"]]))
    code = (
        sum(rates[n] * (4 if n == "hep-rust" else 3) for n in SECTIONS["Reasoning"] if n != "math-prm") / 19
    )
    assert report.sections["Reasoning"]["logps"] == pytest.approx((code + rates["math-prm"]) / 2)
    incomplete = [row for row in rows if row["subset"] != "donotanswer"]
    sections = preference_accuracy(Policy(make_llama(1)), TOKENIZER, load_rows(incomplete)).sections
    assert set(sections) == {"Chat", "Chat Hard", "Reasoning"}


def test_reports_are_json_and_tables() -> None:
    rows = load_rows(
        [{**dict(zip(("prompt", "chosen", "rejected"), p)), "subset": "s"} for p in make_pairs(4)]
    )
    preferences = preference_accuracy(Policy(make_llama()), TOKENIZER, rows, reference=Policy(make_llama(1)))
    texts = perplexity(Policy(make_llama()), TOKENIZER, load_rows(make_rows(4)))
    console = Console(width=160, record=True)
    for report in (preferences, texts):
        assert json.loads(json.dumps(report.to_dict()))["name"]
        console.print(report.table())
    shown = console.export_text()
    assert "implicit reward" in shown
    assert "perplexity" in shown


def test_perplexity_counts_tokens_not_rows() -> None:
    model = make_llama(1)
    rows = [{**row, "completion": row["completion"] + " "} for row in make_rows(11)]
    found = perplexity(Policy(model), TOKENIZER, load_rows(rows))
    sums, lengths = zip(*(plain_logp(model, row["prompt"], row["completion"]) for row in rows))
    assert found.tokens == sum(lengths)
    assert found.nll == pytest.approx(-sum(sums) / sum(lengths), rel=2e-6)
    assert found.perplexity.estimate == pytest.approx(math.exp(found.nll))
    assert found.perplexity.low < found.perplexity.estimate < found.perplexity.high


def test_perplexitys_interval_is_the_jackknifes() -> None:
    """Leaving out one row at a time is another way to the same variance, to first order in 1 / rows."""
    model = make_llama(1, initializer_range=0.5)
    rows = [{**row, "completion": row["completion"] + " "} for row in make_rows(60)]
    found = perplexity(Policy(model), TOKENIZER, load_rows(rows))
    sums_R, lengths_R = np.array([plain_logp(model, row["prompt"], row["completion"]) for row in rows]).T
    without_R = (sums_R.sum() - sums_R) / (lengths_R.sum() - lengths_R)
    deviation = np.sqrt(59 / 60 * np.square(without_R - without_R.mean()).sum())
    half = np.log(found.perplexity.high / found.perplexity.estimate)
    assert half == pytest.approx(1.96 * deviation, rel=0.03)


def test_one_row_has_no_interval() -> None:
    found = perplexity(Policy(make_llama()), TOKENIZER, load_rows(make_rows(1)))
    assert (found.perplexity.low, found.perplexity.high) == (0.0, math.inf)


def test_win_rate_counts_ties_half() -> None:
    rate = win_rate([2, 1, 0, 5], [1, 1, 1, 1])
    assert (rate.wins, rate.ties, rate.losses, rate.rate.estimate) == (2, 1, 1, 0.625)
    mirrored = win_rate([1, 1, 1, 1], [2, 1, 0, 5])
    assert mirrored.rate.estimate == pytest.approx(1 - rate.rate.estimate)
    assert mirrored.rate.low == pytest.approx(1 - rate.rate.high)


@pytest.mark.parametrize(
    ("scores", "others"), [([1, 2], [1]), ([], []), ([1, math.nan], [0, 0]), ([[1]], [[2]])]
)
def test_win_rate_refuses(scores: list, others: list) -> None:
    with pytest.raises(ValueError):
        win_rate(scores, others)


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to score"):
        answer_scores(Policy(make_llama()), [])
    with pytest.raises(ValueError, match="beta"):
        preference_accuracy(Policy(make_llama()), TOKENIZER, load_rows(make_pairs(1)), beta=0)
