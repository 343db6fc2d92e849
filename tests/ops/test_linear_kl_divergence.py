"""linear_kl_divergence: against kl_divergence of logits in full, on every backend; chunks, memory, refusals.

Letters: T tokens, D width, E width of the reference, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops import conformance as c
from ops.heads import HEAD, Gemms
from ops.rows import DTYPES
from torch import Tensor
from torch.nn.functional import linear

from alignfast.kernels import linear_kl_divergence
from alignfast.kernels._backend import resolve
from alignfast.kernels._head import tile_dtype
from alignfast.kernels._workspace import release_workspaces
from alignfast.kernels.kl_divergence import DIVERGENCE, KINDS, kl_options, row_divergence

on_every_backend = pytest.mark.parametrize(("backend", "device"), c.backends_for("kl_divergence"))
T, D, E, V = 37, 16, 12, 101  # odd sizes: the last chunk is ragged, no dimension equals another


class Problem:
    """Both heads, the reference half a nat from the policy where `near`."""

    def __init__(self, dtype: torch.dtype = torch.float64, *, device: str = "cpu", seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

        self.leaves = [normal(T, D), normal(V, D) / 2, normal(V)]
        self.reference = [normal(T, E), normal(V, E) / 2, normal(V)]

    def ours(self, *leaves: Tensor, **options: Any) -> Tensor:
        (hidden_TD, weight_VD, bias_V), (ref_hidden_TE, ref_weight_VE, ref_bias_V) = leaves, self.reference
        return linear_kl_divergence(
            hidden_TD,
            weight_VD,
            ref_hidden_TE,
            ref_weight_VE,
            bias_V=bias_V,
            ref_bias_V=ref_bias_V,
            **options,
        )

    def whole(self, *leaves: Tensor, kind: str, head: dict[str, Any]) -> Tensor:
        """By logits in full, in the type of the tiles, then the definition."""
        compute = tile_dtype(leaves[0])
        options = kl_options(kind, head["scale"], head["softcap"], head["temperature"])
        logits = []
        for hidden, weight, bias in (leaves, [x.to(leaves[0].dtype) for x in self.reference]):
            logits.append(linear(hidden.to(compute), weight.to(compute), bias.to(compute)))
        torch_rows = resolve("kl_divergence", logits[0].device, logits[0].dtype, "torch")
        return row_divergence(*logits, options, torch_rows)[DIVERGENCE]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", [HEAD, {"scale": 1.0, "softcap": None, "temperature": 1.0}], ids=str)
# all; rows alone; a ragged last chunk; all by a number
@pytest.mark.parametrize("chunk_rows", [None, 1, 8, 37])
def test_values_and_gradients(chunk_rows: int | None, head: dict, kind: str) -> None:
    problem = Problem()
    ours, whole = (
        c.values_and_gradients(run, problem.leaves, [torch.linspace(-1, 2, T)])
        for run in (
            lambda *x: problem.ours(*x, kind=kind, chunk_rows=chunk_rows, **head),
            lambda *x: problem.whole(*x, kind=kind, head=head),
        )
    )
    for x, y in zip(ours, whole, strict=True):
        assert (x - y).abs().max() <= 1e-13 * y.abs().max().clamp(min=1)


# Each kind meets each type; chunks of 8 leave a ragged last one.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_backend
def test_holds(backend: str, device: str, dtype: torch.dtype, kind: str) -> None:
    problem, crowd = Problem(dtype, device=device), Problem(dtype, device=device, seed=1)

    def case(problem: Problem) -> c.Case:
        whole = lambda *x: problem.whole(*x, kind=kind, head=HEAD)  # noqa: E731
        return c.Case(whole, whole, problem.leaves)

    run = lambda *x: problem.ours(*x, kind=kind, chunk_rows=8, backend=backend, **HEAD)  # noqa: E731
    c.conform(run, case(problem), crowd=case(crowd))


def test_six_gemms_and_no_logits_in_full() -> None:
    """Two projections forward; both again and the policy's two products back."""
    problem = Problem(torch.float32)
    leaves = [x.requires_grad_() for x in problem.leaves]
    release_workspaces()  # those kept from earlier calls may be larger than what is asked for
    with Gemms() as gemms:
        problem.ours(*leaves, chunk_rows=4, backend="torch").sum().backward()
    chunks = -(-T // 4)
    assert len(gemms.shapes) == 6 * chunks
    assert gemms.largest < 4 * T * V  # bytes


def test_frozen_parts_cost_nothing() -> None:
    problem = Problem(torch.float32)
    hidden_TD, weight_VD, bias_V = problem.leaves
    with Gemms() as gemms:
        problem.ours(hidden_TD.requires_grad_(), weight_VD, bias_V, chunk_rows=T).sum().backward()
    assert len(gemms.shapes) == 5  # no product for the weight
    assert weight_VD.grad is None
    with Gemms() as gemms:
        assert not problem.ours(hidden_TD.detach(), weight_VD, bias_V, chunk_rows=T).requires_grad
    assert len(gemms.shapes) == 2


@pytest.mark.parametrize(("backend", "device"), c.backends_for("kl_divergence", only=c.FAST))
def test_autograd_and_compiling(backend: str, device: str) -> None:
    problem = Problem(torch.float32, device=device)
    run = lambda *x: problem.ours(*x, kind="js", chunk_rows=8, backend=backend, **HEAD)  # noqa: E731
    c.assert_backward_twice(run, problem.leaves)
    c.assert_double_backward_refused(run, problem.leaves)
    c.assert_compiles(run, problem.leaves)


def test_autocast_casts_both_heads() -> None:
    problem, narrow = Problem(torch.float32), Problem(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        kl_T = problem.ours(*problem.leaves)
    narrow.leaves, narrow.reference = (
        [x.bfloat16() for x in side] for side in (problem.leaves, problem.reference)
    )
    assert kl_T.dtype == torch.float32
    assert torch.equal(kl_T, narrow.ours(*narrow.leaves))


def test_no_tokens() -> None:
    problem = Problem()
    problem.reference[0] = problem.reference[0][:0]
    leaves = [problem.leaves[0][:0], *problem.leaves[1:]]
    kl_T, *gradients = c.values_and_gradients(problem.ours, leaves, [torch.zeros(0)])
    assert kl_T.shape == (0,)
    assert not any(x.any() for x in gradients)


def test_inputs_are_never_written_to() -> None:
    problem = Problem()
    before = [x.clone() for x in (*problem.leaves, *problem.reference)]
    c.values_and_gradients(problem.ours, problem.leaves, [torch.ones(T)])
    for x, copy in zip((*problem.leaves, *problem.reference), before):
        assert torch.equal(x.detach(), copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_VD": torch.zeros(V, D + 1)}, r"expected hidden \(T, D\) and weight \(V, D\)"),
        ({"bias_V": torch.zeros(3)}, r"expected a bias of shape \(101,\), got \(3,\)"),
        ({"ref_hidden_TE": torch.zeros(T - 1, E)}, r"got \(37, 101\) and for the reference \(36, 101\)"),
        ({"ref_weight_VE": torch.zeros(V - 1, E)}, r"and for the reference \(37, 100\)"),
        (
            {"ref_hidden_TE": torch.zeros(T, E).double(), "ref_weight_VE": torch.zeros(V, E).double()},
            "the policy is torch.float32 on cpu, the reference torch.float64",
        ),
        ({"ref_weight_VE": torch.zeros(V, E, requires_grad=True)}, "reference's weight requires a gradient"),
        ({"ref_hidden_TE": torch.zeros(T, E, requires_grad=True)}, "reference's hidden requires a gradient"),
        ({"chunk_rows": 0}, "chunk_rows must be >= 1, got 0"),
        ({"kind": "kl"}, "kind='kl' is not one of"),
        ({"softcap": -1.0}, "softcap must be a positive number"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "hidden_TD": torch.zeros(T, D),
        "weight_VD": torch.zeros(V, D),
        "ref_hidden_TE": torch.zeros(T, E),
        "ref_weight_VE": torch.zeros(V, E),
    }
    with pytest.raises(ValueError, match=message):
        linear_kl_divergence(**arguments | change)
