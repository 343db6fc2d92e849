"""Models that read the policy's tokens, and whether they know them: the critic, and the reference."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from alignfast.models.policy import Policy


def check_tokenizer(
    name: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    what: str,
    option: str,
    trust_remote_code: bool = False,
) -> bool:
    """Refuse a model that comes with another vocabulary than the policy's.

    Args:
        name: folder or hub name of the model.
        tokenizer: the policy's.
        what: the model in an error.
        option: that it was given as.
        trust_remote_code: as of `load_policy`.

    Returns:
        Whether there is a tokenizer beside the model at all.

    Raises:
        ValueError: its tokenizer is another one.
    """
    name = os.path.expanduser(os.fspath(name))
    is_there = any(Path(name).glob("tokenizer*")) if Path(name).is_dir() else bool(get_tokenizer_config(name))
    if not is_there:
        return False
    theirs = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"{what} reads the policy's tokens, and the tokenizer of {name} is another one: give a {option} of the "
            "policy's vocabulary, or none, for a copy of the policy"
        )
    return True


def check_reference(
    ref_model: Any,
    reference: Policy,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    trust_remote_code: bool,
) -> None:
    """Refuse a reference that does not know the policy's tokens, or knows them as others.

    Models of one family may pad their embeddings differently: a tokenizer that is the same excuses more of them.

    Args:
        ref_model: as the user gave it.
        reference: what was loaded of it.
        policy: that is trained.
        tokenizer: the policy's.
        trust_remote_code: as of `load_policy`.

    Raises:
        ValueError: its tokenizer or its number of tokens is another one.
    """
    name = ref_model
    if not isinstance(ref_model, (str, os.PathLike)):
        name = getattr(reference.base.config, "_name_or_path", "")
        name = name if name and Path(name).is_dir() else None  # a hub's name would be looked up there
    known = name is not None and check_tokenizer(
        name, tokenizer, what="the reference", option="ref_model", trust_remote_code=trust_remote_code
    )
    theirs, ours = reference.vocabulary, policy.vocabulary
    if theirs < ours or (theirs > ours and not known):
        raise ValueError(
            f"the reference knows {theirs} tokens and the policy {ours}: give a ref_model of the policy's vocabulary, or "
            "none, for the model as it was given"
        )
