"""Where a step's queries, keys and values are: computed once per step on the host, used by every layer.

A sequence's queries are cut into tiles of at most TILE tokens, so that masks stay small whatever the context, and a
tile reads only the part of the context that it can see. Tiles of like size share a bucket: one padded dense
attention. A decode is a tile of one query.

T tokens of a step · S sequences · I tiles of a bucket · Q queries per tile · L context slots per tile · K kv heads ·
N blocks · B slots per block · D head size
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

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


@dataclass(slots=True)
class StepIndex:
    """What layers share is made by the first that needs it: buckets where windows, head counts and dtype are equal."""

    slots_T: Tensor  # int64
    tables_SB: npt.NDArray[np.int32]
    query_starts_X: Ints  # [S + 1]
    lengths_S: Ints
    num_kv_heads: int
    block_size: int
    head_size: int
    device: torch.device
    _places_T: tuple[Tensor, Tensor] | None = None
    _buckets: dict[tuple[int | None, int, torch.dtype], list[Bucket]] = field(default_factory=dict)
    _workspaces: dict[int, Tensor] = field(default_factory=dict)

    def places(self) -> tuple[Tensor, Tensor]:
        """int64 block and offset of each token's slot."""
        if self._places_T is None:
            self._places_T = self.slots_T // self.block_size, self.slots_T % self.block_size
        return self._places_T

    def buckets(self, window: int | None, group: int, dtype: torch.dtype) -> list[Bucket]:
        """`group` query heads share a kv head; `dtype` is that of the scores."""
        key = (window, group, dtype)
        made = self._buckets.get(key)
        if made is None:
            made = self._buckets[key] = [_bucket(self, tiles, *key) for tiles in _make_tiles(self, window, group)]
        return made

    def workspace(self, number: int, cache: Tensor, rows: int) -> Tensor:
        """[rows, D] of the cache's dtype, reused over layers: fresh memory costs more than the copy into it."""
        size = cache.shape[-1]
        held = self._workspaces.get(number)
        if held is None or held.numel() < rows * size or held.dtype != cache.dtype:
            held = self._workspaces[number] = cache.new_empty(rows * size)
        return held[: rows * size].view(rows, size)


