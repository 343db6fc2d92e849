"""`linear_loss` and `linear_token_logps`: which products they form and what they keep; chunks, queue, loss scale.

Letters: T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from harness import peak_bytes
from ops.heads import HEAD, D, Gemms, Inputs, T, V, assert_close
from torch import Tensor

from alignfast.kernels import Stats, _head, linear_loss, linear_token_logps
from alignfast.kernels._workspace import release_workspaces


def _shapes(call: Callable[[], Tensor]) -> Gemms:
    with Gemms() as gemms:
        call().backward()
    return gemms


def test_three_gemms_where_log_probs_first_need_four() -> None:
    inputs = Inputs()
    arguments = (inputs.hidden_TD, inputs.weight_VD, inputs.targets_T)
    whole = {(T, D, V), (T, V, D), (V, T, D)}
    ours = _shapes(
        lambda: linear_loss(*arguments, lambda stats, rows: (stats.logps.sum(), {}), chunk_rows=64)[0]
    )
    ignored = 2  # these rows have no gradient
    assert ours.shapes == [(T, D, V), (T - ignored, V, D), (V, T - ignored, D)]
    theirs = _shapes(lambda: linear_token_logps(*arguments).sum())
    assert sorted(theirs.shapes) == sorted([(T, D, V), *whole])


def test_rows_without_gradient_are_dropped() -> None:
    inputs = Inputs()
    inputs.advantage_T[5:25] = 0  # a group without variance, say; row 20 is ignored besides, row 3 too
    active = T - 20 - 1
    gemms = _shapes(
        lambda: linear_loss(
            inputs.hidden_TD, inputs.weight_VD, inputs.targets_T, inputs.loss_fn, chunk_rows=64
        )[0]
    )
    assert gemms.shapes == [(T, D, V), (active, V, D), (V, active, D)]
    inputs.advantage_T.zero_()
    gemms = _shapes(
        lambda: linear_loss(inputs.hidden_TD, inputs.weight_VD, inputs.targets_T, inputs.loss_fn)[0]
    )
    assert gemms.shapes == [(T, D, V)]
    assert not inputs.weight_VD.grad.isnan().any()


def test_second_pass_forms_only_rows_with_a_gradient() -> None:
    inputs = Inputs()
    inputs.advantage_T[:30] = 0
    gemms = _shapes(
        lambda: linear_loss(
            inputs.hidden_TD,
            inputs.weight_VD,
            inputs.targets_T,
            inputs.loss_fn,
            group_sizes=[T],
            chunk_rows=20,
        )[0]
    )
    assert gemms.shapes == [(20, D, V), (17, D, V), (7, D, V), (7, V, D), (V, 7, D)]


def test_frozen_head_costs_no_weight_gradient() -> None:
    inputs = Inputs()
    gemms = _shapes(
        lambda: linear_loss(
            inputs.hidden_TD, inputs.weight_VD.detach(), inputs.targets_T, lambda s, rows: (s.logps.sum(), {})
        )[0]
    )
    assert [shape for shape in gemms.shapes if shape[0] == V] == []
    frozen_trunk = _shapes(
        lambda: linear_loss(
            inputs.hidden_TD.detach(), inputs.weight_VD, inputs.targets_T, lambda s, rows: (s.logps.sum(), {})
        )[0]
    )
    assert [shape[0] for shape in frozen_trunk.shapes] == [T, V]


def test_without_gradients_only_the_projection_runs() -> None:
    inputs = Inputs()
    with Gemms() as gemms, torch.no_grad():
        loss, _ = linear_loss(inputs.hidden_TD, inputs.weight_VD, inputs.targets_T, inputs.loss_fn)
    assert gemms.shapes == [(T, D, V)]
    assert not loss.requires_grad


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_nothing_of_size_tokens_by_vocabulary_outlives_a_chunk(backend: str) -> None:
    tokens, rows, vocabulary = 512, 32, 4001
    release_workspaces()
    hidden_TD = torch.randn(tokens, 8, requires_grad=True)
    weight_VD = torch.randn(vocabulary, 8, requires_grad=True)
    targets_T = torch.randint(0, vocabulary, (tokens,))
    with Gemms() as gemms:
        loss, _ = linear_loss(
            hidden_TD,
            weight_VD,
            targets_T,
            lambda s, r: (s.logps.sum(), {}),
            chunk_rows=rows,
            backend=backend,
        )
        loss.backward()
    assert gemms.largest <= rows * vocabulary * 4
    release_workspaces()


# --- linear_token_logps in chunks ---


def in_chunks_of(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU 128 MiB of logits are a chunk: 332,000 rows of these tests."""
    monkeypatch.setattr(_head, "_CPU_TILE_BYTES", 1)
    monkeypatch.setattr(_head, "_MIN_ROWS", rows)


