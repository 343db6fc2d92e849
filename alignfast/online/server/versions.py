"""A version: the name of a folder of weights, and their hash.

    weights = SHA-256 of the JSON {file: SHA-256 of the file} of all safetensors, those under adapters included

Pickled weights (.bin, .pt) are refused: reading them can run code.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from alignfast.online.store import Store
from alignfast.online.store import Version as Stored
from alignfast.trainers.checkpoint import sha256

_NOTHING = "no version serves yet in this database: give --model FOLDER for the first one"


class Version(NamedTuple):
    """What an answer says it came from.

    Attributes:
        name: of the version, as the operator or the learner calls it.
        weights: SHA-256 of its weights.
    """

    name: str
    weights: str

    def told(self) -> dict[str, str]:
        """As answers say it."""
        return {"version": self.name, "weights": self.weights}


def folder_of(model: str) -> Path:
    """The folder of a model: itself, or where the hub's cache has it.

    Raises:
        ValueError: there is none.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if Path(model).expanduser().is_absolute():
        raise ValueError(f"{model}: no such folder")
    from transformers.utils import cached_file

    try:
        for name in ("config.json", "adapter_config.json"):
            found = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
            if found is not None:
                return Path(found).parent
    except OSError as error:
        raise ValueError(f"{model}: no such folder, and no model of the hub either: {error}") from error
    raise ValueError(f"{model}: no such folder, and no model of the hub either")


def weights_hash(folder: Path) -> str:
    """SHA-256 of the weights in a folder.

    Raises:
        ValueError: there are no safetensors in it.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder} holds no .safetensors, and other weights are not served: save the model with "
            "save_pretrained(folder), which writes them"
        )
    digests = {file.name: sha256(file) for file in files}
    adapters = folder / "adapter_config.json"
    if adapters.is_file():
        base = json.loads(adapters.read_text()).get("base_model_name_or_path")
        digests["base_model"] = weights_hash(folder_of(str(base)))
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def version_of(model: str, name: str | None = None) -> Version:
    """The version in a folder, named after it unless a name is given."""
    folder = folder_of(model)
    return Version(name or folder.resolve().name, weights_hash(folder))


def name_of(model: str) -> str:
    """What a model is called: its folder, or the last part of its name at the hub.

    >>> name_of("HuggingFaceTB/SmolLM2-135M")
    'SmolLM2-135M'
    """
    return Path(model).expanduser().resolve().name


def served_name(store: Store, model: str | None) -> str:
    """What clients ask for, the same whichever version serves: the model that is named, or the store's first policy.

    Raises:
        ValueError: there is neither.
    """
    if model is not None:
        return name_of(model)
    policies = store.versions.all("policy")
    if not policies:
        raise ValueError(_NOTHING)
    return policies[0].name


def first_version(store: Store, model: str | None) -> Stored:
    """What shall serve: what the store says, or else a model, which the store then says from now on.

    Raises:
        ValueError: the store says nothing and no model is named, or the model can't be served.
    """
    serving = store.versions.serving()
    if serving is not None:
        return serving
    if model is None:
        raise ValueError(_NOTHING)
    folder = folder_of(model).resolve()
    name, weights = version_of(str(folder), name_of(model))
    known = {one.name: one.hash for one in store.versions.all()}
    if known.get(name, weights) != weights:
        name = f"{name}-{weights[:12]}"  # the folder was trained again, and versions never change
    if name not in known:
        store.versions.add(name, "policy", str(folder), weights)
    return store.versions.promote(name)
