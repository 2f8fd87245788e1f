"""What each op means, as loops over single numbers and rows in float64. Slow, and written from the papers alone."""

from __future__ import annotations

import math

import numpy as np
import torch


def rms_norm(x, weight, eps, offset=0.0):
    x = x.double()
    out = torch.empty_like(x)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:-1])).view(-1, x.dim() - 1).tolist():
        row = x[tuple(place)]
        out[tuple(place)] = (
            row / math.sqrt(sum(v * v for v in row.tolist()) / len(row) + eps) * (offset + weight.double())
        )
    return out


def rope(x, cos, sin):
    out = x.double().clone()
    pairs = cos.shape[-1]
    for t in range(x.shape[0]):
        for h in range(x.shape[1]):
            for i in range(pairs):
                a, b = float(x[t, h, i]), float(x[t, h, i + pairs])
                c, s = float(cos[t, i]), float(sin[t, i])
                out[t, h, i] = a * c - b * s
                out[t, h, i + pairs] = a * s + b * c
    return out


def attention(q, k, v, first, case):
    """Attend with q [n, H, D] at positions first.. to k, v [length, K, D], one query at a time, in numpy (no pool)."""
    q_nHD, k_LKD, v_LKD = (x.double().numpy() for x in (q, k, v))
    out = torch.empty(q.shape, dtype=torch.float64)
    group = case.heads // case.kv_heads
    for i, q_HD in enumerate(q_nHD):
        position = first + i
        start = 0 if case.window is None else max(0, position - case.window + 1)
        seen = slice(start, position + 1)
        for h in range(case.heads):
            scores = k_LKD[seen, h // group] @ q_HD[h] * case.scale
            if case.soft_cap is not None:
                scores = case.soft_cap * np.tanh(scores / case.soft_cap)
            weights = np.exp(scores - scores.max())
            out[i, h] = torch.from_numpy(weights @ v_LKD[seen, h // group] / weights.sum())
    return out