# 10 leaves a ragged last chunk, 37 is one chunk, 1 a chunk a row
@pytest.mark.parametrize("rows", [1, 10, T])
@pytest.mark.parametrize("head", [{}, HEAD])
def test_log_probs_in_chunks(rows: int, head: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Inputs()
    expected_T = inputs.expected(**head)
    expected = torch.autograd.grad((expected_T * inputs.advantage_T).sum(), inputs.leaves)
    in_chunks_of(rows, monkeypatch)
    with Gemms() as gemms:
        logps_T, entropy_T = linear_token_logps(
            inputs.hidden_TD, inputs.weight_VD, inputs.targets_T, bias_V=inputs.bias_V, entropy=True, **head
        )
        gradients = torch.autograd.grad(
            (logps_T * inputs.advantage_T).sum() + 0 * entropy_T.sum(), inputs.leaves
        )
    num_chunks = -(-T // rows)
    assert len(gemms.shapes) == 4 * num_chunks
    assert gemms.shapes[0] == (rows, D, V)
    assert_close((logps_T, *gradients), (expected_T, *expected))


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_log_probs_never_hold_all_logits(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, rows, vocabulary = 512, 32, 4001
    in_chunks_of(rows, monkeypatch)
    release_workspaces()
    hidden_TD = torch.randn(tokens, 8, requires_grad=True)
    weight_VD = torch.randn(vocabulary, 8, requires_grad=True)
    with Gemms() as gemms:
        linear_token_logps(
            hidden_TD, weight_VD, torch.randint(0, vocabulary, (tokens,)), backend=backend
        ).sum().backward()
    assert gemms.largest <= rows * vocabulary * 4
    release_workspaces()


# --- the queue of a GPU, where the count of active rows is read a chunk late ---


@pytest.mark.parametrize(
    "plan",
    [
        {"chunk_rows": 7},
        {"group_sizes": [5, 20, 12], "chunk_rows": 9},
        {"group_sizes": [20, 17], "chunk_rows": 6},
    ],
    ids=["chunks", "a large group between", "large groups"],
)
@pytest.mark.parametrize("dropped", [slice(0), slice(5, 25), slice(T)], ids=["all rows", "some", "none"])
def test_counts_read_late_change_nothing(plan: dict, dropped: slice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiles and a late number, without a GPU; a count is only read when the next unit's loss is known."""
    log: list[str] = []

    class Late:
        def __init__(self, number: Tensor) -> None:
            self.number, self.unit = int(number), sum(entry == "loss" for entry in log) - 1

        def read(self) -> int:
            log.append(f"count {self.unit}")
            return self.number

    inputs = Inputs()
    inputs.advantage_T[dropped] = 0

    def loss_fn(stats: Stats, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        log.append("loss")
        return inputs.loss_fn(stats, rows)

    def run() -> tuple[Tensor, ...]:
        loss, metrics = linear_loss(
            inputs.hidden_TD, inputs.weight_VD, inputs.targets_T, loss_fn, bias_V=inputs.bias_V, **plan
        )
        return loss, *metrics.values(), *torch.autograd.grad(loss, inputs.leaves)

    expected = run()
    log.clear()
    module = import_module("alignfast.kernels.linear_loss")
    monkeypatch.setattr(module, "_reads_late", lambda device: True)
    monkeypatch.setattr(module, "_Late", Late)
    for got, wanted in zip(run(), expected, strict=True):
        assert torch.equal(got, wanted)
    units = log.count("loss")
    later = [entry for unit in range(1, units) for entry in ("loss", f"count {unit - 1}")]
    assert log == ["loss", *later, f"count {units - 1}"]


# --- float16's loss scale ---


@pytest.fixture
def _half_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of float16 on a CPU, as on a GPU; a CPU has no product of them that gives float32."""

    def add_mm(total: Tensor, a: Tensor, b: Tensor, *, beta: float) -> None:
        product = a.float() @ b.float()
        total.copy_(product if beta == 0 else total + product)

    monkeypatch.setattr(_head, "tile_dtype", lambda hidden_TD: hidden_TD.dtype)
    monkeypatch.setattr(_head, "_mm", lambda a, b, dtype: (a.float() @ b.float()).to(dtype))
    monkeypatch.setattr(_head, "_add_mm", add_mm)


@pytest.mark.parametrize("slope", [0.0, 0.3, 50.0])
@pytest.mark.parametrize("size", [0.0, 1e-30, 3e-6, 1.0, 65536.0, 1e7])
def test_loss_scale_is_a_power_of_two_with_room_above(size: float, slope: float) -> None:
    dstats_KN = torch.tensor([[size, -size / 3], [math.nan, math.inf]])
    scale = _head.loss_scale(dstats_KN, slope, torch.float16).item()
    assert math.frexp(scale)[0] == 0.5
    assert scale * size * slope < 2048
    assert scale * size * slope >= 1024 or scale == 2.0**39
    assert _head.loss_scale(dstats_KN, slope, torch.float32) is None
    assert _head.loss_scale(torch.empty(6, 0), slope, torch.float16) is None


@pytest.mark.usefixtures("_half_tiles")
def test_a_sum_over_many_rows_fits_float16() -> None:
    """As many rows as a scale of their number would make of 1 more than float16's 65504."""
    tokens = 40_000
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(tokens, 4, generator=generator).half().requires_grad_()
    weight_VD = torch.randn(7, 4, generator=generator).half().requires_grad_()
    targets_T = torch.randint(0, 7, (tokens,), generator=generator)
    exact = [x.detach().double().requires_grad_() for x in (hidden_TD, weight_VD)]
    gold = torch.autograd.grad(linear_token_logps(*exact, targets_T).sum(), exact)
    sums = linear_token_logps(hidden_TD, weight_VD, targets_T).sum()
    for got, wanted in zip(torch.autograd.grad(sums, (hidden_TD, weight_VD)), gold):
        assert (got - wanted).abs().max() <= 2e-3 * wanted.abs().max()


# A loss normalised by 2^24 tokens, one multiplied by a GradScaler's 65,536
@pytest.mark.parametrize("size", [2.0**-24, 2.0**16])
@pytest.mark.parametrize("chunk_rows", [10, 64])
@pytest.mark.usefixtures("_half_tiles")
def test_float16_gradients_of_any_size(size: float, chunk_rows: int) -> None:
    """Power of two in, power of two out, bit for bit; chunks of very different gradients have a scale each."""
    inputs = Inputs(torch.float16)
    chunk_sizes = 2.0 ** torch.tensor([-5, 5, 0, -3]).repeat_interleave(10)[:T]
    inputs.advantage_T *= chunk_sizes

    def gradients(size: float) -> tuple[Tensor, ...]:
        def loss_fn(stats: Stats, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
            return inputs.loss_fn(stats, rows)[0] * size, {}

        arguments = inputs.hidden_TD, inputs.weight_VD, inputs.targets_T, loss_fn
        loss, _ = linear_loss(*arguments, bias_V=inputs.bias_V, chunk_rows=chunk_rows)
        return torch.autograd.grad(loss / size, inputs.leaves)

    exact = Inputs()
    exact.leaves = tuple(x.detach().double().requires_grad_() for x in inputs.leaves)
    exact.hidden_TD, exact.weight_VD, exact.bias_V = exact.leaves
    gold = torch.autograd.grad((exact.expected() * inputs.advantage_T.double()).sum(), exact.leaves)
    for got, plain, wanted in zip(gradients(size), gradients(1.0), gold):
        assert torch.equal(got, plain)
        per_row = wanted.reshape(len(wanted), -1).abs().amax(1)
        assert ((got - wanted).reshape(len(wanted), -1).abs().amax(1) <= 2e-2 * per_row.max()).all()
        if wanted.shape == (T, D):
            assert ((got - wanted).abs().amax(1) <= 2e-2 * per_row).all()


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_memory_does_not_grow_with_the_vocabulary(backend: str) -> None:
    """Head frozen, forward and backward: chunks of logits take the workspace and no more, whatever the vocabulary."""

    def step(vocabulary: int) -> Callable[[], None]:
        hidden_TD = torch.randn(2048, 16, requires_grad=True)
        weight_VD, targets_T = torch.randn(vocabulary, 16), torch.randint(vocabulary, (2048,))
        rows = (hidden_TD, weight_VD, targets_T, lambda stats, _: (stats.logps.sum(), {}))
        return lambda: linear_loss(*rows, backend=backend)[0].backward()

    small, large = (peak_bytes(step(vocabulary)) for vocabulary in (32_000, 128_000))
    assert large == pytest.approx(small, rel=0.1)  # all logits would be four times as much
