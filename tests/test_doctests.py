"""Every example in a docstring runs. Modules are imported by name: an op that is imported twice registers twice."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import alignfast
import alignfast.kernels

# The compiled modules have no docstrings with examples; __main__ would start the command line
_SKIPPED = ("_cpu", "_cuda", "__main__")
MODULES = sorted(
    {m.name for m in pkgutil.walk_packages(alignfast.__path__, "alignfast.")}
    | {f"alignfast.kernels.{m.name}" for m in pkgutil.iter_modules(alignfast.kernels.__path__)}
)


@pytest.mark.parametrize("name", [name for name in MODULES if name.rpartition(".")[2] not in _SKIPPED])
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    result = doctest.testmod(
        module, optionflags=doctest.ELLIPSIS, extraglobs={"torch": importlib.import_module("torch")}
    )
    assert result.failed == 0
