"""gae: the definition against the peers' plain loops, every backend against the definition; refusals.

Letters: B rows, L steps.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import conformance as c
from torch import Tensor

from alignfast.kernels import gae
from alignfast.kernels.gae import MASKED

on_every_backend = pytest.mark.parametrize(("backend", "device"), c.backends_for("gae", every_isa=True))
both_ways = pytest.mark.parametrize("masked", MASKED)


class Rows:
    """Ragged rows, as the arguments of gae: padding at the end, and holes where tools wrote."""

    def __init__(self, B: int, L: int, *, seed: int = 0, holes: float = 0.2) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rewards_BL, self.values_BL = torch.randn(2, B, L, generator=generator)
        self.bootstrap_B = torch.randn(B, generator=generator)
        length_B = torch.randint(0, L + 1, (B,), generator=generator)
        self.mask_BL = torch.rand(B, L, generator=generator) >= holes
        self.mask_BL &= torch.arange(L) < length_B[:, None]

    def run(
        self, dtype: torch.dtype = torch.float32, device: str = "cpu", **options: Any
    ) -> tuple[Tensor, Tensor]:
        floats = (x.to(device, dtype) for x in (self.rewards_BL, self.values_BL, self.bootstrap_B))
        rewards_BL, values_BL, bootstrap_B = floats
        return gae(rewards_BL, values_BL, self.mask_BL.to(device), bootstrap_B=bootstrap_B, **options)


def conform(backend: str, device: str, rows: Rows, **options: Any) -> None:
    """A backend in float32 against the loop in float32 and in float64."""
    ours = rows.run(device=device, backend=backend, **options)
    peer = rows.run(backend="torch", **options)
    gold = rows.run(torch.float64, backend="torch", **options)
    crowd = Rows(64, rows.values_BL.shape[1], seed=1)
    pairs = zip(crowd.run(backend="torch", **options), crowd.run(torch.float64, backend="torch", **options))
    crowd_errors = [c.error(x_BL, exact_BL).largest for x_BL, exact_BL in pairs]
    for name, x, theirs, exact, crowd_error in zip(("advantages", "returns"), ours, peer, gold, crowd_errors):
        c.hold(name, x, theirs, exact, crowd_error=crowd_error)


# --- the definition ---


def loop_of_verl(
    rewards: list[float], values: list[float], mask: list[bool], gamma: float, lam: float
) -> list:
    """Masked steps hand on what they got."""
    advantage, following, advantages = 0.0, 0.0, []
    for reward, value, counts in reversed([*zip(rewards, values, mask)]):
        if counts:
            advantage = reward + gamma * following - value + gamma * lam * advantage
            following = value
        advantages.append(advantage if counts else 0.0)
    return advantages[::-1]


def loop_of_openrlhf(
    rewards: list[float], values: list[float], mask: list[bool], gamma: float, lam: float
) -> list:
    """Masked steps are steps of reward and value 0."""
    advantage, following, advantages = 0.0, 0.0, []
    for reward, value, counts in reversed([*zip(rewards, values, mask)]):
        reward, value = reward * counts, value * counts
        advantage = reward + gamma * following - value + gamma * lam * advantage
        following = value
        advantages.append(advantage if counts else 0.0)
    return advantages[::-1]


@pytest.mark.parametrize(("B", "L"), [(5, 40), (2, 8192)])
@pytest.mark.parametrize(("masked", "loop"), [("skip", loop_of_verl), ("decay", loop_of_openrlhf)])
def test_definition_is_the_peers_loop(masked: str, loop: Any, B: int, L: int) -> None:
    rows = Rows(B, L)
    rows.bootstrap_B.zero_()
    advantages_BL, returns_BL = rows.run(torch.float64, gamma=0.97, lam=0.9, masked=masked, backend="torch")
    for b in range(B):
        sides = (rows.rewards_BL[b].tolist(), rows.values_BL[b].tolist(), rows.mask_BL[b].tolist())
        expected_L = torch.tensor(loop(*sides, 0.97, 0.9), dtype=torch.float64)
        assert torch.allclose(advantages_BL[b], expected_L, rtol=1e-13, atol=1e-13)
        value_L = rows.values_BL[b].double() * rows.mask_BL[b]
        assert torch.allclose(returns_BL[b], expected_L + value_L, rtol=1e-13, atol=1e-13)


def test_the_conventions_differ_where_a_tool_wrote() -> None:
    """Three tool tokens between two of the policy's: skipped, they cost nothing; decaying, three more discounts."""
    rewards_BL, values_BL = torch.tensor([[0.0, 0, 0, 0, 1.0]]), torch.zeros(1, 5)
    mask_BL = torch.tensor([[True, False, False, False, True]])
    options = {"gamma": 0.9, "lam": 1.0, "backend": "torch"}
    skipped_BL, _ = gae(rewards_BL, values_BL, mask_BL, masked="skip", **options)
    decayed_BL, _ = gae(rewards_BL, values_BL, mask_BL, masked="decay", **options)
    assert skipped_BL[0, 0].item() == pytest.approx(0.9)
    assert decayed_BL[0, 0].item() == pytest.approx(0.9**4)


