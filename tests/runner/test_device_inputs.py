"""A step's one upload: what is sampled where, against plain loops, and what views of the words hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.engine.plan import Copy
from batchinfer.ops.pretend import PretendStreams
from batchinfer.ops.streams import UploadBuffer
from batchinfer.runner.device_inputs import HostStep, pack_plan
from tests.runner.test_model_runner import plan

SEATS = 9


@st.composite
def plans(draw):
    work, grown = [], []
    for seat in draw(st.permutations(range(SEATS)))[: draw(st.integers(0, SEATS))]:
        tokens = draw(st.lists(st.integers(-1, 95), min_size=1, max_size=5))
        samples = draw(st.sampled_from([0, 1, len(tokens)]))
        work.append((seat, draw(st.integers(0, 40)), tokens, samples))
        blocks = draw(st.lists(st.integers(0, 99), max_size=3))
        grown += [(seat, draw(st.integers(0, 9)), tuple(blocks))] if blocks else []
    copies = draw(st.lists(st.builds(Copy, st.integers(0, 99), st.integers(0, 99)), max_size=3))
    return replace(plan((), grown, work), copies=tuple(copies))


@settings(max_examples=60, deadline=None)
@given(plans(), st.integers(0, 3), st.randoms(use_true_random=False))
def test_words_of_a_step(step_plan, joins, rng):
    step = HostStep.of_plan(step_plan)
    rows, first = [], 0
    for seat, start, count, samples in zip(
        step_plan.seats, step_plan.starts, step_plan.counts, step_plan.samples, strict=True
    ):
        target = seat if samples == 1 else -1
        rows += [(first + row, seat, start + row + 1, target) for row in range(count - samples, count)]
        first += count
    order = list(range(len(rows)))
    rng.shuffle(order)
    joins_J12 = np.arange(12 * joins, dtype=np.int32).reshape(joins, 12)
    buffer = UploadBuffer(PretendStreams(), torch.device("cpu"))
    packed = pack_plan(step_plan, step, joins_J12, np.array(order, dtype=np.int64), buffer.place)
    assert list(zip(*(values.tolist() for values in packed.rows), strict=True)) == [rows[one] for one in order]
    assert packed.step.seats_S.tolist() == step_plan.seats and packed.step.starts_S.tolist() == step_plan.starts
    assert packed.step.query_starts_X.diff().tolist() == step_plan.counts and packed.step.query_starts_X[0] == 0
    assert packed.step.tokens_T.tolist() == step_plan.tokens
    assert packed.updates.joins_J12.tolist() == joins_J12.tolist()
    blocks = [
        [seat, index, block] for seat, first, added in step_plan.grown for index, block in enumerate(added, first)
    ]
    assert packed.updates.blocks_U3.tolist() == blocks
    assert list(zip(*(numbers.tolist() for numbers in packed.copies), strict=True)) == list(step_plan.copies)
    for tensor in (*packed.updates, *packed.step, *packed.rows, *packed.copies):
        assert tensor.dtype == torch.int32 and tensor.data_ptr() % 16 == 0
