"""Step index of the eager backend: where queries, keys and values are, computed once per step for all layers.

A sequence's queries are cut into tiles of at most TILE tokens, so that masks stay small whatever the context, and a
tile reads only the part of the context that it can see. Tiles of like size share a bucket: one padded dense
attention. A decode is a tile of one query.

T tokens of a step · S sequences · I tiles of a bucket · Q queries per tile · L context slots per tile · K kv heads ·
N blocks · B slots per block · W blocks per table · D head size
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from batchinfer_kernels.contract import AttentionFacts, StepInputs

TILE = 128
SPLIT_SLOTS = 2048  # a bucket is split where that saves this many query × context slots; about one more bucket's cost
BUCKET_NUMBERS = 1 << 24  # of gathered keys or of a mask, in one bucket: sequences that share blocks are copied apart

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tiles that are computed together. Padding repeats a tile's last query, and its last visible slot, masked."""

    queries_M: Tensor | None  # int64 [I * Q], rows of the step; None: all rows in order, one each
    num_queries: int  # Q
    rows_M: tuple[Tensor, Tensor]  # int32 [I * K * L], of keys and of values in the cache seen as [N * 2 * K * B, D]
    num_slots: int  # L
    bags: tuple[Tensor, Tensor] | None  # of decodes: values for every query head, int32 [I * H * L]; starts [I * H]
    bias_I1XL: Tensor | None  # 0 or -inf, X = query heads per kv head * Q (or 1, for all); None: everything is seen


@dataclass(frozen=True, slots=True)
class EagerStepIndex:
    """Slots of a step, and the buckets of each kind of layer: one list per window."""

    places_T: tuple[Tensor, Tensor]  # int64: block of each token's slot, and its offset there
    buckets: dict[int | None, list[Bucket]]  # by window
    workspaces: tuple[Tensor, Tensor]  # of the cache's dtype, for gathered keys and values; reused over layers


@dataclass(frozen=True, slots=True)
class _BucketFacts:
    """Step and cache as the functions below read them: small arrays on the host, block tables where they are."""

    tables_SW: Tensor  # by seat if the step has seats
    seats_S: Ints
    num_rows: int  # rows of queries, those of padding included
    query_starts_X: Ints
    lengths_S: Ints
    num_kv_heads: int
    block_size: int
    head_size: int
    group: int  # query heads per kv head
    dtype: torch.dtype  # of scores