@both_ways
def test_extremes_of_lambda(masked: str) -> None:
    """lam 1 without values is the reward to come; lam 0 is one step's temporal difference."""
    rows = Rows(3, 30, holes=0)
    rows.mask_BL[:] = True
    rewards_BL, values_BL = rows.rewards_BL.double(), rows.values_BL.double()
    to_come_BL, _ = gae(rewards_BL, torch.zeros_like(values_BL), lam=1.0, masked=masked)
    assert torch.allclose(to_come_BL, rewards_BL.flip(1).cumsum(1).flip(1))
    one_step_BL, _ = gae(rewards_BL, values_BL, gamma=0.9, lam=0.0, masked=masked)
    next_BL = torch.cat((values_BL[:, 1:], torch.zeros(3, 1, dtype=torch.float64)), 1)
    assert torch.allclose(one_step_BL, rewards_BL + 0.9 * next_BL - values_BL)


@on_every_backend
def test_bootstrap_reaches_the_last_step_that_counts(backend: str, device: str) -> None:
    """Padding behind it is skipped."""
    zeros_BL, mask_BL = torch.zeros(1, 40, device=device), torch.zeros(1, 40, dtype=torch.bool, device=device)
    mask_BL[0, :3] = True
    options = {"gamma": 0.5, "bootstrap_B": torch.tensor([8.0], device=device), "backend": backend}
    advantages_BL, _ = gae(zeros_BL, zeros_BL, mask_BL, lam=1.0, **options)
    assert advantages_BL[0, :4].tolist() == [1.0, 2.0, 4.0, 0.0]


# --- every backend ---


# B: one; a vector's rows and one more. L: one step; below, at and past a tile of 16; past Triton's block and CUDA's tile
@both_ways
@pytest.mark.parametrize(("B", "L"), [(1, 1), (3, 15), (17, 16), (5, 33), (33, 100)])
@on_every_backend
def test_holds(backend: str, device: str, B: int, L: int, masked: str) -> None:
    conform(backend, device, Rows(B, L), gamma=0.99, lam=0.95, masked=masked)


@both_ways
@pytest.mark.parametrize("lam", [0.95, 1.0])
@pytest.mark.parametrize(("backend", "device"), c.backends_for("gae", only=c.FAST, every_isa=True))
def test_long_rows(backend: str, device: str, lam: float, masked: str) -> None:
    conform(backend, device, Rows(2, 8192), gamma=1.0, lam=lam, masked=masked)


