"""Inputs of a step on the device: one upload per step, state by seat, and static tensors that graphs read.

The host packs what a plan changes and computes into one int32 array; everything per token and per sequence that follows
from it is computed on the device (`StepKernels.expand_step`). A plan is checked here: on a GPU an index out of bounds
aborts the process, or reads wrong memory.

P seats and the dummy seat · W blocks per table · S sequences · X = S + 1 · T tokens · N rows that are sampled ·
J sequences that join · U appended blocks · C copies of blocks
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from batchinfer_kernels.contract import StepInputs
from batchinfer_kernels.steps import JOIN_WORDS, PackedStep, SampleRows, SeatState, SeatUpdates
from torch import Tensor

from batchinfer.engine.plan import Grown, StepPlan
from batchinfer.ops.streams import Upload
from batchinfer.runner.graph_ladder import Rung, StepFacts

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.int32]

_ALIGNED_WORDS = 4


class StepLimits(NamedTuple):
    """Bounds of every plan: its seats, its tokens, the tokens of a context, and what the vocabulary has."""

    max_num_seqs: int
    max_step_tokens: int
    max_model_len: int
    block_size: int
    vocab_size: int

    @property
    def table_blocks(self) -> int:
        return -(-self.max_model_len // self.block_size)

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest step: every seat may have one, whatever `max_step_tokens` is."""
        return max(self.max_step_tokens, self.max_num_seqs)

    @property
    def max_length(self) -> int:
        """Tokens that a block table has room for."""
        return self.table_blocks * self.block_size


class HostStep(NamedTuple):
    """A plan's sequences and the rows that are sampled from them, as host arrays."""

    seats_S: Ints
    starts_S: Ints
    counts_S: Ints
    query_starts_X: Ints
    rows_N: Ints  # among the step's tokens
    seats_N: Ints
    positions_N: Ints  # that the sampled token gets in its sequence
    targets_N: Ints  # seat whose last token it becomes; -1: a draft decides that

    @classmethod
    def of_plan(cls, plan: StepPlan) -> HostStep:
        seats_S = np.array(plan.seats, dtype=np.int64)
        starts_S = np.array(plan.starts, dtype=np.int64)
        counts_S = np.array(plan.counts, dtype=np.int64)
        samples_S = np.array(plan.samples, dtype=np.int64)
        query_starts_X = np.zeros(len(counts_S) + 1, dtype=np.int64)
        np.cumsum(counts_S, out=query_starts_X[1:])
        owners_N = np.repeat(np.arange(len(seats_S)), samples_S)
        from_end_N = samples_S.cumsum()[owners_N] - np.arange(len(owners_N))  # 1: the sequence's last token
        seats_N = seats_S[owners_N]
        return cls(
            seats_S,
            starts_S,
            counts_S,
            query_starts_X,
            query_starts_X[1:][owners_N] - from_end_N,
            seats_N,
            (starts_S + counts_S)[owners_N] - from_end_N + 1,
            np.where(samples_S[owners_N] == 1, seats_N, -1),
        )

    def facts(self, prompt_tokens: Ints) -> StepFacts:
        """Return what decides how the step is launched. prompt_tokens: lengths of prompts by seat."""
        prompts_S = self.starts_S < prompt_tokens[self.seats_S]
        return StepFacts(
            tokens=int(self.query_starts_X[-1]),
            sequences=len(self.seats_S),
            max_length=int((self.starts_S + self.counts_S).max(initial=0)),
            max_queries=int(self.counts_S.max(initial=0)),
            has_prompts=bool(prompts_S.any()),
        )


class PackedPlan(NamedTuple):
    """Views of one upload."""

    updates: SeatUpdates
    step: PackedStep
    rows: SampleRows
    copies: tuple[Tensor, Tensor]  # int32 [C]: blocks that are read, and written


def check_plan(plan: StepPlan, facts: StepFacts, limits: StepLimits, in_flight: bool) -> None:
    """Raise ValueError for a plan that is out of bounds.

    Token -1, the one that was sampled last at a seat, is a token only if a step is in flight.
    """
    assert len(plan.tokens) == facts.tokens, f"a plan declares {facts.tokens} tokens but carries {len(plan.tokens)}"
    if facts.max_length > limits.max_length:
        raise ValueError(f"a sequence of {facts.max_length} tokens is beyond the context of {limits.max_length}")
    if facts.tokens > limits.most_tokens:
        raise ValueError(f"a step of {facts.tokens} tokens is beyond engine.max_step_tokens, {limits.most_tokens}")
    lowest, highest = min(plan.tokens), max(plan.tokens)
    if lowest < -in_flight or highest >= limits.vocab_size:
        wrong = lowest if lowest < -in_flight else highest
        raise ValueError(f"token {wrong} is not in the model's vocabulary of {limits.vocab_size} tokens")


