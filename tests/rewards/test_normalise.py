"""Moments that forget, against sums over the whole history."""

from __future__ import annotations

import json
import math

import pytest
import torch

from alignfast.rewards import RunningNormaliser


def batches(number: int, scale: float = 1.0, offset: float = 0.0, seed: int = 0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [
        offset + scale * torch.randn(n % 4 + 1, 1, generator=draw, dtype=torch.float64) for n in range(number)
    ]


def by_history(history: list[torch.Tensor], decay: float) -> tuple[float, float]:
    """Each batch's moments weighted by decay^age, weights made to add up to 1."""
    weights = torch.tensor([decay**age for age in reversed(range(len(history)))], dtype=torch.float64)
    weights = weights / weights.sum()
    mean = sum(w * batch.mean() for w, batch in zip(weights, history))
    second = sum(w * ((batch - mean) ** 2).mean() for w, batch in zip(weights, history))
    return float(mean), math.sqrt(float(second))


# 0: the last batch alone; 0.9 and 0.99: long and hardly forgotten against 20 batches
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.99])
# an offset of a million would cost E[x^2] - E[x]^2 twelve digits
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (3.0, -2.0), (1.0, 1e6)])
def test_moments_are_those_of_the_weighted_history(decay: float, scale: float, offset: float) -> None:
    normaliser = RunningNormaliser(decay)
    history = batches(20, scale, offset)
    for count, batch in enumerate(history, 1):
        found = normaliser.normalise(batch, ["x"])
        mean, std = by_history(history[:count], decay)
        assert normaliser.mean_and_std("x") == pytest.approx((mean, std), rel=1e-9, abs=1e-12)
        torch.testing.assert_close(found, (batch - mean) / (std + 1e-8), rtol=1e-6, atol=1e-8)


def test_a_shift_is_forgotten_at_the_known_rate() -> None:
    """Scale and offset change in mid-run: what is left of the old after k batches is d^k W_s / W_{s+k}."""
    decay, before, old, new = 0.9, 30, (2.0, 1.0), (-50.0, 20.0)
    normaliser = RunningNormaliser(decay)

    def batch(mean: float, std: float) -> torch.Tensor:
        return torch.tensor([[mean - std], [mean + std]], dtype=torch.float64)

    for _ in range(before):
        normaliser.update(batch(*old), ["x"])
    assert normaliser.mean_and_std("x") == pytest.approx(old)
    for after in range(1, 60):
        normaliser.update(batch(*new), ["x"])
        left = decay**after * (1 - decay**before) / (1 - decay ** (before + after))
        mean = left * old[0] + (1 - left) * new[0]
        variance = left * (old[1] ** 2 + (old[0] - mean) ** 2) + (1 - left) * (
            new[1] ** 2 + (new[0] - mean) ** 2
        )
        assert normaliser.mean_and_std("x") == pytest.approx((mean, math.sqrt(variance)))
    half = math.log(2) / -math.log(0.99)
    assert round(half) == 69  # as the header says
    assert normaliser.normalise(batch(*new), ["x"]).flatten().tolist() == pytest.approx([-1, 1], rel=0.03)


def test_sources_have_moments_of_their_own_and_nan_is_left_out() -> None:
    normaliser = RunningNormaliser(0.5)
    rewards_NF = torch.tensor([[1.0, math.nan, 100.0], [3.0, math.nan, 100.0], [math.nan, math.nan, 100.0]])
    before = rewards_NF.clone()
    found = normaliser.normalise(rewards_NF, ["a", "b", "c"])
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, torch.tensor([[-1, math.nan, 0], [1, math.nan, 0], [math.nan, math.nan, 0]]), equal_nan=True
    )
    assert torch.equal(rewards_NF.nan_to_num(), before.nan_to_num())
    assert normaliser.mean_and_std("a") == (2, 1)
    assert normaliser.mean_and_std("b") == (0, 1)  # never heard of
    # a batch without a number of "a" does not age it
    normaliser.update(torch.tensor([[math.nan]]), ["a"])
    assert normaliser.mean_and_std("a") == (2, 1)


def test_resumed_equals_uninterrupted_bit_for_bit() -> None:
    whole, first, second = (RunningNormaliser(0.97) for _ in range(3))
    history = batches(20, 3.0, 7.0)
    wanted = [whole.normalise(batch, ["x"]) for batch in history]
    found = [first.normalise(batch, ["x"]) for batch in history[:11]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [second.normalise(batch, ["x"]) for batch in history[11:]]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))
    assert second.state_dict() == whole.state_dict()


def test_bad_input_is_refused() -> None:
    for decay in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="decay must lie in"):
            RunningNormaliser(decay)
    with pytest.raises(ValueError, match="epsilon must be above 0"):
        RunningNormaliser(epsilon=0)
    normaliser = RunningNormaliser()
    with pytest.raises(
        ValueError, match=r"expected \(N, 2\) rewards for different sources a, b, got \(1, 1\)"
    ):
        normaliser.update(torch.zeros(1, 1), ["a", "b"])
    with pytest.raises(ValueError, match="different sources a, a"):
        normaliser.update(torch.zeros(1, 2), ["a", "a"])
    with pytest.raises(ValueError, match="a reward is infinite"):
        normaliser.update(torch.full((1, 1), math.inf), ["a"])
    with pytest.raises(ValueError, match=r"made with decay=0\.5, not 0\.99"):
        normaliser.load_state_dict(RunningNormaliser(0.5).state_dict())
