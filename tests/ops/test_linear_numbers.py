"""`linear_loss` and `linear_token_logps` on every backend, held to float64: values and gradients.

Gold is torch's product in float64 and the definition of `token_logps`, the peer F.linear, log_softmax and gather: so
nothing of the fused head is measured against itself.

Letters: T tokens, D width, V vocabulary, G problems of one size, K the statistics with a gradient.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import conformance as c
from ops.rows import DTYPES, OPTIONS, on_every_backend, options_of, statistics, textbook
from torch import Tensor
from torch.nn.functional import linear

from alignfast.kernels import Stats, linear_loss, linear_token_logps
from alignfast.kernels._head import tile_dtype
from alignfast.kernels.linear_loss import plan
from alignfast.kernels.token_logps import row_stats

FIELDS = ("logps", "lse", "entropy", "mean_logit", "sum_sq_probs")  # in the order of `textbook`
_CROWD = 64  # orders of summation: the error of one order is luck


class Problem(NamedTuple):
    """Options and small tensors of G calls side by side; the leaves are hidden_GTD, weight_GVD and perhaps bias_GV."""

    targets_GT: Tensor
    option: tuple[float, float | None, float]  # scale, softcap, temperature
    upstream_KGT: Tensor  # what the loss multiplies each statistic by; rows of 0 are dropped
    pieces: tuple[int, ...] = ()  # rows the peer multiplies at once: as many as the backend, else g of T
    kept_V: Tensor | None = None  # columns whose bias is not -inf: the peer has no others
    cut_G: tuple[int, ...] = ()  # words from here on are multiplied with the width in the opposite order

    @property
    def head(self) -> dict[str, Any]:
        return dict(zip(("scale", "softcap", "temperature"), self.option))

    @property
    def fields(self) -> tuple[str, ...]:
        wanted = self.upstream_KGT.flatten(1).any(1)
        return tuple(field for field, one in zip(FIELDS, wanted) if one) or ("logps",)

    def by_peer(self, hidden_GTD: Tensor, weight_GVD: Tensor, *bias_GV: Tensor) -> list[Tensor]:
        """The K statistics of all G x T rows."""
        compute = tile_dtype(hidden_GTD[0])
        leaves, targets = [weight_GVD, *bias_GV], self.targets_GT.flatten()
        if self.kept_V is not None:
            leaves = [x[:, self.kept_V] for x in leaves]
            targets = moved(targets, self.kept_V.cumsum(0) - 1)
        logits = []
        for g, (hidden_TD, *others) in enumerate(zip(*(x.to(compute) for x in (hidden_GTD, *leaves)))):
            T = max(1, len(hidden_TD))
            cut = self.cut_G[g] if self.cut_G else others[0].shape[0]
            # products of other numbers of rows add in other orders: rows of equal numbers may get unequal errors
            for hidden_ND in hidden_TD.split(self.pieces or T - g % T):
                near = linear(hidden_ND, *(x[:cut] for x in others))
                far = linear(hidden_ND.flip(1), others[0][cut:].flip(1), *(x[cut:] for x in others[1:]))
                logits.append(torch.cat((near, far), 1))
        return textbook(torch.cat(logits), targets, options_of(*self.option))

    def by_definition(self, *leaves: Tensor) -> list[Tensor]:
        logits = torch.cat([linear(*x) for x in zip(*leaves)])
        return statistics(row_stats(logits, self.targets_GT.flatten(), options_of(*self.option), "torch"))

    def loss_of(self, stats: list[Tensor]) -> Tensor:
        """losses_G."""
        wanted = [FIELDS.index(field) for field in self.fields]
        stats_KGT = torch.stack([stats[k].view(self.targets_GT.shape) for k in wanted])
        return (stats_KGT * self.upstream_KGT[wanted].to(stats_KGT.dtype)).sum((0, 2))

    def shuffled(self, hidden_TD: Tensor, weight_VD: Tensor, *bias_V: Tensor) -> tuple[Problem, list[Tensor]]:
        """The same problem G times, rounded otherwise, as large and as far from a tie.

        Tokens, width and vocabulary stand in another order, and two parts of the vocabulary in two orders of the width:
        equal words get unequal errors. Hidden states move in the last bits of the type that is computed in: a width of 1
        has one order alone, and sums of 16-bit products are often exact. Upstream gradients change their signs: a sum of
        five errors may be 0.
        """
        generator, device = torch.Generator().manual_seed(1), hidden_TD.device
        hidden_TD, weight_VD, *bias_V = (x.to(tile_dtype(hidden_TD)) for x in (hidden_TD, weight_VD, *bias_V))
        targets, upstream, leaves = [], [], []
        for _ in range(_CROWD):
            t, d, v = (
                torch.randperm(n, generator=generator).to(device) for n in (*hidden_TD.shape, len(weight_VD))
            )
            v = v if self.kept_V is None else v.sort().values
            targets.append(moved(self.targets_GT[0, t], v.argsort()))
            upstream_KT = self.upstream_KGT[:, 0, t]
            signs_KT = 2 * torch.randint(0, 2, upstream_KT.shape, generator=generator) - 1
            upstream.append(upstream_KT * signs_KT.to(device))
            factor_TD = 1 + (torch.rand(hidden_TD.shape, generator=generator).to(device) - 0.5) * 2**-20
            near_TD = (hidden_TD[t][:, d] * factor_TD).to(hidden_TD.dtype)
            leaves.append([near_TD, weight_VD[v][:, d], *(x[v] for x in bias_V)])
        V = len(weight_VD) if self.kept_V is None else int(self.kept_V.sum())
        many = self._replace(
            targets_GT=torch.stack(targets),
            upstream_KGT=torch.stack(upstream, 1),
            pieces=(),
            cut_G=tuple(g % (V + 1) for g in range(_CROWD)),
        )
        return many, [torch.stack(x) for x in zip(*leaves)]


def moved(targets_T: Tensor, place_V: Tensor) -> Tensor:
    """Targets where word v stands at place_V[v]."""
    return place_V[targets_T.clamp(min=0)].where(targets_T >= 0, targets_T)


def hold(run: c.Run, problem: Problem, leaves: list[Tensor], choose: Any) -> None:
    """Hold `run` on these leaves; `choose(problem, statistics)` is what it returns."""

    def case(problem: Problem, leaves: list[Tensor]) -> c.Case:
        return c.Case(
            lambda *x: choose(problem, problem.by_peer(*x)),
            lambda *x: choose(problem, problem.by_definition(*x)),
            leaves,
        )

    alone = case(problem, [leaf[None] for leaf in leaves])
    c.conform(lambda *x: run(*(leaf[0] for leaf in x)), alone, crowd=case(*problem.shuffled(*leaves)))


def hold_log_probs(backend: str, problem: Problem, leaves: list[Tensor], entropy: bool) -> None:
    def run(hidden_TD: Tensor, weight_VD: Tensor, *bias_V: Tensor) -> Any:
        return linear_token_logps(
            hidden_TD, weight_VD, problem.targets_GT[0], bias_V=bias_V[0] if bias_V else None, entropy=entropy,
            backend=backend, **problem.head,
        )  # fmt: skip

    hold(run, problem, leaves, lambda _, stats: stats[0:3:2] if entropy else stats[:1])


def hold_loss(backend: str, problem: Problem, leaves: list[Tensor], **arguments: Any) -> None:
    def loss_fn(stats: Stats, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        upstream = dict(zip(FIELDS, problem.upstream_KGT[:, 0, rows]))
        return sum((getattr(stats, field) * upstream[field]).sum() for field in problem.fields), {}

    def run(hidden_TD: Tensor, weight_VD: Tensor, *bias_V: Tensor) -> Tensor:
        loss, _ = linear_loss(
            hidden_TD, weight_VD, problem.targets_GT[0], loss_fn, stats=problem.fields, backend=backend,
            bias_V=bias_V[0] if bias_V else None, **problem.head, **arguments,
        )  # fmt: skip
        return loss[None]

    units = plan(problem.targets_GT.shape[1], arguments.get("group_sizes"), arguments["chunk_rows"])
    pieces = tuple(piece.stop - piece.start for unit in units for piece in unit)
    hold(run, problem._replace(pieces=pieces), leaves, Problem.loss_of)


def inputs(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, *, spread: float = 1.0, seed: int = 0,
    ignored: float = 0.3, logps_alone: bool = False, option: tuple = OPTIONS[0],
) -> tuple[Problem, list[Tensor]]:  # fmt: skip
    """A problem whose first rows have no gradient, and hidden states, weight and bias."""
    T, D, V = shape
    generator = torch.Generator().manual_seed(seed)
    hidden_TD, weight_VD, bias_V, upstream_KT = (
        torch.randn(*size, generator=generator) for size in ((T, D), (V, D), (V,), (len(FIELDS), T))
    )
    targets_T = torch.randint(0, V, (T,), generator=generator)
    targets_T[torch.rand(T, generator=generator) < ignored] = -100
    upstream_KT[1:] *= 0.0 if logps_alone else 1.0
    upstream_KT[:, : T // 4] = 0
    leaves = [x.to(dtype).to(device) for x in (spread * hidden_TD, weight_VD, bias_V)]
    return Problem(targets_T[None].to(device), option, upstream_KT[:, None].to(device)), leaves


# 33 rows in chunks of 9, a vocabulary past one block of any backend; of Triton's interpreter, which takes 10 ms a
# block, fewer rows. Options rotate: each meets each dtype.
@pytest.mark.parametrize("rotation", range(3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_backend
def test_holds(backend: str, device: str, dtype: torch.dtype, rotation: int) -> None:
    shape = (9, 24, 83) if backend in c.INTERPRETED else (33, 24, 515)
    option = OPTIONS[(rotation + DTYPES.index(dtype)) % len(OPTIONS)]
    problem, leaves = inputs(shape, dtype, device, option=option, logps_alone=rotation == 1)
    hold_log_probs(backend, problem, leaves, entropy=rotation != 1)
    hold_loss(backend, problem, leaves, chunk_rows=9 if rotation else 4)


def arranged(x: Tensor, layout: str) -> Tensor:
    """In a layout of `conformance.layouts`; a bias is a column of a matrix."""
    return c.layouts(x)[layout] if x.ndim == 2 else c.layouts(x[:, None].repeat(1, 2))[layout][:, 0]


def draw_case(data: st.DataObject, device: str, fewest: int = 0) -> tuple[Problem, list[Tensor]]:
    """Any small shape, dtype, layouts and options; inputs up to 1e4."""
    shape = data.draw(st.tuples(st.integers(fewest, 6), st.integers(1, 9), st.integers(1, 40)), "T, D, V")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    large = 100.0 if (dtype, device) == (torch.float16, "cuda") else 2500.0  # that tile ends at 65504
    option = data.draw(
        st.tuples(st.sampled_from([0.5, 1.0, -2.0]), st.sampled_from([None, 5.0]), st.floats(0.1, 10)),
        "option",
    )
    problem, leaves = inputs(
        shape, dtype, device, option=option,
        spread=data.draw(st.sampled_from([0.0, 0.1, 1.0, large]), "spread"),
        seed=data.draw(st.integers(0, 2**20), "seed"),
        ignored=data.draw(st.sampled_from([0, 0.3, 1]), "ignored"),
        logps_alone=data.draw(st.booleans(), "logps alone"),
    )  # fmt: skip
    if data.draw(st.booleans(), "no bias"):
        leaves = leaves[:2]
    names = st.sampled_from([*c.layouts(torch.zeros(2, 2))])
    return problem, [arranged(x, data.draw(names, "layout")) if len(x) else x for x in leaves]


def hold_any_log_probs(backend: str, device: str, data: st.DataObject) -> None:
    problem, leaves = draw_case(data, device)
    hold_log_probs(backend, problem, leaves, data.draw(st.booleans(), "entropy"))


def hold_any_loss(backend: str, device: str, data: st.DataObject) -> None:
    problem, leaves = draw_case(data, device, fewest=1)
    T = problem.targets_GT.shape[1]
    cut = data.draw(st.integers(0, T), "cut")
    groups = data.draw(st.sampled_from([None, [cut, T - cut]]), "groups")
    hold_loss(backend, problem, leaves, chunk_rows=data.draw(st.integers(1, 7), "chunk"), group_sizes=groups)


fast = pytest.mark.parametrize(("backend", "device"), c.backends_for("token_logps", only=c.FAST))
interpreted = pytest.mark.parametrize(
    ("backend", "device"), c.backends_for("token_logps", only=c.INTERPRETED)
)


@fast
@given(data=st.data())
def test_any_log_probs(backend: str, device: str, data: st.DataObject) -> None:
    hold_any_log_probs(backend, device, data)


@fast
@given(data=st.data())
def test_any_loss(backend: str, device: str, data: st.DataObject) -> None:
    hold_any_loss(backend, device, data)


@interpreted
@settings(max_examples=40)
@given(data=st.data())
def test_any_log_probs_interpreted(backend: str, device: str, data: st.DataObject) -> None:
    hold_any_log_probs(backend, device, data)


@interpreted
@settings(max_examples=40)
@given(data=st.data())
def test_any_loss_interpreted(backend: str, device: str, data: st.DataObject) -> None:
    hold_any_loss(backend, device, data)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_backend
def test_words_that_a_bias_forbids(backend: str, device: str, dtype: torch.dtype) -> None:
    """A bias of -inf is a vocabulary without those words: the same values, and no gradient to them."""
    problem, leaves = inputs((9, 8, 83), dtype, device, logps_alone=True)
    V = torch.arange(83, device=device)
    targets_GT = moved(problem.targets_GT, V - V % 3)
    kept_V = V % 3 != 1
    problem = problem._replace(targets_GT=targets_GT, kept_V=kept_V)
    leaves[2][~kept_V] = -math.inf
    hold_log_probs(backend, problem, leaves, entropy=True)
    hold_loss(backend, problem, leaves, chunk_rows=4)


@on_every_backend
def test_nan_stays_in_its_row(backend: str, device: str) -> None:
    """The weight's gradient is a sum over rows, so there it may spread; the other rows are the same, bit for bit."""
    problem, clean = inputs((9, 8, 83), torch.float32, device, ignored=0, logps_alone=True)
    spoilt = [clean[0].clone(), *clean[1:]]
    spoilt[0][5, 3] = math.nan
    others = [0, 1, 2, 3, 4, 6, 7, 8]
    weights_T = problem.upstream_KGT[0, 0]
    found = []
    for leaves in (clean, spoilt):
        hidden_TD = leaves[0].requires_grad_()
        arguments = hidden_TD, leaves[1], problem.targets_GT[0]
        logps_T = linear_token_logps(*arguments, bias_V=leaves[2], backend=backend)
        loss, _ = linear_loss(
            *arguments, lambda s, rows: ((s.logps * weights_T[rows]).sum(), {}), bias_V=leaves[2],
            chunk_rows=4, backend=backend,
        )  # fmt: skip
        gradients = (torch.autograd.grad(x, hidden_TD)[0] for x in ((logps_T * weights_T).sum(), loss))
        found.append((logps_T.detach()[:, None], *gradients))
    for wanted, got in zip(*found):
        assert torch.equal(got[others], wanted[others])
        assert got[5].isnan().all()
