"""Ops of steps on the device: the same tokens and logprobs as the host's sampler, and nothing that waits.

Torch's ops and Triton's kernels are tested alike, the kernels in the interpreter, with every access checked. The
interpreter's exp is replaced by torch's, so that equality is exact; other devices' differ in the last bits.
"""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch
from batchinfer_kernels.contract import StepInputs
from batchinfer_kernels.eager.philox import uniforms
from batchinfer_kernels.eager.step_kernels import EagerStepKernels
from batchinfer_kernels.steps import JOIN_WORDS, NOT_FINITE, SAMPLED, PackedStep, SeatUpdates
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.runner import philox
from batchinfer.runner.logprobs import token_logprobs
from batchinfer.runner.sample_tokens import Filters, argmax, draw
from tests.kernels.seats import GREEDY, Seat, ints, sample_rows_of, sampled_rows, seat_state
from tests.runner.test_sample_tokens import chi_square, kept


@pytest.fixture(params=["eager", "triton"])
def unchecked(request, monkeypatch):
    """Return the kernels under test. Triton's have the exp, and so the weights, of torch's, bit for bit."""
    if request.param == "eager":
        return EagerStepKernels()
    steps = interpreted_kernels()
    exp_of_torch(monkeypatch)
    return steps


@pytest.fixture
def steps(unchecked):
    """Return the same, with every access of Triton's checked."""
    if isinstance(unchecked, EagerStepKernels):
        yield unchecked
        return
    from tests.kernels.access_checker import checked_accesses

    with checked_accesses():
        yield unchecked


def interpreted_kernels():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    from batchinfer_kernels.triton.step_kernels import TritonStepKernels

    from tests.kernels import interpreter

    interpreter.install()
    return TritonStepKernels()


