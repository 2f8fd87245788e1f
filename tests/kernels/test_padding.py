"""Padding of static step inputs changes nothing: empty sequences, tokens of no sequence, and tables by seat."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from batchinfer_kernels.contract import AttentionFacts, ScoreRule, StepInputs

HEADS, KV_HEADS, SIZE, BLOCK, BLOCKS = 4, 2, 8, 4, 40


def step_of(lengths, counts, tables) -> StepInputs:
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    positions = [p for length, count in zip(lengths, counts, strict=True) for p in range(length - count, length)]
    owners = [s for s, count in enumerate(counts) for _ in range(count)]
    slots = [tables[s][p // BLOCK] * BLOCK + p % BLOCK for s, p in zip(owners, positions, strict=True)]
    return StepInputs(
        tokens_T=torch.zeros(len(slots), dtype=torch.int32),
        positions_T=torch.tensor(positions, dtype=torch.int32),
        slots_T=torch.tensor(slots, dtype=torch.int32),
        block_tables_SW=torch.tensor(tables, dtype=torch.int32),
        query_starts_X=torch.tensor(starts, dtype=torch.int32),
        lengths_S=torch.tensor(lengths, dtype=torch.int32),
        prompt_S=torch.tensor([count > 1 for count in counts]),
        output_rows_N=None,
        max_length=max(lengths),
    )


def padded(step: StepInputs, tokens: int, sequences: int, seats: list[int]) -> StepInputs:
    """Return the step in buffers with room for more, its tables in rows `seats` of one with a dummy row at the end."""
    tables = torch.full((9, step.block_tables_SW.shape[1]), BLOCKS - 1, dtype=torch.int32)
    tables[seats] = step.block_tables_SW
    last = int(step.query_starts_X[-1])
    none = torch.zeros(tokens, dtype=torch.int32)
    return replace(
        step,
        tokens_T=torch.cat([step.tokens_T, none]),
        positions_T=torch.cat([step.positions_T, none]),
        slots_T=torch.cat([step.slots_T, none - 1]),
        block_tables_SW=tables,
        query_starts_X=torch.cat([step.query_starts_X, torch.full((sequences,), last, dtype=torch.int32)]),
        lengths_S=torch.cat([step.lengths_S, torch.zeros(sequences, dtype=torch.int32)]),
        prompt_S=torch.cat([step.prompt_S, torch.zeros(sequences, dtype=torch.bool)]),
        seats_S=torch.tensor(seats + [8] * sequences, dtype=torch.int32),
    )


@pytest.mark.sampled([0, 5])
@pytest.mark.usefixtures("not_compiled")
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [1, 6, 1, 3], [9, 1, 2, 14]])
@pytest.mark.parametrize(("tokens", "sequences"), [(0, 0), (5, 0), (0, 3), (5, 3)])
def test_padding_changes_nothing(ops, window, counts, tokens, sequences):
    generator = torch.Generator().manual_seed(sum(counts))
    lengths = [20, 14, 3, 17]
    blocks = torch.randperm(BLOCKS - 1, generator=generator).view(-1)[:20].view(4, 5).tolist()
    step = step_of(lengths, counts, blocks)
    rule = ScoreRule(0.3, window)
    cache = torch.randn(BLOCKS, 2, KV_HEADS, BLOCK, SIZE, generator=generator)
    cache[-1] = math.nan
    rows = sum(counts)
    qkv = torch.randn(rows + tokens, HEADS + 2 * KV_HEADS, SIZE, generator=generator)
    qkv[rows:] = math.nan
    results = []
    for one in (step, padded(step, tokens, sequences, [7, 2, 5, 0])):
        kv = cache.clone()
        index = ops.prepare(one, kv, AttentionFacts(HEADS, (window,), torch.float32))
        q, k, v = (part.clone() for part in qkv[: len(one.slots_T)].split([HEADS, KV_HEADS, KV_HEADS], dim=1))
        ops.rope_kv_write(q, k, v, None, kv, index)
        results.append((ops.paged_attention(q, kv, index, rule)[:rows], kv[:-1]))
    (plain, plain_kv), (out, kv) = results
    assert torch.equal(kv, plain_kv)
    torch.testing.assert_close(out, plain)
