"""`alignfast.compat.verl` and `.openrlhf` against numbers recorded from their functions; the sources stand in the files.

recorded/verl.json and recorded/openrlhf.json hold inputs and outputs of their code, run on a CPU outside this repository.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignfast.compat import openrlhf, verl

RECORDED = Path(__file__).parent / "recorded"
VERL = json.loads((RECORDED / "verl.json").read_text())
OPENRLHF = json.loads((RECORDED / "openrlhf.json").read_text())


def tensor(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


class Config(dict):
    """What verl's ActorConfig offers of itself: fields, and `get`."""

    __getattr__ = dict.__getitem__


def test_sources_are_named() -> None:
    assert "verl 0.8.0.dev" in VERL["source"]
    assert "b178a3cd56f58b2d502255daba591e92833930a7" in VERL["source"]
    assert "OpenRLHF 0.11.0" in OPENRLHF["source"]


@pytest.mark.parametrize("case", VERL["gae"])
def test_gae(case: dict[str, Any]) -> None:
    mask = tensor(case["mask"])
    advantages, returns = verl.compute_gae_advantage_return(
        tensor(case["rewards"]), tensor(case["values"]), mask, case["gamma"], case["lam"]
    )
    torch.testing.assert_close(advantages, tensor(case["advantages"]) * mask)
    torch.testing.assert_close(returns, tensor(case["returns"]) * mask)
    assert (tensor(case["returns"])[mask == 0] != 0).any()  # the difference: theirs goes on there


def test_gae_refuses_what_it_can_not_whiten() -> None:
    with pytest.raises(ValueError, match="two tokens"):
        verl.compute_gae_advantage_return(
            torch.ones(1, 2), torch.ones(1, 2), torch.tensor([[1, 0]]), 1.0, 1.0
        )


@pytest.mark.parametrize("case", VERL["kl_penalty"], ids=lambda case: case["kind"])
def test_kl_penalty(case: dict[str, Any]) -> None:
    """Also past verl's clamps: one difference is of 5 nats, one of -25."""
    logprob = tensor(case["logprob"]).requires_grad_()
    value = verl.kl_penalty(logprob, tensor(case["ref_logprob"]), case["kind"])
    value.sum().backward()
    torch.testing.assert_close(value.detach(), tensor(case["value"]))
    torch.testing.assert_close(logprob.grad, tensor(case["gradient"]))


@pytest.mark.parametrize("kind", ["k1+", "k3+", "low_var_kl+"])
def test_straight_through_estimates(kind: str) -> None:
    logprob, reference = tensor([-1.0, -2.0]).requires_grad_(), tensor([-1.5, -1.0])
    value = verl.kl_penalty(logprob, reference, kind)
    value.sum().backward()
    torch.testing.assert_close(value, verl.kl_penalty(logprob, reference, kind[:-1]))
    torch.testing.assert_close(logprob.grad, (logprob - reference).detach())


@pytest.mark.parametrize("case", VERL["agg_loss"], ids=lambda case: case["mode"])
def test_agg_loss(case: dict[str, Any]) -> None:
    value = verl.agg_loss(tensor(case["loss"]), tensor(case["mask"]), case["mode"], **case["options"])
    # seq-mean-token-mean: theirs adds 1e-8 to each count of tokens
    torch.testing.assert_close(value, tensor(case["value"]), rtol=2e-8, atol=1e-12)


def test_nothing_that_is_masked_has_a_say() -> None:
    loss = torch.tensor([[1.0, float("nan")]])
    assert verl.agg_loss(loss, torch.tensor([[1, 0]]), "seq-mean-token-sum").item() == 1


@pytest.mark.parametrize("case", VERL["compute_policy_loss_vanilla"])
def test_policy_loss(case: dict[str, Any]) -> None:
    log_prob = tensor(case["log_prob"]).requires_grad_()
    config = Config({"global_batch_info": {}}, **case["config"])
    weights = None if case["weights"] is None else tensor(case["weights"])
    loss, metrics = verl.compute_policy_loss_vanilla(
        tensor(case["old_log_prob"]), log_prob, tensor(case["advantages"]), tensor(case["mask"]), case["mode"],
        config, weights,
    )  # fmt: skip
    loss.backward()
    torch.testing.assert_close(loss.detach(), tensor(case["value"]), rtol=2e-8, atol=1e-12)
    torch.testing.assert_close(log_prob.grad, tensor(case["gradient"]), rtol=2e-8, atol=1e-12)
    assert metrics == pytest.approx(case["metrics"], rel=1e-7)
    assert metrics["actor/pg_clipfrac"] > 0


@pytest.mark.parametrize("case", VERL["linear_cross_entropy"]["cases"])
def test_linear_cross_entropy(case: dict[str, Any]) -> None:
    hidden, weight = (tensor(case[name]).requires_grad_() for name in ("hidden", "weight"))
    labels = torch.tensor(case["labels"])
    logps, entropy = verl.linear_cross_entropy(hidden, weight, labels, case["temperature"], case["reduction"])
    (logps.sum() + 0.5 * entropy.sum()).backward()
    for ours, name in (
        (logps.detach(), "logprobs"),
        (entropy.detach(), "entropy"),
        (hidden.grad, "hidden_gradient"),
        (weight.grad, "weight_gradient"),
    ):
        torch.testing.assert_close(ours, tensor(case[name]))


def test_what_is_not_done_is_refused() -> None:
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="kl_penalty='full'"):
        verl.kl_penalty(x, x, "full")
    with pytest.raises(ValueError, match="loss_agg_mode"):
        verl.agg_loss(x, x, "mean")
    with pytest.raises(ValueError, match="config"):
        verl.compute_policy_loss_vanilla(x, x, x, x)
    with pytest.raises(ValueError, match="dist_process_group"):
        verl.linear_cross_entropy(x, x, x[0].long(), dist_process_group=object())
    with pytest.raises(ValueError, match="reduction"):
        verl.linear_cross_entropy(x, x, x[0, :1].long(), reduction="max")


@pytest.mark.parametrize("case", OPENRLHF["get_advantages_and_returns"])
def test_openrlhf_advantages(case: dict[str, Any]) -> None:
    mask = None if case["mask"] is None else tensor(case["mask"])
    advantages, returns = openrlhf.get_advantages_and_returns(
        tensor(case["values"]), tensor(case["rewards"]), mask, case["gamma"], case["lambd"]
    )
    counts = torch.ones_like(advantages) if mask is None else mask
    torch.testing.assert_close(advantages, tensor(case["advantages"]) * counts)
    torch.testing.assert_close(returns, tensor(case["returns"]) * counts)
