"""Builds alignfast._cpu, and alignfast._cuda where nvcc is found, by CMake and Ninja over csrc/.

`ALIGNFAST_CUDA_ARCHS` names other targets than all (`90a-real` while you work on a kernel), as CMake spells them.
`ALIGNFAST_CUDA=0` leaves the CUDA part out, and removes one that was built before: it would still be found and used.
What was built stays in build/ beside this file, so that a changed source rebuilds alone; `python setup.py build_ext
--inplace` does that without pip. Everything else about the package is in pyproject.toml.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_NVCC = (12, 4)


def find_nvcc() -> Path | None:
    """The nvcc to use: CUDA_HOME's, the one on PATH, or /usr/local/cuda's. None where there is none, or it is too old."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = [Path(home, "bin", "nvcc") for home in homes] + [
        Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    ]
    nvcc = next((path for path in found if path.exists()), None)
    if nvcc is None:
        print("alignfast: no nvcc found (CUDA_HOME, PATH, /usr/local/cuda): alignfast._cuda is not built")
        return None
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release (\d+)\.(\d+)", answer)
    if version is None or tuple(map(int, version.groups())) < OLDEST_NVCC:
        oldest = ".".join(map(str, OLDEST_NVCC))
        print(
            f"alignfast: {nvcc} is older than {oldest}, or unknown: alignfast._cuda is not built. It said:\n{answer}"
        )
        return None
    return nvcc.resolve()


def cuda_compiler() -> Path | None:
    """nvcc, if the CUDA part is to be built."""
    if os.environ.get("ALIGNFAST_CUDA", "1") == "0" or not list((ROOT / "csrc" / "cuda").glob("*.cu")):
        return None
    return find_nvcc()


def tool(name: str) -> Path:
    """cmake or ninja: the one installed beside this Python, as by pip, before another on PATH."""
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        raise SystemExit(
            f"alignfast: there is no {name}, beside {sys.executable} or on PATH: `pip install {name}`"
        )
    return Path(found)


class BuildWithCMake(build_ext):
    """One CMake build for all extension modules, each then copied to where setuptools wants it."""

    def run(self) -> None:
        nvcc = cuda_compiler()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        self._configure(build, nvcc)
        for extension in self.extensions:
            target = extension.name.rpartition(".")[2]
            folder = Path(self.get_ext_fullpath(extension.name)).resolve().parent
            if self.inplace:
                folder = ROOT / "alignfast"
            if target == "_cuda" and nvcc is None:
                for old in folder.glob("_cuda.*.so"):
                    print(f"alignfast: without its CUDA part: {old} of an earlier build is removed")
                    old.unlink()
                continue
            self._compile(build, target)
            built = next(build.glob(f"{target}.*.so"))
            wanted = folder / built.name
            wanted.parent.mkdir(parents=True, exist_ok=True)
            # Copied beside and renamed: a process that runs from the old file keeps it.
            fresh = wanted.with_suffix(".fresh")
            shutil.copy2(built, fresh)
            fresh.replace(wanted)

    def _configure(self, build: Path, nvcc: Path | None) -> None:
        build.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "ALIGNFAST_CUDA": "ON" if nvcc else "OFF",
        }
        if nvcc:
            options["CMAKE_CUDA_COMPILER"] = nvcc
            # Empty rather than left out: CMake remembers what an earlier build was given.
            options["CMAKE_CUDA_ARCHITECTURES"] = os.environ.get("ALIGNFAST_CUDA_ARCHS", "")
        settings = [f"-D{name}={value}" for name, value in options.items()]
        self._cmake("-S", ROOT / "csrc", "-B", build, "-G", "Ninja", *settings, cuda=nvcc is not None)

    def _compile(self, build: Path, target: str) -> None:
        self._cmake("--build", build, "--target", target, cuda=target == "_cuda")

    def _cmake(self, *arguments: str | Path, cuda: bool) -> None:
        command = [tool("cmake"), *arguments]
        failed = subprocess.run(command).returncode
        if failed:
            remedy = "Repair the CUDA toolkit or set ALIGNFAST_CUDA=0 to do without it. " if cuda else ""
            raise SystemExit(
                f"alignfast: compiling csrc/ failed (exit status {failed}); the reason stands above. {remedy}"
                "A C++17 compiler with OpenMP is needed, such as g++ 9 or newer."
            )


setup(
    ext_modules=[Extension("alignfast._cpu", []), Extension("alignfast._cuda", [])],
    cmdclass={"build_ext": BuildWithCMake},
)
