"""A token of each row of logits with its log-probs: ours by backend, and softmax with multinomial behind transformers' filters.

Floor: the logits are read once. Peers draw tokens alone, as `generate` does, or (`with log-probs`) also say how likely each
was under the whole distribution and under the one drawn from, as ours always does and as a trainer needs it. The error
is that of the whole distribution's log-prob; that the filters keep the same tokens is for tests/ops/test_sample_tokens.py.
Letters: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import device, measure, relative_error, sizes
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from alignfast.kernels import report, sample_tokens

OURS = [f"alignfast {name}" for name, state in report()["sample_tokens"].items() if state == "available"]
PROVIDERS = [*OURS, "multinomial", "multinomial with log-probs"]
SHAPES = sizes([(32, 32_000), (32, 128_256), (256, 32_000), (256, 128_256)], [(3, 101)], [(32, 32_000)])
TEMPERATURE = 0.8
FILTERS: dict[str, dict[str, Any]] = {
    "no filter": {},
    "top-p": {"top_p": 0.95},
    "top-k, top-p, min-p": {"top_k": 50, "top_p": 0.95, "min_p": 0.02},
}
Call = Callable[[Tensor], tuple[Tensor, Tensor | None]]


def multinomial(filters: dict[str, Any], with_logps: bool) -> Call:
    """Filters in the order in which `generate` has them, softmax, multinomial."""
    kinds = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    temperature = TemperatureLogitsWarper(TEMPERATURE)
    warpers = LogitsProcessorList(kinds[name](value) for name, value in filters.items())
    no_ids = torch.empty(0, dtype=torch.int64)

    def draw(logits_BV: Tensor) -> tuple[Tensor, Tensor | None]:
        x_BV = temperature(no_ids, logits_BV)  # type: ignore[arg-type]
        kept_BV = warpers(no_ids, x_BV)  # type: ignore[arg-type]
        tokens_B1 = torch.multinomial(kept_BV.softmax(-1), 1)
        if not with_logps:
            return tokens_B1[:, 0], None
        kept_BV.log_softmax(-1).gather(1, tokens_B1)
        return tokens_B1[:, 0], x_BV.log_softmax(-1).gather(1, tokens_B1)[:, 0]

    return draw


def provider(name: str, case: str) -> Call:
    """The same call for everyone: tokens, and their log-probs if there are any."""
    filters = FILTERS[case]
    if name.startswith("multinomial"):
        return multinomial(filters, with_logps=name != "multinomial")

    def ours(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
        sequence_B = torch.arange(len(logits_BV), device=logits_BV.device)
        tokens_B, logps_B, _ = sample_tokens(
            logits_BV, temperature=TEMPERATURE, seed=0, sequence_B=sequence_B, position_B=sequence_B,
            backend=name.split()[1], **filters,
        )  # fmt: skip
        return tokens_B, logps_B

    return ours


def inputs(B: int, V: int) -> Tensor:
    """Rows of the entropy of a language model's: 5 nats or so."""
    return (3 * torch.randn(B, V, generator=torch.Generator().manual_seed(0))).to(device())


def errors(call: Call) -> tuple[float | None, float]:
    """Error of the log-probs at the tokens drawn, and twice log_softmax's (plus 2 units in the last place)."""
    logits_BV = inputs(64, 4999)
    tokens_B, logps_B = call(logits_BV)
    if logps_B is None:
        return None, 0.0

    def plain(logits_BV: Tensor) -> Tensor:
        return (logits_BV / TEMPERATURE).log_softmax(-1).gather(1, tokens_B[:, None])[:, 0]

    gold_B, allowed_B = plain(logits_BV.double()), plain(logits_BV)
    allowed = 2 * relative_error(allowed_B, gold_B) + 2 * torch.finfo(torch.float32).eps
    return relative_error(logps_B, gold_B), allowed


@pytest.mark.parametrize(("B", "V"), SHAPES)
@pytest.mark.parametrize("case", FILTERS)
@pytest.mark.parametrize("name", PROVIDERS)
def bench_sample_tokens(benchmark, name: str, case: str, B: int, V: int) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = f"sample_tokens, {case}"
    call, logits_BV = provider(name, case), inputs(B, V)
    error, allowed = errors(call)
    measure(
        benchmark, lambda: call(logits_BV), provider=name, shape=f"{B} x {V}", error=error, allowed_error=allowed,
        read_bytes=logits_BV.nbytes, flops=4 * logits_BV.numel(), rounds=20 if "native" in name else 5,
    )  # fmt: skip
