"""Attention over a cache of blocks: gather a bucket's keys and values, then dense attention.

T tokens of a step · H query heads · K kv heads · G = H / K · D head size · N blocks · B slots per block ·
I tiles of a bucket · Q queries per tile · L context slots per tile · X = G * Q · M rows of the step or of the cache
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from batchinfer_kernels.contract import ScoreRule
from batchinfer_kernels.eager.step_index import Bucket, EagerStepIndex


def paged_attention(
    q_THD: Tensor, kv_N2KBD: Tensor, index: EagerStepIndex, rule: ScoreRule, out_THD: Tensor | None = None
) -> Tensor:
    heads, size = q_THD.shape[1:]
    kv_heads = kv_N2KBD.shape[2]
    group = heads // kv_heads
    whole_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device) if out_THD is None else out_THD
    for bucket in index.buckets[rule.window]:
        q_MHD = q_THD if bucket.queries_M is None else q_THD.index_select(0, bucket.queries_M)
        q_IQKGD = q_MHD.reshape(-1, bucket.num_queries, kv_heads, group, size)
        q_IKXD = q_IQKGD.permute(0, 2, 3, 1, 4).reshape(q_IQKGD.shape[0], kv_heads, -1, size)
        o_IKXD = _attend(q_IKXD, kv_N2KBD, bucket, index, rule)
        o_IKGQD = o_IKXD.reshape(-1, kv_heads, group, bucket.num_queries, size)
        o_MHD = o_IKGQD.permute(0, 3, 1, 2, 4).reshape(q_MHD.shape)
        if bucket.queries_M is None:
            return o_MHD if out_THD is None else out_THD.copy_(o_MHD)
        # a padded query repeats a real one, so rows written twice get the same values
        whole_THD.index_copy_(0, bucket.queries_M, o_MHD)
    return whole_THD


def _attend(q_IKXD: Tensor, kv_N2KBD: Tensor, bucket: Bucket, index: EagerStepIndex, rule: ScoreRule) -> Tensor:
    scale, _, soft_cap = rule
    k_IKLD = _gather(kv_N2KBD, 0, bucket, index).to(q_IKXD.dtype)
    bags = bucket.bags if kv_N2KBD.dtype == q_IKXD.dtype else None
    if soft_cap is None and bags is None:
        v_IKLD = _gather(kv_N2KBD, 1, bucket, index).to(q_IKXD.dtype)
        return F.scaled_dot_product_attention(q_IKXD, k_IKLD, v_IKLD, bucket.bias_I1XL, scale=scale)
    score_IKXL = (q_IKXD * scale) @ k_IKLD.transpose(2, 3)  # in this order no product overflows float16
    if soft_cap is not None:
        score_IKXL.div_(soft_cap).tanh_().mul_(soft_cap)
    if bucket.bias_I1XL is not None:
        score_IKXL += bucket.bias_I1XL
    wide = torch.promote_types(q_IKXD.dtype, torch.float32)
    weight_IKXL = score_IKXL.softmax(-1, dtype=wide).to(q_IKXD.dtype)
    if bags is None:
        return weight_IKXL @ _gather(kv_N2KBD, 1, bucket, index).to(q_IKXD.dtype)
    # a decode's sum over values needs no copy of them: up to a third less time in attention
    values_MD = kv_N2KBD.view(-1, kv_N2KBD.shape[-1])
    return F.embedding_bag(bags[0], values_MD, bags[1], mode="sum", per_sample_weights=weight_IKXL.view(-1))


def _gather(kv_N2KBD: Tensor, number: int, bucket: Bucket, index: EagerStepIndex) -> Tensor:
    """Copy the bucket's keys, `number` 0, or values, 1."""
    kv_heads, size = kv_N2KBD.shape[2], kv_N2KBD.shape[4]
    rows_M = bucket.rows_M[number]
    space_MD = index.workspaces[number][: len(rows_M)]
    torch.index_select(kv_N2KBD.view(-1, size), 0, rows_M, out=space_MD)
    return space_MD.view(-1, kv_heads, bucket.num_slots, size)
