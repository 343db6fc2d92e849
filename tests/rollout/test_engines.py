"""Completions: greedy ones against transformers, log-probs against the model's own, frequencies, stops, seeds, refusals.

Letters: N tokens drawn, V vocabulary.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from models.zoo import make as make_model
from ops.test_paged_attention_flash import FlashAttn2
from torch import Tensor
from trainers.tiny import WORDS, make_gpt2_with_dropout, make_llama, make_tokenizer
from transformers import PreTrainedTokenizerBase

from alignfast import GRPOConfig
from alignfast.data import Tree, pack
from alignfast.kernels import paged_attention_flash
from alignfast.models.attention import ModelRefused
from alignfast.models.policy import Policy
from alignfast.rollout import Completion, RolloutEngine, Sampling, make_engine
from alignfast.rollout.native import NativeEngine

TOKENIZER = make_tokenizer()
PROMPTS = ["the cat", "a", "the dog sat on the mat and", "very happy bird", "the cat"]
TEMPLATE = "{% for m in messages %}{{ 'happy ' + m['content'] + ' ' }}{% endfor %}"

LOCAL = ("native", "transformers")  # the third, a server, has tests of its own

with_every_engine = pytest.mark.parametrize("name", LOCAL)


def sharp_llama() -> Any:
    """Weights so large that every prompt token bears on the answer; the usual ones give all prompts the same."""
    return make_llama(3, initializer_range=0.5)


def engine_of(
    name: str, model: Any, tokenizer: PreTrainedTokenizerBase = TOKENIZER, **options: Any
) -> RolloutEngine:
    return make_engine(name, Policy(model), tokenizer, **options)


def texts(found: list[list[Completion]]) -> list[list[str]]:
    return [[completion.text for completion in completions] for completions in found]


def logps_by_the_model(model: Any, completion: Completion, temperature: float = 1.0) -> Tensor:
    """logps_N by one plain forward pass in float64: in float32 it is itself 1.3e-5 off on some CPUs."""
    ids = completion.prompt_ids + completion.token_ids
    with torch.no_grad():
        double = deepcopy(model).double()
        logits_NV = double(input_ids=torch.tensor([ids])).logits[0, len(completion.prompt_ids) - 1 : -1]
    tokens_N1 = torch.tensor(completion.token_ids)[:, None]
    return (logits_NV / temperature).log_softmax(-1).gather(1, tokens_N1)[:, 0]


# --- what is drawn ---


@pytest.mark.parametrize("max_sequences", [1, 3, 256])
def test_greedy_is_transformers_own_token_for_token(max_sequences: int) -> None:
    model = sharp_llama().eval()
    sampling = Sampling(temperature=0, max_new_tokens=12, n=2)
    found = engine_of("native", model, max_sequences=max_sequences).generate(PROMPTS, sampling)
    for prompt, completions in zip(PROMPTS, found):
        ids = TOKENIZER(prompt, return_tensors="pt")["input_ids"]
        expected = model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :].tolist()
        for completion in completions:
            assert list(completion.token_ids) == expected
            assert completion.finish_reason == (
                "stop" if expected[-1] == TOKENIZER.eos_token_id else "length"
            )


@pytest.mark.parametrize(
    "architecture", ["qwen3", "mistral", "gemma2", "gemma3", "cohere", "granite", "gpt2", "gpt_neox"]
)
def test_greedy_of_every_architecture(architecture: str) -> None:
    model = make_model(architecture, torch.float32).eval()
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22], [40, 3], [5, 6, 7]]
    sampling = Sampling(temperature=0, max_new_tokens=20, stop_token_ids=())
    native, reference = (engine_of(name, model).generate(prompts, sampling) for name in LOCAL)
    for (ours,), (theirs,) in zip(native, reference):
        assert ours.token_ids == theirs.token_ids
        # eager keeps Gemma 2's softcap, which the reference's sdpa drops: then their own logits differ
        if architecture != "gemma2":
            assert torch.tensor(ours.logps).allclose(torch.tensor(theirs.logps), atol=2e-5)


@with_every_engine
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_the_models_own(name: str, temperature: float) -> None:
    model = sharp_llama().eval()
    sampling = Sampling(temperature=temperature, max_new_tokens=9, n=3, top_k=5)
    for completions in engine_of(name, model).generate(PROMPTS, sampling):
        for completion in completions:
            expected_N = logps_by_the_model(model, completion, temperature)
            assert (torch.tensor(completion.logps) - expected_N).abs().max() < 1e-5
            assert all(s > p for s, p in zip(completion.sampled_logps, completion.logps))
            assert len(completion.mask) == len(completion.logps) == len(completion.token_ids)


def test_log_probs_are_the_trainers_own() -> None:
    """So that the first ratio of a policy update is 1."""
    policy = Policy(sharp_llama().eval())
    found = NativeEngine(policy, TOKENIZER).generate(PROMPTS, Sampling(max_new_tokens=20, n=4))
    completions = [completion for group in found for completion in group]
    trees = [Tree(c.prompt_ids, (c.token_ids,), (c.mask,)) for c in completions]
    with policy.attached():
        logps_P = policy(pack(trees, range(len(trees))))
    ours_P = torch.tensor([logp for c in completions for logp in c.logps])
    assert (logps_P - ours_P).abs().max() < 1e-5


def test_log_probs_in_bfloat16_are_the_trainers_own_on_average() -> None:
    policy = Policy(sharp_llama().eval().bfloat16())
    found = NativeEngine(policy, TOKENIZER).generate(PROMPTS, Sampling(max_new_tokens=20, n=4))
    completions = [completion for group in found for completion in group]
    with policy.attached():
        logps_P = policy(
            pack([Tree(c.prompt_ids, (c.token_ids,), (c.mask,)) for c in completions], range(20))
        )
    ours_P = torch.tensor([logp for c in completions for logp in c.logps])
    assert (logps_P - ours_P).abs().mean() < 1e-2


@with_every_engine
def test_samples_follow_the_models_probabilities(name: str) -> None:
    model = sharp_llama()
    with torch.no_grad():
        p_V = model(input_ids=torch.tensor([TOKENIZER("the cat")["input_ids"]])).logits[0, -1].softmax(-1)
    (samples,) = texts(engine_of(name, model).generate(["the cat"], Sampling(max_new_tokens=1, n=4000)))
    for word in WORDS[:5]:
        p = p_V[TOKENIZER.convert_tokens_to_ids(word)].item()
        # four standard deviations: a wrong distribution is far outside, chance in one of 3,000 runs; seeded anyway
        assert abs(samples.count(word) / 4000 - p) < 4 * (p * (1 - p) / 4000) ** 0.5


@with_every_engine
def test_filters_leave_out_what_is_unlikely(name: str) -> None:
    model = sharp_llama().eval()
    with torch.no_grad():
        p_V = model(input_ids=torch.tensor([TOKENIZER("the cat")["input_ids"]])).logits[0, -1].softmax(-1)
    kept = {
        "top_k": (3, p_V.topk(3).indices),
        "min_p": (0.2, (p_V >= 0.2 * p_V.max()).nonzero()[:, 0]),
    }
    for option, (value, tokens) in kept.items():
        (found,) = engine_of(name, model).generate(
            ["the cat"], Sampling(max_new_tokens=1, n=400, **{option: value})
        )
        assert {completion.token_ids[0] for completion in found} <= set(tokens.tolist())


# --- what it does not depend on ---


@with_every_engine
def test_a_seed_gives_the_same_again_and_leaves_torchs_own(name: str) -> None:
    engine = engine_of(name, sharp_llama())
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (
        texts(engine.generate(PROMPTS, Sampling(max_new_tokens=8, n=4, seed=seed, stop_token_ids=())))
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert torch.rand(1) == expected


def test_a_sample_does_not_depend_on_what_is_drawn_beside_it() -> None:
    policy = Policy(sharp_llama())
    sampling = Sampling(max_new_tokens=20, n=2, seed=3)
    together = NativeEngine(policy, TOKENIZER).generate(PROMPTS, sampling, sequence_ids=range(100, 110))
    few = NativeEngine(policy, TOKENIZER, max_sequences=3, cache_tokens=128, max_prefill_tokens=1)
    backwards = few.generate(
        PROMPTS[::-1], sampling, sequence_ids=[108, 109, 106, 107, 104, 105, 102, 103, 100, 101]
    )
    assert texts(together) == texts(backwards[::-1])
    assert together[0][0].token_ids != together[4][0].token_ids  # of one prompt, under other numbers


def test_a_changed_weight_is_seen_by_the_next_token() -> None:
    policy = Policy(sharp_llama())
    engine, sampling = NativeEngine(policy, TOKENIZER), Sampling(max_new_tokens=8, temperature=0)
    before = engine.generate(PROMPTS, sampling)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    after = engine.generate(PROMPTS, sampling)
    assert texts(after) == texts(NativeEngine(policy, TOKENIZER).generate(PROMPTS, sampling)) != texts(before)


def test_adapters_are_obeyed() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(sharp_llama(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    sampling = Sampling(max_new_tokens=8, temperature=0)
    native, reference = (engine_of(name, model.eval()).generate(PROMPTS, sampling) for name in LOCAL)
    assert texts(native) == texts(reference)


# --- stops ---


@with_every_engine
def test_generation_stops_at_the_end_token_and_keeps_the_mode(name: str) -> None:
    model = sharp_llama().train()
    greedy = {"temperature": 0, "max_new_tokens": 20}
    ((whole,),) = engine_of(name, model).generate(["a"], Sampling(**greedy, stop_token_ids=()))
    end = whole.token_ids[5]
    model.generation_config.eos_token_id = end
    ((completion,),) = engine_of(name, model).generate(["a"], Sampling(**greedy))
    assert completion.finish_reason == "stop"
    assert completion.token_ids == whole.token_ids[: whole.token_ids.index(end) + 1]
    assert completion.text == TOKENIZER.decode(completion.token_ids[:-1], skip_special_tokens=True)
    assert model.training


@with_every_engine
def test_a_stop_of_the_models_own_ends_a_text_and_is_not_part_of_it(name: str) -> None:
    model, tokenizer = sharp_llama(), make_tokenizer()
    tokenizer.pad_token = None  # so that rows are filled up with the stop, which is a word here
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("cat")
    found = texts(engine_of(name, model, tokenizer).generate(PROMPTS, Sampling(max_new_tokens=30, n=8)))
    lengths = {len(text.split()) for group in found for text in group}
    assert len(lengths) > 1  # some stopped
    assert not any("cat" in text for group in found for text in group)


@with_every_engine
def test_a_stop_text_ends_a_completion_where_it_first_stands(name: str) -> None:
    engine = engine_of(name, sharp_llama())
    plain = Sampling(max_new_tokens=30, n=4, temperature=0, stop_token_ids=())
    ((whole, *_),) = engine.generate(["a"], plain)
    words = whole.text.split()
    stop = f"{words[4]} {words[5]}"  # two tokens
    (found,) = engine.generate(["a"], replace(plain, stop=(stop, "no such text")))
    for completion in found:
        assert completion.finish_reason == "stop"
        assert completion.text == whole.text[: whole.text.index(stop)]
        decoded = TOKENIZER.decode(completion.token_ids, skip_special_tokens=True)
        assert decoded == completion.text + stop


@with_every_engine
def test_no_stop_tokens_where_none_are_wanted(name: str) -> None:
    engine = engine_of(name, sharp_llama())
    found = engine.generate(PROMPTS, Sampling(max_new_tokens=40, n=8, stop_token_ids=()))
    assert {len(completion.token_ids) for group in found for completion in group} == {40}


# --- prompts ---


@with_every_engine
def test_prompts_are_texts_conversations_or_tokens(name: str) -> None:
    model, tokenizer = sharp_llama(), make_tokenizer()
    engine, sampling = engine_of(name, model, tokenizer), Sampling(max_new_tokens=8, temperature=0)
    chat = [{"role": "user", "content": "the cat"}]
    with pytest.raises(ValueError, match="chat template"):
        engine.generate([chat], sampling)
    tokenizer.chat_template = TEMPLATE
    by_chat, by_text, by_ids, other = texts(
        engine.generate([chat, "happy the cat", tokenizer("happy the cat")["input_ids"], "the cat"], sampling)
    )
    assert by_chat == by_text == by_ids != other


@with_every_engine
def test_a_tokenizer_without_a_pad_token_will_do(name: str) -> None:
    model, tokenizer = sharp_llama(), make_tokenizer()
    sampling = Sampling(max_new_tokens=6, temperature=0)
    expected = texts(engine_of(name, model, tokenizer).generate(PROMPTS, sampling))
    tokenizer.pad_token = None
    assert texts(engine_of(name, model, tokenizer).generate(PROMPTS, sampling)) == expected


@with_every_engine
def test_no_prompts_give_no_completions(name: str) -> None:
    assert engine_of(name, make_llama()).generate([], Sampling()) == []


@with_every_engine
def test_a_completion_ends_where_the_models_positions_do(name: str) -> None:
    engine = engine_of(name, make_gpt2_with_dropout())  # 64 learned positions: one more is an error
    sampling = Sampling(max_new_tokens=30, stop_token_ids=())
    (short,), (long,) = engine.generate(["a " * 10, "a " * 60], sampling)
    assert (len(short.token_ids), len(long.token_ids)) == (30, 4)
    assert long.finish_reason == "length"


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ({"n": 0}, "n must be >= 1, got 0"),
        ({"temperature": -1}, "temperature and top_k must be >= 0"),
        ({"top_p": 0}, "0 < top_p <= 1"),
        ({"top_k": -1}, "top_k must be >= 0"),
        ({"min_p": 1}, "0 <= min_p < 1"),
        ({"stop": "."}, "must be a tuple of texts"),
        ({"stop": ("",)}, "none of them empty"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


@with_every_engine
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "no token to start from"),
        ([], "no token to start from"),
        ([3, 32], "token id 32 and the model knows 32 tokens"),
        ([3, -1], "token id -1"),
        ("a " * 64, "prompt 1 has 64 tokens, which leaves no room in the model's 64 positions"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(name: str, prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine_of(name, make_llama()).generate(["a", prompt], Sampling())


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ValueError, match="'vlm' is not one of native, transformers"):
        engine_of("vlm", make_llama())


def test_a_cache_that_holds_no_sequence_is_refused() -> None:
    engine = engine_of("native", make_llama(), cache_tokens=16)
    with pytest.raises(ValueError, match="cache_tokens=16 is too few"):
        engine.generate(["a"], Sampling(max_new_tokens=30))


def test_decoding_by_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pages are of 256 tokens: prompts that share one, that fill one, and answers that run into the next."""
    monkeypatch.setattr(
        paged_attention_flash, "library", lambda device: paged_attention_flash.Library(2, FlashAttn2)
    )
    monkeypatch.setattr(paged_attention_flash, "refusal", lambda device, dtype: None)
    policy = Policy(make_llama(3, initializer_range=0.5, max_position_embeddings=512).eval())
    prompts = [[5 + i % 20 for i in range(length)] for length in (250, 256, 3, 250)]
    sampling = Sampling(max_new_tokens=12, n=2, seed=4, stop_token_ids=())
    flash = NativeEngine(policy, TOKENIZER, decode_backend="flash")
    found, expected = (
        engine.generate(prompts, sampling) for engine in (flash, NativeEngine(policy, TOKENIZER))
    )
    assert flash.page == 256
    for ours, theirs in zip(found, expected):
        for a, b in zip(ours, theirs):
            assert a.token_ids == b.token_ids
            assert a.logps == pytest.approx(b.logps, abs=1e-5)


