"""The sampler against a naive one that knows one row, plain lists and dense arrays; and against transformers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from batchinfer.engine.plan import Join
from batchinfer.request import Request, SamplingParams
from batchinfer.runner.philox import uniforms
from batchinfer.runner.sampler import Sampler


def request(params: SamplingParams, prompt=(1, 2, 3), key=0, stop_ids=(), bad_words=()) -> Request:
    return Request(0, list(prompt), params, 100, key, frozenset(stop_ids), tuple(bad_words))


class Batch:
    """Sequences on seats, stepped together: what the runner does, without a model."""

    def __init__(self, requests: list[Request], vocab: int, seats: list[int] | None = None) -> None:
        self.vocab = vocab
        self.requests = requests
        self.seats = seats or list(range(len(requests)))
        self.outputs: list[list[int]] = [[] for _ in requests]
        self.sampler = Sampler(max(self.seats) + 1, vocab)
        for number in range(len(requests)):
            self.join(number)

    def join(self, number: int) -> None:
        one = self.requests[number]
        self.sampler.seat_sequence(Join.of_request(self.seats[number], one, self.outputs[number]), one.constraint)

    def step(self, logits: torch.Tensor, members: list[int] | None = None):
        """One token for each of `members`, whose logits are the rows in that order."""
        members = list(range(len(self.requests))) if members is None else members
        positions = [len(self.requests[number].prompt) + len(self.outputs[number]) for number in members]
        seats = np.array([self.seats[number] for number in members], dtype=np.int64)
        result = self.sampler.sample(logits.clone(), seats, np.array(positions, dtype=np.int64))
        for row, number in enumerate(members):
            if not (result.failed and row in result.failed):
                self.outputs[number].append(result.tokens[row])
        return result


def naive_edits(logits: np.ndarray, one: Request, output: list[int]) -> np.ndarray:
    """All that changes logits before the draw, for one row, in float64."""
    params = one.params
    row = logits.astype(np.float64)
    if params.allowed_token_ids is not None:
        banned = np.ones(len(row), dtype=bool)
        banned[list(params.allowed_token_ids)] = False
        row[banned] = -math.inf
    for word in one.bad_words:
        if list(word[:-1]) == output[len(output) - len(word) + 1 :] and len(output) >= len(word) - 1:
            row[word[-1]] = -math.inf
    if len(output) < params.min_tokens:
        row[list(one.stop_ids)] = -math.inf
    for token, amount in (params.logit_bias or {}).items():
        row[token] += amount
    for token in set(one.prompt) | set(output):
        row[token] = (
            row[token] / params.repetition_penalty if row[token] > 0 else row[token] * params.repetition_penalty
        )
    for token in set(output):
        row[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    return row


def random_request(generator: np.random.Generator, vocab: int) -> Request:
    def sometimes(value, otherwise):
        return value if generator.random() < 0.4 else otherwise

    def ids(count):
        return tuple(int(token) for token in generator.integers(0, vocab, count))

    params = SamplingParams(
        temperature=sometimes(0.0, float(generator.uniform(0.3, 2))),
        top_k=sometimes(int(generator.integers(1, vocab)), 0),
        top_p=sometimes(float(generator.uniform(0.2, 1)), 1.0),
        min_p=sometimes(float(generator.uniform(0, 0.2)), 0.0),
        repetition_penalty=sometimes(float(generator.uniform(0.5, 2)), 1.0),
        presence_penalty=sometimes(float(generator.uniform(-2, 2)), 0.0),
        frequency_penalty=sometimes(float(generator.uniform(-2, 2)), 0.0),
        logit_bias=sometimes(dict(zip(ids(3), (5.0, -3.0, 1.5), strict=True)), None),
        allowed_token_ids=sometimes(ids(vocab // 2), None),
        min_tokens=int(sometimes(generator.integers(1, 6), 0)),
        logprobs=sometimes(int(generator.integers(0, 6)), None),
    )
    words = tuple(ids(int(generator.integers(1, 4))) for _ in range(sometimes(4, 0)))
    return request(params, ids(int(generator.integers(1, 9))), int(generator.integers(0, 2**63)), ids(2), words)


def mass_above(mass: np.ndarray) -> np.ndarray:
    """For each token, the mass of the strictly more probable ones."""
    ascending = np.sort(mass)
    return mass.sum() - ascending.cumsum()[np.searchsorted(ascending, mass, side="right") - 1]


def naive_sample(logits: np.ndarray, one: Request, output: list[int]) -> tuple[int, np.ndarray]:
    """Return the token, and its distances to the running sums of the distribution (empty if greedy)."""
    params = one.params
    row = naive_edits(logits, one, output)
    if params.temperature == 0 or params.top_k == 1:
        return int(row.argmax()), np.zeros(0)
    mass = np.exp((row - row.max()) / params.temperature)
    keep = mass >= params.min_p * mass.max()
    if 0 < params.top_k < len(mass):
        keep &= mass >= np.sort(mass)[-params.top_k]
    mass = np.where(keep, mass, 0)
    mass /= mass.sum()
    above = mass_above(mass)
    mass = np.where((above < params.top_p) | (params.top_p == 1), mass, 0)
    sums = (mass / mass.sum()).cumsum()
    position = len(one.prompt) + len(output)
    uniform = uniforms(np.array([one.key], dtype=np.uint64), np.array([position]))[0]
    return int(np.searchsorted(sums, uniform, side="right")), np.abs(sums - uniform)


@pytest.mark.parametrize("vocab", [11, 60, 1500])
def test_random_requests_equal_the_naive_sampler(vocab):
    """Everything at once, for 12 steps, so that counts, tails and min_tokens move, and seats change hands.

    Exact up to float32's rounding.
    """
    generator = np.random.default_rng(vocab)
    batch = Batch([random_request(generator, vocab) for _ in range(64)], vocab)
    differ = compared = 0
    for _ in range(12):
        # coarse logits: greedy rows see no near ties that float32 arithmetic could turn around
        logits = torch.from_numpy(generator.permuted(np.tile(np.linspace(-6, 6, vocab), (64, 1)), axis=1)).float()
        for number in np.nonzero(generator.random(64) < 0.15)[0].tolist():
            batch.requests[number] = random_request(generator, vocab)
            batch.outputs[number] = generator.integers(0, vocab, generator.integers(0, 4)).tolist()
            batch.join(number)
        before = [list(output) for output in batch.outputs]
        result = batch.step(logits)
        for number, one in enumerate(batch.requests):
            row = naive_edits(logits[number].numpy(), one, before[number])
            if not np.isfinite(row.max()):
                assert result.failed and "exclude every token" in result.failed[number]
                continue
            assert not (result.failed and number in result.failed)
            token, margins = naive_sample(logits[number].numpy(), one, before[number])
            compared += 1
            if token != result.tokens[number]:
                differ += 1
                near = np.sort(row[np.isfinite(row)])[-2:] if not len(margins) else margins
                assert np.ptp(near) < 1e-4 if not len(margins) else near.min() < 1e-4, (number, one)
    assert compared > 600 and differ <= compared // 200


@pytest.mark.parametrize("steps", [10])
def test_a_sequence_is_the_same_alone_in_any_batch_and_after_preemption(steps):
    generator = np.random.default_rng(7)
    vocab, count = 700, 24
    requests = [random_request(generator, vocab) for _ in range(count)]
    logits = torch.randn(steps, count, vocab, generator=torch.Generator().manual_seed(0)) * 2
    logits[:, ::2] = logits[:, ::2].bfloat16().float()
    together = Batch(requests, vocab)
    results = [together.step(logits[step]) for step in range(steps)]
    failed = {row for result in results for row in result.failed or ()}
    for number in range(count):
        alone = Batch([requests[number]], vocab)
        for step in range(steps):
            result = alone.step(logits[step, [number]])
            if number not in failed:
                logprobs = results[step].logprobs
                assert result.tokens[0] == results[step].tokens[number]
                assert (result.logprobs and result.logprobs[0]) == (logprobs and logprobs[number])
    # other seats, another order, only some of them in each step, and now and then a new start on the seat
    seats = generator.permutation(40)[:count].tolist()
    scattered = Batch(requests, vocab, seats)
    todo = dict.fromkeys(range(count), 0)
    while todo:
        members = [number for number in generator.permutation(list(todo)).tolist() if generator.random() < 0.6]
        if not members:
            continue
        scattered.step(torch.stack([logits[todo[number], number] for number in members]), members)
        for number in members:
            todo[number] += 1
            if todo[number] == steps:
                del todo[number]
            elif generator.random() < 0.2:
                scattered.join(number)
    for number in set(range(count)) - failed:
        assert scattered.outputs[number] == together.outputs[number]


def test_greedy_takes_the_largest_and_the_first_of_equals():
    batch = Batch([request(SamplingParams(temperature=0.0))] * 3, 2000)
    logits = torch.randn(3, 2000)
    logits[1, [40, 1990]] = 99.0
    result = batch.step(logits)
    assert result.tokens == logits.argmax(1).tolist() and result.tokens[1] == 40
    assert result.logprobs is None and result.failed is None


def test_greedy_rows_are_not_disturbed_by_random_ones():
    params = [SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(temperature=0.0, logprobs=2)]
    batch = Batch([request(one) for one in params], 300)
    logits = torch.randn(3, 300)
    result = batch.step(logits)
    assert [result.tokens[0], result.tokens[2]] == [int(logits[0].argmax()), int(logits[2].argmax())]


def test_keys_and_positions_give_other_tokens():
    one = SamplingParams()
    logits = torch.zeros(200, 1000)
    batch = Batch([request(one, key=key) for key in range(200)], 1000)
    first, second = batch.step(logits).tokens, batch.step(logits).tokens
    assert len(set(first)) > 150 and first != second
    again = Batch([request(one, key=key) for key in range(200)], 1000)
    assert again.step(logits).tokens == first
    longer = Batch([request(one, prompt=(1, 2, 3, 4), key=key) for key in range(200)], 1000)
    assert longer.step(logits).tokens == second, "the key and the position decide, not what is prompt and what output"
    assert (
        Batch([request(one, key=2**64 - 1), request(one, key=-1)], 1000)
        .step(logits[:2])
        .tokens.count(Batch([request(one, key=2**64 - 1)], 1000).step(logits[:1]).tokens[0])
        == 2
    )


def test_logprobs_are_the_log_softmax_of_the_unmodified_logits():
    vocab = 5000
    params = [
        SamplingParams(temperature=0.0, logprobs=0),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.3, top_k=5, logprobs=20, repetition_penalty=1.5, logit_bias={9: 50.0}),
        SamplingParams(temperature=2.0, logprobs=5, allowed_token_ids=(4, 8)),
    ]
    batch = Batch([request(one) for one in params], vocab)
    logits = torch.randn(4, vocab) * 4
    exact = logits.double().log_softmax(1)
    result = batch.step(logits)
    assert result.logprobs is not None and result.logprobs[1] is None
    for row, count in ((0, 0), (2, 20), (3, 5)):
        one = result.logprobs[row]
        assert one.token_id == result.tokens[row] and len(one.top) == count
        assert one.logprob == pytest.approx(float(exact[row, one.token_id]), abs=5e-6)
        assert [token for token, _ in one.top] == exact[row].topk(count).indices.tolist()
        assert [value for _, value in one.top] == pytest.approx(exact[row].topk(count).values.tolist(), abs=5e-6)
        assert dict(one.top).get(one.token_id, one.logprob) == one.logprob
    assert result.tokens[2] == 9 and result.tokens[3] in (4, 8)


def test_equal_logits_have_their_logprobs_in_order_of_ids():
    batch = Batch([request(SamplingParams(temperature=0.0, logprobs=3))], 4000)
    one = batch.step(torch.zeros(1, 4000)).logprobs[0]
    assert [token for token, _ in one.top] == [0, 1, 2]
    assert {value for _, value in one.top} == {one.logprob}
    assert one.logprob == pytest.approx(-math.log(4000), abs=1e-6)


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"logprobs": 3}, {"top_p": 0.5, "frequency_penalty": 1.0}])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("vocab", [50, 3001])
def test_logits_that_are_not_finite_fail_their_row_alone(params, bad, vocab):
    batch = Batch([request(SamplingParams(**params), key=key) for key in range(5)], vocab)
    logits = torch.randn(5, vocab)
    good = Batch(batch.requests, vocab).step(logits)
    logits[3, :: 1 if bad < 0 else 17] = bad
    result = batch.step(logits)
    assert set(result.failed) == {3} and "not finite" in result.failed[3]
    assert [token for row, token in enumerate(result.tokens) if row != 3] == [
        token for row, token in enumerate(good.tokens) if row != 3
    ]
    if result.logprobs:
        assert result.logprobs[3] is None and all(math.isfinite(one.logprob) for one in result.logprobs if one)


def test_parameters_that_the_model_cannot_honour_fail_their_row_alone():
    params = [
        SamplingParams(allowed_token_ids=(3, 100)),
        SamplingParams(logit_bias={-1: 1.0}),
        SamplingParams(allowed_token_ids=(5,), min_tokens=2),
        SamplingParams(allowed_token_ids=(5,), min_tokens=2),
        SamplingParams(temperature=0.0),
    ]
    requests = [request(one, stop_ids=(5, 2**70)) for one in params[:3]] + [request(one) for one in params[3:]]
    result = Batch(requests, 100).step(torch.randn(5, 100))
    assert result.failed[0] == "allowed_token_ids names token 100, and the model's vocabulary has 100 tokens"
    assert result.failed[1].startswith("logit_bias names token -1")
    assert "exclude every token" in result.failed[2]
    assert set(result.failed) == {0, 1, 2} and result.tokens[3] == 5


def test_a_seat_forgets_the_parameters_of_the_sequence_before():
    special = SamplingParams(
        temperature=0.0,
        logit_bias={7: 100.0},
        repetition_penalty=2.0,
        min_tokens=9,
        logprobs=2,
        allowed_token_ids=(7, 8),
    )
    sampler = Sampler(2, 50)
    logits = torch.randn(1, 50)
    seat, position = np.array([1]), np.array([3])
    for _ in range(3):
        sampler.seat_sequence(Join.of_request(1, request(special, stop_ids=(7,), bad_words=((1, 2, 3), (4,))), (1, 2)))
        sampler.sample(logits.clone(), seat, position + 2)
        sampler.seat_sequence(Join.of_request(1, request(SamplingParams(temperature=0.0))))
        result = sampler.sample(logits.clone(), seat, position)
        assert result.tokens == [int(logits.argmax())] and result.logprobs is None and result.failed is None


def test_neighbours_with_edits_do_not_revive_the_edits_of_a_former_sequence():
    plain, special = SamplingParams(temperature=0.0), SamplingParams(temperature=0.0, logit_bias={7: 100.0})
    batch = Batch([request(special), request(special)], 20)
    logits = torch.arange(20).float().expand(2, -1)
    assert batch.step(logits).tokens == [7, 7]
    batch.requests[0] = request(plain)
    batch.join(0)
    assert batch.step(logits).tokens == [19, 7]
    # bad words do not match what the one before said on this seat
    batch.requests[0] = request(plain, bad_words=((19, 19),))
    batch.outputs[0] = [19]
    batch.join(0)
    assert batch.step(logits).tokens == [18, 7]
    batch.outputs[0] = [19]
    batch.join(0)
    batch.outputs[0] = []
    batch.join(0)
    assert batch.step(logits).tokens == [19, 7]


def test_min_tokens_hold_back_stop_tokens_until_then():
    batch = Batch([request(SamplingParams(temperature=0.0, min_tokens=3), stop_ids=(4, 5))], 10)
    logits = torch.arange(10).float()[None]
    logits[0, 4:6] += 50
    assert [batch.step(logits).tokens[0] for _ in range(5)] == [9, 9, 9, 5, 5]


def test_bad_words_end_no_matching_output():
    words = ((6,), (9, 9, 8), (8, 8))
    batch = Batch([request(SamplingParams(temperature=0.0), prompt=(9, 9), bad_words=words)], 10)
    steps = [[9, 8], [9, 8], [8, 7], [8, 7], [8, 7], [6, 5]]  # best and second best token of each step
    chosen = []
    for best, second in steps:
        logits = torch.zeros(1, 10)
        logits[0, best], logits[0, second] = 5.0, 4.0
        chosen.append(batch.step(logits).tokens[0])
    # the prompt does not count; after 9 9 no 8 may follow; after 8 no second 8; 6 never
    assert chosen == [9, 9, 7, 8, 7, 5]


def test_penalty_memory_follows_the_text_not_the_vocabulary():
    vocab = 250_000
    sampler = Sampler(1024, vocab)
    penalties = sampler._seats._penalties
    assert penalties._tokens_PL.size == 0
    for seat in range(20):
        one = request(SamplingParams(repetition_penalty=1.1), prompt=range(100))
        sampler.seat_sequence(Join.of_request(seat, one))
    for seat in range(200):
        sampler.seat_sequence(Join.of_request(seat % 3, request(SamplingParams(presence_penalty=1.0))))
    assert penalties._tokens_PL.nbytes < 64 * 256 * 4


EXTREMES = (
    {"temperature": 1e300, "top_p": 0.9, "allowed_token_ids": (1, 2, 3)},
    {"temperature": 1e-300},
    {"temperature": 1.0, "top_k": 2**63 - 1, "min_p": 1.0},
    {"temperature": 1.0, "min_tokens": 2**63 - 1, "top_p": 1e-300},
    {"temperature": 0.0, "repetition_penalty": 1e300},
    {"temperature": 1.0, "repetition_penalty": 1e-300, "presence_penalty": -2.0, "logprobs": 20},
    {"temperature": 1.0, "logit_bias": {3: -100.0, 4: 100.0}, "frequency_penalty": 2.0, "logprobs": 20},
)


@pytest.mark.parametrize("params", EXTREMES)
def test_extreme_values_that_are_allowed_work(params):
    batch = Batch([request(SamplingParams(**params), stop_ids=(7,))], 60)
    for step in range(4):
        result = batch.step(torch.randn(1, 60, generator=torch.Generator().manual_seed(step)) * 30)
        assert result.failed is None and 0 <= result.tokens[0] < 60
        assert not result.logprobs or math.isfinite(result.logprobs[0].logprob)


def test_an_empty_step_samples_nothing():
    result = Sampler(4, 10).sample(torch.zeros(0, 10), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    assert result.tokens == [] and result.failed is None


def test_named_tokens_have_the_logprobs_of_the_whole_vocabulary():
    vocab = 300
    generator = np.random.default_rng(4)
    logits = torch.from_numpy(generator.normal(0, 4, (5, vocab)).astype(np.float32))
    named = [(299, 0, 7), None, tuple(range(128)), (5,), None]
    asked = [SamplingParams(temperature=0.7, logprob_token_ids=one, presence_penalty=1.5) for one in named]
    asked[4] = SamplingParams(temperature=0.7, logprobs=3)
    result = Batch([request(params, key=number) for number, params in enumerate(asked)], vocab).step(logits)
    whole = torch.log_softmax(logits.double(), 1)
    assert result.logprobs[1] is None and len(result.logprobs[4].top) == 3
    for row in (0, 2, 3):
        entry = result.logprobs[row]
        tokens, values = zip(*entry.top, strict=True)
        assert tokens == named[row] and values == pytest.approx(whole[row, list(tokens)].tolist(), abs=1e-6)
        # from one sum with the best ones, bit for bit
        best = Batch([request(SamplingParams(temperature=0.7, logprobs=20), key=row)], vocab).step(
            logits[row : row + 1]
        )
        ranked = dict(best.logprobs[0].top)
        assert all(ranked.get(token, value) == value for token, value in entry.top)


def test_a_named_token_beyond_the_vocabulary_fails_its_row_alone():
    asked = [SamplingParams(logprob_token_ids=[11]), SamplingParams(logprob_token_ids=[10])]
    result = Batch([request(params) for params in asked], 11).step(torch.zeros(2, 11))
    assert "logprob_token_ids names token 11" in result.failed[0] and set(result.failed) == {0}
    assert result.logprobs[0] is None and result.logprobs[1].top[0][0] == 10
