"""Another version in place of the first: no request waits, none is cut, and each answer is of one version whole."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from online.server.serving import FIRST, Live, listening, make_chat_tokenizer, make_model, make_service, until
from safetensors.torch import save_file
from trainers.tiny import make_llama

from alignfast.models.attention import ModelRefused
from alignfast.models.policy import Policy
from alignfast.online.server.versions import Version, version_of, weights_hash
from alignfast.rollout import Sampling
from alignfast.rollout.native import NativeEngine

CHAT = [{"role": "user", "content": "the cat sat"}]
ASK: dict[str, Any] = {
    "model": "tiny",
    "messages": CHAT,
    "temperature": 0,
    "max_tokens": 40,
    "logprobs": True,
}


def save(folder: Path, seed: int) -> Path:
    make_model(seed).save_pretrained(folder)
    make_chat_tokenizer().save_pretrained(folder)
    return folder


def promote(live: Live, name: str, folder: Path) -> None:
    """As another machine does it: in the store, and nowhere else."""
    live.store.versions.add(name, "policy", str(folder), weights_hash(folder))
    live.store.versions.promote(name)


def expected_of(seed: int) -> Any:
    engine = NativeEngine(Policy(make_model(seed)), make_chat_tokenizer())
    ((completion,),) = engine.generate([CHAT], Sampling(temperature=0, max_new_tokens=40))
    return completion


def test_a_swap_under_load_drops_nothing_and_the_next_answer_says_the_new_version(tmp_path: Path) -> None:
    folder = save(tmp_path / "v2", seed=8)
    second = Version("v2", weights_hash(folder))
    expected = {FIRST: expected_of(3), second: expected_of(8)}
    assert expected[FIRST].token_ids != expected[second].token_ids
    with listening(make_service()) as live:
        client, over, found = live.openai(), threading.Event(), []

        def talk() -> None:
            while not over.is_set():
                answer = client.chat.completions.create(**ASK)
                told = answer.model_extra["alignfast"]
                found.append((Version(told["version"], told["weights"]), answer))

        with ThreadPoolExecutor(8) as pool:
            talkers = [pool.submit(talk) for _ in range(8)]
            until(lambda: len(found) >= 8)
            promote(live, "v2", folder)
            until(lambda: live.service.runner.current.version == second)  # type: ignore[union-attr]
            after = client.chat.completions.create(**ASK).model_extra["alignfast"]
            before = len(found)
            until(lambda: len(found) >= before + 8)
            over.set()
            for talker in talkers:
                talker.result()  # an error of any request is raised here
        assert (after["version"], after["weights"]) == second
        assert {version for version, _ in found} == {FIRST, second}
        for version, answer in found:
            (choice,) = answer.choices
            assert choice.message.content == expected[version].text
            logps = [entry.logprob for entry in choice.logprobs.content]
            assert logps == pytest.approx(expected[version].logps[: len(logps)], abs=1e-5)
            shown = live.shown(answer.id)
            assert (shown.policy_version, shown.weights_hash) == version
        until(lambda: live.service.runner.num_engines == 1)
        assert client.models.list().data[0].model_extra["alignfast"] == second._asdict()


def test_an_answer_that_runs_ends_on_the_version_that_began_it(tmp_path: Path) -> None:
    with listening(make_service(endless=True)) as live:
        ask = {"model": "tiny", "messages": CHAT, "max_tokens": 200}
        stream = live.openai().chat.completions.create(**ask, stream=True)
        next(stream)
        model = make_model(8, positions=100_000)
        model.generation_config.eos_token_id = None
        live.service.open(Policy(model), make_chat_tokenizer(endless=True), Version("v2", "2" * 64))
        assert live.service.runner.num_engines == 2
        answer = live.openai().chat.completions.create(**{**ask, "max_tokens": 3})
        assert answer.model_extra["alignfast"]["version"] == "v2"
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert chunks[-1].model_extra["alignfast"]["version"] == "v1"
        assert len(live.shown(chunks[0].id).completion_ids) == 200
        until(lambda: live.service.runner.num_engines == 1)


def test_a_version_that_can_not_run_leaves_the_one_before_it(tmp_path: Path) -> None:
    with listening(make_service()) as live:
        broken = make_llama(1)
        broken.config.layer_types = ["conv", "full_attention"]
        with pytest.raises(ModelRefused, match="conv"):
            live.service.open(Policy(broken), make_chat_tokenizer(), Version("v2", "2" * 64))
        other = make_chat_tokenizer()
        other.chat_template = "{{ 'other' }}"
        with pytest.raises(ValueError, match="'v3' has another tokenizer or chat template"):
            live.service.open(Policy(make_model(8)), other, Version("v3", "3" * 64))
        assert served(live) == FIRST


def served(live: Live) -> Version:
    told = live.openai().chat.completions.create(**ASK).model_extra["alignfast"]
    return Version(told["version"], told["weights"])


# --- hashes ---


def test_a_hash_is_of_the_weights_and_of_nothing_else(tmp_path: Path) -> None:
    first, again, other = (save(tmp_path / name, seed) for name, seed in (("a", 3), ("b", 3), ("c", 8)))
    assert weights_hash(first) == weights_hash(again) != weights_hash(other)
    (again / "README.md").write_text("notes")
    assert weights_hash(again) == weights_hash(first)
    raw = bytearray((again / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (again / "model.safetensors").write_bytes(raw)
    assert weights_hash(again) != weights_hash(first)
    assert version_of(str(first)) == ("a", weights_hash(first))
    assert version_of(str(first), "round-3").name == "round-3"


def test_the_hash_of_adapters_is_of_their_base_too(tmp_path: Path) -> None:
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    save_file({"lora": torch.ones(2)}, adapters / "adapter_model.safetensors")
    hashes = set()
    for seed in (3, 8):
        base = save(tmp_path / f"base-{seed}", seed)
        (adapters / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{base}"}}')
        hashes.add(weights_hash(adapters))
    assert len(hashes) == 2


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds no \.safetensors"):
        weights_hash(tmp_path)