def test_flash_attn_that_can_not_be_had_is_refused_before_anything_is_drawn() -> None:
    with pytest.raises(RuntimeError, match="backend='flash': flash-attn needs a CUDA tensor, got cpu"):
        make_engine("native", Policy(make_llama()), TOKENIZER, decode_backend="flash")
    with pytest.raises(ValueError, match=r"decode_backend=.* has no meaning without engine"):
        GRPOConfig(engine="transformers", decode_backend="flash")


def test_a_model_without_numbers_is_an_error() -> None:
    model = make_llama()
    engine = engine_of("native", model)
    engine.generate(["a"], Sampling(max_new_tokens=1))
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="are no numbers"):
        engine.generate(["a"], Sampling(max_new_tokens=1))


def test_a_model_that_comes_out_wrong_is_refused() -> None:
    """An attention that looks at the mask's shape alone runs, and is wrong one token at a time."""
    model = make_llama(initializer_range=0.5)
    forward = model.model.layers[0].self_attn.forward

    def forgetful(*args: Any, **options: Any) -> Any:
        options.pop("packed_cache", None) if options.get("packed_layout") is None else None
        return forward(*args, **options)

    model.model.layers[0].self_attn.forward = forgetful
    with pytest.raises(ModelRefused, match="use engine='transformers'"):
        engine_of("native", model).generate(["a"], Sampling())
