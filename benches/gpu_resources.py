"""Registers, stack and shared memory of each GPU kernel, as the compilers report them; no GPU is needed.

    python benches/gpu_resources.py > docs/gpu-resources.md

CUDA's are read from the compiled module, all that it holds. Triton's are compiled for the purpose, at the sizes of an 8B
model, by tests/ops/triton_compile.py. The stack holds spilled registers and local arrays. Shared memory that a launch of a
CUDA kernel asks for is not in its binary (docs/cuda-build.md has it); Hopper keeps 1 KiB a block for itself.

Of the template arguments `16 bit` is __half and __nv_bfloat16. A Variant of token_logps is its type, a warp a row (short
rows), with the entropy, with the other moments, with a softcap; kl_divergence's flag is the softcap; attention's number is
the width of a head up to which it serves, and its flags say which of dkey and dvalue a launch makes.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import triton

ROOT = Path(__file__).resolve().parent.parent
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_DTYPES = {"bfloat16": "16 bit", "float32": "float"}
OF_LOGITS = ("token_logps", "kl_divergence", "sample_tokens")
OF_NUMBERS = ("preference_loss", "gae", "kl_penalty", "policy_loss")  # float32 alone


class Usage(NamedTuple):
    """What one compiled kernel takes. A register is of a thread, the stack too, shared memory of a block."""

    source: str
    kernel: str
    arch: str
    registers: int
    stack_bytes: int
    shared_bytes: int


def cuda_usages(listing: str) -> list[Usage]:
    """What `cuobjdump -res-usage` lists.

    >>> cuda_usages('''arch = sm_90a
    ... identifier = /csrc/cuda/gae.cu
    ...  Function gae_kernel:
    ...   REG:62 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:600''')
    [Usage(source='gae.cu', kernel='gae_kernel', arch='sm_90a', registers=62, stack_bytes=0, shared_bytes=1024)]
    """
    found: list[Usage] = []
    arch = source = mangled = ""
    for line in listing.splitlines():
        if match := re.match(r"arch = (\S+)", line):
            arch = match[1]
        elif match := re.match(r"identifier = (\S+)", line):
            source = Path(match[1]).name
        elif match := re.match(r" *Function (\S+):", line):
            mangled = match[1]
        elif match := re.match(r" *REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            registers, stack, shared = map(int, match.groups())
            found.append(Usage(source, mangled, arch, registers, stack, shared))
    names = demangled([usage.kernel for usage in found])
    return [usage._replace(kernel=name) for usage, name in zip(found, names, strict=True)]


def demangled(names: Sequence[str]) -> list[str]:
    """C++ names without namespaces and arguments; types of 16 bits, which take the same but for a register, are one."""
    run = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    texts = []
    for text in run.stdout.splitlines():
        text = re.sub(r"^void |alignfast::cuda::(\(anonymous namespace\)::)?", "", text)
        text = re.sub(r"\(.*", "", text)
        texts.append(re.sub(r"__half|__nv_bfloat16", "16 bit", text).replace("> >", ">>"))
    return texts


def compiled_by_triton() -> Iterator[Usage]:
    """Triton's kernels for sm_80 and sm_90; the larger cards take larger tiles."""
    jobs: list[tuple[str, int, str, dict[str, bool]]] = []
    for arch in (80, 90):
        jobs += [(op, arch, dtype, {}) for op in OF_LOGITS for dtype in _DTYPES]
        jobs += [(op, arch, "float32", {}) for op in OF_NUMBERS]
        jobs += [
            ("packed_attention", arch, "bfloat16", {"large": arch == 90}),
            ("paged_attention", arch, "bfloat16", {}),
        ]
    script = ROOT / "tests" / "ops" / "triton_compile.py"
    run = subprocess.run(
        [sys.executable, script, json.dumps(jobs)], capture_output=True, text=True, check=True
    )
    for line in run.stdout.splitlines():
        of = json.loads(line)
        yield Usage(
            f"{of['op']}_triton.py", f"{of['kernel']}, {_DTYPES[of['dtype']]}", f"sm_{of['arch']}",
            of["registers"], of["spilled_bytes"], of["shared"],
        )  # fmt: skip


def table(usages: Iterable[Usage]) -> list[str]:
    """A line for each kernel, its cards beside each other; of several binaries under one name, the most."""
    most: dict[tuple[str, str], dict[str, Usage]] = {}
    for usage in usages:
        by_arch = most.setdefault((usage.source, usage.kernel), {})
        known = by_arch.get(usage.arch, usage)
        by_arch[usage.arch] = usage._replace(
            **{
                name: max(getattr(known, name), getattr(usage, name))
                for name in ("registers", "stack_bytes", "shared_bytes")
            }
        )
    archs = sorted({arch for by_arch in most.values() for arch in by_arch})
    lines = [
        f"| source | kernel | registers, {' / '.join(archs)} | stack, bytes | shared memory, bytes |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for (source, kernel), by_arch in sorted(most.items()):
        columns = (
            " / ".join(f"{getattr(by_arch[arch], name):,}" if arch in by_arch else "-" for arch in archs)
            for name in ("registers", "stack_bytes", "shared_bytes")
        )
        lines.append(f"| {source} | `{kernel}` | {' | '.join(columns)} |")
    return lines


def compiled_by_nvcc() -> list[Usage]:
    """All of the CUDA module that was built.

    Raises:
        RuntimeError: it was not.
    """
    spec = importlib.util.find_spec("alignfast._cuda")
    if spec is None or spec.origin is None:
        raise RuntimeError("alignfast was built without its CUDA part: `alignfast doctor` says why")
    run = subprocess.run([CUOBJDUMP, "-res-usage", spec.origin], capture_output=True, text=True, check=True)
    return cuda_usages(run.stdout)


def main() -> None:
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"], capture_output=True, text=True
    ).stdout.strip()
    _, _, note = __doc__.partition("docs/gpu-resources.md\n")
    print("# What each GPU kernel takes of a multiprocessor\n")
    print(f"Made by `python benches/gpu_resources.py` at commit {commit}, Triton {triton.__version__}.{note}")
    print("## CUDA C++\n")
    print("\n".join(table(compiled_by_nvcc())))
    print("\n## Triton\n\nOf several variants under one name, the most.\n")
    print("\n".join(table(compiled_by_triton())))


if __name__ == "__main__":
    main()
