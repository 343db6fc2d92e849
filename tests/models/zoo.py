"""Tiny random models, one of each architecture that the tests name. Letters: V vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as tf
from transformers import PreTrainedModel

VOCABULARY = 97
_LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_SLIDING = ["sliding_attention", "full_attention"]

# name: (model class, config class, options). Windows of 5 are shorter than the tests' prompts, so that they bite.
_MODELS: dict[str, tuple[str, str, dict]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA_LIKE),
    "llama_tied": ("LlamaForCausalLM", "LlamaConfig", {**_LLAMA_LIKE, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA_LIKE),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_LLAMA_LIKE, "head_dim": 8}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_LLAMA_LIKE, "sliding_window": 5}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {
            **_LLAMA_LIKE,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 5,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **_LLAMA_LIKE,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 5,
            "layer_types": _SLIDING,
        },
    ),
    "cohere": ("CohereForCausalLM", "CohereConfig", _LLAMA_LIKE),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {**_LLAMA_LIKE, "logits_scaling": 3.0}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4},
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
        },
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "word_embed_proj_dim": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 48,
        },
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", {**_LLAMA_LIKE, "num_key_value_heads": 4}),  # its head has a bias
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_LLAMA_LIKE, "num_local_experts": 4}),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", {**_LLAMA_LIKE, "layer_types": ["conv", "full_attention"]}),
    "falcon_h1": (
        "FalconH1ForCausalLM",
        "FalconH1Config",
        {
            **_LLAMA_LIKE,
            "head_dim": 8,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
        },
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**_LLAMA_LIKE, "head_dim": 8, "num_local_experts": 4, "layer_types": _SLIDING},
    ),
}

# Convolutions; state spaces; attention sinks; attention that does not go through transformers' interface.
REFUSED = ["lfm2", "falcon_h1", "gpt_oss", "bloom"]
PACKABLE = [name for name in _MODELS if name not in REFUSED]


def make(name: str, dtype: torch.dtype = torch.float64, attention: str | None = None) -> PreTrainedModel:
    """A model of this architecture with random weights, larger than at initialisation so that mistakes show."""
    model_class, config_class, options = _MODELS[name]
    config = getattr(tf, config_class)(**options)
    torch.manual_seed(0)
    build: Callable = getattr(tf, model_class)
    model = build(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
            elif key.endswith("bias"):
                parameter.normal_(std=0.1)
    if hasattr(model, "num_experts"):
        model.set_experts_implementation("eager")  # the grouped one has no float64
    if attention is not None:
        model.set_attn_implementation(attention)
    return model.to(dtype)
