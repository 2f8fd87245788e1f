"""Paged attention beside torch's FlashAttention-2, an implementation that shares nothing with ours."""

from __future__ import annotations

import pytest
import torch
from batchinfer_kernels.contract import AttentionFacts, ScoreRule, StepInputs
from batchinfer_kernels.triton import make_backend

_PAGE = 256  # tokens: torch takes multiples of it alone
_HEADS, _KV_HEADS, _SIZE = 16, 8, 128


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [[(1, 700), (1, 3000), (1, 5)], [(300, 300), (40, 2000), (7, 257)]], ids=str)
def test_paged_attention_equals_flash_attention(batch, dtype):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12):
        pytest.skip("varlen_attn takes tables of blocks from torch 2.12 on")
    counts, lengths = (torch.tensor(column, dtype=torch.int32, device="cuda") for column in zip(*batch, strict=True))
    generator = torch.Generator("cuda").manual_seed(0)
    pages = [-(-length // _PAGE) for _, length in batch]
    cache_shape = (sum(pages), 2, _KV_HEADS, _PAGE, _SIZE)
    kv_N2KBD = torch.randn(cache_shape, generator=generator, dtype=dtype, device="cuda")
    q_THD = torch.randn(int(counts.sum()), _HEADS, _SIZE, generator=generator, dtype=dtype, device="cuda")
    tables_SW = torch.zeros(len(batch), max(pages), dtype=torch.int32, device="cuda")
    order = torch.randperm(sum(pages), generator=generator, device="cuda").int()
    for row_W, blocks in zip(tables_SW, order.split(pages), strict=True):
        row_W[: len(blocks)] = blocks
    starts_X = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    expected = varlen.varlen_attn(
        q_THD,
        kv_N2KBD[:, 0].transpose(1, 2).contiguous(),
        kv_N2KBD[:, 1].transpose(1, 2).contiguous(),
        starts_X,
        None,
        int(counts.max()),
        int(lengths.max()),
        scale=_SIZE**-0.5,
        window_size=(-1, 0),
        enable_gqa=True,
        seqused_k=lengths,
        block_table=tables_SW,
    )
    backend = make_backend("cuda", lambda fallback: None)
    tokens_T = torch.zeros(len(q_THD), dtype=torch.int32, device="cuda")
    step = StepInputs(
        tokens_T, tokens_T, tokens_T, tables_SW, starts_X, lengths, counts > 1, None, int(lengths.max()), None
    )
    index = backend.prepare(step, kv_N2KBD, AttentionFacts(_HEADS, (None,), dtype))
    got = backend.paged_attention(q_THD, kv_N2KBD, index, ScoreRule(_SIZE**-0.5))
    torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)
