"""Steps of decoding through static tensors: the recorded function itself in the place of a CUDA graph.

Letters: S sequences, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rollout.test_engines import PROMPTS, TOKENIZER, sharp_llama
from torch import Tensor
from trainers.tiny import make_llama

from alignfast import GRPOConfig
from alignfast.models import ModelRefused, Policy, load_policy
from alignfast.rollout import Completion, Sampling
from alignfast.rollout.graphs import bucket
from alignfast.rollout.native import NativeEngine


class StandIn:
    """Replays by calling the function again, which reads the static tensors alone; its results go where the first one lies."""

    def __init__(self) -> None:
        self.recorded: list[Tensor] = []
        self.replays = 0

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        result_SD = run().clone()
        self.recorded.append(result_SD)

        def replay() -> None:
            self.replays += 1
            result_SD.copy_(run())

        return replay, result_SD


def engines(policy: Policy, **options) -> tuple[NativeEngine, NativeEngine]:
    """One with graphs, one without."""
    with_graphs = NativeEngine(policy, TOKENIZER, **options)
    with_graphs.recorder = StandIn()
    return with_graphs, NativeEngine(policy, TOKENIZER, **options)


def drawn(found: list[list[Completion]]) -> list[tuple]:
    return [(c.token_ids, c.finish_reason) for group in found for c in group]


def assert_alike(one: NativeEngine, other: NativeEngine, sampling: Sampling, prompts=PROMPTS) -> None:
    mine, theirs = one.generate(prompts, sampling), other.generate(prompts, sampling)
    assert drawn(mine) == drawn(theirs)
    for ours, plain in zip(mine, theirs):
        for a, b in zip(ours, plain):
            assert a.logps == pytest.approx(b.logps, abs=1e-5)


@pytest.mark.parametrize("max_sequences", [1, 3, 11, 256])
def test_completions_are_those_without_graphs(max_sequences: int) -> None:
    """Sequences that end at different steps, new ones that take their places, a second page, and a second call."""
    one, other = engines(Policy(sharp_llama().eval()), max_sequences=max_sequences)
    for seed in (1, 2):
        assert_alike(one, other, Sampling(max_new_tokens=20, n=5, seed=seed))
    sizes = {len(result_SD) for result_SD in one.recorder.recorded}
    assert sizes <= {bucket(number) for number in range(1, max_sequences + 1)}
    assert one.recorder.replays > len(one.recorder.recorded)


def test_a_longer_call_is_recorded_anew_with_its_cache() -> None:
    one, other = engines(Policy(sharp_llama().eval()))
    assert_alike(one, other, Sampling(max_new_tokens=4))
    before = len(one.recorder.recorded)
    assert_alike(one, other, Sampling(max_new_tokens=40, n=3))
    assert len(one.recorder.recorded) > before


def test_weights_changed_in_place_are_seen_and_those_put_elsewhere_recorded_anew() -> None:
    policy = Policy(sharp_llama().eval())
    one, other = engines(policy)
    sampling = Sampling(max_new_tokens=8, n=2, stop_token_ids=())  # the same steps each time
    assert_alike(one, other, sampling)
    recorded = len(one.recorder.recorded)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(0.7)
    assert_alike(one, other, sampling)
    assert len(one.recorder.recorded) == recorded
    for parameter in policy.parameters():
        parameter.data = parameter.data * 1.3
    assert_alike(one, other, sampling)
    assert len(one.recorder.recorded) > recorded


def test_adapters_and_precision_are_part_of_what_was_recorded() -> None:
    policy = load_policy(sharp_llama(), peft_config=dict(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    one, other = engines(policy)
    sampling = Sampling(max_new_tokens=8, temperature=0, stop_token_ids=())
    assert_alike(one, other, sampling)
    recorded = len(one.recorder.recorded)
    with policy.adapters_off():
        assert_alike(one, other, sampling)
    assert len(one.recorder.recorded) > recorded
    recorded = len(one.recorder.recorded)
    with torch.autocast("cpu", torch.bfloat16):
        one.generate(PROMPTS, sampling)
    assert len(one.recorder.recorded) > recorded


def test_what_can_not_be_recorded_is_refused_with_its_reason() -> None:
    class Refuses:
        def record(self, run):
            raise RuntimeError("operation not permitted when stream is capturing")

    engine = NativeEngine(Policy(make_llama()), TOKENIZER)
    engine.recorder = Refuses()
    with pytest.raises(
        ModelRefused, match=r"LlamaForCausalLM can't be recorded .* capturing; set cuda_graphs=False"
    ):
        engine.generate(["the cat"], Sampling(max_new_tokens=3))
    engine.cuda_graphs = False
    assert engine.generate(["the cat"], Sampling(max_new_tokens=3))


def test_graphs_without_a_gpu_are_refused() -> None:
    with pytest.raises(ValueError, match="cuda_graphs=True needs a GPU, and the model is on cpu"):
        NativeEngine(Policy(make_llama()), TOKENIZER, cuda_graphs=True).generate(["the cat"], Sampling())
    assert GRPOConfig().cuda_graphs is None
    with pytest.raises(ValueError, match=r"cuda_graphs=.* has no meaning without engine"):
        GRPOConfig(engine="transformers", cuda_graphs=False)
