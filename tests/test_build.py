"""The compiled modules: every instruction set computes right, and the build keeps what it promises."""

from __future__ import annotations

import hashlib
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch
from torch import Tensor

from alignfast import _cpu
from alignfast.kernels._native import DTYPES
from alignfast.kernels.token_logps import STATS, _Native, row_options

ROOT = Path(__file__).resolve().parent.parent
EVERY_ISA = [pytest.param(isa, id=isa, marks=pytest.mark.isa(isa)) for isa in _cpu.isas]
EXP, TANH, TANH_SLOPE, EXP_ANYWHERE, LOG1P_TO_1 = range(5)


def apply(function: int, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    _cpu.simd_function(function, x.data_ptr(), x.numel(), out.data_ptr())
    return out


def convert(x: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty_like(x, dtype=dtype)
    _cpu.simd_convert(DTYPES[x.dtype], x.data_ptr(), DTYPES[dtype], out.data_ptr(), x.numel())
    return out


def ulps(actual: Tensor, gold: Tensor) -> Tensor:
    """Errors counted in the distance between neighbouring float32 numbers at gold."""
    _, exponent = torch.frexp(gold)
    return (actual.double() - gold).abs() / torch.ldexp(torch.ones_like(gold), exponent - 24)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int16)


# --- simd.h ---


@pytest.mark.parametrize("isa", EVERY_ISA)
def test_log1p_to_1(isa: str) -> None:
    t = torch.cat((torch.linspace(0, 1, 1_000_003), torch.logspace(-30, 0, 1000)))
    assert ulps(apply(LOG1P_TO_1, t), t.double().log1p()).max() < 2
    assert torch.equal(apply(LOG1P_TO_1, torch.tensor([0.0])), torch.tensor([0.0]))
    assert apply(LOG1P_TO_1, torch.tensor([math.nan])).isnan().all()


@pytest.mark.parametrize("isa", EVERY_ISA)
def test_exp(isa: str) -> None:
    x = torch.linspace(-86.5, 88.0, 1_000_003)  # prime: the last vector is ragged for every width
    assert ulps(apply(EXP, x), x.double().exp()).max() < 1.25
    x = torch.tensor([0.0, -0.0, -math.inf, -1e30, -200.0, math.nan])
    assert torch.equal(apply(EXP, x)[:5], torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]))
    assert apply(EXP, x)[5].isnan()


@pytest.mark.parametrize("isa", EVERY_ISA)
def test_exp_anywhere(isa: str) -> None:
    x = torch.linspace(-87.0, 88.7, 1_000_003)
    assert ulps(apply(EXP_ANYWHERE, x), x.double().exp()).max() < 2.9
    tiny = torch.linspace(-110.0, -87.0, 10_007)  # subnormals, counted in steps of 2^-149
    assert (apply(EXP_ANYWHERE, tiny) - tiny.double().exp()).abs().max() < 2 * 2.0**-149
    x = torch.tensor([0.0, 88.8, 1e4, math.inf, -1e4, -math.inf, math.nan])
    assert apply(EXP_ANYWHERE, x)[:6].tolist() == [1.0, math.inf, math.inf, math.inf, 0.0, 0.0]
    assert apply(EXP_ANYWHERE, x)[6].isnan()


@pytest.mark.parametrize("isa", EVERY_ISA)
def test_tanh_and_its_slope(isa: str) -> None:
    small = torch.logspace(-30, 0, 100_003)
    x = torch.cat([torch.linspace(-40, 40, 1_000_003), small, -small])
    assert ulps(apply(TANH, x), x.double().tanh()).max() < 2.5
    # by cosh: 1 - tanh^2 has no digits left at 20, in float64 either
    assert ulps(apply(TANH_SLOPE, x), x.double().cosh().pow(-2)).max() < 5
    x = torch.tensor([math.inf, -math.inf, math.nan])
    assert apply(TANH, x)[:2].tolist() == [1, -1]
    assert apply(TANH, x)[2].isnan()


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_numbers_are_read_and_rounded_as_torch_does(isa: str, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = convert(every, torch.float32)
    assert torch.equal(wide.nan_to_num(nan=7), every.float().nan_to_num(nan=7))
    assert torch.equal(bits(convert(wide[wide == wide], dtype)), bits(every[every == every]))
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31 - 1, (1_000_003,), dtype=torch.int32, generator=generator)
    # halfway between neighbours, at the end of float16's range, and among its subnormals
    borders = torch.tensor(
        [1 + 2**-9, 1 + 3 * 2**-9, 65519.996, 65520.0, -65520.0, 2**-25, 1.5 * 2**-24, math.inf]
    )
    small = torch.randn(100_003, generator=generator) * 1e-6
    for x in (anything.view(torch.float32), borders, small):
        rounded, gold = convert(x, dtype), x.to(dtype)
        assert torch.equal(rounded.isnan(), gold.isnan())
        assert torch.equal(bits(rounded[rounded == rounded]), bits(gold[gold == gold]))


