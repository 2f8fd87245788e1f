"""Sampling: greedy, or min_p, top_k, top_p and the draw, for rows of any mix of parameters.

Every row is sorted, whether it has filters or not: which ones have is known on the device alone. Semantics and their
reasons (integer weights, filters as thresholds on scaled logits, inverse CDF in order of ids) are those of
batchinfer.runner.sample_tokens, tokens included.

Letters: see batchinfer_kernels.steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from batchinfer_kernels.eager.philox import uniforms
from batchinfer_kernels.steps import NOT_FINITE, SAMPLED, SampledRows, SampleRows, SeatState

SCALE_BITS = 40  # with up to 2^22 tokens, a row's sum stays below 2^63
_SCALE = float(1 << SCALE_BITS)
_MOST_ELEMENTS = 1 << 24  # of temporaries at once


def sample_rows(logits_NV: Tensor, rows: SampleRows, state: SeatState, out: SampledRows) -> None:
    """Sample one token per row with its seat's parameters, and store it as its target's last token."""
    for part in row_slices(logits_NV):
        tokens_N, finite_N = _sampled(logits_NV[part], rows.seats_N[part].long(), rows.positions_N[part].long(), state)
        out.tokens_N[part] = torch.where(finite_N, tokens_N, 0).to(out.tokens_N.dtype)
        out.status_N[part] = torch.where(finite_N, SAMPLED, NOT_FINITE).to(out.status_N.dtype)
    # rows without a target all write 0 to the dummy seat
    targets_N, dummy = rows.targets_N.long(), len(state.last_tokens_P) - 1
    state.last_tokens_P[torch.where(targets_N < 0, dummy, targets_N)] = torch.where(targets_N < 0, 0, out.tokens_N)


def row_slices(logits_NV: Tensor) -> Iterator[slice]:
    """Yield slices of rows whose temporaries fit in memory."""
    size = max(1, _MOST_ELEMENTS // logits_NV.shape[1])
    for start in range(0, len(logits_NV), size):
        yield slice(start, start + size)


def weights_of(scaled: Tensor) -> Tensor:
    """Return int64 weights: probability relative to the most probable token, times 2^40. Overwrites `scaled`."""
    return scaled.exp_().mul_(_SCALE).to(torch.int64)


def _sampled(logits_NV: Tensor, seats_N: Tensor, positions_N: Tensor, state: SeatState) -> tuple[Tensor, Tensor]:
    """Return a token for each row, and for which rows it counts: those whose largest logit is finite."""
    greedy_N1 = logits_NV.argmax(1, keepdim=True)  # the lowest of equals; a NaN is the largest
    largest_N1 = logits_NV.gather(1, greedy_N1)
    temperature_N1 = state.temperature_P[seats_N, None]
    is_greedy_N1 = temperature_N1 == 0
    scaled_NV = (logits_NV - largest_N1).div_(torch.where(is_greedy_N1, 1, temperature_N1))
    threshold_N1 = _threshold(scaled_NV, seats_N, state)
    weights_NV = weights_of(scaled_NV.clone()).masked_fill_(scaled_NV < threshold_N1, 0)
    sums_NV = weights_NV.cumsum(1)
    uniform_N1 = uniforms(state.keys_P[seats_N], positions_N)[:, None]
    # in [0, total): a uniform number is at most 1 - 2^-53, so the product rounds below the total
    target_N1 = (uniform_N1 * sums_NV[:, -1:].double()).long()
    drawn_N1 = torch.searchsorted(sums_NV, target_N1, right=True)
    return torch.where(is_greedy_N1, greedy_N1, drawn_N1)[:, 0], largest_N1[:, 0].isfinite()


def _threshold(scaled_NV: Tensor, seats_N: Tensor, state: SeatState) -> Tensor:
    """Return the lowest scaled logit that min_p, top_k and top_p keep, [N, 1]."""
    vocab = scaled_NV.shape[1]
    top_k_N1, top_p_N1 = state.top_k_P[seats_N, None].long(), state.top_p_P[seats_N, None]
    sorted_NV = scaled_NV.sort(dim=1, descending=True).values
    kth_N1 = sorted_NV.gather(1, (top_k_N1 - 1).clamp(0, vocab - 1))
    limited_N1 = (top_k_N1 > 0) & (top_k_N1 < vocab)
    limit_N1 = torch.maximum(torch.where(limited_N1, kth_N1, -math.inf), state.log_min_p_P[seats_N, None])
    weights_NV = weights_of(sorted_NV.clone()).masked_fill_(sorted_NV < limit_N1, 0)
    sums_NV = weights_NV.cumsum(1)
    # a token stays if all more probable ones together have less than top_p of what min_p and top_k left
    above_NV = (sums_NV - weights_NV).double()
    kept_NV = (above_NV < top_p_N1 * sums_NV[:, -1:].double()) & (sorted_NV >= limit_N1)
    lowest_N1 = sorted_NV.masked_fill(~kept_NV, math.inf).amin(1, keepdim=True)
    return torch.where(top_p_N1 < 1, lowest_N1, limit_N1)