def step_index(
    slots_T: Tensor,
    block_tables_SB: Tensor,
    query_starts_X: npt.ArrayLike,
    lengths_S: npt.ArrayLike,
    kv_N2KBD: Tensor,
    prompt_S: npt.ArrayLike | None = None,
) -> StepIndex:
    """`prompt_S` makes no difference here: results depend on how a prompt is cut in any case."""
    num_kv_heads, block_size, head_size = kv_N2KBD.shape[2:]
    return StepIndex(
        slots_T=slots_T,
        tables_SB=block_tables_SB.cpu().numpy(),
        query_starts_X=np.asarray(query_starts_X, dtype=np.int64),
        lengths_S=np.asarray(lengths_S, dtype=np.int64),
        num_kv_heads=num_kv_heads,
        block_size=block_size,
        head_size=head_size,
        device=slots_T.device,
    )


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Parallel arrays [I]: the sequence, the first row in the step, rows, and the positions that are seen."""

    sequence: Ints
    row: Ints
    count: Ints
    position: Ints  # of the first query
    start: Ints  # first position that the first query sees
    end: Ints  # one past the last query's position

    def take(self, chosen: Ints) -> _Tiles:
        return _Tiles(*(getattr(self, name)[chosen] for name in self.__slots__))


def _make_tiles(index: StepIndex, window: int | None, group: int) -> list[_Tiles]:
    """The tiles of each bucket."""
    tiles = _cut(index, window)
    seen = tiles.end - tiles.start
    # queries padded to a power of two: at most 8 kinds, and decodes (1) never share with chunks
    width = 2 ** np.ceil(np.log2(tiles.count)).astype(np.int64)
    groups: list[_Tiles] = []
    for queries in np.unique(width):
        members = np.flatnonzero(width == queries)
        members = members[np.argsort(-seen[members], kind="stable")]
        numbers_per_slot = max(index.num_kv_heads * index.head_size, group * int(queries))
        for part in _split(members, seen[members], int(queries)):
            most = max(1, BUCKET_NUMBERS // (numbers_per_slot * int(seen[part[0]])))
            groups += [tiles.take(np.sort(part[i : i + most])) for i in range(0, len(part), most)]
    return groups


def _cut(index: StepIndex, window: int | None) -> _Tiles:
    counts = np.diff(index.query_starts_X)
    tiles_S = -(-counts // TILE)
    sequence = np.repeat(np.arange(len(counts)), tiles_S)
    first = TILE * (np.arange(len(sequence)) - np.repeat(np.cumsum(tiles_S) - tiles_S, tiles_S))
    count = np.minimum(TILE, counts[sequence] - first)
    position = index.lengths_S[sequence] - counts[sequence] + first
    start = np.zeros_like(position) if window is None else np.maximum(0, position - window + 1)
    return _Tiles(sequence, index.query_starts_X[sequence] + first, count, position, start, position + count)


def _split(members: Ints, seen: Ints, queries: int) -> list[Ints]:
    """`members` by falling context, cut where that saves most padding, as long as it saves enough."""
    saved = (len(seen) - np.arange(len(seen))) * (seen[0] - seen) * queries
    at = int(saved.argmax())
    if saved[at] < SPLIT_SLOTS:
        return [members]
    return _split(members[:at], seen[:at], queries) + _split(members[at:], seen[at:], queries)


def _bucket(index: StepIndex, tiles: _Tiles, window: int | None, group: int, dtype: torch.dtype) -> Bucket:
    num_queries = int(tiles.count.max())
    num_slots = int((tiles.end - tiles.start).max())
    query_IQ = np.minimum(np.arange(num_queries), tiles.count[:, None] - 1)
    row_IQ = tiles.row[:, None] + query_IQ
    wanted_IL = tiles.start[:, None] + np.arange(num_slots)
    position_IL = np.minimum(wanted_IL, tiles.end[:, None] - 1)
    block_IL = index.tables_SB[tiles.sequence[:, None], position_IL // index.block_size].astype(np.int64)
    head_K1 = np.arange(index.num_kv_heads)[:, None]
    keys_IKL = (block_IL[:, None, :] * 2 * index.num_kv_heads + head_K1) * index.block_size
    keys_IKL += (position_IL % index.block_size)[:, None, :]

    keys_M = torch.from_numpy(keys_IKL.reshape(-1).astype(np.int32)).to(index.device)
    values_M = keys_M + index.num_kv_heads * index.block_size
    bias_I1XL = _bias(wanted_IL[:, None, :], (tiles.position[:, None] + query_IQ)[:, :, None], window, group, dtype)
    whole = num_queries == 1 and len(tiles.row) == index.query_starts_X[-1]
    return Bucket(
        queries_M=None if whole else torch.from_numpy(row_IQ.reshape(-1)).to(index.device),
        num_queries=num_queries,
        rows_M=(keys_M, values_M),
        num_slots=num_slots,
        bags=_bags(values_M, num_slots, group) if num_queries == 1 else None,
        bias_I1XL=None if bias_I1XL is None else bias_I1XL.to(index.device),
    )


def _bags(values_M: Tensor, num_slots: int, group: int) -> tuple[Tensor, Tensor]:
    each_M = values_M.view(-1, 1, num_slots).expand(-1, group, num_slots).reshape(-1)
    return each_M, torch.arange(0, len(each_M), num_slots, dtype=torch.int32, device=values_M.device)


def _bias(key_I1L: Ints, query_IQ1: Ints, window: int | None, group: int, dtype: torch.dtype) -> Tensor | None:
    """From positions. The CPU's fused attention wants a float mask, over all query heads of a kv head."""
    visible_IQL = key_I1L <= query_IQ1
    if window is not None:
        visible_IQL &= key_I1L > query_IQ1 - window
    if visible_IQL.all():
        return None
    bias_IQL = torch.zeros(visible_IQL.shape, dtype=dtype).masked_fill_(torch.from_numpy(~visible_IQL), -torch.inf)
    if bias_IQL.shape[1] == 1:
        return bias_IQL.unsqueeze(1)
    return bias_IQL.repeat(1, group, 1).unsqueeze(1)
