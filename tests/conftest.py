"""What all tests share: Triton's interpreter where there is no GPU, and the same Hypothesis cases every time."""

from __future__ import annotations

import os

import torch
from hypothesis import Phase, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by triton when it is first imported

settings.register_profile(
    "alignfast",
    max_examples=300,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[
        Phase.explicit,
        Phase.generate,
    ],  # shrinking a case that fails by rounding took minutes, for nothing
)
settings.load_profile("alignfast")
