"""A policy's losses are those of the plain model on each sequence alone, whatever the layout."""

from __future__ import annotations

import pytest
import torch
from models import zoo
from torch import Tensor

from alignfast.data.packing import Batch, Tree, pack
from alignfast.kernels import Stats
from alignfast.models import ModelRefused, Policy, load_policy
from alignfast.models.attention import NAME, attention_set

# Prompts longer than the sliding windows of 5; an answer of one token; a text without prompt; masked-out tokens.
_generator = torch.Generator().manual_seed(1)


def _ids(count: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, zoo.VOCABULARY, (count,), generator=_generator).tolist())


TREES = [
    Tree(_ids(9), (_ids(6), _ids(3)), ((True,) * 6, (True, False, True))),
    Tree((), (_ids(7),), ((True, True, False, True, True, True, True),)),
    Tree(_ids(2), (_ids(1), _ids(12), _ids(4)), ((True,), (True,) * 12, (True,) * 4)),
]
WEIGHTS = torch.linspace(-1, 1, 5)


_to, _softmax = torch.Tensor.to, torch.nn.functional.softmax


def _to_double(self: Tensor, *args: object, **kwargs: object) -> Tensor:
    narrowing = (args and args[0] is torch.float32) or kwargs.get("dtype") is torch.float32
    return _to(self, torch.float64) if narrowing else _to(self, *args, **kwargs)


@pytest.fixture
def double_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models round norms, rotations and attention weights to float32 whatever their type: seven digits that hide
    everything below. Inside a test with this fixture they stay in float64."""
    monkeypatch.setattr(torch.Tensor, "to", _to_double)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: _to(self, torch.float64))
    monkeypatch.setattr(
        torch.nn.functional, "softmax", lambda x, dim=-1, dtype=None: _softmax(x, dim, dtype=torch.float64)
    )


def plain_logps(model: torch.nn.Module, tree: Tree) -> list[Tensor]:
    """Log-probs of the trained tokens of each answer, from the model's own logits on that sequence alone."""
    found = []
    for answer, trained in zip(tree.answers, tree.trained):
        ids = torch.tensor([tree.prompt + answer])
        logps_LV = model(input_ids=ids).logits[0].log_softmax(-1)
        positions = [
            len(tree.prompt) + i for i, keep in enumerate(trained) if keep and len(tree.prompt) + i > 0
        ]
        found.append(torch.stack([logps_LV[at - 1, ids[0, at]] for at in positions]))
    return found


def batch_for(policy: Policy) -> Batch:
    return pack(TREES, [0, 1, 2], layout=policy.layout, pad_id=0)


def weighted_loss(stats: Stats, rows: slice) -> tuple[Tensor, dict]:
    """Every token with a weight of its own, so that a swapped pair of rows shows."""
    weight_P = torch.linspace(0.5, 2, 200)[rows]
    return (stats.logps * weight_P.to(stats.logps.dtype)).sum(), {
        "tokens": torch.tensor(float(len(weight_P)))
    }


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float(
        (got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
    )


# 1e-12 and 2e-6 are the bounds: rounding of sums of this depth, far below any structural mistake
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("name", zoo.PACKABLE)
def test_equals_the_plain_model(
    name: str, layout: str, dtype: torch.dtype, bound: float, request: pytest.FixtureRequest
) -> None:
    if dtype == torch.float64:
        request.getfixturevalue("double_throughout")
    # eager is the model's own definition: stock sdpa drops Gemma 2's softcap
    model = zoo.make(name, dtype, attention="eager")
    policy = load_policy(model, layout=layout).eval()
    expected_P = torch.cat([logps_P for tree in TREES for logps_P in plain_logps(model, tree)])
    (expected_P * torch.linspace(0.5, 2, 200)[: len(expected_P)].to(dtype)).sum().backward()
    expected = gradients(model)
    batch = batch_for(policy)
    with policy.attached():
        logps_P = policy(batch)
        loss, metrics = policy(batch, weighted_loss)
        loss.backward()
    got = gradients(model)
    assert metrics["tokens"] == len(expected_P)
    assert relative_error(logps_P, expected_P.detach()) <= bound
    assert got.keys() == expected.keys()
    largest = max(float(x.abs().max()) for x in expected.values())
    for key, gradient in expected.items():
        # softmax ignores a shift common to all keys: the bias of keys has gradient 0, and only rounding is seen of it
        scale = largest if key.endswith("k_proj.bias") else float(gradient.abs().max())
        assert float((got[key] - gradient).abs().max()) / scale <= bound, key


@pytest.mark.parametrize("name", zoo.REFUSED)
def test_what_cannot_be_packed_is_refused_and_runs_padded(name: str) -> None:
    model = zoo.make(name, torch.float32)
    with pytest.raises(ModelRefused, match="layout='padded'"):
        load_policy(model, layout="shared").eval().probe()
    padded = load_policy(model, layout="padded").eval()
    padded.probe()
    batch = batch_for(padded)
    expected_P = torch.cat([logps_P for tree in TREES for logps_P in plain_logps(model, tree)]).detach()
    assert relative_error(padded(batch), expected_P) <= 1e-5


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "cohere", "granite", "mixtral"])
def test_probe_takes_models_that_can_be_packed(name: str, layout: str) -> None:
    load_policy(zoo.make(name, torch.float32), layout=layout).probe()


