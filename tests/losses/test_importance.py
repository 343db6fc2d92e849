"""Importance weights against the loop that defines them, and against TRL's padded formula."""

from __future__ import annotations

import math

import pytest
import torch

from alignfast.losses import importance_weights

LENGTHS = [3, 1, 0, 5, 2]  # one token alone, and a completion without tokens, which lengths may hold
NAME = "sampling/importance_sampling_ratio"


def logps(scale: float = 1.0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    now_P = -torch.rand(sum(LENGTHS), generator=draw, dtype=torch.float64) * 4
    return now_P.to(dtype), (now_P + scale * torch.randn(len(now_P), generator=draw, dtype=torch.float64)).to(
        dtype
    )


def by_loop(now, then, level, mode, cap, floor) -> list[float]:
    weights, start = [], 0
    for length in LENGTHS:
        gaps = [float(now[i] - then[i]) for i in range(start, start + length)]
        logs = [sum(gaps)] * length if level == "sequence" else gaps
        for log in logs:
            ratio = math.exp(log)
            low, high = floor or 0.0, math.inf if cap is None else cap
            if mode == "truncate":
                weights.append(min(max(ratio, low), high))
            else:
                weights.append(ratio if low <= ratio <= high else 0.0)
        start += length
    return weights


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
# TRL's default; both bounds, so that each bites; none
@pytest.mark.parametrize(("cap", "floor"), [(3.0, None), (1.5, 0.5), (None, None)])
def test_equals_the_loop(level: str, mode: str, cap: float | None, floor: float | None) -> None:
    now_P, then_P = logps()
    found = importance_weights(now_P, then_P, LENGTHS, level=level, mode=mode, cap=cap, floor=floor)
    assert found.weights_P.dtype == torch.float64
    assert found.weights_P.tolist() == pytest.approx(
        by_loop(now_P, then_P, level, mode, cap, floor), rel=1e-14
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_equals_trls_padded_formula(level: str, mode: str) -> None:
    """Rows padded to the longest with differences of 0, a ratio for each token or each row, clamp or masked fill."""
    now_P, then_P = logps()
    gap_SL = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.float64)
    mask_SL = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    gap_SL[mask_SL] = now_P - then_P
    ratio = (gap_SL.sum(-1, keepdim=True) if level == "sequence" else gap_SL).exp()
    bad = (ratio > 1.5) | (ratio < 0.5)
    weights = ratio.clamp(0.5, 1.5) if mode == "truncate" else ratio.masked_fill(bad, 0.0)
    found = importance_weights(now_P, then_P, LENGTHS, level=level, mode=mode, cap=1.5, floor=0.5)
    torch.testing.assert_close(found.weights_P, weights.expand_as(gap_SL)[mask_SL], rtol=1e-14, atol=0)
    of = weights.flatten() if level == "sequence" else weights[mask_SL]
    for metric, value in (("min", of.min()), ("mean", of.mean()), ("max", of.max())):
        assert float(found.metrics[f"{NAME}/{metric}"]) == pytest.approx(float(value), rel=1e-6)


def test_float32_is_summed_in_float64() -> None:
    """A thousand tokens: float32 sums are wrong in the fifth digit of the ratio."""
    draw = torch.Generator().manual_seed(1)
    then_P = -torch.rand(3000, generator=draw) * 20
    now_P = then_P + 0.01 * torch.randn(3000, generator=draw)
    found = importance_weights(now_P, then_P, [1000] * 3, level="sequence", cap=None).weights_P
    wanted_S = (now_P.double() - then_P.double()).view(3, 1000).sum(1).exp()
    torch.testing.assert_close(found[::1000].double(), wanted_S, rtol=6e-8, atol=0)  # half a unit of float32


def test_metrics_of_a_known_case() -> None:
    now_P = torch.tensor([4.0, 1.0, 1.0, 2.0]).log()
    found = importance_weights(now_P, torch.zeros(4), [2, 2], cap=3.0)
    wanted = {"min": 1.0, "mean": 7 / 4, "max": 3.0, "raw_mean": 2.0, "raw_max": 4.0, "cut": 0.25}
    for name, value in {**wanted, "ess": 7**2 / (9 + 1 + 1 + 4) / 4}.items():
        assert float(found.metrics[f"{NAME}/{name}"]) == pytest.approx(value, rel=1e-6), name
    assert float(found.metrics["sampling/sampling_logp_difference/max"]) == pytest.approx(math.log(4))
    assert float(found.metrics["sampling/sampling_logp_difference/mean"]) == pytest.approx(math.log(8) / 4)


def test_equal_policies_weigh_one_each() -> None:
    now_P, _ = logps(dtype=torch.float32)
    for level in ("token", "sequence"):
        found = importance_weights(now_P, now_P, LENGTHS, level=level)
        assert found.weights_P.dtype == torch.float32
        assert found.weights_P.tolist() == [1.0] * len(now_P)
        assert float(found.metrics[f"{NAME}/ess"]) == 1


def test_unknown_log_probs_are_taken_as_equal_and_not_reported_as_such() -> None:
    now_P, then_P = logps()
    then_P[1] = math.nan
    found = importance_weights(now_P, then_P, LENGTHS, cap=None)
    assert found.weights_P[1] == 1
    assert found.weights_P.isfinite().all()
    known = [i for i in range(len(now_P)) if i != 1]
    wanted = (now_P - then_P)[known].abs().mean()
    assert float(found.metrics["sampling/sampling_logp_difference/mean"]) == pytest.approx(float(wanted))


@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_a_ratio_past_float32_is_no_nan(mode: str) -> None:
    """A token that the sampling policy thought impossible: 200 nats, where exp leaves float32."""
    found = importance_weights(torch.zeros(2), torch.tensor([-200.0, 0.0]), [2], mode=mode, cap=3.0)
    assert found.weights_P.tolist() == [3.0 if mode == "truncate" else 0.0, 1.0]
    assert found.metrics[f"{NAME}/ess"].isfinite()


def test_all_masked_has_no_effective_samples() -> None:
    found = importance_weights(torch.ones(2), torch.zeros(2), [1, 1], mode="mask", cap=1.0)
    assert found.weights_P.tolist() == [0, 0]
    assert float(found.metrics[f"{NAME}/ess"]) == 0


def test_weights_are_constants_and_inputs_are_left_alone() -> None:
    now_P, then_P = logps()
    before = now_P.clone(), then_P.clone()
    now_P.requires_grad_()
    assert not importance_weights(now_P, then_P, LENGTHS).weights_P.requires_grad
    assert torch.equal(now_P, before[0])
    assert torch.equal(then_P, before[1])


def test_without_tokens_there_is_nothing_to_report() -> None:
    found = importance_weights(torch.zeros(0), torch.zeros(0), [])
    assert found.weights_P.shape == (0,)
    assert found.metrics == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "row"}, "level='row' is not one of token, sequence"),
        ({"mode": "clip"}, "mode='clip' is not one of truncate, mask"),
        ({"cap": 0.0}, "cap must be above 0"),
        ({"cap": math.nan}, "cap must be above 0"),
        ({"floor": 4.0}, "floor must lie between 0 and cap"),
        ({"floor": -1.0}, "floor must lie between 0 and cap"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        importance_weights(torch.zeros(2), torch.zeros(2), [2], **options)


def test_lengths_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match=r"each of the 3 tokens that lengths count, got \(2,\) now"):
        importance_weights(torch.zeros(2), torch.zeros(2), [2, 1])
    with pytest.raises(ValueError, match=r"got \(2,\) now and \(3,\) then"):
        importance_weights(torch.zeros(2), torch.zeros(3), [2])
