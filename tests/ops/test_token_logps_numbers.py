"""token_logps: what must hold between its results, and at the edges of the numbers.

Letters: T rows, V vocabulary, K the six statistics.
"""

from __future__ import annotations

import math

import pytest
import torch
from ops import conformance as c
from ops.rows import (
    DTYPES,
    conform,
    inputs,
    on_every_backend,
    options_of,
)

from alignfast.kernels import _targets, token_logps
from alignfast.kernels.token_logps import IS_TOP1, row_stats

# --- relations ---


@on_every_backend
def test_is_top1(backend: str, device: str) -> None:
    """Ties count as top; so does the only entry that is not -inf."""
    logits_TV = torch.tensor([[1.0, 5, 5, 0], [1, 5, 6, 0], [-1, -math.inf, -math.inf, -1e4], [0, 0, 0, 0]])
    targets_T = torch.tensor([2, 1, 0, -100])
    stats_KT = row_stats(logits_TV.to(device), targets_T.to(device), options_of(), backend)
    assert stats_KT[IS_TOP1].tolist() == [1, 0, 1, 0]


@on_every_backend
def test_shift(backend: str, device: str) -> None:
    """Adding a constant to a row costs no digit of its log-prob and gradient, as it costs log_softmax none.

    64 and quarters: the sum is exact in float32.
    """
    logits_TV, targets_T = inputs(33, 83)
    logits_TV = (logits_TV * 4).round() / 4 + 64
    conform(backend, device, logits_TV, targets_T, options_of(), seen_TV=logits_TV[:9], logps_alone=True)


@on_every_backend
def test_temperature_divides(backend: str, device: str) -> None:
    """A power of two divides exactly, so the two ways agree bit for bit."""
    logits_TV, targets_T = (x.to(device) for x in inputs(4, 83))
    cooled = token_logps(logits_TV, targets_T, temperature=0.5, entropy=True, backend=backend)
    divided = token_logps(logits_TV / 0.5, targets_T, entropy=True, backend=backend)
    assert torch.equal(torch.stack(cooled), torch.stack(divided))


@on_every_backend
def test_rows_do_not_meet(backend: str, device: str) -> None:
    """Rows may come in any order, and an ignored row's content, NaN too, is never looked at."""
    logits_TV, targets_T = (x.to(device) for x in inputs(9, 83, ignored=0.4))
    order_T = torch.randperm(9, generator=torch.Generator().manual_seed(3)).to(device)
    logits_TV[targets_T == -100] = math.nan
    leaf_TV, shuffled_TV = logits_TV.requires_grad_(), logits_TV.detach()[order_T].requires_grad_()
    stats_KT = row_stats(leaf_TV, targets_T, options_of(), backend)
    shuffled_KT = row_stats(shuffled_TV, targets_T[order_T], options_of(), backend)
    assert torch.equal(stats_KT[:, order_T], shuffled_KT)
    assert not stats_KT[:, targets_T == -100].any()
    (gradient_TV,) = torch.autograd.grad(stats_KT.sum(), leaf_TV)
    (shuffled_gradient_TV,) = torch.autograd.grad(shuffled_KT.sum(), shuffled_TV)
    assert torch.equal(gradient_TV[order_T], shuffled_gradient_TV)
    assert not gradient_TV[targets_T == -100].any()


# --- the edges of the numbers ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_backend
def test_large_logits(backend: str, device: str, dtype: torch.dtype) -> None:
    """Up to +-1e4, where exp of anything but a difference overflows."""
    logits_TV, targets_T = inputs(6, 83, dtype, ignored=0)
    logits_TV[0], logits_TV[1] = 1e4, -1e4
    logits_TV[2, 5], logits_TV[3, 6] = 1e4, -1e4
    logits_TV[4] *= 3000
    logits_TV[5, :2], logits_TV[5, 2:] = 1e4, 0
    targets_T[2:] = torch.tensor([5, 6, 7, 8])
    conform(backend, device, logits_TV, targets_T, options_of())
    conform(backend, device, logits_TV, targets_T, options_of(), logps_alone=True)


@on_every_backend
def test_a_sure_token_keeps_its_digits(backend: str, device: str) -> None:
    """At a margin of 30 nats x - lse rounds to 0 in float32. The log-prob is -36 e^-30, its gradient 36 e^-30."""
    logits_TV = torch.zeros(1, 37)
    logits_TV[0, 4] = 30.0
    leaf_TV = logits_TV.to(device).requires_grad_()
    logps_T = token_logps(leaf_TV, torch.tensor([4], device=device), backend=backend)
    (gradient_TV,) = torch.autograd.grad(logps_T.sum(), leaf_TV)
    assert logps_T.item() == pytest.approx(-36 * math.exp(-30), rel=1e-6)
    assert gradient_TV[0, 4].item() == pytest.approx(36 * math.exp(-30), rel=1e-6)


