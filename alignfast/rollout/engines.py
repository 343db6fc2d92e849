"""The engines by their names."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from alignfast.models.policy import Policy
from alignfast.rollout.sampling import RolloutEngine
from alignfast.rollout.server import START

ENGINES = ("native", "transformers", "vllm")


def make_engine(
    name: str, policy: Policy | None, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> RolloutEngine:
    """An engine for a policy.

    Args:
        name: `native` (packed prompts and a paged cache: see `NativeEngine`), `transformers` (`model.generate`) or
            `vllm` (a server, EXPERIMENTAL: see `VllmEngine`).
        policy: the model; None with `vllm` alone: the server's own.
        tokenizer: its tokenizer.
        **options: of the engine's class; `vllm` needs `server_url`.

    Raises:
        ValueError: the name is none of `ENGINES`, or the engine lacks its policy or its server.
    """
    if name == "vllm":
        from alignfast.rollout.vllm import VllmEngine

        if "server_url" not in options:
            raise ValueError(
                f"engine='vllm' needs server_url, the address of a vLLM server. To have one: {START}"
            )
        return VllmEngine(tokenizer=tokenizer, policy=policy, **options)
    if name not in ENGINES:
        raise ValueError(f"engine={name!r} is not one of {', '.join(ENGINES)}")
    if policy is None:
        raise ValueError(f"engine={name!r} needs a policy")
    if name == "native":
        from alignfast.rollout.native import NativeEngine

        return NativeEngine(policy, tokenizer, **options)
    from alignfast.rollout.reference import TransformersEngine

    return TransformersEngine(policy.model, tokenizer, **options)
