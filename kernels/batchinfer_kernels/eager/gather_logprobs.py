"""Logprobs of sampled tokens and of the best or the named tokens of each row.

All values of a row come from one exact sum, so equal logits have equal logprobs and no row depends on another.

Letters: see batchinfer_kernels.steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from batchinfer_kernels.eager.sample_rows import SCALE_BITS, row_slices, weights_of
from batchinfer_kernels.steps import LogprobRows


def gather_logprobs(logits_NV: Tensor, tokens_N: Tensor, best: int, named_NC: Tensor | None = None) -> LogprobRows:
    """Return logprobs of the tokens, and of the `best` tokens of each row or of those that it names.

    A row whose largest logit is not finite gets NaN or infinities.
    """
    rows, width = len(logits_NV), best if named_NC is None else max(best, named_NC.shape[1])
    values = logits_NV.new_empty(rows, 1 + width, dtype=torch.float64)
    ids_NC = torch.full((rows, width), -1, dtype=torch.int32, device=logits_NV.device)
    for part in row_slices(logits_NV):
        some_NV = logits_NV[part]
        ids_NC[part] = _listed(some_NV, best, ids_NC[part], None if named_NC is None else named_NC[part])
        all_ids = torch.cat([tokens_N[part, None].long(), ids_NC[part].long()], dim=1)
        logprobs = some_NV.gather(1, all_ids.clamp_min(0)).double() - _log_sum_exp(some_NV)
        values[part] = logprobs.masked_fill_(all_ids < 0, 0)
    return LogprobRows(values[:, 0], values[:, 1:], ids_NC)


def _listed(logits_NV: Tensor, best: int, none_NC: Tensor, named_NC: Tensor | None) -> Tensor:
    """Return the ids that each row lists, -1 beyond them."""
    ids_NC = none_NC.clone()
    count = min(best, logits_NV.shape[1])
    ids_NC[:, :count] = _best_ids(logits_NV, count)
    if named_NC is None or named_NC.shape[1] == 0:
        return ids_NC
    padded_NC = F.pad(named_NC, (0, none_NC.shape[1] - named_NC.shape[1]), value=-1)
    return torch.where(named_NC[:, :1] < 0, ids_NC, padded_NC)


def _best_ids(logits_NV: Tensor, count: int) -> Tensor:
    """Return the ids of the largest logits, equals by ascending id: one unique integer key per token orders both."""
    vocab = logits_NV.shape[1]
    bits_NV = (logits_NV + 0.0).view(torch.int32)  # -0 becomes +0, its equal
    ordered_NV = torch.where(bits_NV < 0, bits_NV ^ 0x7FFF_FFFF, bits_NV).long()
    ids_V = torch.arange(vocab, device=logits_NV.device)
    keys_NK = ((ordered_NV << 32) | (vocab - ids_V)).topk(count, dim=1).values
    return vocab - (keys_NK & 0xFFFF_FFFF)


def _log_sum_exp(logits_NV: Tensor) -> Tensor:
    largest_N1 = logits_NV.amax(1, keepdim=True)
    total_N1 = weights_of(logits_NV - largest_N1).sum(1, keepdim=True).double()
    return largest_N1.double() + total_N1.log() - SCALE_BITS * math.log(2.0)
