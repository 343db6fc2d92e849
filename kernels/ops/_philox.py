"""Random numbers that are a function of a counter: Philox 4x32-10 (Salmon et al., SC 2011), in PyTorch.

What is drawn for a counter depends on the key and the counter alone, not on what was drawn before, where or by how
many threads. csrc/sample_tokens.h has the same function for compiled code; Triton has its own. 32-bit words are kept in int64,
whose products wrap around.

Letters: B counters.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(key: tuple[int, int], counter: Words) -> Words:
    """Four random words for each counter of four words.

    >>> zero_1 = torch.zeros(1, dtype=torch.int64)
    >>> [f"{int(word_1):08x}" for word_1 in philox((0, 0), (zero_1, zero_1, zero_1, zero_1))]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    a_B, b_B, c_B, d_B = counter
    low, high = key
    for _ in range(_ROUNDS):
        first_B, second_B = a_B * _MULTIPLIERS[0], c_B * _MULTIPLIERS[1]
        a_B, b_B, c_B, d_B = (
            (second_B >> 32 & _WORD) ^ b_B ^ low,
            second_B & _WORD,
            (first_B >> 32 & _WORD) ^ d_B ^ high,
            first_B & _WORD,
        )
        low, high = low + _KEY_STEPS[0] & _WORD, high + _KEY_STEPS[1] & _WORD
    return a_B, b_B, c_B, d_B


def uniform(seed: int, sequence_B: Tensor, position_B: Tensor) -> Tensor:
    """A number in [0, 1) for each (sequence, position), float64 with 53 random bits.

    Args:
        seed: the key, 64 bits.
        sequence_B: int64, the upper half of the counter.
        position_B: int64, the lower half.
    """
    counter = (
        position_B & _WORD,
        position_B >> 32 & _WORD,
        sequence_B & _WORD,
        sequence_B >> 32 & _WORD,
    )
    high_B, low_B, _, _ = philox((seed & _WORD, seed >> 32 & _WORD), counter)
    return (high_B << 21 | low_B >> 11).to(torch.float64) * 2.0**-53
