"""Completions of prompts: our engine beside `model.generate`, whole calls in one process, so that both have one malloc.

4 prompts of 128 tokens, 8 completions of 64 tokens each, without a stop, float32 on a CPU, at temperature 1 without filters:
what a GRPO step draws; on a GPU 32 prompts, 256 tokens, bfloat16 and the 0.5B model of dpo_step.py. `generate` gives tokens alone; `generate with log-probs` is our engine around it, which gives what
ours always gives. Weights are changed by no one; first it is checked that greedy decoding gives `generate`'s own tokens (on a CPU), and that
log-probs are the model's.
What makes malloc keep its memory (`sides.TUNED`) is for the environment of the whole run.
`ALIGNFAST_BENCH_MODEL` names the 135M model's folder; without it that row is skipped.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from dpo_step import model_and_tokenizer
from harness import device, measure, need, need_gpu, sizes
from transformers import GenerationConfig

from alignfast.models.policy import Policy
from alignfast.rollout import RolloutEngine, Sampling, make_engine

PROMPTS, EACH = sizes((4, 8), (2, 2))
PROMPT_TOKENS, NEW_TOKENS = sizes((128, 64), (9, 5))
ROUNDS = sizes(7, 1)
FLASH = "alignfast native, flash-attn"  # which of the two decodes faster, no machine has said yet
PROVIDERS = ["alignfast native", FLASH, "generate", "generate with log-probs", "vllm"]
SHAPES = ["0.5b"] if torch.cuda.is_available() else ["tiny", "135m"]
if torch.cuda.is_available():
    PROMPTS, EACH, NEW_TOKENS = sizes((32, 8, 256), (2, 2, 5))


@cache
def model_of(shape: str) -> tuple[Any, Any]:
    """Model and tokenizer, with no defaults of generation that `generate` could fill in."""
    model, tokenizer = model_and_tokenizer(shape)
    model.generation_config = GenerationConfig()
    return model.to(device(), torch.float32 if device().type == "cpu" else torch.bfloat16).eval(), tokenizer


@cache
def engine_of(shape: str, name: str, **options: Any) -> RolloutEngine:
    """One engine for all rounds, as a trainer has it; its first call probes the model."""
    model, tokenizer = model_of(shape)
    return make_engine(name, Policy(model), tokenizer, **options)


def prompts_of(round_number: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(round_number)
    return torch.randint(0, 31_000, (PROMPTS, PROMPT_TOKENS), generator=generator).tolist()


def generate(model: Any, prompts: list[list[int]], each: int, temperature: float) -> list[list[int]]:
    """New tokens of every completion by transformers alone."""
    ids_BL = torch.tensor(prompts, device=device()).repeat_interleave(each, 0)
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        max_new_tokens=NEW_TOKENS, pad_token_id=0, **(drawn if temperature else {"do_sample": False})
    )
    with torch.no_grad():
        out_BL = model.generate(ids_BL, attention_mask=torch.ones_like(ids_BL), generation_config=config)
    return out_BL[:, len(prompts[0]) :].tolist()


def sampling(each: int, temperature: float, seed: int) -> Sampling:
    return Sampling(max_new_tokens=NEW_TOKENS, n=each, temperature=temperature, seed=seed, stop_token_ids=())


def provider(name: str, shape: str) -> Callable[[int], list[list[int]]]:
    """Tokens of all completions of a round; each round has prompts of its own."""
    if name == "generate":
        model = model_of(shape)[0]
        return lambda number: generate(model, prompts_of(number), EACH, 1.0)
    if name == "vllm":
        return vllm(shape)
    if name == FLASH:
        try:
            engine = engine_of(shape, "native", decode_backend="flash")
        except RuntimeError as absent:
            pytest.skip(str(absent))
    else:
        engine = engine_of(shape, "native" if name == "alignfast native" else "transformers")

    check_logps(engine, shape)

    def ours(number: int) -> list[list[int]]:
        found = engine.generate(prompts_of(number), sampling(EACH, 1.0, number))
        return [list(completion.token_ids) for group in found for completion in group]

    return ours


def vllm(shape: str) -> Callable[[int], list[list[int]]]:
    """vLLM's offline engine on the same weights, with the log-prob of each token drawn, as ours has it."""
    need_gpu("vLLM")
    theirs = need("vllm", "vllm")
    folder = tempfile.mkdtemp(prefix="alignfast-bench-")
    for part in model_of(shape):
        part.save_pretrained(folder)
    engine = theirs.LLM(
        folder, dtype="bfloat16", max_model_len=PROMPT_TOKENS + NEW_TOKENS, gpu_memory_utilization=0.5
    )
    options = theirs.SamplingParams(
        n=EACH, max_tokens=NEW_TOKENS, temperature=1.0, ignore_eos=True, logprobs=0
    )

    def call(number: int) -> list[list[int]]:
        prompts = [{"prompt_token_ids": ids} for ids in prompts_of(number)]
        found = engine.generate(prompts, options, use_tqdm=False)
        return [list(answer.token_ids) for request in found for answer in request.outputs]

    return call


