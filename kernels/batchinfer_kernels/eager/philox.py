"""Counter-based random numbers, Philox 4x32-10, in int64 arithmetic: products wrap, and shifts are masked.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The numbers are those of
batchinfer.runner.philox.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFF_FFFF
_ROUNDS = 10


def uniforms(keys_N: Tensor, positions_N: Tensor) -> Tensor:
    """Return float64 numbers in [0, 1), multiples of 2^-53, of int64 keys (their bits count) and positions."""
    first_N, second_N = keys_N & _LOW, (keys_N >> 32) & _LOW
    a_N, b_N = positions_N & _LOW, (positions_N >> 32) & _LOW
    c_N = d_N = torch.zeros_like(a_N)
    for _ in range(_ROUNDS):
        left_N, right_N = a_N * _MULTIPLIERS[0], c_N * _MULTIPLIERS[1]
        a_N, b_N = ((right_N >> 32) & _LOW) ^ b_N ^ first_N, right_N & _LOW
        c_N, d_N = ((left_N >> 32) & _LOW) ^ d_N ^ second_N, left_N & _LOW
        first_N, second_N = (first_N + _KEY_STEPS[0]) & _LOW, (second_N + _KEY_STEPS[1]) & _LOW
    return ((a_N << 21) | (b_N >> 11)).double() * 2.0**-53
