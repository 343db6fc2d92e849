"""The adapter for a vLLM server, against recorded answers (see `recorded.py`): what it asks, what it makes of them, and
what it refuses. That the answers are a real server's is not shown here.
"""

from __future__ import annotations

import base64
import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models.zoo import make as make_model
from rollout.recorded import RecordedServer, answer, card, choice, hang, settings
from torch import Tensor
from trainers.tiny import make_llama, make_tokenizer

from alignfast.losses import importance_weights
from alignfast.models.attention import ModelRefused
from alignfast.models.policy import Policy
from alignfast.rollout import Sampling, make_engine, server
from alignfast.rollout.server import ServerError
from alignfast.rollout.transfer import NcclCommunicator, fingerprint, served_weights, side_by_side
from alignfast.rollout.vllm import VllmEngine, request_seed

TOKENIZER = make_tokenizer()
THE, CAT, SAT = TOKENIZER("the cat sat")["input_ids"]
EOS = TOKENIZER.eos_token_id


@pytest.fixture(autouse=True)
def quick_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_PAUSE_S", 0.01)


@pytest.fixture
def recorded() -> Iterator[RecordedServer]:
    made = RecordedServer(lambda text: TOKENIZER(text)["input_ids"])
    yield made
    made.close()


class FakeGroup:
    """Rank 0 of a group whose other ranks are the recorded server: each side waits for the other, as NCCL does."""

    def __init__(self, recorded: RecordedServer) -> None:
        self.unique_id = bytes(range(128))
        self.recorded, self.received = recorded, {}
        self.joined, self.sent = threading.Event(), threading.Event()
        recorded.answers["/init_weight_transfer_engine"] = self._wait(self.joined)
        recorded.answers["/update_weights"] = self._wait(self.sent)

    def __call__(self, device: torch.device) -> FakeGroup:
        return self

    def _wait(self, event: threading.Event) -> Any:
        def wait(body: dict[str, Any]) -> Any:
            return {"message": "ok"} if event.wait(10) else (500, {"detail": "the trainer never came"})

        return wait

    def _wait_until_asked(self, route: str) -> dict[str, Any]:
        for _ in range(1000):
            if self.recorded.asked_of(route):
                return self.recorded.asked_of(route)[-1]
            threading.Event().wait(0.01)
        raise AssertionError(f"{route} was never asked")

    def join(self, world_size: int) -> None:
        self._wait_until_asked("/init_weight_transfer_engine")
        assert world_size == 3  # two workers and the trainer
        self.recorded.asked.append(("join", {}))
        self.joined.set()

    def broadcast(self, tensor: Tensor) -> None:
        info = self._wait_until_asked("/update_weights")["update_info"]
        name = info["names"][len(self.received) % len(info["names"])]
        self.recorded.asked.append(("broadcast", {"name": name}))
        assert tensor.is_contiguous()
        self.received[name] = tensor.clone()
        if len(self.received) == len(info["names"]):
            self.sent.set()

    def synchronize(self) -> None:
        pass


def engine_of(recorded: RecordedServer, **options: Any) -> VllmEngine:
    return VllmEngine(recorded.url, TOKENIZER, **options)