# rows that begin at a vector's border, and rows that do not
@pytest.mark.parametrize("L", [256, 129])
@pytest.mark.parametrize(("backend", "device"), c.backends_for("gae", only=("native",), every_isa=True))
def test_results_past_the_caches(backend: str, device: str, L: int) -> None:
    """What is written straight to memory is what is written through the caches."""
    rows = Rows((1 << 21) // L + 1, L)
    whole_BL, _ = rows.run(device=device, backend=backend)
    first = Rows(100, L)
    for name in ("rewards_BL", "values_BL", "mask_BL", "bootstrap_B"):
        setattr(first, name, getattr(rows, name)[-100:])
    assert whole_BL[-100:].equal(first.run(device=device, backend=backend)[0])


@both_ways
@on_every_backend
def test_masked_numbers_are_not_read(backend: str, device: str, masked: str) -> None:
    rows, spoilt = Rows(7, 40), Rows(7, 40)
    for x_BL in (spoilt.rewards_BL, spoilt.values_BL):
        x_BL[~rows.mask_BL] = math.nan
    clean = rows.run(device=device, masked=masked, backend=backend)
    for x_BL, wanted_BL in zip(spoilt.run(device=device, masked=masked, backend=backend), clean):
        assert torch.equal(x_BL, wanted_BL)
        assert not x_BL[~rows.mask_BL.to(device)].any()


@on_every_backend
def test_nan_stays_in_its_row(backend: str, device: str) -> None:
    rows, spoilt = Rows(5, 20, holes=0), Rows(5, 20, holes=0)
    rows.mask_BL[:] = spoilt.mask_BL[:] = True
    spoilt.rewards_BL[2, 10] = math.nan
    clean = rows.run(device=device, backend=backend)
    for x_BL, wanted_BL in zip(spoilt.run(device=device, backend=backend), clean):
        assert x_BL[2, :11].isnan().all()
        assert torch.equal(x_BL[[0, 1, 3, 4]], wanted_BL[[0, 1, 3, 4]])


@on_every_backend
def test_strides_types_and_no_mask(backend: str, device: str) -> None:
    """Any layout and type is read; the mask may hold numbers; without one all steps count."""
    rows = Rows(6, 20)
    rewards_BL, values_BL = rows.rewards_BL.bfloat16().to(device), rows.values_BL.bfloat16().to(device)
    mask_BL = rows.mask_BL.to(device)
    wanted = gae(rewards_BL.float(), values_BL.float(), mask_BL, backend=backend)
    got = gae(
        rewards_BL.T.contiguous().T,
        values_BL.T.contiguous().T,
        mask_BL.long().T.contiguous().T,
        backend=backend,
    )
    for x_BL, wanted_BL in zip(got, wanted):
        assert torch.equal(x_BL, wanted_BL)
    everywhere = gae(rewards_BL, values_BL, torch.ones_like(mask_BL), backend=backend)
    assert torch.equal(gae(rewards_BL, values_BL, backend=backend)[0], everywhere[0])


@on_every_backend
def test_out_and_no_gradient(backend: str, device: str) -> None:
    rows = Rows(4, 30)
    wanted = rows.run(device=device, backend=backend)
    out = (torch.full((4, 30), math.nan, device=device), torch.full((4, 30), math.nan, device=device))
    got = rows.run(device=device, out=out, backend=backend)
    for x_BL, given_BL, wanted_BL in zip(got, out, wanted):
        assert x_BL is given_BL
        assert torch.equal(x_BL, wanted_BL)
    values_BL = rows.values_BL.to(device).requires_grad_()
    assert not gae(values_BL, values_BL, backend=backend)[0].requires_grad


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
@on_every_backend
def test_nothing(backend: str, device: str, shape: tuple[int, int]) -> None:
    empty_BL = torch.zeros(shape, device=device)
    assert [x.shape for x in gae(empty_BL, empty_BL, backend=backend)] == [shape, shape]


@pytest.mark.parametrize(("backend", "device"), c.backends_for("gae", only=("native",)))
def test_threads_change_nothing(backend: str, device: str) -> None:
    rows = Rows(100, 6000)  # past half a million numbers, where threads begin
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(rows.run(device=device, backend=backend))
    torch.set_num_threads(before)
    assert all(torch.equal(x_BL, y_BL) for x_BL, y_BL in zip(*results))


@pytest.mark.parametrize(("backend", "device"), c.backends_for("gae", only=("native",)))
def test_native_op_is_registered_right(backend: str, device: str) -> None:
    rows, out = Rows(3, 20), (torch.empty(3, 20, device=device), torch.empty(3, 20, device=device))
    tensors = (x.to(device) for x in (rows.rewards_BL, rows.values_BL, rows.mask_BL, rows.bootstrap_B))
    torch.library.opcheck(torch.ops.alignfast.gae, (*tensors, 0.99, 0.94, False, *out))


@pytest.mark.parametrize(("backend", "device"), c.backends_for("gae", only=("native",)))
def test_compiles(backend: str, device: str) -> None:
    rows = Rows(3, 20)
    wanted = rows.run(device=device, backend=backend)
    run = torch.compile(lambda: rows.run(device=device, backend=backend), fullgraph=True, backend="aot_eager")
    for x_BL, wanted_BL in zip(run(), wanted):
        assert torch.equal(x_BL, wanted_BL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values_BL": torch.zeros(2, 4)}, r"alike, got \(2, 3\), \(2, 4\)"),
        ({"mask_BL": torch.ones(3, 2)}, r"mask_BL must be of shape \(2, 3\), got \(3, 2\)"),
        ({"bootstrap_B": torch.ones(3)}, r"bootstrap_B must be of shape \(2,\), got \(3,\)"),
        ({"gamma": 1.5}, r"gamma must lie in \[0, 1\], got 1.5"),
        ({"lam": -0.1}, r"lam must lie in \[0, 1\], got -0.1"),
        ({"masked": "zero"}, "masked='zero' is not one of skip, decay"),
        ({"out": (torch.zeros(2, 3), torch.zeros(3, 2).T)}, "out must be two contiguous tensors"),
        ({"backend": "cuda"}, "backend='cuda' is not one of"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"rewards_BL": torch.zeros(2, 3), "values_BL": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=message):
        gae(**arguments | change)


def hold_any_rows(backend: str, device: str, data: st.DataObject, longest: int) -> None:
    B, L = data.draw(st.integers(1, 40), "B"), data.draw(st.integers(1, longest), "L")
    rows = Rows(
        B, L, seed=data.draw(st.integers(0, 2**20), "seed"), holes=data.draw(st.floats(0, 1), "holes")
    )
    gamma, lam = data.draw(st.floats(0, 1), "gamma"), data.draw(st.floats(0, 1), "lam")
    conform(backend, device, rows, gamma=gamma, lam=lam, masked=data.draw(st.sampled_from(MASKED), "masked"))


@pytest.mark.parametrize(("backend", "device"), c.backends_for("gae", only=c.COMPILED))
@given(data=st.data())
def test_any_rows(backend: str, device: str, data: st.DataObject) -> None:
    hold_any_rows(backend, device, data, longest=100)


@pytest.mark.parametrize(("backend", "device"), c.backends_for("gae", only=c.INTERPRETED))
@settings(max_examples=10)
@given(data=st.data())
def test_any_rows_interpreted(backend: str, device: str, data: st.DataObject) -> None:
    hold_any_rows(backend, device, data, longest=30)