@on_every_backend
def test_forbidden_words(backend: str, device: str) -> None:
    """Entries of -inf have no probability: they add nothing, and as a target they give -inf."""
    logits_TV, targets_T = inputs(4, 83, ignored=0)
    logits_TV[:, ::3] = -math.inf
    targets_T[:] = torch.tensor([1, 2, 4, 5])
    logits_TV[3] = -math.inf
    logits_TV[3, 5] = 1.0  # the only word left
    leaf_TV = logits_TV.to(device).requires_grad_()
    logps_T, entropy_T = token_logps(leaf_TV, targets_T.to(device), entropy=True, backend=backend)
    gold_TV = logits_TV.double().requires_grad_()
    gold = token_logps(gold_TV, targets_T, entropy=True, backend="torch")
    for name, mine, expected in zip(("logps", "entropy"), (logps_T, entropy_T), gold):
        c.hold(name, mine, expected.float(), expected)
    (gradient_TV,) = torch.autograd.grad((logps_T + entropy_T).sum(), leaf_TV)
    (gold_gradient_TV,) = torch.autograd.grad((gold[0] + gold[1]).sum(), gold_TV)
    c.hold("gradient", gradient_TV, gold_gradient_TV.float(), gold_gradient_TV)
    assert (logps_T[3], entropy_T[3]) == (0, 0)
    assert not gradient_TV[:, ::3].any()
    impossible = token_logps(logits_TV.to(device), torch.zeros_like(targets_T).to(device), backend=backend)
    assert impossible.tolist() == [-math.inf] * 4


@on_every_backend
def test_nan_stays_in_its_row(backend: str, device: str) -> None:
    logits_TV, targets_T = inputs(4, 300, ignored=0)
    logits_TV[2, 270] = math.nan
    leaf_TV = logits_TV.to(device).requires_grad_()
    logps_T, entropy_T = token_logps(leaf_TV, targets_T.to(device), entropy=True, backend=backend)
    (gradient_TV,) = torch.autograd.grad((logps_T + entropy_T).sum(), leaf_TV)
    bad_T = torch.tensor([False, False, True, False])
    for tensor in (logps_T, entropy_T, gradient_TV.sum(1)):
        assert torch.equal(tensor.isnan().cpu(), bad_T)
    assert gradient_TV[2].isnan().all()


@pytest.mark.parametrize("target", [-1, 37, -101, 2**40])
@on_every_backend
def test_target_outside_the_vocabulary(backend: str, device: str, target: int) -> None:
    """Refused on a CPU; on a GPU the row is NaN and a flag tells, once."""
    logits_TV, targets_T = inputs(3, 37, ignored=0)
    targets_T[1] = target
    if device == "cpu":
        with pytest.raises(ValueError, match=rf"\[0, 37\).*got {target} at row 1"):
            token_logps(logits_TV, targets_T, backend=backend)
        return
    _targets.bad_targets_seen(torch.device(device))
    logps_T = token_logps(logits_TV.to(device), targets_T.to(device), backend=backend)
    assert logps_T.isnan().tolist() == [False, True, False]
    assert _targets.bad_targets_seen(logps_T.device)
    assert not _targets.bad_targets_seen(logps_T.device)


def test_the_flag_is_found_without_a_devices_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate calls it `cuda`, every tensor `cuda:1`."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(_targets, "_FLAGS", {torch.device("cuda:1"): torch.tensor(True)})
    assert not _targets.bad_targets_seen(torch.device("cuda:0"))
    assert _targets.bad_targets_seen(torch.device("cuda"))
    assert not _targets.bad_targets_seen(torch.device("cuda"))


def test_another_ignore_index() -> None:
    """A class of the vocabulary may be the one to ignore, as pad tokens are."""
    logits_TV, targets_T = inputs(6, 37, ignored=0)
    targets_T[:2] = 7
    plain = token_logps(logits_TV, targets_T, backend="torch")
    assert torch.equal(token_logps(logits_TV, targets_T, ignore_index=7, backend="torch")[2:], plain[2:])
    assert not token_logps(logits_TV, targets_T, ignore_index=7, backend="torch")[:2].any()
