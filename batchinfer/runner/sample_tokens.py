"""Choosing tokens from logits: the filters (min_p, top_k, top_p), the draw, and exact sums of probabilities.

Batch invariance: a row of logits gives the same token in every batch, so nothing here may depend on the order of a sum
or on how ties are sorted:

- A token's probability is a whole number: `exp((logit - max) / temperature)` in units of 2^-40. Sums of integers are
  exact in any order, on any number of threads.
- A filter is a threshold on the scaled logit. Tokens that tie with the last token kept are kept as well. top_p keeps a
  token if all more probable tokens together have less than p, of the tokens that min_p and top_k left, as in vLLM.
- The token is found by inverse CDF over token ids in ascending order.

So drawing from the best few tokens and drawing from the whole vocabulary give the same token, and differ in cost only.

N rows of logits · R rows to draw · V vocabulary · K best tokens of each row · C blocks · B tokens of a block
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from batchinfer.ops.resources import HOST

_SCALE_BITS = 40  # with up to 2^22 tokens, a row's sum stays below 2^63
_SCALE = float(1 << _SCALE_BITS)
_BLOCK = 128  # tokens per block when drawing from the whole vocabulary: first the block is found, then the token
_COLUMN = 32  # tokens per column of argmax
_CANDIDATES = (64, 256)  # best tokens to try first, then second; with more, sorting the row is cheaper
# elements of temporaries at once: on CPUs what a core's cache holds, elsewhere a bound on memory
_DRAW_ELEMENTS = {HOST.type: 1 << 19}
_SUM_ELEMENTS = {HOST.type: 1 << 17}
_MOST_ELEMENTS = 1 << 26

Ints = npt.NDArray[np.int64]


class Filters(NamedTuple):
    """Sampling filters and random numbers of R rows: host arrays. Off: top_k 0, top_p 1, min_p 0. temperature > 0."""

    temperature_R: npt.NDArray[np.float32]
    top_k_R: npt.NDArray[np.int64]
    top_p_R: npt.NDArray[np.float64]
    min_p_R: npt.NDArray[np.float64]
    uniform_R: npt.NDArray[np.float64]


class _Candidates(NamedTuple):
    """Filters of some rows on the device of the logits, as columns that broadcast over tokens.

    needs_total: some row has top_p without top_k. has_min_p: some row has min_p.
    """

    place_R: Tensor  # in the result
    temperature_R1: Tensor
    top_k_R1: Tensor
    top_p_R1: Tensor
    log_min_p_R1: Tensor
    uniform_R1: Tensor
    needs_total: bool
    has_min_p: bool


def draw(logits_NV: Tensor, rows_R: Ints, filters: Filters) -> Tensor:
    """Return a token id for each given row, int64 [R]. The largest logit of each row must be finite.

    No logit is changed.
    """
    vocab = logits_NV.shape[1]
    tokens_R = torch.empty(len(rows_R), dtype=torch.int64, device=logits_NV.device)
    limited_R = (filters.top_k_R > 0) & (filters.top_k_R < vocab)
    filters = filters._replace(top_k_R=np.where(limited_R, filters.top_k_R, 0))
    # a few more candidates than top_k, so that ties with the last one kept are nearly always among them
    needed_R = np.where(limited_R, filters.top_k_R + filters.top_k_R // 8 + 8, filters.top_p_R < 1)
    open_R = needed_R > 0
    for size in _CANDIDATES:
        for chunk in _chunks(np.nonzero(open_R & (needed_R <= size))[0], logits_NV):
            some = _candidates(filters, chunk, logits_NV.device)
            drawn_R, solved_R = _draw_from_best(_select(logits_NV, rows_R[chunk]), min(size, vocab), some)
            tokens_R[some.place_R] = drawn_R
            open_R[chunk[solved_R.cpu().numpy()]] = False
    for group_R, sort in ((open_R, True), (needed_R == 0, False)):
        for chunk in _chunks(np.nonzero(group_R)[0], logits_NV):
            some = _candidates(filters, chunk, logits_NV.device)
            tokens_R[some.place_R] = _draw_from_all(_select(logits_NV, rows_R[chunk]), some, sort)
    return tokens_R


def argmax(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest logit of each row and its token id, the lowest of equals. A NaN counts as the largest.

    torch.argmax is not vectorised on CPUs; maxima over the slow axis are, and then only one column is searched.
    """
    rows, vocab = logits_NV.shape
    columns = vocab // _COLUMN
    whole = columns * _COLUMN
    if rows == 0 or columns < 8:
        ids_N = logits_NV.argmax(1)
        return logits_NV.gather(1, ids_N[:, None])[:, 0], ids_N
    columns_NBC = logits_NV[:, :whole].view(rows, _COLUMN, columns)
    best_NC = columns_NBC.amax(1)
    if whole < vocab:
        best_NC = torch.cat([best_NC, logits_NV[:, whole:]], dim=1)
    place_N = best_NC.argmax(1)
    values_N = best_NC.gather(1, place_N[:, None])[:, 0]
    column_N = place_N.clamp(max=columns - 1)
    inner_NB = columns_NBC[torch.arange(rows, device=place_N.device), :, column_N]
    ids_N = torch.where(place_N < columns, inner_NB.argmax(1) * columns + column_N, place_N - columns + whole)
    # among equals in several columns the lowest id is not in the first column
    tied_N = ((best_NC == values_N[:, None]).sum(1) > 1).nonzero()[:, 0]
    if len(tied_N):
        ids_N[tied_N] = logits_NV[tied_N].argmax(1)
    return values_N, ids_N


