"""Compiles the kernels that an op would launch on a GPU, without a GPU: `triton_compile.py '[[OP, ARCH, DTYPE, OPTIONS], ...]'`.

The op's own host code runs on tensors of the meta device, which have shapes and no memory; each launch is caught,
specialised as Triton's runtime would, and compiled by the ptxas of Triton's wheel. Prints one JSON line a kernel.

It must be a process of its own: `TRITON_INTERPRET`, which the tests set, turns kernels into Python when they are
imported.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

_TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32",
    torch.uint8: "*u8",
}  # fmt: skip


class Launch:
    """A caught launch: what Triton's runtime makes of its arguments. Launches with equal `key` share one binary."""

    def __init__(self, kernel: JITFunction, args: tuple, kwargs: dict[str, Any]) -> None:
        self.kernel = kernel
        self.signature: dict[str, str] = {}
        self.constants: dict[str, Any] = {}
        self.aligned: list[int] = []
        values = dict(zip(kernel.arg_names, args)) | kwargs
        for index, parameter in enumerate(kernel.params):
            self._add(index, parameter, values.pop(parameter.name))
        self.options = values

    def _add(self, index: int, parameter: Any, value: Any) -> None:
        name, plain = parameter.name, parameter.do_not_specialize
        if parameter.is_constexpr or (type(value) is int and value == 1 and not plain):
            self.signature[name], self.constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            self.signature[name] = _TYPES[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
                self.aligned.append(index)
        elif parameter.annotation_type:
            self.signature[name] = parameter.annotation_type
        elif isinstance(value, float):
            self.signature[name] = "fp32"
        else:
            self.signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not plain:
                self.aligned.append(index)

    @property
    def key(self) -> str:
        return f"{self.kernel.__name__} {self.signature} {self.constants} {self.aligned} {self.options}"

    def compile(self, arch: int) -> dict[str, Any]:
        attributes = {(index,): [["tt.divisibility", 16]] for index in self.aligned}
        source = ASTSource(self.kernel, self.signature, constexprs=self.constants, attrs=attributes)
        binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=self.options)
        usage = _resource_usage(binary.asm["cubin"])
        return {"kernel": self.kernel.__name__, "arch": arch, "shared": binary.metadata.shared, **usage}


def _resource_usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    text = run.stdout + run.stderr
    return {
        "registers": int(re.search(r"REG:(\d+)", text)[1]),
        "spilled_bytes": int(re.search(r"STACK:(\d+)", text)[1]),
    }


def catch(op: str, dtype: torch.dtype, tokens: int, **options: Any) -> list[Launch]:
    """The launches of an op's forward and backward on `tokens` tokens, at the sizes of an 8B model."""
    caught: list[Launch] = []
    run = JITFunction.run
    JITFunction.run = lambda kernel, *args, grid, warmup, **kwargs: caught.append(
        Launch(kernel, args, kwargs)
    )
    try:
        {
            "token_logps": _token_logps,
            "preference_loss": _preference_loss,
            "packed_attention": _packed_attention,
            "gae": _gae,
            "paged_attention": _paged_attention,
            "kl_penalty": _kl_penalty,
            "policy_loss": _policy_loss,
            "kl_divergence": _kl_divergence,
            "sample_tokens": _sample_tokens,
        }[op](dtype, tokens, **options)
    finally:
        JITFunction.run = run
    return caught


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _token_logps(dtype: torch.dtype, tokens: int, stats: tuple[str, ...] = ("entropy",)) -> None:
    from alignfast.kernels import token_logps_triton
    from alignfast.kernels.token_logps import row_options

    logits_TV, targets_T = _meta(tokens, 128256, dtype=dtype), _meta(tokens, dtype=torch.int64)
    options = row_options(1.0, None, 1.0, -100, stats)
    stats_KT = token_logps_triton.forward(logits_TV, targets_T, options)
    token_logps_triton.backward(logits_TV, targets_T, stats_KT, stats_KT, options, logits_TV)


def _preference_loss(dtype: torch.dtype, tokens: int) -> None:
    from alignfast.kernels import preference_loss_triton

    pairs = tokens // 100
    for code in range(4):
        preference_loss_triton.forward(
            _meta(tokens), _meta(2 * pairs + 1, dtype=torch.int64), _meta(pairs), _meta(pairs), code, 0.1, 0.0
        )


