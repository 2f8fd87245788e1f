"""Counter-based random numbers: Philox 4x32-10.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A number depends on its key
and counter alone, so there is no state to carry, split or save.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10

Words = npt.NDArray[np.uint64]


def philox4x32(counter_4N: Words, key_2N: Words) -> Words:
    """Return four random 32-bit words for each of N counters and keys, all held as uint64 below 2^32."""
    a_N, b_N, c_N, d_N = counter_4N
    first_N, second_N = key_2N
    for _ in range(_ROUNDS):
        left_N = a_N * _MULTIPLIERS[0]
        right_N = c_N * _MULTIPLIERS[1]
        a_N, b_N = (right_N >> _HALF) ^ b_N ^ first_N, right_N & _LOW
        c_N, d_N = (left_N >> _HALF) ^ d_N ^ second_N, left_N & _LOW
        first_N = (first_N + _KEY_STEPS[0]) & _LOW
        second_N = (second_N + _KEY_STEPS[1]) & _LOW
    return np.stack([a_N, b_N, c_N, d_N])


def uniforms(keys_N: Words, positions_N: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return one number in [0, 1) per 64-bit key and position, a multiple of 2^-53."""
    position_N = positions_N.astype(np.uint64)
    zero_N = np.zeros_like(position_N)
    counter_4N = np.stack([position_N & _LOW, position_N >> _HALF, zero_N, zero_N])
    words_4N = philox4x32(counter_4N, np.stack([keys_N & _LOW, keys_N >> _HALF]))
    bits_N = ((words_4N[0] << _HALF) | words_4N[1]) >> np.uint64(11)
    result: npt.NDArray[np.float64] = bits_N.astype(np.float64) * 2.0**-53
    return result