# --- instruction sets and threads ---


def inputs(T: int = 20, V: int = 5003) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(T, V, generator=generator) * 5, torch.randint(0, V, (T,), generator=generator)


def stats_and_gradient(logits_TV: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    options = row_options(1.0, 20.0, 0.7, -100, STATS)
    stats_KT = _Native.forward(logits_TV, targets_T, options)
    dlogits_TV = torch.empty_like(logits_TV)
    _Native.backward(logits_TV, targets_T, stats_KT, torch.ones_like(stats_KT), options, dlogits_TV)
    return stats_KT, dlogits_TV


def test_instruction_sets_agree() -> None:
    best, results = _cpu.isa(), {}
    try:
        for isa in _cpu.isas:
            _cpu.use_isa(isa)
            assert _cpu.isa() == isa
            results[isa] = stats_and_gradient(*inputs())
    finally:
        _cpu.use_isa(best)
    for stats_KT, dlogits_TV in results.values():
        # x is up to 28, rounded by 1e-6 on either side, and sum_sq_probs is made of e^2x
        torch.testing.assert_close(stats_KT, results["portable"][0], rtol=5e-6, atol=1e-7)
        torch.testing.assert_close(dlogits_TV, results["portable"][1], rtol=2e-5, atol=1e-7)


def test_two_threads_give_the_bits_of_one() -> None:
    logits_TV, targets_T = inputs(T=120)  # 600 thousand numbers: enough for threads.h to use both
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = stats_and_gradient(logits_TV, targets_T)
        torch.set_num_threads(2)
        two = stats_and_gradient(logits_TV, targets_T)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two))


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True, text=True
    )


@pytest.mark.parametrize("isa", _cpu.isas)
def test_environment_chooses_the_instruction_set(isa: str) -> None:
    done = run("from alignfast import _cpu; print(_cpu.isa())", ALIGNFAST_CPU_ISA=isa)
    assert done.stdout.strip() == isa, done.stderr


def test_unknown_instruction_set_is_refused() -> None:
    done = run("from alignfast import _cpu", ALIGNFAST_CPU_ISA="sse9")
    assert done.returncode != 0
    assert "'sse9' is not compiled in or not on this machine" in done.stderr
    with pytest.raises(ValueError, match=r"there are: .*portable"):
        _cpu.use_isa("sse9")


