"""paged_attention by flash-attn: stand-ins with the library's own parameters, dense arithmetic; refusals.

Letters: S sequences, H query heads, K key heads, E head width, N pages, P tokens of a page, M pages of a sequence.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ops.test_paged_attention import Cache
from torch import Tensor

from alignfast.kernels import _backend, paged_attention, paged_attention_flash, report


def attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, lengths: Tensor, scale: float, softcap: float,
    window: tuple[int, int],
) -> Tensor:  # fmt: skip
    """Query (S, 1, H, E): what lies beyond a length is multiplied by 0, as the library may do it."""
    assert q.shape[1] == 1
    assert pages.dtype == lengths.dtype == torch.int32
    assert torch.stack((k_cache, v_cache)).isfinite().all()
    assert window[1] == (-1 if window[0] == -1 else 0)
    out = paged_attention(
        q[:, 0], k_cache, v_cache, pages, lengths, scale=scale, softcap=softcap or None,
        window=None if window[0] == -1 else window[0] + 1, backend="torch",
    )  # fmt: skip
    return out[:, None]


class FlashAttn2:
    """flash_attn.flash_attn_interface of 2.6 to 2.8."""

    @staticmethod
    def flash_attn_with_kvcache(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Any = None, v: Any = None, rotary_cos: Any = None,
        rotary_sin: Any = None, cache_seqlens: Any = None, cache_batch_idx: Any = None, cache_leftpad: Any = None,
        block_table: Any = None, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, rotary_interleaved: bool = True,
        alibi_slopes: Any = None, num_splits: int = 0, return_softmax_lse: bool = False,
    ) -> Tensor:  # fmt: skip
        assert k_cache.shape[1] % 256 == 0
        assert softmax_scale is not None
        return attend(q, k_cache, v_cache, block_table, cache_seqlens, softmax_scale, softcap, window_size)


class FlashAttn3:
    """flash_attn_interface of the folder hopper."""

    @staticmethod
    def flash_attn_with_kvcache(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Any = None, v: Any = None, qv: Any = None,
        rotary_cos: Any = None, rotary_sin: Any = None, cache_seqlens: Any = None, cache_batch_idx: Any = None,
        cache_leftpad: Any = None, page_table: Any = None, cu_seqlens_q: Any = None, cu_seqlens_k_new: Any = None,
        max_seqlen_q: Any = None, rotary_seqlens: Any = None, q_descale: Any = None, k_descale: Any = None,
        v_descale: Any = None, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), attention_chunk: int = 0, softcap: float = 0.0,
        rotary_interleaved: bool = True, scheduler_metadata: Any = None, num_splits: int = 0, pack_gqa: Any = None,
        sm_margin: int = 0, return_softmax_lse: bool = False,
    ) -> Tensor:  # fmt: skip
        assert softmax_scale is not None
        return attend(q, k_cache, v_cache, page_table, cache_seqlens, softmax_scale, softcap, window_size)


LIBRARIES = {2: FlashAttn2, 3: FlashAttn3}


@pytest.fixture(params=LIBRARIES)
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The library, on a CPU's tensors."""
    found = paged_attention_flash.Library(request.param, LIBRARIES[request.param])
    monkeypatch.setattr(paged_attention_flash, "library", lambda device: found)
    monkeypatch.setattr(paged_attention_flash, "refusal", lambda device, dtype: None)
    return request.param


def finite(cache: Cache) -> Cache:
    cache.key_NPKE, cache.value_NPKE = (x.nan_to_num(7.0) for x in (cache.key_NPKE, cache.value_NPKE))
    return cache


@pytest.mark.parametrize(
    "options", [{}, {"scale": 0.3}, {"window": 20}, {"window": 1}, {"softcap": 2.0, "window": 300}], ids=str
)
def test_is_called_as_it_wants(version: int, options: dict[str, Any]) -> None:
    cache = finite(Cache([5, 1, 600, 256, 257], (6, 2, 24), P=256))
    expected_SHE = cache.run(backend="torch", **options)
    assert torch.equal(cache.run(backend="flash", **options), expected_SHE)


def test_any_page_for_version_3_multiples_of_256_for_version_2(version: int) -> None:
    cache = finite(Cache([5, 40], (6, 2, 24), P=16))
    if version == 3:
        assert torch.equal(cache.run(backend="flash"), cache.run(backend="torch"))
        return
    with pytest.raises(RuntimeError, match="flash-attn 2 takes pages of a multiple of 256 tokens, got 16"):
        cache.run(backend="flash")


@pytest.mark.parametrize("width", [20, 264])
def test_heads_that_it_does_not_take_are_refused(version: int, width: int) -> None:
    with pytest.raises(RuntimeError, match=f"up to 256 wide, by eights, got {width}; pass backend='triton'"):
        finite(Cache([5], (2, 1, width), P=256)).run(backend="flash")


CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("installed", "device", "dtype", "reason"),
    [
        (None, CUDA, torch.bfloat16, "flash-attn is not installed: `pip install flash-attn`"),
        (2, CUDA, torch.float32, "takes bfloat16 and float16, got torch.float32; pass backend='triton'"),
        (2, CPU, torch.bfloat16, "needs a CUDA tensor, got cpu; pass backend='auto'"),
        (2, CUDA, torch.bfloat16, None),
    ],
)
def test_what_is_refused_and_why(
    installed: int | None, device: torch.device, dtype: torch.dtype, reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    found = None if installed is None else paged_attention_flash.Library(2, FlashAttn2)
    monkeypatch.setattr(paged_attention_flash, "library", lambda device: found)
    if reason is None:
        assert _backend.resolve("paged_attention", device, dtype, "flash").name == "flash"
    else:
        with pytest.raises(RuntimeError, match=reason):
            _backend.resolve("paged_attention", device, dtype, "flash")


@pytest.mark.parametrize(
    ("installed", "capability", "version"),
    [
        (("flash_attn_interface", "flash_attn_2_cuda"), (9, 0), 3),
        (("flash_attn_interface", "flash_attn_2_cuda"), (8, 0), 2),
        (("flash_attn_2_cuda",), (9, 0), 2),
        (("flash_attn_interface",), (8, 0), None),
        ((), (9, 0), None),
    ],
)
def test_version_3_serves_hopper(
    installed: tuple[str, ...], capability: tuple[int, int], version: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    imports = SimpleNamespace(
        import_module=lambda name: name,
        util=SimpleNamespace(find_spec=lambda name: name if name in installed else None),
    )
    monkeypatch.setattr(paged_attention_flash, "importlib", imports)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = paged_attention_flash.library.__wrapped__(CUDA)
    assert (found and found.version) == version


def test_auto_never_takes_it_and_no_other_op_has_it(version: int) -> None:
    assert _backend.resolve("paged_attention", CUDA, torch.bfloat16).name != "flash"
    with pytest.raises(RuntimeError, match="token_logps has no flash implementation; it has torch"):
        _backend.resolve("token_logps", CUDA, torch.bfloat16, "flash")


def test_16_bit_alone_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = {torch.float32: "no", torch.bfloat16: None}
    monkeypatch.setattr(paged_attention_flash, "refusal", lambda device, dtype: refusals[dtype])
    assert report()["paged_attention"]["flash"] == "available"