def adapted(**options: Any) -> Policy:
    """A policy with LoRA that makes a difference."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        make_llama(3), peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "down_proj"], **options})
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_()
    return Policy(model)


# --- what is asked, and what comes of it ---


def test_a_request_leaves_nothing_to_the_servers_own_settings(recorded: RecordedServer) -> None:
    sampling = Sampling(max_new_tokens=7, temperature=0.7, n=3, seed=5, stop=("mat",), stop_token_ids=(9,))
    engine_of(recorded, api_key="secret").generate([[THE, CAT]], sampling, sequence_ids=[10, 11, 12])
    (body,) = recorded.asked_of("/v1/completions")
    assert body == {
        "model": "tiny", "prompt": [THE, CAT], "n": 3, "max_tokens": 7, "min_tokens": 0, "temperature": 0.7, "top_k": 0,
        "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "seed": request_seed(5, 10), "stop": ["mat"], "stop_token_ids": [9], "ignore_eos": True,
        "skip_special_tokens": True, "include_stop_str_in_output": False, "logprobs": 0, "return_token_ids": True,
        "stream": False,
    }  # fmt: skip
    assert recorded.keys == {"Bearer secret"}


def test_completions_hold_what_the_server_drew(recorded: RecordedServer) -> None:
    recorded.answers["/v1/completions"] = answer(
        choice([SAT, EOS], [-1.5, -0.25], index=1, reason="stop", text=" sat", prompt=[THE, CAT]),
        choice([SAT, THE], [-1.5, -2.0], index=0, text=" sat the", prompt=[THE, CAT]),
    )
    ((first, second),) = engine_of(recorded).generate(["the cat"], Sampling(max_new_tokens=2, n=2))
    assert first.prompt_ids == second.prompt_ids == (THE, CAT)
    assert (first.token_ids, first.finish_reason, first.text) == ((SAT, THE), "length", "sat the")
    assert (second.token_ids, second.finish_reason, second.text) == ((SAT, EOS), "stop", "sat")
    assert second.logps == second.sampled_logps == (-1.5, -0.25)
    assert second.mask == (True, True)


def test_prompts_keep_their_order_and_tokens(recorded: RecordedServer) -> None:
    recorded.answers["/v1/completions"] = lambda body: answer(
        *(choice([body["prompt"][0]], index=i, prompt=body["prompt"]) for i in range(body["n"]))
    )
    prompts = [[5 + i % 7, 4] for i in range(40)]
    found = engine_of(recorded, max_requests=8).generate(prompts, Sampling(max_new_tokens=1, n=2))
    assert [[c.token_ids[0] for c in row] for row in found] == [[5 + i % 7] * 2 for i in range(40)]
    assert engine_of(recorded).generate([], Sampling()) == []


def test_a_sample_is_keyed_by_its_own_number(recorded: RecordedServer) -> None:
    """vLLM gives the i-th completion of a request its seed + i."""

    def drawn(sequence_ids: list[int] | None, seed: int = 1) -> dict[tuple[int, int], None]:
        recorded.asked.clear()
        sampling = Sampling(max_new_tokens=2, n=2, seed=seed)
        engine.generate([[THE], [CAT]], sampling, sequence_ids=sequence_ids)
        bodies = recorded.asked_of("/v1/completions")
        return sorted((body["prompt"][0], body["seed"] + i) for body in bodies for i in range(body["n"]))

    engine = engine_of(recorded)
    key = request_seed(1, 0)
    assert drawn(None) == drawn([0, 1, 2, 3]) == [(THE, key), (THE, key + 1), (CAT, key + 2), (CAT, key + 3)]
    assert len(recorded.asked) == 2
    assert drawn([7, 3, 100, 101]) == sorted(
        [(THE, key + 7), (THE, key + 3), (CAT, key + 100), (CAT, key + 101)]
    )
    assert len(recorded.asked) == 3  # 7 and 3 are not successive
    assert not {seed for _, seed in drawn(None, seed=2)} & {seed for _, seed in drawn(None, seed=3)}
    assert 0 <= request_seed(2**40, 2**40) < 2**63
    with pytest.raises(ValueError, match="sequence id for each of 4 completions, got 3"):
        drawn([1, 2, 3])


def test_greedy_decoding_is_asked_once(recorded: RecordedServer) -> None:
    (row,) = engine_of(recorded).generate(["the"], Sampling(max_new_tokens=2, temperature=0, top_k=5, n=3))
    assert [body["n"] for body in recorded.asked_of("/v1/completions")] == [1]  # vLLM refuses more
    assert len(row) == 3
    assert row[0].logps == (-0.5, -0.625)
    assert row[0].sampled_logps == (0.0, 0.0)


def test_end_tokens_are_the_policys(recorded: RecordedServer) -> None:
    model = make_llama()
    model.generation_config.eos_token_id = [EOS, SAT]
    engine = engine_of(recorded, policy=Policy(model), sync=False)
    recorded.answers["/v1/completions"] = lambda body: answer(
        choice([THE, SAT], reason="stop", by=SAT, text=" the sat", prompt=body["prompt"])
    )
    ((completion,),) = engine.generate(["the"], Sampling(max_new_tokens=5))
    (body,) = recorded.asked_of("/v1/completions")
    assert sorted(body["stop_token_ids"]) == sorted([EOS, SAT])
    assert body["ignore_eos"]
    assert (completion.text, completion.finish_reason) == ("the", "stop")
    engine_of(recorded).generate(["the"], Sampling(max_new_tokens=5))  # without a policy, the server's own
    body = recorded.asked_of("/v1/completions")[-1]
    assert (body["stop_token_ids"], body["ignore_eos"]) == ([], False)


def test_what_was_drawn_behind_a_stop_text_is_cut_away(recorded: RecordedServer) -> None:
    """Speculative decoding draws several tokens at once, past the text that stops."""
    tokens = TOKENIZER("the cat sat on the")["input_ids"]
    recorded.answers["/v1/completions"] = answer(
        choice(tokens, reason="stop", by="cat sat", text=" the", prompt=[THE])
    )
    ((completion,),) = engine_of(recorded).generate(["the"], Sampling(max_new_tokens=9, stop=("cat sat",)))
    assert completion.token_ids == tuple(tokens[:3])
    assert len(completion.logps) == len(completion.mask) == 3
    assert (completion.text, completion.finish_reason) == ("the ", "stop")


def test_a_stop_text_of_another_spelling_is_the_servers_word(recorded: RecordedServer) -> None:
    recorded.answers["/v1/completions"] = answer(
        choice([THE, CAT], reason="stop", by="  cat", text="the", prompt=[THE])
    )
    ((completion,),) = engine_of(recorded).generate(["the"], Sampling(max_new_tokens=9, stop=("  cat",)))
    assert (completion.text, completion.finish_reason, completion.token_ids) == ("the", "stop", (THE, CAT))


def test_filters_take_a_second_request_for_the_whole_distribution(recorded: RecordedServer) -> None:
    def respond(body: dict[str, Any]) -> Any:
        if "prompt_logprobs" not in body:
            return answer(choice([SAT, CAT], [-0.25, -0.5], prompt=body["prompt"]))
        scored = choice([THE])
        entries = [{str(token): {"logprob": -float(token), "rank": 1}} for token in body["prompt"]]
        scored["prompt_logprobs"] = [None, *entries[1:]]
        return answer(scored)

    recorded.answers["/v1/completions"] = respond
    ((completion,),) = engine_of(recorded).generate([[THE, CAT]], Sampling(max_new_tokens=2, top_p=0.9))
    assert completion.sampled_logps == (-0.25, -0.5)
    assert completion.logps == (-float(SAT), -float(CAT))
    scoring = recorded.asked_of("/v1/completions")[1]
    assert scoring["prompt"] == [THE, CAT, SAT, CAT]
    assert (scoring["prompt_logprobs"], scoring["max_tokens"]) == (0, 1)
    engine_of(recorded).generate([[THE] * 45], Sampling(max_new_tokens=9, top_p=0.9))
    drawing, scoring = recorded.asked_of("/v1/completions")[2:]
    assert drawing["max_tokens"] + 45 + scoring["max_tokens"] == 48  # the server's context


def test_a_completion_holds_what_importance_correction_needs(recorded: RecordedServer) -> None:
    found = engine_of(recorded).generate(["the", "cat"], Sampling(max_new_tokens=2, n=2))
    completions = [completion for row in found for completion in row]
    then_P = torch.tensor([logp for completion in completions for logp in completion.sampled_logps])
    lengths = [len(completion.token_ids) for completion in completions]
    weights = importance_weights(then_P + 0.5, then_P, lengths, level="sequence", mode="mask", cap=3.0)
    assert weights.weights_P.allclose(torch.full((8,), 1.0).exp())


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("raw_logprobs", {"temperature": 0.7}, "gives raw_logprobs, and temperature=0.7"),
        ("raw_logprobs", {"top_k": 5}, "top_k=5.* need processed_logprobs"),
        (None, {"min_p": 0.1}, "not started with VLLM_SERVER_DEV_MODE=1"),
        ("processed_logits", {}, "gives processed_logits, expected log-probs"),
    ],
)
def test_log_probs_of_another_kind_are_refused(
    recorded: RecordedServer, mode: str | None, options: dict[str, Any], message: str
) -> None:
    recorded.answers["/server_info"] = (404, {"detail": "Not Found"}) if mode is None else settings(mode)
    with pytest.raises(ServerError, match=message):
        engine_of(recorded).generate(["the"], Sampling(**options))
    assert not recorded.asked_of("/v1/completions")


@pytest.mark.parametrize("mode", ["raw_logprobs", None])
@pytest.mark.parametrize("temperature", [0, 1])
def test_raw_log_probs_will_do_where_they_are_the_same(
    recorded: RecordedServer, mode: str | None, temperature: float
) -> None:
    recorded.answers["/server_info"] = (404, {"detail": "Not Found"}) if mode is None else settings(mode)
    sampling = Sampling(max_new_tokens=2, temperature=temperature)
    ((completion,),) = engine_of(recorded).generate(["the"], sampling)
    assert completion.logps == (-0.5, -0.625)


def test_filters_at_another_temperature_are_refused(recorded: RecordedServer) -> None:
    with pytest.raises(ValueError, match="go with temperature=1 alone"):
        engine_of(recorded).generate(["the"], Sampling(temperature=0.5, top_p=0.9))


# --- prompts ---


def test_prompts_are_held_to_the_servers_context(recorded: RecordedServer) -> None:
    engine = engine_of(recorded, policy=Policy(make_llama()), sync=False)  # 64 positions; the server has 48
    with pytest.raises(ValueError, match="48 tokens, which leaves no room in the model's 48 positions"):
        engine.generate(["a", "a " * 48], Sampling())
    with pytest.raises(ValueError, match="token id 32 and the model knows 32 tokens"):
        engine.generate([[3, 32]], Sampling())
    with pytest.raises(ValueError, match="no token to start from"):
        engine.generate([""], Sampling())
    recorded.answers["/v1/completions"] = lambda body: answer(choice([3] * body["max_tokens"]))
    ((completion,),) = engine.generate(["a " * 45], Sampling(max_new_tokens=30))
    assert (len(completion.token_ids), completion.finish_reason) == (3, "length")


# --- a server that is not as it should be ---


def test_a_server_that_is_not_there_is_named_with_the_way_to_one() -> None:
    made = RecordedServer(list)
    made.close()
    with pytest.raises(
        ServerError, match=r"no vLLM server can be reached at .* asked 3 times.*vllm serve MODEL"
    ):
        VllmEngine(made.url, TOKENIZER, retries=2)


def test_a_server_that_is_starting_is_waited_for(recorded: RecordedServer) -> None:
    recorded.answers["/health"] = [(503, ""), (503, ""), (503, ""), None]
    engine_of(recorded, retries=0, server_timeout=10)
    assert len(recorded.asked_of("/health")) == 4


@pytest.mark.parametrize(
    ("route", "said", "message"),
    [
        ("/tokenize", {"tokens": [1, 2]}, "another model than the tokenizer's"),
        ("/v1/models", {"data": [card("a"), card("b")]}, "serves a, b: name one by model="),
        ("/health", "<html>", "expected JSON: is it a vLLM server"),
        ("/v1/models", (401, {"error": "Unauthorized"}), "asks for a key"),
        ("/v1/models", (404, {"detail": "Not Found"}), "has no route /v1/models: it is too old"),
    ],
)
def test_another_server_is_refused_at_once(
    recorded: RecordedServer, route: str, said: Any, message: str
) -> None:
    recorded.answers[route] = said
    with pytest.raises(ServerError, match=message):
        engine_of(recorded)


def test_a_model_is_found_by_its_name(recorded: RecordedServer) -> None:
    recorded.answers["/v1/models"] = {"data": [card("tiny"), card("adapter", parent="tiny")]}
    assert engine_of(recorded).model == "tiny"
    assert engine_of(recorded, model="adapter").model == "adapter"
    with pytest.raises(ServerError, match="serves tiny, adapter, and not 'other'"):
        engine_of(recorded, model="other")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ((400, {"error": {"message": "max_tokens is too large", "code": 400}}), r"\(400\): max_tokens is too large"),
        ((500, {"error": {"message": "EngineDeadError"}}), "EngineDeadError"),
        (answer(), "gave 0 completions of a prompt, expected 1"),
        (answer({**choice([3, 4]), "token_ids": None}), "must be vLLM 0.10.2 or later"),
        (answer(choice([3, 4], prompt=[5])), "changed the prompt's tokens"),
        (answer(choice([3, 4], [-1.0])), "a log-prob for each of 2 tokens, got 1"),
        (answer(choice([3, 4], [-1.0, 2.5])), "expected a log-prob"),
        (answer({**choice([3, 4]), "logprobs": None}), "got 0 numbers"),
        (answer(choice([3], reason="abort")), "ended a completion for 'abort'"),
        (answer(choice([3])), r"cut a completion at 1 tokens, expected 2.*--generation-config vllm"),
        (answer(choice([3, 7], reason="stop", by=7)), r"stopped at token 7, expected one of \[\] alone"),
    ],
)  # fmt: skip
def test_answers_that_mean_something_else_are_refused(
    recorded: RecordedServer, said: Any, message: str
) -> None:
    recorded.answers["/v1/completions"] = said
    with pytest.raises(ServerError, match=message):
        engine_of(recorded).generate(["the"], Sampling(max_new_tokens=2, stop_token_ids=()))
    assert len(recorded.asked_of("/v1/completions")) == 1


def test_a_busy_server_is_asked_again_so_many_times(recorded: RecordedServer) -> None:
    engine = engine_of(recorded, retries=2)
    fine = answer(choice([3, 4]))
    recorded.answers["/v1/completions"] = [(503, "busy"), (429, "busy"), fine]
    assert engine.generate(["the"], Sampling(max_new_tokens=2))[0][0].token_ids == (3, 4)
    recorded.answers["/v1/completions"] = [(503, "busy"), (503, "busy"), (503, "busy"), fine]
    with pytest.raises(ServerError, match=r"\(503\): busy"):
        engine.generate(["the"], Sampling(max_new_tokens=2))


def test_a_late_server_is_given_up(recorded: RecordedServer) -> None:
    engine = engine_of(recorded, retries=1, timeout=0.3)
    recorded.answers["/v1/completions"] = hang(1.0)
    with pytest.raises(ServerError, match=r"did not answer /v1/completions within 0.3 s \(asked 2 times\)"):
        engine.generate(["the"], Sampling(max_new_tokens=2))
    assert len(recorded.asked_of("/v1/completions")) == 2


def test_a_connection_that_breaks_is_made_again(recorded: RecordedServer) -> None:
    def break_off(body: dict[str, Any]) -> Any:
        raise ConnectionError("on purpose")

    recorded._http.handle_error = lambda *args: None  # the server's own report of it
    engine = engine_of(recorded, retries=1)
    recorded.answers["/v1/completions"] = [break_off, answer(choice([3, 4]))]
    assert engine.generate(["the"], Sampling(max_new_tokens=2))[0][0].token_ids == (3, 4)


def test_after_an_error_what_waits_is_not_asked_for(recorded: RecordedServer) -> None:
    recorded.answers["/v1/completions"] = (400, {"error": {"message": "no"}})
    with pytest.raises(ServerError):
        engine_of(recorded, max_requests=1).generate([[THE]] * 50, Sampling())
    threading.Event().wait(0.3)  # 50 requests take a third of that
    assert len(recorded.asked_of("/v1/completions")) < 10


# --- weights ---


def test_weights_go_in_the_order_of_the_protocol(recorded: RecordedServer) -> None:
    policy, group = Policy(make_llama()), FakeGroup(recorded)
    engine = engine_of(recorded, policy=policy, sync=False, communicator=group)
    recorded.asked.clear()
    assert engine.sync_weights()
    names = [name for name, _ in policy.model.named_parameters()]
    routes = [route for route, _ in recorded.asked]
    assert routes == [
        "/version", "/get_world_size", "/init_weight_transfer_engine", "join",
        "/pause", "/start_weight_update", "/update_weights", *["broadcast"] * len(names), "/finish_weight_update",
        "/reset_prefix_cache", "/resume",
    ]  # fmt: skip
    (opened,) = recorded.asked_of("/init_weight_transfer_engine")
    assert opened["init_info"] == {
        "nccl_unique_id_b64": base64.b64encode(bytes(range(128))).decode(),
        "rank_offset": 1,
        "world_size": 3,
        "packed": False,
    }
    assert recorded.asked_of("/pause") == [{"mode": "wait"}]
    (info,) = [body["update_info"] for body in recorded.asked_of("/update_weights")]
    assert info["names"] == [body["name"] for body in recorded.asked_of("broadcast")] == names
    assert info["dtype_names"] == ["float32"] * len(names)
    assert info["shapes"] == [list(parameter.shape) for parameter in policy.model.parameters()]
    for name, parameter in policy.model.named_parameters():
        assert group.received[name].equal(parameter)


def test_weights_go_only_where_they_changed(recorded: RecordedServer) -> None:
    policy = adapted()
    group = FakeGroup(recorded)
    engine = engine_of(recorded, policy=policy, communicator=group)
    sampling = Sampling(max_new_tokens=2)
    engine.generate(["the"], sampling)
    assert len(recorded.asked_of("/update_weights")) == 1
    engine.generate(["the"], sampling)
    assert not engine.sync_weights()
    group.received.clear()
    next(p for n, p in policy.named_parameters() if "lora_B" in n).data[0, 0] += (
        1  # seen by no version counter
    )
    engine.generate(["the"], sampling)
    assert len(recorded.asked_of("/update_weights")) == 2
    routes = [route for route, _ in recorded.asked]
    assert routes[-2:] == ["/resume", "/v1/completions"]
    assert routes.count("/init_weight_transfer_engine") == 1
    group.received.clear()
    with policy.adapters_off():
        assert engine.sync_weights()


def test_named_parameters_go_as_they_are(recorded: RecordedServer) -> None:
    group = FakeGroup(recorded)
    engine = engine_of(recorded, communicator=group)
    weight = torch.arange(6.0).view(2, 3).T
    assert engine.sync_weights([("a.weight", weight)])
    assert not engine.sync_weights(iter([("a.weight", weight.clone())]))
    assert group.received["a.weight"].equal(weight)
    group.received.clear()
    assert engine.sync_weights([("a.weight", weight.bfloat16())])
    assert recorded.asked_of("/update_weights")[-1]["update_info"] == {
        "names": ["a.weight"], "dtype_names": ["bfloat16"], "shapes": [[3, 2]],
    }  # fmt: skip
    with pytest.raises(ValueError, match="no weights to send: make the engine with policy="):
        engine.sync_weights()
    with pytest.raises(ModelRefused, match=r"a.weight holds torch.uint8"):
        engine.sync_weights([("a.weight", torch.zeros(2, dtype=torch.uint8))])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["embed_tokens", "v_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"use_rslora": True},
    ],
)
def test_adapters_are_merged_as_peft_does_and_the_policy_is_only_read(options: dict[str, Any]) -> None:
    policy = adapted(**options)
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    found = {weight.name: weight.read() for weight in served_weights(policy)}
    assert all(before[name].equal(tensor) for name, tensor in policy.model.state_dict().items())
    expected = dict(copy.deepcopy(policy.model).merge_and_unload().named_parameters())
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.allclose(expected[name], rtol=0, atol=1e-6), name
    assert not found["model.layers.0.self_attn.q_proj.weight"].requires_grad


def test_adapters_that_are_off_are_not_merged() -> None:
    policy = adapted(modules_to_save=["lm_head"])
    with policy.adapters_off():
        found = {weight.name: weight.read() for weight in served_weights(policy)}
    for name, parameter in make_llama(3).named_parameters():
        assert found[name].equal(parameter), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "DoRA on model.layers.0.self_attn.q_proj.weight can't be merged"),
        ({"target_modules": ["lm_head"], "tie": True}, "are one tensor, and adapters on one of them"),
        ({"trainable_token_indices": [3]}, "adapter of a kind that can't be merged"),
    ],
)
def test_adapters_that_are_no_sum_are_refused_before_anything_is_sent(
    recorded: RecordedServer, options: dict[str, Any], message: str
) -> None:
    peft = pytest.importorskip("peft")
    model = make_llama(tie_word_embeddings=options.pop("tie", False))
    config = peft.LoraConfig(**{"target_modules": ["q_proj"], "r": 2, **options})
    policy = Policy(peft.get_peft_model(model, config))
    with pytest.raises(ModelRefused, match=message):
        served_weights(policy)
    with pytest.raises(ModelRefused, match=message):
        engine_of(recorded, policy=policy, communicator=FakeGroup(recorded)).sync_weights()
    assert not recorded.asked_of("/pause")


def test_a_model_whose_checkpoint_has_other_names_is_refused() -> None:
    with pytest.raises(ModelRefused, match="names its weights otherwise"):
        served_weights(Policy(make_model("mixtral", torch.float32)))


def test_tied_weights_go_once() -> None:
    names = [weight.name for weight in served_weights(Policy(make_llama(tie_word_embeddings=True)))]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_an_update_that_fails_half_way_says_so_and_does_not_hang(recorded: RecordedServer) -> None:
    group = FakeGroup(recorded)
    engine = engine_of(recorded, policy=Policy(make_llama()), communicator=group, timeout=20)
    recorded.answers["/update_weights"] = (503, {"error": {"message": "KeyError: 'model.embed'"}})
    group.broadcast = lambda tensor: threading.Event().wait(60)  # its peers are gone
    with pytest.raises(
        ServerError, match=r"failed half-way, and the server stays paused.*KeyError: 'model.embed'"
    ):
        engine.sync_weights()
    assert not recorded.asked_of("/resume")
    assert len(recorded.asked_of("/update_weights")) == 1  # never sent twice
    with pytest.raises(ServerError, match="failed half-way: restart the server, and make"):
        engine.generate(["the"], Sampling())


def test_a_cache_that_keeps_old_prefixes_is_an_error(recorded: RecordedServer) -> None:
    engine = engine_of(recorded, policy=Policy(make_llama()), communicator=FakeGroup(recorded))
    recorded.answers["/reset_prefix_cache"] = {"success": False}
    with pytest.raises(ServerError, match="prefix cache could not be reset"):
        engine.sync_weights()


def test_an_older_server_answers_a_reset_with_nothing(recorded: RecordedServer) -> None:
    recorded.answers["/reset_prefix_cache"] = None
    engine = engine_of(recorded, policy=Policy(make_llama()), communicator=FakeGroup(recorded))
    assert engine.sync_weights()


@pytest.mark.parametrize(
    ("route", "said", "message"),
    [
        ("/version", {"version": "0.9.2"}, "is vLLM 0.9.2, and weights need 0.30 or later"),
        (
            "/get_world_size",
            (404, {"detail": "Not Found"}),
            r"no route /get_world_size.*VLLM_SERVER_DEV_MODE=1",
        ),
        (
            "/init_weight_transfer_engine",
            (500, {"error": {"message": "Weight transfer not configured"}}),
            "no way for weights: .*Weight transfer not configured",
        ),
    ],
)
def test_a_server_that_takes_no_weights_is_refused(
    recorded: RecordedServer, route: str, said: Any, message: str
) -> None:
    group = FakeGroup(recorded)
    group.join = lambda world_size: threading.Event().wait(60)
    recorded.answers[route] = said
    engine = engine_of(recorded, policy=Policy(make_llama()), communicator=group)
    with pytest.raises(ServerError, match=message):
        engine.sync_weights()
    assert not recorded.asked_of("/pause")


def test_a_policy_on_the_cpu_cannot_send(recorded: RecordedServer) -> None:
    with pytest.raises(RuntimeError, match="put the policy on a GPU"):
        engine_of(recorded, policy=Policy(make_llama())).sync_weights()
    with pytest.raises(RuntimeError, match="over NCCL, and these are on cpu"):
        NcclCommunicator(torch.device("cpu"))


def test_calls_side_by_side_end_with_the_first_that_fails() -> None:
    never = threading.Event()
    with pytest.raises(KeyError):
        side_by_side({"a": lambda: never.wait(60), "b": lambda: {}["b"]}, timeout=20)
    with pytest.raises(ServerError, match=r"a did not end within 0\.1 s"):
        side_by_side({"a": lambda: never.wait(60), "b": lambda: None}, timeout=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
def test_a_fingerprint_sees_any_element(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignfast.rollout.transfer._CHUNK", 5)  # 11 elements: two chunks and a part
    tensor = torch.arange(11).to(dtype)
    before = fingerprint([tensor])
    assert before == fingerprint([tensor.clone()])
    for i in range(11):
        changed = tensor.clone()
        changed[i] += 1
        assert fingerprint([changed]) != before
    for pair in ([1, 6], [6, 8]):  # the same place of two chunks, and two places of one
        swapped = tensor.clone()
        swapped[pair] = tensor[pair[::-1]]
        assert fingerprint([swapped]) != before


# --- by its name ---


def test_the_engine_is_made_by_its_name(recorded: RecordedServer) -> None:
    engine = make_engine("vllm", None, TOKENIZER, server_url=recorded.url + "/v1/")
    assert engine.name == "vllm"
    assert engine.generate(["the"], Sampling(max_new_tokens=2))[0][0].token_ids == (3, 4)
    with pytest.raises(ValueError, match=r"needs server_url.*vllm serve MODEL"):
        make_engine("vllm", None, TOKENIZER)
    with pytest.raises(ValueError, match="engine='native' needs a policy"):
        make_engine("native", None, TOKENIZER)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_requests": 0}, "max_requests must be >= 1"),
        ({"timeout": 0}, "timeout > 0 and retries >= 0"),
        ({"retries": -1}, "timeout > 0 and retries >= 0"),
    ],
)
def test_options_out_of_range_are_refused(
    recorded: RecordedServer, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        engine_of(recorded, **options)