def test_wrong_number_of_arguments_is_refused() -> None:
    with pytest.raises(TypeError, match="simd_function takes 4 arguments, got 1"):
        _cpu.simd_function(0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime_in_the_process() -> None:
    """torch's wheel brings a libgomp under the system's name: two of them would be two pools of threads."""
    script = "import torch; from alignfast import _cpu; print(open('/proc/self/maps').read())"
    assert len(set(re.findall(r"\S*libgomp\S*", run(script).stdout))) == 1


# --- what the build leaves behind ---


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, of binutils")
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_no_function_is_shared_between_instruction_sets(isa: str) -> None:
    """Of a weak symbol the linker keeps any copy: AVX-512 code would run on a machine without it."""
    objects = list(ROOT.glob(f"build/cmake-*/CMakeFiles/cpu_{isa}.dir/cpu/*.o"))
    if not objects:
        pytest.skip("no objects of a build here")
    listed = subprocess.run(
        ["nm", "-C", "--defined-only", *objects], capture_output=True, text=True, check=True
    )
    assert not re.findall(r"^[0-9a-f]+ [WVu] .*", listed.stdout, re.MULTILINE)


def cuda_module() -> Path:
    import alignfast

    found = list(Path(alignfast.__file__).parent.glob("_cuda.*.so"))
    if not found:
        pytest.skip("alignfast._cuda is not built here")
    return found[0]


def test_cuda_module_imports_without_a_driver() -> None:
    """Its runtime is linked in: no libcudart, no libcuda, whatever torch brings."""
    needed = subprocess.run(["ldd", cuda_module()], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in needed
    done = run("from alignfast import _cuda; print(_cuda.isa())")
    assert done.stdout.strip() == "cuda", done.stderr


def test_cuda_module_is_for_ampere_hopper_and_later() -> None:
    cuda_module()
    builds = [path.read_text() for path in ROOT.glob("build/cmake-*/build.ninja")]
    found = {pair for build in builds for pair in re.findall(r"arch=(\w+),code=\[([\w,]+)\]", build)}
    if not found:
        pytest.skip("no build of CUDA code here")
    # PTX of compute_90, not of compute_90a, which would run on Hopper alone
    assert found == {("compute_80", "sm_80"), ("compute_90a", "sm_90a"), ("compute_90", "compute_90")}


# --- setup.py ---


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def fake_nvcc(folder: Path, release: str) -> None:
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.0'\n")
    nvcc.chmod(0o755)


@pytest.mark.parametrize(
    ("release", "taken"), [("12.3", False), ("12.4", True), ("12.10", True), ("13.0", True)]
)
def test_nvcc_from_12_4_on_is_taken(
    setup_py: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    release: str,
    taken: bool,
) -> None:
    fake_nvcc(tmp_path, release)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("ALIGNFAST_CUDA", raising=False)
    assert (setup_py["cuda_compiler"]() is not None) == taken
    assert ("is older than 12.4" in capsys.readouterr().out) != taken
    monkeypatch.setenv("ALIGNFAST_CUDA", "0")
    assert setup_py["cuda_compiler"]() is None


def test_failed_cuda_build_fails_the_install_and_names_the_remedy(
    setup_py: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command: subprocess.CompletedProcess(command, 1))
    build = setup_py["BuildWithCMake"](setuptools.Distribution())
    with pytest.raises(SystemExit, match="set ALIGNFAST_CUDA=0 to do without it"):
        build._compile(tmp_path, "_cuda")
    with pytest.raises(SystemExit, match=r"C\+\+17 compiler with OpenMP"):
        build._compile(tmp_path, "_cpu")


@pytest.mark.parametrize("inplace", [True, False])
def test_leaving_the_cuda_part_out_removes_the_one_of_before(
    setup_py: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inplace: bool
) -> None:
    monkeypatch.setenv("ALIGNFAST_CUDA", "0")
    command = setup_py["BuildWithCMake"]
    monkeypatch.setitem(command.run.__globals__, "ROOT", tmp_path)
    monkeypatch.setattr(command, "_configure", lambda *_: None)
    monkeypatch.setattr(command, "_compile", lambda *_: None)
    build = command(setuptools.Distribution({"ext_modules": []}))
    folder = tmp_path / "alignfast" if inplace else tmp_path / "lib" / "alignfast"
    build.inplace, build.build_lib = inplace, str(tmp_path / "lib")
    build.extensions = [setuptools.Extension(f"alignfast.{name}", []) for name in ("_cpu", "_cuda")]
    folder.mkdir(parents=True)
    old, other = folder / "_cuda.cpython-311-x86_64-linux-gnu.so", folder / "_cuda_notes.txt"
    for path in (old, other):
        path.touch()
    compiled = tmp_path / "build" / f"cmake-{sys.implementation.cache_tag}" / "_cpu.abi.so"
    compiled.parent.mkdir(parents=True)
    compiled.touch()
    build.run()
    assert not old.exists()
    assert other.exists()
    assert (folder / "_cpu.abi.so").exists()


# --- the checkout ---


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_a_wheel_is_built_from_nothing(tmp_path: Path) -> None:
    """setuptools copies all of build/lib.* into a wheel, modules that were deleted since as well."""
    shown = subprocess.run(
        ["make", "-n", "-o", "build/built", "wheel"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    before, _, _ = shown.partition("-m build --wheel")
    stale = tmp_path / "build" / "lib.linux-x86_64-cpython-311" / "alignfast" / "deleted.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    removing = [line for line in before.splitlines() if line.startswith("rm -rf")]
    subprocess.run(["sh", "-c", "\n".join(removing)], cwd=tmp_path, check=True)
    assert not stale.exists()


def test_the_licence_is_the_one_that_is_declared() -> None:
    text = (ROOT / "LICENSE").read_bytes()
    # of https://www.apache.org/licenses/LICENSE-2.0.txt, without its first empty line
    assert (
        hashlib.sha256(text).hexdigest() == "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4"
    )
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text()


def test_a_hanging_test_ends(request: pytest.FixtureRequest) -> None:
    assert 0 < float(request.config.getini("timeout")) <= 3600
    assert request.config.getini("timeout_method") == "thread"


@pytest.mark.skipif(
    not (ROOT / ".git").exists() or shutil.which("git") is None, reason="needs a git checkout"
)
def test_what_the_quickstart_leaves_is_ignored_and_its_package_is_not() -> None:
    asked = ["quickstart/report.html", "alignfast/quickstart/new.py", "tests/quickstart/new.py"]
    done = subprocess.run(["git", "check-ignore", *asked], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == asked[:1], done.stderr


# As much of PyPI's `kernels` as transformers takes from it: every name is one class, which decorates to no effect.
STUB = """
OWNER = "pypi"
class Anything:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, decorated): return decorated
def __getattr__(name):
    if name.startswith("__"): raise AttributeError(name)
    return Anything
"""
USERS = """
import sys
import alignfast, alignfast.kernels
import transformers
from transformers.utils.import_utils import is_kernels_available
import transformers.integrations.hub_kernels as theirs, transformers.models.llama.modeling_llama
import kernels
assert sys.path[0] == "", sys.path
assert is_kernels_available(), "transformers does not see the package"
assert theirs.LayerRepository is kernels.Anything, theirs.LayerRepository
print(kernels.OWNER)
"""


def test_transformers_finds_pypis_kernels_from_the_repository_root(tmp_path: Path) -> None:
    """Our folder kernels/ comes first on the path; an installed package of that name must win all the same."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(STUB)
    info = tmp_path / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(tmp_path))))
    done = subprocess.run(
        [sys.executable, "-c", USERS],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "pypi", done.stderr