def test_probe_refuses_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last line of defence: a model whose config says nothing, but whose logits are others."""
    policy = load_policy(zoo.make("llama", torch.float32)).eval()
    monkeypatch.setattr("alignfast.models.head._scale", lambda model: 1.01)
    with pytest.raises(ModelRefused, match="gives other logits"):
        policy.probe()


def test_attention_setting_is_put_back_and_own_calls_stay_right() -> None:
    model = zoo.make("gemma2", attention="eager")
    ids_BL = torch.tensor([_ids(8)])
    before_BLV = model(input_ids=ids_BL).logits
    sdpa_BLV = zoo.make("gemma2", attention="sdpa")(input_ids=ids_BL).logits
    with attention_set(model, NAME):
        assert model.config._attn_implementation == "alignfast"
        assert torch.equal(model(input_ids=ids_BL).logits, sdpa_BLV)
        with attention_set(model, NAME):
            pass
        assert model.config._attn_implementation == "alignfast"
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(input_ids=ids_BL).logits, before_BLV)


def test_padded_keeps_a_softcap_that_sdpa_drops() -> None:
    """Gemma 2 as transformers loads it, in the layout that runs the model's own attention."""
    model = zoo.make("gemma2", torch.float32, attention="eager")
    expected_P = torch.cat([logps_P for tree in TREES for logps_P in plain_logps(model, tree)]).detach()
    policy = load_policy(zoo.make("gemma2", torch.float32, attention="sdpa"), layout="padded").eval()
    with policy.attached():
        assert relative_error(policy(batch_for(policy)), expected_P) <= 2e-6
    assert policy.base.config._attn_implementation == "sdpa"


def test_a_mixture_s_router_is_trained_in_every_layout() -> None:
    """Its gradient reaches the router, and follows the coefficient."""
    sizes = []
    for layout, coefficient in [("shared", 0.0), ("shared", 0.1), ("shared", 0.2), ("padded", 0.2)]:
        policy = load_policy(zoo.make("mixtral"), layout=layout).train()
        policy.set_router_weight(coefficient)
        with policy.attached():
            loss, metrics = policy(batch_for(policy), lambda stats, rows: (stats.logps.sum() * 0, {}))
        assert ("router_loss" in metrics) == (coefficient > 0)
        if coefficient:
            loss.backward()
            gates = [g for name, g in gradients(policy.model).items() if ".gate" in name]
            assert gates
            sizes.append(sum(float(g.abs().sum()) for g in gates))
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=1e-6)
    assert min(sizes) > 0


def test_generate_inside_is_as_outside() -> None:
    model = zoo.make("llama", torch.float32).eval()
    ids_BL = torch.tensor([_ids(5)])
    outside = model.generate(ids_BL, max_new_tokens=8, do_sample=False, pad_token_id=0)
    with attention_set(model, NAME):
        assert torch.equal(model.generate(ids_BL, max_new_tokens=8, do_sample=False, pad_token_id=0), outside)


