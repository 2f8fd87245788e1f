"""Logprobs: log-softmax of logits, gathered for sampled tokens and for the best or the named tokens of each row.

R rows · V vocabulary · K best or named tokens
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from batchinfer.request import TokenLogprob
from batchinfer.runner.sample_tokens import log_sum_exp, ranked

Ints = npt.NDArray[np.int64]

NOT_FINITE = "the model's logits are not finite (NaN or infinity); if it recurs, compute in float32 (engine.dtype)"


def token_logprobs(
    logits_RV: Tensor,
    largest_R: Tensor,
    tokens_R: Ints,
    counts_R: Ints,
    named_R: Sequence[tuple[int, ...]] = (),
) -> list[TokenLogprob]:
    """Return for each row the logprob of its token, and of its best `counts` tokens or of the tokens that it names.

    logits_RV: float32, the maximum of each row (`largest_R`) finite. named_R: an empty tuple for a row that names no
    tokens; empty if no row does. The result of a row depends on its logits alone, bit for bit. All values come from
    one sum, so that equal logits have equal logprobs.
    """
    norm_R1 = log_sum_exp(logits_RV, largest_R)[:, None]
    values_RK, ids_RK = ranked(logits_RV, int(counts_R.max()))
    tokens_R1 = torch.from_numpy(tokens_R).to(logits_RV.device)[:, None]
    own = (logits_RV.gather(1, tokens_R1).double() - norm_R1)[:, 0].tolist()
    best = (values_RK.double() - norm_R1).tolist()
    ids = ids_RK.tolist()
    entries = [
        TokenLogprob(token, logprob, tuple(zip(row_ids[:count], row_best[:count], strict=True)))
        for token, logprob, row_ids, row_best, count in zip(
            tokens_R.tolist(), own, ids, best, counts_R.tolist(), strict=True
        )
    ]
    for row, named in enumerate(named_R):
        if named:
            ids_K = torch.tensor(named, device=logits_RV.device)
            values = (logits_RV[row, ids_K].double() - norm_R1[row]).tolist()
            entries[row] = entries[row]._replace(top=tuple(zip(named, values, strict=True)))
    return entries


def listed_logprobs(
    tokens_R: Ints,
    values_RC: npt.NDArray[np.float64],
    ids_RK: npt.NDArray[np.int32],
    counts_R: Ints,
) -> list[TokenLogprob]:
    """Return logprobs as a device gathered them: each row's own first, then those of its `counts` listed ids.

    C = 1 + K
    """
    rows = zip(tokens_R.tolist(), values_RC.tolist(), ids_RK.tolist(), counts_R.tolist(), strict=True)
    return [
        TokenLogprob(token, values[0], tuple(zip(ids[:count], values[1 : 1 + count], strict=True)))
        for token, values, ids, count in rows
    ]