def prepare(step: StepInputs, kv_N2KBD: Tensor, attention: AttentionFacts) -> EagerStepIndex:
    """Build the index of one step. Of `kv_N2KBD`, any layer's cache, only shape and dtype count.

    Reads starts and lengths on the host: on another device that waits for them. `prompt_S` makes no difference: results
    depend on how a prompt is cut into chunks in any case.
    """
    num_kv_heads, block_size, head_size = kv_N2KBD.shape[2:]
    facts = _BucketFacts(
        tables_SW=step.block_tables_SW,
        seats_S=np.arange(len(step.lengths_S)) if step.seats_S is None else step.seats_S.cpu().numpy(),
        num_rows=len(step.slots_T),
        query_starts_X=step.query_starts_X.cpu().numpy(),
        lengths_S=step.lengths_S.cpu().numpy(),
        num_kv_heads=num_kv_heads,
        block_size=block_size,
        head_size=head_size,
        group=attention.num_heads // num_kv_heads,
        dtype=attention.dtype,
    )
    buckets = {
        window: [_bucket(facts, tiles, window) for tiles in _make_tiles(facts, window)]
        for window in dict.fromkeys(attention.windows)
    }
    rows = max((len(bucket.rows_M[0]) for found in buckets.values() for bucket in found), default=0)
    # one each, aligned as torch aligns a tensor; fresh memory in every layer would cost more than the copy into it
    keys_MD, values_MD = (kv_N2KBD.new_empty(rows, head_size) for _ in range(2))
    places_T = step.slots_T // block_size, step.slots_T % block_size
    return EagerStepIndex(places_T, buckets, (keys_MD, values_MD))


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Parallel arrays [I]: the sequence, the first row in the step, rows, and the positions that are seen."""

    sequence: Ints
    row: Ints
    count: Ints
    position: Ints  # of the first query
    start: Ints  # first position that the first query sees
    end: Ints  # one past the last query's position

    def select(self, chosen: Ints) -> _Tiles:
        return _Tiles(*(getattr(self, name)[chosen] for name in self.__slots__))


def _make_tiles(facts: _BucketFacts, window: int | None) -> list[_Tiles]:
    """Return the tiles of each bucket."""
    tiles = _cut(facts, window)
    seen = tiles.end - tiles.start
    # queries padded to a power of two: at most 8 kinds, and decodes (1) never share with chunks
    width = 2 ** np.ceil(np.log2(tiles.count)).astype(np.int64)
    groups: list[_Tiles] = []
    for queries in np.unique(width):
        members = np.flatnonzero(width == queries)
        members = members[np.argsort(-seen[members], kind="stable")]
        numbers_per_slot = max(facts.num_kv_heads * facts.head_size, facts.group * int(queries))
        for split in _split(members, seen[members], int(queries)):
            most = max(1, BUCKET_NUMBERS // (numbers_per_slot * int(seen[split[0]])))
            groups += [tiles.select(np.sort(split[i : i + most])) for i in range(0, len(split), most)]
    return groups


def _cut(facts: _BucketFacts, window: int | None) -> _Tiles:
    counts = np.diff(facts.query_starts_X)
    tiles_S = -(-counts // TILE)
    sequence = np.repeat(np.arange(len(counts)), tiles_S)
    first = TILE * (np.arange(len(sequence)) - np.repeat(np.cumsum(tiles_S) - tiles_S, tiles_S))
    count = np.minimum(TILE, counts[sequence] - first)
    position = facts.lengths_S[sequence] - counts[sequence] + first
    start = np.zeros_like(position) if window is None else np.maximum(0, position - window + 1)
    return _Tiles(sequence, facts.query_starts_X[sequence] + first, count, position, start, position + count)


def _split(members: Ints, seen: Ints, queries: int) -> list[Ints]:
    """Cut `members`, sorted by falling context, where that saves most padding, as long as it saves enough."""
    saved = (len(seen) - np.arange(len(seen))) * (seen[0] - seen) * queries
    at = int(saved.argmax())
    if saved[at] < SPLIT_SLOTS:
        return [members]
    return _split(members[:at], seen[:at], queries) + _split(members[at:], seen[at:], queries)


def _bucket(facts: _BucketFacts, tiles: _Tiles, window: int | None) -> Bucket:
    num_queries = int(tiles.count.max())
    num_slots = int((tiles.end - tiles.start).max())
    query_IQ = np.minimum(np.arange(num_queries), tiles.count[:, None] - 1)
    row_IQ = tiles.row[:, None] + query_IQ
    wanted_IL = tiles.start[:, None] + np.arange(num_slots)
    keys_M = _key_rows(facts, tiles.sequence, np.minimum(wanted_IL, tiles.end[:, None] - 1))
    values_M = keys_M + facts.num_kv_heads * facts.block_size
    positions_IQ = tiles.position[:, None] + query_IQ
    bias_I1XL = _bias(wanted_IL[:, None, :], positions_IQ[:, :, None], window, facts.group, facts.dtype)
    whole = num_queries == 1 and len(tiles.row) == facts.num_rows
    device = keys_M.device
    return Bucket(
        queries_M=None if whole else torch.from_numpy(row_IQ.reshape(-1)).to(device),
        num_queries=num_queries,
        rows_M=(keys_M, values_M),
        num_slots=num_slots,
        bags=_bags(values_M, num_slots, facts.group) if num_queries == 1 else None,
        bias_I1XL=None if bias_I1XL is None else bias_I1XL.to(device),
    )


def _key_rows(facts: _BucketFacts, sequence_I: Ints, position_IL: Ints) -> Tensor:
    """Return int32 [I * K * L]: row of each key in the cache seen as [N * 2 * K * B, D]. Tables stay on the device."""
    device, size = facts.tables_SW.device, facts.block_size
    seat_I1 = torch.from_numpy(facts.seats_S[sequence_I][:, None]).to(device)
    position = torch.from_numpy(position_IL).to(device)
    block_IL = facts.tables_SW[seat_I1, position // size].long()
    head_K1 = torch.arange(facts.num_kv_heads, device=device)[:, None]
    keys_IKL = (block_IL[:, None, :] * 2 * facts.num_kv_heads + head_K1) * size
    return keys_IKL.add_((position % size)[:, None, :]).view(-1).int()


def _bags(values_M: Tensor, num_slots: int, group: int) -> tuple[Tensor, Tensor]:
    each_M = values_M.view(-1, 1, num_slots).expand(-1, group, num_slots).reshape(-1)
    return each_M, torch.arange(0, len(each_M), num_slots, dtype=torch.int32, device=values_M.device)


def _bias(key_I1L: Ints, query_IQ1: Ints, window: int | None, group: int, dtype: torch.dtype) -> Tensor | None:
    """Return 0 or -inf from positions, None if all is visible.

    torch's fused attention on CPUs wants a float mask over all query heads of a kv head.
    """
    visible_IQL = key_I1L <= query_IQ1
    if window is not None:
        visible_IQL &= key_I1L > query_IQ1 - window
    if visible_IQL.all():
        return None
    bias_IQL = torch.zeros(visible_IQL.shape, dtype=dtype).masked_fill_(torch.from_numpy(~visible_IQL), -torch.inf)
    if bias_IQL.shape[1] == 1:
        return bias_IQL.unsqueeze(1)
    return bias_IQL.repeat(1, group, 1).unsqueeze(1)
