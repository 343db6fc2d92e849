"""A reward model's score: of the last real token, alone as in a batch, and refused where the head is not one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from trainers.tiny import make_llama, make_rows, make_tokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from alignfast.models import ModelRefused
from alignfast.rewards import ClassifierScorer, ModelReward, RewardSet, load_reward

TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"
ROWS = make_rows(12)
PROMPTS = [row["prompt"] for row in ROWS]
COMPLETIONS = [row["completion"] for row in ROWS]


def word_tokenizer(pad: str = "<pad>") -> Any:
    """A tokenizer of a few words whose pad may be its end token."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = pad
    return tokenizer


def make_model(num_labels: int = 1, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, eos_token_id=1, pad_token_id=1, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForSequenceClassification(LlamaConfig(**{**sizes, **options}, num_labels=num_labels))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)  # so that scores differ by far more than rounding
    return model.to(dtype)


def by_definition(model: PreTrainedModel, tokenizer: Any, prompt: str, completion: str) -> torch.Tensor:
    """The head on the last hidden state of one sequence, which ends in the end token."""
    ids = torch.tensor([tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"]])
    assert ids[0, -1] == tokenizer.eos_token_id
    with torch.no_grad():
        return model.score(model.model(ids).last_hidden_state[0, -1])


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_a_score_alone_is_the_score_in_a_batch(pad: str) -> None:
    tokenizer = word_tokenizer(pad)
    scorer = ClassifierScorer(make_model(), tokenizer, max_tokens=80)  # several batches of several rows
    together = scorer.score(PROMPTS, COMPLETIONS)
    assert together.shape == (12, 1)
    assert together.dtype == torch.float32
    assert together.std() > 0.1
    for n in range(12):
        alone = scorer.score(PROMPTS[n : n + 1], COMPLETIONS[n : n + 1])
        torch.testing.assert_close(together[n : n + 1], alone, rtol=0, atol=1e-5)
        wanted = by_definition(scorer.model, tokenizer, PROMPTS[n], COMPLETIONS[n])
        torch.testing.assert_close(alone[0], wanted, rtol=0, atol=1e-5)


def test_transformers_own_head_is_one_token_early_where_pad_is_eos() -> None:
    """Why the score is taken by place: with pad == eos theirs skips the end token."""
    tokenizer, model = word_tokenizer("<eos>"), make_model().eval()
    ids = torch.tensor([tokenizer(PROMPTS[0] + COMPLETIONS[0] + "<eos>")["input_ids"]])
    ours = ClassifierScorer(model, tokenizer).score(PROMPTS[:1], COMPLETIONS[:1])
    with torch.no_grad():
        theirs = model(ids).logits
        model.config.pad_token_id = None
        without_pad = model(ids).logits
    torch.testing.assert_close(ours, without_pad, rtol=0, atol=1e-5)
    assert (theirs - ours).abs() > 1e-2


def test_learned_positions_and_dropout() -> None:
    """GPT-2's positions are learned and its dropout is on in training: neither may show."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=64, num_labels=1, pad_token_id=1
    )
    model = GPT2ForSequenceClassification(config).train()
    scorer = ClassifierScorer(model, word_tokenizer())
    together = scorer.score(PROMPTS, COMPLETIONS)
    alone = torch.cat([scorer.score([p], [c]) for p, c in zip(PROMPTS, COMPLETIONS)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert model.training


def test_messages_go_through_the_template() -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    scorer = ClassifierScorer(make_model(), tokenizer)
    prompt = [{"role": "user", "content": "the cat"}]
    completion = [{"role": "assistant", "content": "sat on the mat"}]
    ids = torch.tensor([tokenizer("user the cat <eos> assistant sat on the mat <eos>")["input_ids"]])
    with torch.no_grad():
        wanted = scorer.model.score(scorer.model.model(ids).last_hidden_state[0, -1])
    torch.testing.assert_close(scorer.score([prompt], [completion])[0], wanted, rtol=0, atol=1e-5)


def test_an_empty_completion_has_a_score() -> None:
    scorer = ClassifierScorer(make_model(), word_tokenizer())
    wanted = by_definition(scorer.model, scorer.tokenizer, "the cat", "")
    torch.testing.assert_close(scorer.score(["the cat"], [""])[0], wanted, rtol=0, atol=1e-5)
    assert scorer.score([], []).shape == (0, 1)


def test_disagreement_of_heads_lowers_the_reward() -> None:
    scorer = ClassifierScorer(make_model(num_labels=3), word_tokenizer())
    heads_NK = scorer.score(PROMPTS, COMPLETIONS)
    assert heads_NK.shape == (12, 3)
    assert ModelReward(scorer, disagreement_coef=0.0)(PROMPTS, COMPLETIONS) == pytest.approx(
        heads_NK.mean(1).tolist()
    )
    for n, reward in enumerate(ModelReward(scorer, disagreement_coef=0.5)(PROMPTS, COMPLETIONS)):
        heads = heads_NK[n].tolist()
        mean = sum(heads) / 3
        std = math.sqrt(sum((head - mean) ** 2 for head in heads) / 3)
        assert reward == pytest.approx(mean - 0.5 * std, abs=1e-5)
        assert reward.disagreement == pytest.approx(std, abs=1e-5)


def test_anything_that_scores() -> None:
    class Lengths:
        def score(self, prompts: list[str], completions: list[str]) -> torch.Tensor:
            return torch.tensor([float(len(text)) for text in completions])

    assert ModelReward(Lengths())(["", ""], ["a", "bbb"]) == [1.0, 3.0]

    class Wrong:
        def score(self, prompts: list[str], completions: list[str]) -> torch.Tensor:
            return torch.zeros(1)

    with pytest.raises(ValueError, match=r"expected \(2,\) or \(2, K\) scores, got \(1,\)"):
        ModelReward(Wrong())(["", ""], ["", ""])


def test_heads_and_coefficient_must_agree_before_scoring() -> None:
    ensemble = ClassifierScorer(make_model(num_labels=2), word_tokenizer())
    with pytest.raises(ValueError, match="the reward model has 2 labels"):
        ModelReward(ensemble)
    with pytest.raises(ValueError, match=r"disagreement_coef=0\.5 needs an ensemble of heads"):
        ModelReward(ClassifierScorer(make_model(), word_tokenizer()), disagreement_coef=0.5)
    with pytest.raises(ValueError, match="must be a number >= 0, got -1"):
        ModelReward(ensemble, disagreement_coef=-1)


def save(folder: Path, model: PreTrainedModel) -> str:
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_folder_is_a_reward(tmp_path: Path) -> None:
    model = make_model()
    reward = load_reward(save(tmp_path / "judge", model))
    wanted = ClassifierScorer(model, word_tokenizer()).score(PROMPTS, COMPLETIONS).flatten()
    rewards = RewardSet(reward)
    rewards.check(["prompt"])
    scores = rewards.score(PROMPTS, COMPLETIONS)
    assert scores.names == ("judge",)
    torch.testing.assert_close(scores.rewards_N, wanted, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"the reward model can't read such rows.*no chat template"):
        rewards.check(["prompt"], conversational=True)
    with pytest.raises(ValueError, match="disagreement_coef=1 needs an ensemble"):
        ModelReward.load(tmp_path / "judge", disagreement_coef=1)


def test_a_coefficient_goes_to_the_folders_of_ensembles(tmp_path: Path) -> None:
    model = make_model(num_labels=3)
    ensemble, single = save(tmp_path / "judges", model), save(tmp_path / "judge", make_model())
    with pytest.raises(ValueError, match="the reward model has 3 labels"):
        RewardSet(ensemble)
    scores = RewardSet(["format", ensemble], disagreement_coef=2.0).score(PROMPTS, COMPLETIONS)
    heads_NK = ClassifierScorer(model, word_tokenizer()).score(PROMPTS, COMPLETIONS)
    spread_N = heads_NK.std(1, correction=0)
    torch.testing.assert_close(scores.disagreement_NF[:, 1], spread_N, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        scores.per_function_NF[:, 1], heads_NK.mean(1) - 2 * spread_N, rtol=0, atol=1e-5
    )
    assert scores.disagreement_NF[:, 0].isnan().all()
    with pytest.raises(ValueError, match=r"disagreement_coef=2\.0 needs an ensemble of heads"):
        RewardSet([single, ensemble], disagreement_coef=2.0)
    itself = ModelReward(ClassifierScorer(model, word_tokenizer()), disagreement_coef=0.0)
    for funcs in ("format", itself):
        with pytest.raises(
            ValueError, match="is for the folder of a reward model with several heads, and none is"
        ):
            RewardSet(funcs, disagreement_coef=2.0)


def test_what_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match=r"score\.weight is not in its weights \(a language model has no"):
        load_reward(save(tmp_path / "lm", make_llama()))
    make_model().save_pretrained(tmp_path / "mute")
    with pytest.raises(
        ValueError, match=r"mute holds no tokenizer that can be loaded: save the model's own there"
    ):
        load_reward(tmp_path / "mute")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelRefused, match=r"there is no config\.json"):
        load_reward(tmp_path / "empty")
    bert = BertConfig(
        vocab_size=32,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        num_labels=1,
    )
    with pytest.raises(ModelRefused, match="BertForSequenceClassification has no linear head `score`"):
        ClassifierScorer(BertForSequenceClassification(bert), word_tokenizer())
    relabelled = make_model()
    relabelled.config.num_labels = 4
    with pytest.raises(ModelRefused, match="says num_labels=4 and the head has 1"):
        ClassifierScorer(relabelled, word_tokenizer())


def test_another_tokenizer_is_refused_before_scoring(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="token ids up to 22 and the reward model knows 20 tokens"):
        ClassifierScorer(make_model(vocab_size=20), word_tokenizer())
    with pytest.raises(ValueError, match=r"judge: the tokenizer gives token ids up to 22"):
        RewardSet(save(tmp_path / "judge", make_model(vocab_size=20)))


def test_a_completion_that_is_too_long_is_left_out_alone() -> None:
    scorer = ClassifierScorer(make_model(), word_tokenizer())
    completions = [*COMPLETIONS[:3], " cat" * 64]
    scores = RewardSet(ModelReward(scorer)).score(PROMPTS[:4], completions)
    (failure,) = scores.failures
    assert failure.row == 3
    assert "tokens with its prompt; the reward model takes 1 to 64" in failure.reason
    torch.testing.assert_close(
        scores.rewards_N[:3], scorer.score(PROMPTS[:3], COMPLETIONS[:3])[:, 0], rtol=0, atol=1e-5
    )


def test_texts_and_messages_do_not_mix() -> None:
    scorer = ClassifierScorer(make_model(), word_tokenizer())
    with pytest.raises(
        ValueError, match="prompt 0 says that all are texts, and prompt or completion 1 is not"
    ):
        scorer.score(["a", "a"], ["b", [{"role": "assistant", "content": "b"}]])
