"""`alignfast.compat.liger` against Liger itself: losses, gradients and what comes with them.

Liger's cross-entropy is a Triton kernel, which runs in the interpreter here; a softcap and class weights do not (arguments
that it casts are plain numbers there), so those are compared with PyTorch.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from alignfast.compat import liger as ours

pytest.importorskip("liger_kernel", reason="Liger is not installed")
from liger_kernel.chunked_loss import (
    LigerFusedLinearDPOLoss,
    LigerFusedLinearGRPOLoss,
)
from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

B, L, D, V = 6, 5, 8, 37  # 37: no multiple of a block
GENERATOR = torch.Generator().manual_seed(0)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


INPUT, WEIGHT, BIAS = drawn(B, L, D), drawn(V, D), drawn(V)
REF = {"ref_input": INPUT + 0.2 * drawn(B, L, D), "ref_weight": WEIGHT, "ref_bias": BIAS}
TARGET = torch.randint(V, (B, L), generator=GENERATOR)
TARGET[0, 3:] = TARGET[4, 1:] = -100
MASK = (TARGET != -100).long()
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0, -0.3])
OLD = -3 + 0.3 * drawn(B, L)


def leaves() -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = (x.clone().requires_grad_() for x in (INPUT, WEIGHT, BIAS))
    return hidden, weight, bias


def same(a: Any, b: Any) -> None:
    """Two outputs alike; an absent one is None in both. What cancels in float32 keeps a share of the largest entry: Liger
    is in float32 whatever it is given."""
    if isinstance(a, Tensor):
        size = float(b.detach().abs().max())
        torch.testing.assert_close(a.detach(), b.detach().view(a.shape), rtol=0, atol=5e-6 * max(size, 1e-3))
    elif a is not None:
        for x, y in zip(a, b, strict=True):
            same(x, y)
    else:
        assert b is None


DPO_OPTIONS: list[dict[str, Any]] = [
    *({"loss_type": name} for name in ("sigmoid", "hinge", "nca_pair", "bco_pair", "sppo_hard", "apo_zero")),
    {"loss_type": "apo_down", "beta": 0.4},
    {"loss_type": "discopop", "discopop_tau": 0.1},
    {"loss_type": "exo_pair", "label_smoothing": 0.1},
    {"loss_type": "robust", "label_smoothing": 0.1},
    {"label_smoothing": 0.3},  # which sigmoid does not read
    {"use_ref_model": False},
    {"average_log_prob": True, "beta": 1.0},
    {"compute_nll_loss": True, "alpha": 0.7},
    {"chunk_size": 2},
]


@pytest.mark.parametrize("options", DPO_OPTIONS, ids=str)
def test_dpo(options: dict[str, Any]) -> None:
    found = []
    for module in (LigerFusedLinearDPOLoss, ours.LigerFusedLinearDPOLoss):
        hidden, weight, bias = leaves()
        arguments = REF if options.get("use_ref_model", True) else {}
        loss, others = module(**{"compiled": False} | options)(weight, hidden, TARGET, bias, **arguments)
        (3 * loss).backward()
        found.append((loss, others, hidden.grad, weight.grad, bias.grad))
    same(found[1], found[0])


GRPO_OPTIONS: list[dict[str, Any]] = [
    *({"loss_type": name} for name in ("grpo", "bnpo", "dapo", "sapo")),
    {"loss_type": "dr_grpo", "max_completion_length": 9},
    {"loss_type": "cispo", "epsilon_high": 1.1},
    {"importance_sampling_level": "sequence"},
    {"importance_sampling_level": "sequence", "use_bias_correction_kl": True, "loss_type": "grpo"},
    {"use_bias_correction_kl": True},
    {"delta": 1.5},
    {"temperature": 0.7},
    {"beta": 0.0, "use_ref_model": False},
    {"use_ref_model": False},
    {"epsilon_low": 0.1, "epsilon_high": 0.4, "chunk_size": 3},
]
GIVEN: list[dict[str, Any]] = [
    {"old_per_token_logps": OLD},
    {"vllm_is_ratio": torch.rand(B, generator=GENERATOR)},
    {
        "vllm_is_ratio": torch.rand(B, L, generator=GENERATOR),
        "old_per_token_logps": OLD,
        "num_items_in_batch": 40,
    },
    {"ref_per_token_logps": OLD - 0.5},
]


@pytest.mark.parametrize(("options", "given"), [
    *((options, {"old_per_token_logps": OLD}) for options in GRPO_OPTIONS),
    *(({}, given) for given in GIVEN),
], ids=str)  # fmt: skip
def test_grpo(options: dict[str, Any], given: dict[str, Any]) -> None:
    reference = {} if "ref_per_token_logps" in given or not options.get("use_ref_model", True) else REF
    # No row without a token: Liger divides by the mean ratio of one
    arguments = (TARGET.clamp(0), MASK.float(), ADVANTAGES)
    found = []
    for module in (LigerFusedLinearGRPOLoss, ours.LigerFusedLinearGRPOLoss):
        hidden, weight, bias = leaves()
        loss, metrics = module(**{"compiled": False} | options)(
            hidden, weight, *arguments, bias=bias, **reference, **given
        )
        (3 * loss).backward()
        found.append((loss, metrics, hidden.grad, weight.grad, bias.grad))
    same(found[1], found[0])


CE_OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"lse_square_scale": 1e-2, "return_z_loss": True},
    {"return_token_accuracy": True},
    {"use_token_scaling": True},
    {"ignore_index": 3},
    {"accum_dtype": torch.float32},
]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", CE_OPTIONS, ids=[", ".join(options) or "plain" for options in CE_OPTIONS])
def test_cross_entropy(options: dict[str, Any], reduction: str) -> None:
    target = TARGET.flatten()
    if options.get("ignore_index") == 3:
        target = target.masked_fill(target == -100, 3)
    found = []
    for module in (LigerFusedLinearCrossEntropyLoss, ours.LigerFusedLinearCrossEntropyLoss):
        hidden, weight, bias = leaves()
        out = module(reduction=reduction, **options)(weight, hidden.flatten(0, 1), target, bias)
        loss = out if isinstance(out, Tensor) else out.loss
        (loss * torch.linspace(1, 2, loss.numel()).view(loss.shape)).sum().backward()
        fields = () if isinstance(out, Tensor) else (out.z_loss, out.token_accuracy, out.predicted_tokens)
        found.append((loss, fields, hidden.grad, weight.grad, bias.grad))
    same(found[1], found[0])


@pytest.mark.parametrize(
    "options", [{"softcap": 2.0}, {"ce_weight": BIAS.abs()}], ids=["softcap", "class weights"]
)
def test_what_the_interpreter_can_not_run(options: dict[str, Any]) -> None:
    target = TARGET.flatten()
    hidden, weight, bias = leaves()
    loss = ours.liger_fused_linear_cross_entropy(hidden.flatten(0, 1), weight, target, bias, **options)
    loss.backward()
    again = leaves()
    logits = again[0].flatten(0, 1) @ again[1].T + again[2]
    if "softcap" in options:
        logits = 2.0 * torch.tanh(logits / 2.0)
    expected = torch.nn.functional.cross_entropy(logits, target, weight=options.get("ce_weight"))
    expected.backward()
    same([loss, hidden.grad, weight.grad, bias.grad], [expected, *(x.grad for x in again)])


def test_defaults_are_ligers() -> None:
    """Of each class and, as far as it has a signature in Python, each functional form."""
    import inspect

    from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def defaults(f: Any, skipped: int) -> dict[str, Any]:
        return {name: p.default for name, p in [*inspect.signature(f).parameters.items()][skipped:]}

    for name, theirs in (
        ("DPO", LigerFusedLinearDPOLoss),
        ("GRPO", LigerFusedLinearGRPOLoss),
        ("CrossEntropy", LigerFusedLinearCrossEntropyLoss),
    ):
        mine = getattr(ours, f"LigerFusedLinear{name}Loss")
        assert defaults(mine, 0) == defaults(theirs, 0)
        assert defaults(mine.forward, 0) == defaults(theirs.forward, 0)
    assert defaults(ours.liger_fused_linear_dpo, 0) == defaults(LigerFusedLinearDPOFunction.forward, 1)
    assert defaults(ours.liger_fused_linear_grpo, 0) == defaults(LigerFusedLinearGRPOFunction.forward, 1)
    assert defaults(ours.liger_fused_linear_cross_entropy, 0) == defaults(liger_fused_linear_cross_entropy, 0)


def test_what_is_not_done_is_refused() -> None:
    for name in ("luspo", "vespo"):
        with pytest.raises(ValueError, match=name):
            ours.LigerFusedLinearGRPOLoss(loss_type=name)
    with pytest.raises(ValueError, match="ipo"):
        ours.LigerFusedLinearDPOLoss(loss_type="ipo")
    with pytest.raises(ValueError, match="use_ref_model"):
        ours.LigerFusedLinearDPOLoss()(WEIGHT, INPUT, TARGET)
    with pytest.raises(ValueError, match="use_ref_model"):
        ours.LigerFusedLinearGRPOLoss()(INPUT, WEIGHT, TARGET.clamp(0), MASK, ADVANTAGES)
    rows = (WEIGHT, INPUT.flatten(0, 1), TARGET.flatten())
    with pytest.raises(ValueError, match="return_predicted_tokens"):
        ours.LigerFusedLinearCrossEntropyLoss(return_predicted_tokens=True)(*rows)
    with pytest.raises(ValueError, match="accum_dtype"):
        ours.LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float64)(*rows)