def test_packed_batch_outside_is_refused() -> None:
    policy = load_policy(zoo.make("llama"))
    with pytest.raises(RuntimeError, match=r"policy\.attached"):
        policy(batch_for(policy))


def test_gradient_checkpointing_changes_nothing() -> None:
    results = []
    for checkpointing in (False, True):
        policy = load_policy(zoo.make("mistral"), gradient_checkpointing=checkpointing).train()
        with policy.attached():
            policy(batch_for(policy), weighted_loss)[0].backward()
        results.append(gradients(policy.model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_mixture_trains_its_router() -> None:
    model = zoo.make("mixtral")
    policy = load_policy(model, layout="padded").train()
    tree = TREES[0]
    batch = pack([Tree(tree.prompt, (answer,), (mask,)) for answer, mask in zip(tree.answers, tree.trained)][:1], [0],
                 layout="padded", pad_id=0)  # fmt: skip
    loss, metrics = policy(batch, weighted_loss, router_weight=0.5)
    own = model(input_ids=batch.input_ids_BL, output_router_logits=True).aux_loss
    assert torch.allclose(metrics["router_loss"], 0.5 * model.router_aux_loss_coef * own, rtol=1e-12)
    policy.eval()
    without, _ = policy(batch, weighted_loss)
    assert torch.allclose(loss, without + metrics["router_loss"], rtol=1e-12)


def _lora(model: torch.nn.Module, **options: object) -> Policy:
    return load_policy(model, peft_config={"r": 4, "lora_alpha": 8, **options})


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "lm_head"]},  # LoRA on the head: `.weight` alone would skip it
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "v_proj"]},
    ],
)
@pytest.mark.usefixtures("double_throughout")
def test_adapters_count_on_trunk_and_head(options: dict) -> None:
    policy = _lora(zoo.make("llama"), **options).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(
                    torch.randn(parameter.shape, generator=_generator, dtype=parameter.dtype) * 0.3
                )
    expected_P = torch.cat([logps_P for tree in TREES for logps_P in plain_logps(policy.model, tree)])
    (expected_P * torch.linspace(0.5, 2, 200)[: len(expected_P)].double()).sum().backward()
    expected = gradients(policy.model)
    with policy.attached():
        assert relative_error(policy(batch_for(policy)), expected_P.detach()) <= 1e-12
        policy(batch_for(policy), weighted_loss)[0].backward()
        got = gradients(policy.model)
        with policy.adapters_off():
            off_P = policy(batch_for(policy))
    assert got.keys() == expected.keys()
    assert all(relative_error(got[name], expected[name]) <= 1e-11 for name in expected)
    base_P = torch.cat([logps_P for tree in TREES for logps_P in plain_logps(zoo.make("llama"), tree)])
    assert relative_error(off_P, base_P.detach()) <= 1e-12


def test_head_dropout_of_lora_is_refused() -> None:
    model = zoo.make("llama")
    adapter = {"r": 4, "target_modules": ["lm_head"], "lora_dropout": 0.1}
    with pytest.raises(ModelRefused, match="lora_dropout"):
        load_policy(model, peft_config=adapter, disable_dropout=False)


def test_attention_dropout_is_refused_unless_disabled() -> None:
    model = zoo.make("gpt2")
    policy = load_policy(model, disable_dropout=False).train()
    with policy.attached(), pytest.raises(ModelRefused, match="disable_dropout=True"):
        policy(batch_for(policy), weighted_loss)
    policy = load_policy(model).train()
    with policy.attached():
        policy(batch_for(policy), weighted_loss)


def test_reference_copy_is_frozen_and_apart() -> None:
    policy = load_policy(zoo.make("llama"))
    reference = policy.reference_copy()
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    with torch.no_grad():
        next(policy.parameters()).add_(1)
    assert not torch.equal(next(policy.parameters()), next(reference.parameters()))


def test_bad_options_say_what_to_do() -> None:
    model = zoo.make("llama")
    with pytest.raises(ValueError, match="shared, packed or padded"):
        load_policy(model, layout="dense")
    with pytest.raises(ValueError, match=r"model.to\(dtype\)"):
        load_policy(model, dtype="bfloat16")
    with pytest.raises(ValueError, match="no adapters"), load_policy(model).adapters_off():
        pass
