"""A reward function from what a config can say."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from alignfast.rewards.protocol import RewardFunction
from alignfast.rewards.verifiers import BUILT_IN, Regex


def load_reward(spec: Any, *, disagreement_coef: float | None = None) -> RewardFunction:
    """A reward function by its name, so that a wrong one is told before training.

    Args:
        spec: one of
            a function or other object that can be called: itself;
            `numeric`, `exact`, `format`, or `regex:PATTERN`: a verifier;
            `package.module:function` or `package.module.function`: imported; the working directory is looked in last;
            a folder: a reward model.
        disagreement_coef: of a reward model's folder, see `ModelReward`; nothing else takes it.

    Raises:
        ValueError: there is no such thing, and the message names the nearest; or the coefficient does not fit the model.
        TypeError: the spec is of no such kind.
        ModelRefused: the folder holds no reward model.

    >>> load_reward("numeric")
    Numeric(column=None, tolerance=0.0, marked_only=False)
    >>> load_reward("numerik")
    Traceback (most recent call last):
    ValueError: there is no reward 'numerik'; did you mean 'numeric'?
    """
    if callable(spec):
        return _not_a_bare_model(spec)
    if not isinstance(spec, (str, Path)):
        raise TypeError(f"expected a reward function or the name of one, got {type(spec).__name__}")
    name = str(spec)
    if name in BUILT_IN:
        return BUILT_IN[name]()
    if name.startswith("regex:"):
        return Regex(name.removeprefix("regex:"))
    folder = Path(name).expanduser()
    if folder.is_dir():
        from alignfast.rewards.model import ModelReward

        return ModelReward.load(folder, disagreement_coef=disagreement_coef)
    if folder.exists() or "/" in name:
        raise ValueError(f"there is no folder {name!r}{_nearest_folder(folder)}")
    module, _, function = name.partition(":") if ":" in name else name.rpartition(".")
    if not module:
        raise ValueError(f"there is no reward {name!r}{_nearest(name, [*BUILT_IN, 'regex:...'])}")
    return _imported(name, module, function)


def _not_a_bare_model(spec: Any) -> RewardFunction:
    if isinstance(spec, (type, nn.Module)):
        kind = f"the class {spec.__name__}" if isinstance(spec, type) else f"a {type(spec).__name__}"
        raise TypeError(
            f"expected a reward function, got {kind}; make an object of a class, and wrap a model: "
            "ModelReward(ClassifierScorer(model, tokenizer))"
        )
    return spec


def _imported(name: str, module: str, function: str) -> RewardFunction:
    # At the end: a file here must not stand in for an installed package of its name (`kernels`, `datasets`).
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    importlib.invalidate_caches()
    try:
        found = importlib.import_module(module)
    except Exception as error:
        missing = (getattr(error, "name", None) or "") if isinstance(error, ModuleNotFoundError) else ""
        if f"{module}.".startswith(f"{missing}.") and missing:
            raise ValueError(f"reward {name!r}: {_no_module(missing)}") from error
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"reward {name!r}: importing {module!r} failed: {reason}") from error
    reward = getattr(found, function, None)
    if not callable(reward):
        what = "has no" if not hasattr(found, function) else "holds no function but a value as"
        near = _nearest(function, _functions(found))
        raise ValueError(f"reward {name!r}: {module} ({found.__file__}) {what} {function!r}{near}")
    return _not_a_bare_model(reward)


def _no_module(missing: str) -> str:
    """That a module is not there, and which is nearest beside it; built-in rewards are near too."""
    package, _, name = missing.rpartition(".")
    siblings = _modules(importlib.import_module(package) if package else None)
    near = _nearest(name, siblings, package + "." if package else "")
    return f"there is no module {missing!r}{near or _nearest(name, BUILT_IN)}"


def _modules(package: ModuleType | None) -> list[str]:
    paths = [str(Path.cwd())] if package is None else getattr(package, "__path__", [])
    return [module.name for module in pkgutil.iter_modules(paths)]


def _functions(module: ModuleType) -> list[str]:
    return [name for name in dir(module) if not name.startswith("_") and callable(getattr(module, name))]


def _nearest_folder(folder: Path) -> str:
    parent = folder.parent
    siblings = [path.name for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    return _nearest(folder.name, siblings, f"{parent}/")


def _nearest(name: str, known: Iterable[str], before: str = "") -> str:
    """The nearest known name as the end of a message; nothing where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {before + near[0]!r}?" if near else ""
