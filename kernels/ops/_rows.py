"""How the definitions read rows of logits.

Letters: T rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def from_the_top(x_TV: Tensor) -> tuple[Tensor, Tensor]:
    """Differences to each row's largest entry, and that entry: an lse of 25 is stored to 1e-6, its excess to 1e-8."""
    limit = torch.finfo(x_TV.dtype).max  # an infinite top would make NaN of every difference
    top_T1 = x_TV.detach().amax(1, keepdim=True).clamp(-limit, limit)
    return x_TV - top_T1, top_T1


def transform(
    logits_TV: Tensor, scale: float, softcap: float, temperature: float
) -> tuple[Tensor, Tensor | float]:
    """x = softcap * tanh(scale * z / softcap) / temperature, or scale * z / temperature for a softcap of 0; and dx/dz."""
    z_TV = logits_TV.double() if logits_TV.dtype == torch.float64 else logits_TV.float()
    if not softcap:
        factor = scale / temperature
        return z_TV * factor, factor
    tanh_TV = (z_TV * (scale / softcap)).tanh()
    slope_TV = (1 - tanh_TV.square()) * (scale / temperature)
    return tanh_TV * (softcap / temperature), slope_TV