def pack_plan(plan: StepPlan, step: HostStep, joins_J12: Words, order_N: Ints, upload: Upload) -> PackedPlan:
    """Upload a plan as one array of words. order_N: its rows in the order of sampling, see `aligned_order`."""
    parts: list[npt.ArrayLike] = [
        _blocks(plan.grown),
        joins_J12.reshape(-1),
        step.seats_S,
        step.starts_S,
        step.query_starts_X,
        plan.tokens,
        step.rows_N[order_N],
        step.seats_N[order_N],
        step.positions_N[order_N],
        step.targets_N[order_N],
        [copy.source for copy in plan.copies],
        [copy.target for copy in plan.copies],
    ]
    arrays = [np.asarray(part, dtype=np.int32) for part in parts]
    starts = [0]
    for array in arrays:
        starts.append(starts[-1] + -(-len(array) // _ALIGNED_WORDS) * _ALIGNED_WORDS)
    words = np.zeros(starts[-1], dtype=np.int32)
    for start, array in zip(starts, arrays, strict=False):
        words[start : start + len(array)] = array
    device = upload(words)
    views = [device[start : start + len(array)] for start, array in zip(starts, arrays, strict=False)]
    return PackedPlan(
        SeatUpdates(views[0].view(-1, 3), views[1].view(-1, JOIN_WORDS)),
        PackedStep(*views[2:6]),
        SampleRows(*views[6:10]),
        (views[10], views[11]),
    )


def aligned_order(order_N: Ints, num_direct: int) -> Ints:
    """Return the order with its first row repeated between its two groups, so that views of both are aligned."""
    missing = -num_direct % _ALIGNED_WORDS
    if num_direct == len(order_N) or not missing:
        return order_N
    return np.concatenate([order_N[:num_direct], order_N[:1].repeat(missing), order_N[num_direct:]])


def _blocks(grown: tuple[Grown, ...]) -> list[int]:
    """Return appended blocks, flat: seat, index in its table, block."""
    words: list[int] = []
    for seat, first, blocks in grown:
        for index, block in enumerate(blocks, first):
            words += (seat, index, block)
    return words


def make_seat_state(limits: StepLimits, dummy_block: int, device: torch.device) -> SeatState:
    """Return the state of seats that nobody has taken: greedy, with every table entry at the dummy block."""
    count = limits.max_num_seqs + 1

    def filled(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((count,), value, dtype=dtype, device=device)

    return SeatState(
        torch.full((count, limits.table_blocks), dummy_block, dtype=torch.int32, device=device),
        filled(0, torch.int32),
        filled(0, torch.int32),
        filled(0, torch.int64),
        filled(0.0, torch.float32),
        filled(0, torch.int32),
        filled(-math.inf, torch.float32),
        filled(1.0, torch.float64),
    )


class StaticInputs:
    """Tensors that the forward pass of every step reads, with room for the largest step."""

    def __init__(self, limits: StepLimits, state: SeatState, device: torch.device) -> None:
        def zeros(count: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=device)

        tokens, seqs = limits.most_tokens, limits.max_num_seqs
        self._kept: dict[Rung, StepInputs] = {}
        self._whole = StepInputs(
            tokens_T=zeros(tokens),
            positions_T=zeros(tokens),
            slots_T=zeros(tokens),
            block_tables_SW=state.block_tables_PW,
            query_starts_X=zeros(seqs + 1),
            lengths_S=zeros(seqs),
            prompt_S=zeros(seqs, torch.bool),
            output_rows_N=None,
            max_length=limits.max_length,
            seats_S=zeros(seqs),
        )
        self.clear()

    def views(self, size: Rung) -> StepInputs:
        """Return the beginnings of the tensors, for a step of this size, with these bounds."""
        whole, seats_S = self._whole, self._whole.seats_S
        assert seats_S is not None
        return replace(
            whole,
            tokens_T=whole.tokens_T[: size.tokens],
            positions_T=whole.positions_T[: size.tokens],
            slots_T=whole.slots_T[: size.tokens],
            query_starts_X=whole.query_starts_X[: size.sequences + 1],
            lengths_S=whole.lengths_S[: size.sequences],
            prompt_S=whole.prompt_S[: size.sequences],
            seats_S=seats_S[: size.sequences],
            max_length=size.max_length,
            max_queries=size.max_queries,
            has_prompts=size.has_prompts,
        )

    def kept_views(self, rung: Rung) -> StepInputs:
        """Return the same as `views`, made once: for the rungs of graphs."""
        found = self._kept.get(rung)
        if found is None:
            found = self._kept[rung] = self.views(rung)
        return found

    def clear(self) -> None:
        """Make every view an empty step: padding alone."""
        whole = self._whole
        assert whole.seats_S is not None
        for tensor in (whole.tokens_T, whole.positions_T, whole.query_starts_X, whole.lengths_S, whole.prompt_S):
            tensor.zero_()
        whole.slots_T.fill_(-1)
        whole.seats_S.fill_(len(whole.block_tables_SW) - 1)
