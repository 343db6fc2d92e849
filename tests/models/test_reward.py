"""A reward model's rewards are those of transformers' own forward on each sequence alone, however they are batched."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from trainers.tiny import make_llama, make_rankings, make_reward_llama, make_tokenizer

from alignfast.data import Tree, load_rows, pack, prepare_ranking
from alignfast.models import ModelRefused, RewardModel, is_reward_model, load_reward_model

TREES = prepare_ranking(load_rows(make_rankings(6)), make_tokenizer(), max_length=None).trees
NO_PROMPT = Tree((), ((5, 6, 1), (7, 1)), ((True,) * 3, (True,) * 2))
LAYOUTS = ("shared", "packed", "padded")
LORA = dict(r=2, lora_alpha=4, target_modules=["q_proj"])


def alone(model, trees) -> torch.Tensor:
    """rewards_SH by the model's own forward, one sequence at a time."""
    with torch.no_grad():
        sequences = [torch.tensor([tree.prompt + answer]) for tree in trees for answer in tree.answers]
        return torch.cat([model.eval()(input_ids=ids_1L).logits for ids_1L in sequences])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_heads", [1, 3])
def test_rewards_do_not_depend_on_the_batch(layout, num_heads):
    model, trees = make_reward_llama(num_labels=num_heads), [*TREES, NO_PROMPT]
    reward_model = load_reward_model(model, num_heads=num_heads, layout=layout)
    expected = alone(model, trees)
    for max_tokens in (1, 40, 4096):
        found = torch.from_numpy(reward_model.score(trees, max_tokens))
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < 1e-5
    assert reward_model.training  # as it was


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["Qwen2", "Gemma2", "GPT2", "OPT", "GPTNeoX", "Mixtral"])
def test_architectures(layout, name):
    """Sliding windows, softcaps, learned positions, a head behind a projection."""
    sizes = dict(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, num_key_value_heads=2, pad_token_id=0, num_labels=1, eos_token_id=1,
    )  # fmt: skip
    options = {
        "GPT2": dict(n_embd=16, n_layer=2, n_head=2, vocab_size=32, pad_token_id=0, num_labels=1),
        "OPT": dict(word_embed_proj_dim=8, ffn_dim=24, **{k: v for k, v in sizes.items() if "key" not in k}),
        "Gemma2": dict(**sizes, head_dim=8, sliding_window=3, attn_logit_softcapping=2.0),
    }.get(name, sizes)
    torch.manual_seed(0)
    model = getattr(tf, f"{name}ForSequenceClassification")(getattr(tf, f"{name}Config")(**options))
    model.set_attn_implementation("eager")
    found = load_reward_model(model, layout=layout).score(TREES)
    assert (torch.from_numpy(found) - alone(model, TREES)).abs().max() < 1e-5


def test_the_reward_sits_on_the_last_token_also_where_pad_is_eos():
    """The end token is a token: with it the reward is another one than transformers' batch reads."""
    model = make_reward_llama(pad_token_id=1)  # its end token
    reward_model = load_reward_model(model)
    found = reward_model.score([NO_PROMPT])
    trusting = alone(model, [NO_PROMPT])  # reads the token before the end
    assert reward_model.set_pad_token(1, None, eos_id=1) is None
    with torch.no_grad():
        last = [model(input_ids=torch.tensor([ids])).logits.item() for ids in NO_PROMPT.answers]
    assert found[:, 0].tolist() == pytest.approx(last, abs=1e-6)
    assert abs(trusting[0].item() - last[0]) > 1e-3
    assert reward_model.set_pad_token(None, 2, eos_id=1) == 2 == model.config.pad_token_id


def test_a_causal_language_model_gets_a_fresh_head(tmp_path):
    base = make_llama()
    base.save_pretrained(tmp_path / "lm")
    assert not is_reward_model(str(tmp_path / "lm"))
    model = load_reward_model(tmp_path / "lm", num_heads=3)
    assert model.fresh_head
    assert model.num_heads == 3
    assert torch.equal(model.base.model.embed_tokens.weight, base.model.embed_tokens.weight)
    model.model.save_pretrained(tmp_path / "rm")
    again = load_reward_model(tmp_path / "rm")
    assert is_reward_model(str(tmp_path / "rm"))
    assert not again.fresh_head
    assert again.num_heads == 3
    assert (again.score(TREES) == model.score(TREES)).all()


def test_lora_keeps_its_head(tmp_path):
    """The adapters' folder alone, over the language model, gives the same rewards."""
    make_llama().save_pretrained(tmp_path / "lm")
    model = load_reward_model(tmp_path / "lm", num_heads=2, peft_config=LORA)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    assert any(".score." in name for name, p in model.named_parameters() if p.requires_grad)
    model.model.save_pretrained(tmp_path / "adapters")
    again = load_reward_model(tmp_path / "adapters")
    assert again.num_heads == 2
    assert (again.score(TREES) == model.score(TREES)).all()


# --- refusals ---


def without_head(folder):
    make_reward_llama().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "score" not in k}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def test_a_checkpoint_without_its_head(tmp_path):
    with pytest.raises(ValueError, match=r"lacks score.weight, without which its rewards are random"):
        load_reward_model(without_head(tmp_path))


def test_adapters_without_their_head(tmp_path):
    make_llama().save_pretrained(tmp_path / "lm")
    causal = get_peft_model(make_llama(), LoraConfig(task_type="CAUSAL_LM", **LORA))
    causal.save_pretrained(tmp_path / "adapters")
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "lm")
    (tmp_path / "adapters" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="hold no head score"):
        load_reward_model(tmp_path / "adapters")


@pytest.mark.parametrize(
    "config",
    [LoraConfig(**LORA), LoraConfig(r=2, target_modules=["q_proj", "score"])],
    ids=["frozen head", "adapted head"],
)
def test_adapters_that_would_lose_the_head(config):
    with pytest.raises(ModelRefused, match="would not be saved with the adapters: set task_type='SEQ_CLS'"):
        load_reward_model(make_reward_llama(), peft_config=config)


def test_other_numbers_of_heads(tmp_path):
    make_reward_llama(num_labels=2).save_pretrained(tmp_path)
    for model in (make_reward_llama(num_labels=2), tmp_path):
        with pytest.raises(ValueError, match="has 2 outputs and num_heads=1: give its own number"):
            load_reward_model(model, num_heads=1)


def test_other_classes(tmp_path):
    with pytest.raises(ModelRefused, match=r"no head named score.*causal language model"):
        load_reward_model(make_llama())
    tf.CohereForCausalLM(
        tf.CohereConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
        )
    ).save_pretrained(tmp_path)
    with pytest.raises(ModelRefused, match="no sequence classification model for cohere"):
        load_reward_model(tmp_path)


def test_a_head_that_is_not_understood_is_refused():
    model = make_reward_llama()

    class Doubled(type(model)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 2 * output.logits
            return output

    model.__class__ = Doubled
    with pytest.raises(ModelRefused, match="gives other rewards than its head score"):
        RewardModel(model).probe()


def test_a_packed_batch_needs_packed_attention():
    model = load_reward_model(make_reward_llama())
    with pytest.raises(RuntimeError, match="attached"):
        model(pack(TREES, range(len(TREES))))