def largest(logits_NV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest logits of each row in descending order, and their ids; ties in any order.

    The best tokens lie in the blocks with the best maxima, so few tokens besides the maxima need to be compared.
    """
    rows, vocab = logits_NV.shape
    per_block = int(math.sqrt(vocab / count))
    if per_block < 4:
        return logits_NV.topk(count, dim=1)
    blocks = vocab // per_block
    whole = blocks * per_block
    # a block is every C-th token: maxima over the slow axis are vectorised
    blocks_NBC = logits_NV[:, :whole].view(rows, per_block, blocks)
    best_NK = blocks_NBC.amax(1).topk(count, dim=1, sorted=False).indices
    starts_B1 = torch.arange(0, whole, blocks, device=logits_NV.device)[:, None]
    ids_NK = (best_NK[:, None, :] + starts_B1).flatten(1)
    if whole < vocab:
        rest_K = torch.arange(whole, vocab, device=logits_NV.device)
        ids_NK = torch.cat([ids_NK, rest_K.expand(rows, -1)], dim=1)
    values_NK, picked_NK = logits_NV.gather(1, ids_NK).topk(count, dim=1)
    return values_NK, ids_NK.gather(1, picked_NK)


def ranked(logits_NV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the same as `largest`, with ties in ascending order of ids, cut after the lowest ids."""
    count = min(count, logits_NV.shape[1])
    if count == 0:
        return logits_NV[:, :0], torch.empty_like(logits_NV[:, :0], dtype=torch.int64)
    wider = min(count + 4, logits_NV.shape[1])
    values_NK, ids_NK = largest(logits_NV, wider)
    ids_NK, order_NK = ids_NK.sort(dim=1)
    values_NK, order_NK = values_NK.gather(1, order_NK).sort(dim=1, descending=True, stable=True)
    ids_NK = ids_NK.gather(1, order_NK)
    if wider < logits_NV.shape[1]:
        open_N = (values_NK[:, -1] == values_NK[:, count - 1]).nonzero()[:, 0]
        if len(open_N):
            whole_NV = logits_NV[open_N].sort(dim=1, descending=True, stable=True)
            values_NK[open_N] = whole_NV.values[:, :wider]
            ids_NK[open_N] = whole_NV.indices[:, :wider]
    return values_NK[:, :count], ids_NK[:, :count]


def log_sum_exp(logits_NV: Tensor, largest_N: Tensor) -> Tensor:
    """Return float64 [N], bit for bit independent of the other rows. `largest_N` is the maximum of each row."""
    total_N = _sums(logits_NV, largest_N[:, None], None)[:, 0].double()
    return largest_N.double() + total_N.log() - _SCALE_BITS * math.log(2.0)


# -- how one chunk is drawn ----------------------------------------------------------------------------------------


def _draw_from_best(logits_NV: Tensor, count: int, rows: _Candidates) -> tuple[Tensor, Tensor]:
    """Return token ids, and for which rows they are right: no token outside the candidates passes the filters."""
    values_NK, ids_NK = largest(logits_NV, count)
    scaled_NK = (values_NK - values_NK[:, :1]) / rows.temperature_R1
    weights_NK = _weights(scaled_NK.clone())
    unlimited_N1 = rows.top_k_R1 == 0
    totals_N1 = _sums(logits_NV, values_NK[:, :1], rows) if rows.needs_total else None
    limit_N1, threshold_N1 = _thresholds(scaled_NK, weights_NK, rows, totals_N1)
    worst_N1 = scaled_NK[:, -1:]
    closed_N1 = (worst_N1 < threshold_N1) & (unlimited_N1 | (worst_N1 < limit_N1))
    # nothing follows the candidates, or nothing that has any weight
    closed_N1 |= (weights_NK[:, -1:] == 0) | (count == logits_NV.shape[1])
    weights_NK = weights_NK.masked_fill_(scaled_NK < threshold_N1, 0)
    ids_NK, order_NK = ids_NK.sort(dim=1)
    sums_NK = weights_NK.gather(1, order_NK).cumsum(1)
    place_N1 = _search(sums_NK, _targets(sums_NK[:, -1:], rows))
    return ids_NK.gather(1, place_N1)[:, 0], closed_N1[:, 0]


def _draw_from_all(logits_NV: Tensor, rows: _Candidates, sort: bool) -> Tensor:
    """Return token ids drawn from the whole vocabulary; `sort` if top_k or top_p need all tokens in order."""
    vocab = logits_NV.shape[1]
    scaled_NV = (logits_NV - logits_NV.amax(1, keepdim=True)).div_(rows.temperature_R1)
    threshold_N1 = rows.log_min_p_R1
    if sort:
        sorted_NV = _descending(scaled_NV)
        threshold_N1 = _thresholds(sorted_NV, _weights(sorted_NV.clone()), rows, None)[1]
    outside_NV = scaled_NV < threshold_N1 if sort or rows.has_min_p else None
    padded = -(-vocab // _BLOCK) * _BLOCK
    weights_NV = torch.empty(len(logits_NV), padded, dtype=torch.int64, device=logits_NV.device)
    weights_NV[:, vocab:] = 0
    weights_NV[:, :vocab] = scaled_NV.exp_().mul_(_SCALE)
    if outside_NV is not None:
        weights_NV[:, :vocab].masked_fill_(outside_NV, 0)
    # first the block, then the token in it: a running sum over all tokens is not needed
    weights_NCB = weights_NV.view(-1, padded // _BLOCK, _BLOCK)
    sums_NC = weights_NCB.sum(2).cumsum(1)
    targets_N1 = _targets(sums_NC[:, -1:], rows)
    block_N1 = _search(sums_NC, targets_N1)
    inner_NB = weights_NCB[torch.arange(len(logits_NV), device=logits_NV.device), block_N1[:, 0]].cumsum(1)
    before_N1 = sums_NC.gather(1, block_N1) - inner_NB[:, -1:]
    return (block_N1 * _BLOCK + _search(inner_NB, targets_N1 - before_N1))[:, 0]


def _thresholds(
    scaled_NK: Tensor, weights_NK: Tensor, rows: _Candidates, totals_N1: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the lowest scaled logit that min_p and top_k keep, and the lowest that all filters keep.

    scaled_NK is in descending order. totals_N1: the weight that min_p leaves of the whole vocabulary, for rows without
    top_k; for other rows, and if it is None, the weight of the given tokens counts.
    """
    last_N1 = (rows.top_k_R1 - 1).clamp(0, scaled_NK.shape[1] - 1)
    kth_N1 = torch.where(rows.top_k_R1 > 0, scaled_NK.gather(1, last_N1), -math.inf)
    limit_N1 = torch.maximum(kth_N1, rows.log_min_p_R1)
    weights_NK = weights_NK.masked_fill(scaled_NK < limit_N1, 0)
    sums_NK = weights_NK.cumsum(1)
    whole_N1 = sums_NK[:, -1:]
    if totals_N1 is not None:
        whole_N1 = torch.where(rows.top_k_R1 > 0, whole_N1, totals_N1)
    above_NK = (sums_NK - weights_NK).double()
    kept_NK = (above_NK < rows.top_p_R1 * whole_N1.double()) & (scaled_NK >= limit_N1)
    lowest_N1 = scaled_NK.masked_fill(~kept_NK, math.inf).amin(1, keepdim=True)
    return limit_N1, torch.where(rows.top_p_R1 < 1, lowest_N1, limit_N1)


def _sums(logits_NV: Tensor, largest_N1: Tensor, rows: _Candidates | None) -> Tensor:
    """Return the weight of the whole vocabulary, int64 [N, 1]: after temperature and min_p if `rows` is given."""
    sums = []
    for part in _slices(len(logits_NV), logits_NV, _SUM_ELEMENTS):
        scaled_NV = logits_NV[part] - largest_N1[part]
        if rows is not None:
            scaled_NV.div_(rows.temperature_R1[part])
            if rows.has_min_p:
                scaled_NV.masked_fill_(scaled_NV < rows.log_min_p_R1[part], -math.inf)
        sums.append(_weights(scaled_NV).sum(1, keepdim=True))
    return torch.cat(sums)


def _weights(scaled: Tensor) -> Tensor:
    """Return int64 weights: probability relative to the most probable token, times 2^40. Overwrites `scaled`."""
    return scaled.exp_().mul_(_SCALE).to(torch.int64)


def _targets(total_N1: Tensor, rows: _Candidates) -> Tensor:
    """Return whole numbers in [0, total): a uniform number is at most 1 - 2^-53, so the product rounds below it."""
    return (rows.uniform_R1 * total_N1.double()).to(torch.int64)


def _search(sums_NK: Tensor, targets_N1: Tensor) -> Tensor:
    """Return the first place whose running sum is above the target."""
    return torch.searchsorted(sums_NK, targets_N1, right=True)


def _descending(scaled_NV: Tensor) -> Tensor:
    if scaled_NV.device.type != HOST.type:
        return scaled_NV.sort(dim=1, descending=True).values
    # numpy's sort of float32 uses SIMD: 0.2 ms for 49152 tokens, where torch's takes 4.6
    return torch.from_numpy(np.sort(scaled_NV.neg().numpy(), axis=1)).neg_()


def _select(logits_NV: Tensor, rows_R: Ints) -> Tensor:
    """Return these rows; a view without a copy if they are contiguous."""
    first, last = int(rows_R[0]), int(rows_R[-1])
    if last - first + 1 == len(rows_R) and np.all(np.diff(rows_R) == 1):
        return logits_NV[first : last + 1]
    return logits_NV.index_select(0, torch.from_numpy(rows_R).to(logits_NV.device))


def _candidates(filters: Filters, chunk: Ints, device: torch.device) -> _Candidates:
    def column(values_R: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values_R[chunk][:, None]).to(device)

    with np.errstate(divide="ignore"):
        log_min_p_R = np.log(filters.min_p_R).astype(np.float32)
    return _Candidates(
        torch.from_numpy(chunk).to(device),
        column(filters.temperature_R),
        column(filters.top_k_R),
        column(filters.top_p_R),
        column(log_min_p_R),
        column(filters.uniform_R),
        bool(((filters.top_p_R[chunk] < 1) & (filters.top_k_R[chunk] == 0)).any()),
        bool((filters.min_p_R[chunk] > 0).any()),
    )


def _chunks(rows: Ints, logits_NV: Tensor) -> Iterator[Ints]:
    for part in _slices(len(rows), logits_NV, _DRAW_ELEMENTS):
        yield rows[part]


def _slices(count: int, logits_NV: Tensor, elements: dict[str, int]) -> Iterator[slice]:
    size = max(1, elements.get(logits_NV.device.type, _MOST_ELEMENTS) // logits_NV.shape[1])
    for start in range(0, count, size):
        yield slice(start, start + size)