def floor_bytes(shape: str) -> float | None:
    """What decoding reads on a GPU at least: the weights at each place, and the keys and values of every sequence."""
    if device().type == "cpu":  # there the head's products count, not bytes
        return None
    model, _ = model_of(shape)
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    entry = 2 * config.num_hidden_layers * config.num_key_value_heads * width * 2  # of one token, in 16 bits
    seen = sum(PROMPT_TOKENS + i for i in range(NEW_TOKENS))
    return NEW_TOKENS * sum(p.nbytes for p in model.parameters()) + PROMPTS * EACH * seen * entry


@cache
def check_greedy(shape: str) -> None:
    """Both take the likeliest token each time, and it is the same one."""
    ours = engine_of(shape, "native").generate(prompts_of(0), sampling(1, 0.0, 0))
    theirs = generate(model_of(shape)[0], prompts_of(0), 1, 0.0)
    assert [list(completion.token_ids) for (completion,) in ours] == theirs


def check_logps(engine: RolloutEngine, shape: str) -> None:
    """The log-probs that an engine gives are the model's own of the same tokens: within 1e-4, on a GPU 1e-2 in the mean."""
    model = model_of(shape)[0]
    differences = []
    for prompt, completions in zip(
        prompts_of(0)[:2], engine.generate(prompts_of(0)[:2], sampling(2, 1.0, 0))
    ):
        for completion in completions:
            drawn_R = torch.tensor(completion.token_ids, device=device())
            ids_1L = torch.cat([torch.tensor(prompt, device=device()), drawn_R])[None]
            with torch.no_grad():
                logits_RV = model(ids_1L).logits[0, len(prompt) - 1 : -1]
            gold_R = logits_RV.float().log_softmax(-1).gather(1, drawn_R[:, None])[:, 0]
            differences.append((torch.tensor(completion.logps, device=device()) - gold_R).abs())
    found = torch.cat(differences)
    if device().type == "cpu":
        assert found.max() <= 1e-4, f"log-probs differ by {found.max():.1e}"
    else:
        assert found.mean() <= 1e-2, f"log-probs differ by {found.mean():.1e} in the mean"


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("shape", SHAPES)
def bench_rollout(benchmark, name: str, shape: str) -> None:  # type: ignore[no-untyped-def]
    if shape == "135m" and "ALIGNFAST_BENCH_MODEL" not in os.environ:
        pytest.skip("ALIGNFAST_BENCH_MODEL is not set")
    benchmark.group = "rollouts"
    if device().type == "cpu":  # in bfloat16 two tokens may be equally likely
        check_greedy(shape)
    call, number = provider(name, shape), iter(range(1, 1000))

    def one_round() -> None:
        drawn = call(next(number))
        assert [len(tokens) for tokens in drawn] == [NEW_TOKENS] * (PROMPTS * EACH)

    measure(
        benchmark, one_round, provider=name, shape=f"{shape}, {PROMPTS} x {EACH}, {PROMPT_TOKENS} + {NEW_TOKENS}",
        tokens=PROMPTS * EACH * NEW_TOKENS, read_bytes=floor_bytes(shape), rounds=ROUNDS,
    )  # fmt: skip