def _gae(dtype: torch.dtype, tokens: int) -> None:
    from alignfast.kernels import gae_triton

    rows_BL, mask_BL = _meta(32, tokens), _meta(32, tokens, dtype=torch.bool)
    for decays in (False, True):
        gae_triton.forward(rows_BL, rows_BL, mask_BL, _meta(32), 1.0, 0.95, decays, rows_BL, rows_BL)


def _kl_penalty(dtype: torch.dtype, tokens: int) -> None:
    from alignfast.kernels import kl_penalty_triton

    for code in range(4):
        for slope in (False, True):
            kl_penalty_triton.forward(_meta(tokens), _meta(tokens), code, slope)


def _policy_loss(dtype: torch.dtype, tokens: int) -> None:
    from alignfast.kernels import policy_loss_triton

    tokens_T, mask_T, scale = _meta(tokens), _meta(tokens, dtype=torch.bool), _meta()
    for ref_T, marked_T, scale_T, corrects in (
        (None, None, scale.expand(tokens), False),
        (tokens_T, mask_T, scale.expand(tokens), False),
        (tokens_T, mask_T, tokens_T, True),
    ):
        policy_loss_triton.forward(
            tokens_T, tokens_T, tokens_T, ref_T, marked_T, scale_T, 0.8, 1.2, 3.0, 0.1, corrects
        )


def _kl_divergence(dtype: torch.dtype, tokens: int) -> None:
    from alignfast.kernels import kl_divergence_triton
    from alignfast.kernels.kl_divergence import KINDS, kl_options

    logits_TV = _meta(tokens, 128256, dtype=dtype)
    for kind in KINDS:
        options = kl_options(kind, 1.0, None, 0.7)
        stats_KT = kl_divergence_triton.forward(logits_TV, logits_TV, options)
        kl_divergence_triton.backward(logits_TV, logits_TV, stats_KT, stats_KT[0], options, logits_TV)


def _sample_tokens(dtype: torch.dtype, tokens: int) -> None:
    from alignfast.kernels import sample_tokens_triton
    from alignfast.kernels.sample_tokens import sample_options

    logits_BV, counter_B = _meta(tokens, 128256, dtype=dtype), _meta(tokens, dtype=torch.int64)
    for options in (sample_options(1.0, 0, 1.0, 0.0, 7), sample_options(0.7, 50, 0.9, 0.1, 2**60)):
        sample_tokens_triton.forward(logits_BV, counter_B, counter_B, options)


def _packed_attention(
    dtype: torch.dtype,
    tokens: int,
    width: int = 128,
    window: int = 0,
    softcap: float = 0.0,
    large: bool = True,
) -> None:
    from alignfast.kernels import _attention_tiles, packed_attention_triton
    from alignfast.kernels.packed_attention import AttentionOptions, PackedLayout

    _attention_tiles.is_large = lambda device: large  # as on sm_90
    layout = PackedLayout((tokens // 2,), ((tokens - tokens // 2,),))
    options = AttentionOptions(0.1, window, softcap)
    q_THE, k_TKE = _meta(tokens, 32, width, dtype=dtype), _meta(tokens, 8, width, dtype=dtype)
    out_THE, norms_HT2 = packed_attention_triton.forward(q_THE, k_TKE, k_TKE, layout, options)
    packed_attention_triton.backward(q_THE, q_THE, k_TKE, k_TKE, out_THE, norms_HT2, layout, options)


def _paged_attention(dtype: torch.dtype, tokens: int, window: int = 0) -> None:
    from alignfast.kernels import paged_attention_triton
    from alignfast.kernels.packed_attention import AttentionOptions

    pages_NPKE = _meta(4096, 16, 8, 128, dtype=dtype)
    pages_SM, length_S = _meta(64, tokens // 64, dtype=torch.int32), _meta(64, dtype=torch.int32)
    options = AttentionOptions(0.1, window, 0.0)
    paged_attention_triton.forward(
        _meta(64, 32, 128, dtype=dtype), pages_NPKE, pages_NPKE, pages_SM, length_S, options
    )


if __name__ == "__main__":
    for op, arch, dtype, options in json.loads(sys.argv[1]):
        launches, others = (catch(op, getattr(torch, dtype), tokens, **options) for tokens in (8192, 4099))
        for launch, other in zip(launches, others, strict=True):
            report = launch.compile(arch) | {"same_binary_for_other_lengths": launch.key == other.key}
            print(json.dumps({"op": op, "dtype": dtype, "large": arch == 90, **options, **report}))