def exp_of_torch(monkeypatch):
    from triton.runtime import interpreter

    def create_exp(self, values):
        exp = torch.from_numpy(np.ascontiguousarray(values.data)).exp().numpy()
        return interpreter.TensorHandle(exp, values.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_exp", create_exp)


def sample(steps, logits_NV, seats, positions=None, parameters=None):
    """Return tokens, status and state after sampling row n of the logits with seat n, or `parameters[n]`."""
    state = seat_state(parameters or seats)
    numbers = range(len(logits_NV))
    out = sampled_rows(len(logits_NV))
    before = logits_NV.clone()
    steps.sample_rows(logits_NV, sample_rows_of(numbers, positions or [3] * len(logits_NV)), state, out)
    assert torch.equal(before.view(torch.int32), logits_NV.view(torch.int32)), "logits are not the op's to change"
    return out.tokens_N.tolist(), out.status_N.tolist(), state


def host_tokens(logits_NV, seats, positions):
    """Return the tokens of the host's sampler."""
    tokens = argmax(logits_NV)[1]
    rows_R = np.array([row for row, seat in enumerate(seats) if seat.temperature], dtype=np.int64)
    if len(rows_R):
        some = [seats[row] for row in rows_R]
        keys = np.array([seat.key for seat in some], dtype=np.uint64)
        filters = Filters(
            np.array([seat.temperature for seat in some], dtype=np.float32),
            np.array([seat.top_k for seat in some], dtype=np.int64),
            np.array([seat.top_p for seat in some], dtype=np.float64),
            np.array([seat.min_p for seat in some], dtype=np.float64),
            philox.uniforms(keys, np.array(positions, dtype=np.int64)[rows_R]),
        )
        tokens[torch.from_numpy(rows_R)] = draw(logits_NV, rows_R, filters)
    return tokens.tolist()


def random_logits(rows, vocab, seed=0, spread=2.0, step=0.0):
    """Return logits; multiples of `step` if it is given, so that many are equal."""
    logits_NV = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread
    return (logits_NV / step).round_() * step if step else logits_NV


KEY = 0xFEDC_BA98_7654_3210
SEATS = {
    "greedy": GREEDY,
    "plain": Seat(key=KEY),
    "hot": Seat(temperature=3.0, key=1),
    "cold": Seat(temperature=0.1, key=2),
    "top_k 1": Seat(top_k=1, key=3),
    "top_k": Seat(top_k=20, key=4),
    "wide top_k": Seat(top_k=700, temperature=2.0, key=5),
    "top_k of all": Seat(top_k=1 << 30, key=6),
    "top_p": Seat(top_p=0.8, key=7),
    "tiny top_p": Seat(top_p=1e-9, key=8),
    "wide top_p": Seat(top_p=0.99, temperature=2.0, key=9),
    "min_p": Seat(min_p=0.05, key=10),
    "largest min_p": Seat(min_p=1.0, key=11),
    "all": Seat(0.8, 30, 0.9, 0.02, KEY + 1),
    "wide all": Seat(1.5, 600, 0.95, 0.001, KEY + 2),
}


@pytest.mark.parametrize(("vocab", "step"), [(1, 0.0), (33, 0.5), (1000, 0.0), (3001, 0.5)])
def test_tokens_are_those_of_the_hosts_sampler(steps, vocab, step):
    """Rows of all parameters in one call; logits in steps tie at every threshold."""
    seats = list(SEATS.values())
    positions = [position * 1000 for position in range(len(seats))]
    logits_NV = random_logits(len(seats), vocab, vocab, step=step)
    tokens, status, state = sample(steps, logits_NV, seats, positions)
    assert tokens == host_tokens(logits_NV, seats, positions)
    assert status == [SAMPLED] * len(seats)
    assert state.last_tokens_P.tolist() == [*tokens, 0]


@pytest.mark.parametrize("vocab", [49_152, 50_257])
def test_tokens_of_large_vocabularies(unchecked, vocab):
    seats = [SEATS[case] for case in ("greedy", "top_p", "all")]
    logits_NV = random_logits(len(seats), vocab, spread=4.0)
    assert sample(unchecked, logits_NV, seats)[0] == host_tokens(logits_NV, seats, [3] * len(seats))


def test_tokens_of_the_largest_vocabularies():
    seats = [SEATS[case] for case in ("greedy", "top_p", "all")]
    logits_NV = random_logits(len(seats), 262_144, spread=4.0)
    assert sample(EagerStepKernels(), logits_NV, seats)[0] == host_tokens(logits_NV, seats, [3] * len(seats))


def test_blocks_widen_with_the_vocabulary(monkeypatch):
    """Triton's kernels hold one number per block in registers, so larger vocabularies have larger blocks."""
    steps = interpreted_kernels()
    from batchinfer_kernels.triton import block_maxima

    monkeypatch.setattr(block_maxima, "_MOST_BLOCKS", 4)
    seats = [SEATS[case] for case in ("greedy", "plain", "all")]
    logits_NV = random_logits(len(seats), 2500)
    tokens = sample(steps, logits_NV, seats)[0]
    assert tokens == host_tokens(logits_NV, seats, [3] * len(seats))
    ids_NC = steps.gather_logprobs(logits_NV, ints(tokens), 5).ids_NC
    assert ids_NC.tolist() == logits_NV.topk(5).indices.tolist()


@st.composite
def seats_of(draw_value):
    return Seat(
        temperature=draw_value(st.sampled_from([0.0, 1e-5, 0.3, 1.0, 1.7, 1e30])),
        top_k=draw_value(st.sampled_from([0, 1, 2, 5, 40, 64, 65, 1000])),
        top_p=draw_value(st.one_of(st.just(1.0), st.floats(1e-12, 1.0))),
        min_p=draw_value(st.one_of(st.just(0.0), st.floats(0.0, 1.0))),
        key=draw_value(st.integers(0, 2**64 - 1)),
    )


mixes = given(
    st.lists(seats_of(), min_size=1, max_size=4),
    st.integers(2, 300),
    st.integers(0, 2**20),
    st.sampled_from([0.0, 0.25, 4.0]),
)


def check_mix(steps, seats, vocab, position, step):
    logits_NV = random_logits(len(seats), vocab, vocab + position, step=step)
    positions = [position] * len(seats)
    assert sample(steps, logits_NV, seats, positions)[0] == host_tokens(logits_NV, seats, positions)


@mixes
@settings(max_examples=60, deadline=None)
def test_any_mix_of_parameters(seats, vocab, position, step):
    check_mix(EagerStepKernels(), seats, vocab, position, step)


def test_any_mix_of_parameters_in_triton(monkeypatch):
    steps = interpreted_kernels()
    exp_of_torch(monkeypatch)

    @mixes
    @settings(max_examples=8, deadline=None)
    def check(seats, vocab, position, step):
        check_mix(steps, seats, vocab, position, step)

    check()


def test_another_exp_changes_next_to_nothing():
    """NumPy's exp: a weight's last bits change no token of these rows, and the eighth digit of a logprob at most."""
    steps = interpreted_kernels()
    seats = [SEATS[case] for case in ("greedy", "plain", "top_p", "wide all")]
    logits_NV = random_logits(len(seats), 1000)
    tokens = sample(steps, logits_NV, seats)[0]
    assert tokens == host_tokens(logits_NV, seats, [3] * len(seats))
    mine = steps.gather_logprobs(logits_NV, ints(tokens), 5)
    theirs = EagerStepKernels().gather_logprobs(logits_NV, ints(tokens), 5)
    assert torch.equal(mine.ids_NC, theirs.ids_NC)
    assert (mine.values_NC - theirs.values_NC).abs().max() < 1e-7


def test_rows_are_read_once_or_twice():
    """Once for the maxima of blocks; then greedy tokens and filters need a few blocks, plain draws all of them."""
    steps = interpreted_kernels()
    from tests.kernels.access_checker import checked_accesses

    logits_NV = random_logits(2, 12_288, spread=4.0)
    for seat, passes in ((GREEDY, 1), (Seat(), 2), (Seat(top_k=5), 1.6)):
        with checked_accesses() as launches:
            sample(steps, logits_NV, [seat] * 2)
        assert len(launches) == 2
        assert sum(launch.loaded_bytes for launch in launches) < 1.1 * passes * logits_NV.nbytes


def test_a_row_depends_on_nothing_beside_it(steps):
    seats = [SEATS[case] for case in ("greedy", "plain", "top_p", "all")]
    logits_NV = random_logits(len(seats), 500, step=0.125)
    tokens = sample(steps, logits_NV, seats)[0]
    order = np.random.default_rng(0).permutation(len(seats)).tolist()
    assert sample(steps, logits_NV[order], [seats[row] for row in order])[0] == [tokens[row] for row in order]
    alone = [sample(steps, logits_NV[row : row + 1], [seats[row]])[0][0] for row in range(len(seats))]
    assert alone == tokens


@pytest.mark.parametrize("seat", [GREEDY, Seat(top_k=3, top_p=0.5)], ids=["greedy", "filtered"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_without_a_finite_maximum_is_reported(steps, value, seat):
    logits_NV = random_logits(3, 70)
    sound = sample(steps, logits_NV, [seat] * 3)[0]
    if value == -math.inf:
        logits_NV[1] = value
    else:
        logits_NV[1, 69] = value
    tokens, status, state = sample(steps, logits_NV, [seat] * 3)
    assert tokens == [sound[0], 0, sound[2]]
    assert status == [SAMPLED, NOT_FINITE, SAMPLED]
    assert state.last_tokens_P.tolist() == [*tokens, 0]


@pytest.mark.parametrize("seat", [GREEDY, Seat(key=1), Seat(top_k=5, key=1)], ids=["greedy", "plain", "filtered"])
def test_masked_tokens_are_never_drawn(steps, seat):
    logits_NV = torch.full((1, 300), -math.inf)
    logits_NV[0, 217] = -1000.0
    assert sample(steps, logits_NV, [seat])[0] == [217]


def test_greedy_takes_the_lowest_of_equals(steps):
    logits_NV = torch.zeros(3, 1030)
    logits_NV[1, [700, 5, 1029]] = 2.0
    logits_NV[2] = -0.0
    logits_NV[2, [3, 900]] = 0.0  # equal to -0
    assert sample(steps, logits_NV, [GREEDY] * 3)[0] == [0, 5, 0]


def test_only_targets_get_a_last_token(steps):
    """Rows of one seat, a verified draft, sample at their own positions; one of them is the seat's last token."""
    seats = [Seat(key=5, last_token=90), Seat(key=6, last_token=91)]
    logits_NV = random_logits(1, 100).expand(5, 100).contiguous()
    rows, state, out = (
        sample_rows_of([0, 0, 0, 1, 2], [7, 8, 9, 7, 0], [-1, 0, -1, -1, -1]),
        seat_state(seats),
        sampled_rows(5),
    )
    steps.sample_rows(logits_NV, rows, state, out)
    keys = [seats[0], seats[0], seats[0], seats[1], GREEDY]
    assert out.tokens_N.tolist() == host_tokens(logits_NV, keys, [7, 8, 9, 7, 0])
    assert state.last_tokens_P.tolist() == [int(out.tokens_N[1]), 91, 0]


@pytest.mark.parametrize("case", ["plain", "top_k", "top_p", "min_p", "all"])
def test_draws_follow_the_exact_distribution(case):
    """Only torch's ops can draw often enough; the other kernels give the same tokens."""
    seat, draws = SEATS[case], 4000
    row_V = random_logits(1, 60, seed=1)
    tokens = sample(
        EagerStepKernels(),
        row_V.expand(draws, -1).contiguous(),
        [seat] * draws,
        list(range(draws)),
    )[0]
    counts = np.bincount(tokens, minlength=60)
    expected = kept(row_V[0].numpy(), seat.temperature, seat.top_k, seat.top_p, seat.min_p)
    statistic, limit = chi_square(counts, expected)
    assert statistic < limit


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5), st.integers(0, 2**31 - 1))
def test_uniform_numbers_are_the_hosts(keys, position):
    keys_N = np.array([0, 2**64 - 1, 2**63, *keys], dtype=np.uint64)
    positions_N = np.full(len(keys_N), position)
    numbers = uniforms(torch.from_numpy(keys_N.view(np.int64)), torch.from_numpy(positions_N))
    assert np.array_equal(numbers.numpy(), philox.uniforms(keys_N, positions_N))


# -- logprobs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab", "step"), [(3, 0.5), (33, 0.0), (1000, 0.5), (3001, 0.0)])
def test_logprobs_are_those_of_the_host(steps, vocab, step):
    logits_NV = random_logits(6, vocab, vocab, step=step)
    logits_NV[0, :2] = torch.tensor([0.0, -0.0])  # equal
    tokens = np.array([0, vocab - 1, 1, 2, vocab // 2, 1])
    named = [(), (2, 0, 1, 2), (), (vocab - 1,), (), ()]
    named_NC = ints([[*row, *[-1] * (4 - len(row))] for row in named])
    for best, names in ((0, None), (7, None), (20, named), (2, named)):
        rows = steps.gather_logprobs(logits_NV, ints(tokens), best, None if names is None else named_NC)
        width = best if names is None else max(best, 4)
        assert rows.ids_NC.shape == rows.values_NC.shape == (6, width)
        for row, expected in enumerate(
            token_logprobs(logits_NV, logits_NV.amax(1), tokens, np.full(6, best), names or ())
        ):
            ids, values = rows.ids_NC[row].tolist(), rows.values_NC[row].tolist()
            assert float(rows.own_N[row]) == expected.logprob
            assert tuple(zip(ids, values, strict=True))[: len(expected.top)] == expected.top
            assert set(ids[len(expected.top) :]) <= {-1}
            assert set(values[len(expected.top) :]) <= {0.0}


def test_logprobs_do_not_depend_on_other_rows(steps):
    logits_NV = random_logits(5, 777, step=0.125)
    tokens_N = ints([5, 6, 7, 8, 9])
    together = steps.gather_logprobs(logits_NV, tokens_N, 5)
    for row in range(5):
        alone = steps.gather_logprobs(logits_NV[row : row + 1], tokens_N[row : row + 1], 5)
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(together, alone, strict=True))


# -- state by seat and inputs of a step ----------------------------------------------------------------------------


def words_of(seat, number):
    """Return the uploaded row of a sequence that joins, as its layout is documented."""
    row = np.zeros(JOIN_WORDS, dtype=np.int32)
    row[0], row[1], row[5] = number, seat.prompt_tokens, seat.top_k
    row[2:4] = np.array([seat.key], dtype=np.uint64).view(np.int32)
    row[4:5] = np.array([seat.temperature], dtype=np.float32).view(np.int32)
    with np.errstate(divide="ignore"):
        row[6:7] = np.log(np.array([seat.min_p])).astype(np.float32).view(np.int32)
    row[7:9] = np.array([seat.top_p]).view(np.int32)
    return row


@pytest.mark.parametrize("appended", [0, 1, 300])
@pytest.mark.parametrize("joining", [0, 1, 9])
def test_updates_reach_the_state(steps, appended, joining):
    generator = np.random.default_rng(appended + joining)
    state, expected = seat_state([Seat()] * 10, 40), seat_state([Seat()] * 10, 40)
    places = generator.permutation(400)[:appended]
    blocks_U3 = ints(np.stack([places // 40, places % 40, generator.integers(0, 2**31 - 1, appended)], axis=1))
    joins = list(zip(generator.permutation(10).tolist(), list(SEATS.values())[:joining], strict=False))
    joins_J12 = ints(np.array([words_of(seat, number) for number, seat in joins]).reshape(-1, JOIN_WORDS))
    steps.update_seats(SeatUpdates(blocks_U3, joins_J12), state)
    expected.block_tables_PW[blocks_U3[:, 0].long(), blocks_U3[:, 1].long()] = blocks_U3[:, 2]
    for number, seat in joins:
        for column, value in zip(expected[2:], seat_state([seat])[2:], strict=True):
            column[number] = value[0]
    for mine, theirs in zip(state, expected, strict=True):
        assert torch.equal(mine, theirs)


def empty_inputs(tokens, sequences, state, dtype=torch.int32):
    """Return static buffers filled with what no step writes."""

    def buffer(count, kind=dtype):
        return torch.full((count,), 99, dtype=kind)

    return StepInputs(
        buffer(tokens), buffer(tokens), buffer(tokens), state.block_tables_PW, buffer(sequences + 1), buffer(sequences),
        torch.ones(sequences, dtype=torch.bool), None, 1 << 20, buffer(sequences),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (30, 0), (5, 300)])
@pytest.mark.parametrize("block_size", [1, 16])
def test_steps_expand_with_padding(steps, block_size, padding, dtype):
    """A decode, a chunk of a prompt, a verified draft, the rest of a prompt, and one token of a prompt."""
    counts, starts, seats = [1, 21, 4, 300, 1], [40, 16, 9, 0, 2], [3, 0, 4, 1, 6]
    generator = np.random.default_rng(block_size)
    blocks = generator.permutation(8 * 320).reshape(8, 320)
    state = seat_state(
        [Seat(prompt_tokens=1 + 40 * (n % 2 == 0), last_token=1000 + n, blocks=tuple(blocks[n])) for n in range(8)], 320
    )
    state.prompt_tokens_P[[0, 1, 4, 6, 3]] = ints([200, 300, 9, 3, 40])
    tokens = generator.integers(0, 900, sum(counts))
    tokens[[0, 22]] = -1  # sampled last
    starts_X = np.cumsum([0, *counts])
    step = PackedStep(ints(seats), ints(starts), ints(starts_X), ints(tokens))
    out = empty_inputs(len(tokens) + padding[0], len(seats) + padding[1], state, dtype)
    steps.expand_step(step, state, block_size, out)

    position = np.concatenate([np.arange(s, s + c) for s, c in zip(starts, counts, strict=True)])
    seat_of = np.repeat(seats, counts)
    tokens[0], tokens[22] = 1003, 1004
    slots = blocks[seat_of, position // block_size] * block_size + position % block_size
    more_tokens, more_sequences = padding
    assert out.tokens_T.tolist() == [*tokens, *[0] * more_tokens]
    assert out.positions_T.tolist() == [*position, *[0] * more_tokens]
    assert out.slots_T.tolist() == [*slots, *[-1] * more_tokens]
    assert out.query_starts_X.tolist() == [*starts_X, *[len(tokens)] * more_sequences]
    assert out.lengths_S.tolist() == [*np.add(starts, counts), *[0] * more_sequences]
    assert out.prompt_S.tolist() == [False, True, False, True, True, *[False] * more_sequences]
    assert out.seats_S.tolist() == [*seats, *[8] * more_sequences]


def test_no_op_waits_for_the_device():
    """On the meta device there is nothing to read back: whatever depends on values raises."""
    steps = EagerStepKernels()

    def meta(values):
        return type(values)(*(value.to("meta") if isinstance(value, torch.Tensor) else value for value in values))

    state = meta(seat_state([Seat()] * 5, 8))
    steps.update_seats(meta(SeatUpdates(ints([[0, 1, 2]]), ints([[0] * 12]))), state)
    inputs = empty_inputs(8, 6, state)
    step = meta(PackedStep(ints([0, 1]), ints([0, 4]), ints([0, 3, 4]), ints([1, 2, 3, -1])))
    fields = (getattr(inputs, name) for name in StepInputs.__slots__)
    steps.expand_step(
        step, state, 16, StepInputs(*(f.to("meta") if isinstance(f, torch.Tensor) else f for f in fields))
    )
    logits_NV = torch.empty(4, 100, device="meta")
    steps.sample_rows(logits_NV, meta(sample_rows_of([0, 1, 2, 3], [1] * 4)), state, meta(sampled_rows(4)))
    rows = steps.gather_logprobs(
        logits_NV, torch.empty(4, dtype=torch.int32, device="meta"), 5, ints([[-1]] * 4).to("meta")
    )
    assert rows.ids_NC.shape == (4, 5)
