"""The house keeps its shape: imports go down, folders are packages, files stay readable."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import alignfast

ROOT = Path(__file__).resolve().parent.parent
# Floor of each package; a module may import its own floor and those below
FLOORS = {
    "alignfast.kernels": 1,
    "alignfast.losses": 2,
    "alignfast.data": 2,
    "alignfast.models": 3,
    "alignfast.rollout": 3,
    "alignfast.rewards": 3,
    "alignfast.trainers": 4,
    "alignfast.evaluation": 4,
    "alignfast.compat": 4,
    "alignfast.online": 5,
    "alignfast.benches": 6,
    "alignfast": 6,
}
MAX_FILE, MAX_FUNCTION = 400, 80


def packages() -> list[str]:
    """The packages that pyproject.toml lists; read without a TOML parser, which Python 3.10 lacks."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"packages = \[(\s*\"alignfast\".*?)\]", text, re.DOTALL)
    assert listed is not None
    return re.findall(r'"([\w.]+)"', listed.group(1))


MAPPED = {"alignfast.kernels": ROOT / "kernels" / "ops", "alignfast.benches": ROOT / "benches"}


def folder(package: str) -> Path:
    return MAPPED.get(package, ROOT / package.replace(".", "/"))


def sources() -> Iterator[tuple[str, Path]]:
    """(package, file) of every Python file that ships."""
    for package in packages():
        for path in sorted(folder(package).glob("*.py")):
            yield package, path


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor(module: str) -> int:
    known = [package for package in FLOORS if module == package or module.startswith(package + ".")]
    return FLOORS[max(known, key=len)]


def test_imports_go_down() -> None:
    climbing = [
        f"{path.relative_to(ROOT)} imports {name}"
        for package, path in sources()
        for name in imported(path)
        if name.startswith("alignfast.") and name.split(".")[1] in {p.split(".")[-1] for p in packages()}
        and floor(name) > floor(package)
    ]  # fmt: skip
    assert not climbing


def test_ops_losses_and_data_do_not_import_transformers_when_imported() -> None:
    script = "import sys, alignfast.losses, alignfast.kernels, alignfast.data; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_packages_in_pyproject_are_the_packages_on_disk() -> None:
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "alignfast").rglob("__init__.py")
        if "__pycache__" not in path.parts
    }
    assert set(packages()) == found | set(MAPPED)


def test_top_level_kernels_is_not_a_package() -> None:
    """PyPI's `kernels`, which transformers imports, must win from the repository root."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_a_package_named_kernels_is_left_to_its_owner(tmp_path: Path) -> None:
    """With PyPI's `kernels` installed and the repository root first on the path, `import kernels` finds theirs."""
    theirs = tmp_path / "kernels"
    theirs.mkdir()
    (theirs / "__init__.py").write_text("OWNER = 'pypi'\n")
    script = f"import sys; sys.path.append({str(tmp_path)!r}); import alignfast.kernels, kernels; print(kernels.OWNER)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "pypi", done.stderr


def test_every_module_imports() -> None:
    found = [
        m.name for m in pkgutil.walk_packages(alignfast.__path__, "alignfast.") if "__main__" not in m.name
    ]
    found += [f"alignfast.kernels.{path.stem}" for path in folder("alignfast.kernels").glob("[!_]*.py")]
    for name in found:
        if not name.rpartition(".")[2].startswith(("_cpu", "_cuda")):
            importlib.import_module(name)
    assert len(found) > 30


@pytest.mark.parametrize("kind", ["files", "functions"])
def test_files_and_functions_stay_readable(kind: str) -> None:
    """Longer ones give their reason in the file's first docstring, with the word "long"."""
    long = []
    for _, path in sources():
        text = path.read_text()
        tree = ast.parse(text)
        if "long" in (ast.get_docstring(tree) or ""):
            continue
        if kind == "files" and text.count("\n") > MAX_FILE:
            long.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        if kind == "functions":
            long += [
                f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
                for node in ast.walk(tree)
                if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno > MAX_FUNCTION  # type: ignore[operator]
            ]
    assert not long


def test_readme_tree_is_the_tree() -> None:
    """Every folder that README's tree names exists, and every folder of the top two floors is named."""
    tree = (ROOT / "README.md").read_text().split("<!-- tree -->")[1]
    named, base = set(), ROOT
    for line in tree.splitlines():
        if not line or line.startswith("`"):
            continue
        entry = line.split()[0].rstrip("/")
        base = base if line.startswith(" ") else ROOT / entry
        named.add(base / entry if line.startswith(" ") else base)
    assert not [path for path in named if not path.exists()]
    packages_there = {path.parent for path in (ROOT / "alignfast").glob("*/__init__.py")}
    assert packages_there <= named
