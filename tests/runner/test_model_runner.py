"""The runner: its inputs against plain loops, its tokens against sequences computed alone, and what failures leave."""

from __future__ import annotations

import math
import types

import numpy as np
import pytest
import torch
from batchinfer_kernels import cpu
from batchinfer_kernels.cpu.linear_argmax import make_bounds
from batchinfer_kernels.eager.linear import DenseMatrix

from batchinfer.engine.engine import Engine
from batchinfer.engine.plan import Grown, Join, StepPlan
from batchinfer.models.weights import load_decoder
from batchinfer.ops.choose import load_backend
from batchinfer.request import Request, SamplingParams
from batchinfer.runner.model_runner import ModelRunner
from batchinfer.runner.sampler import Sampler
from tests.harness import decoder_engine, run_requests, run_step
from tests.models.tiny import SIZES, Paged, build

VOCAB = SIZES["vocab_size"]


class Echo(torch.nn.Module):
    """Stands in for a decoder: keeps its inputs; logits are a row of a fixed table, chosen by token and position."""

    def __init__(self, vocab: int = 40) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(kv_shape=(1, 1, 2), vocab_size=vocab)
        self.backend, self.dtype = load_backend(), torch.float32
        self.table = torch.randn(997, vocab, generator=torch.Generator().manual_seed(1)) * 3
        self.seen = []
        self.head_rows = 0
        self.fail = None

    def forward(self, inputs, cache):
        self.seen.append(inputs)
        if self.fail is not None and len(self.seen) % 7 == 4 and len(inputs.lengths_S) > 1:
            raise self.fail
        return (inputs.tokens_T * 31 + inputs.positions_T)[inputs.output_rows_N, None]

    def logits(self, hidden):
        self.head_rows += len(hidden)
        return self.table[hidden[:, 0] % 997].clone()

    def largest_logits(self, hidden):
        return None


def greedy(prompt, request_id=0, max_tokens=50, **params) -> Request:
    return Request(request_id, list(prompt), SamplingParams(**{"temperature": 0.0} | params), max_tokens, request_id)


def plan(joins=(), grown=(), work=()) -> StepPlan:
    """work: (seat, start, tokens, samples)."""
    return StepPlan(
        1,
        tuple(joins),
        tuple(Grown(*one) for one in grown),
        [seat for seat, *_ in work],
        [start for _, start, *_ in work],
        [len(tokens) for _, _, tokens, _ in work],
        [samples for *_, samples in work],
        [token for _, _, tokens, _ in work for token in tokens],
    )


def test_inputs_equal_plain_loops():
    """Random plans over several steps: what each token's position and slot, and each sequence's table must be."""
    generator = np.random.default_rng(0)
    size, seats, decoder = 4, 9, Echo()
    runner = ModelRunner(decoder, 400, size, seats, 60)
    tables = {seat: [] for seat in range(seats)}
    computed = dict.fromkeys(range(seats), 0)
    prompts = {}
    blocks = iter(generator.permutation(400).tolist())
    for _ in range(25):
        joins, grown, work = [], [], []
        for seat in generator.permutation(seats)[: generator.integers(1, seats + 1)].tolist():
            count = int(generator.choice([1, 1, 2, 7]))
            if computed[seat] == 0 or computed[seat] + count > 60:
                prompts[seat] = int(generator.integers(1, 60))
                joins.append(Join.of_request(seat, greedy([1] * prompts[seat])))
                tables[seat], computed[seat] = [], 0
            needed = -(-(computed[seat] + count) // size) - len(tables[seat])
            if needed > 0:
                added = tuple(next(blocks) for _ in range(needed))
                grown.append((seat, len(tables[seat]), added))
                tables[seat].extend(added)
            tokens = generator.integers(0, 40, count).tolist()
            work.append((seat, computed[seat], tokens, bool(generator.random() < 0.6)))
            computed[seat] += count
        result = run_step(runner, plan(joins, grown, work))
        inputs = decoder.seen[-1]
        flat = [(seat, start + i, token) for seat, start, tokens, _ in work for i, token in enumerate(tokens)]
        assert inputs.tokens_T.tolist() == [token for *_, token in flat]
        assert inputs.positions_T.tolist() == [position for _, position, _ in flat]
        assert inputs.slots_T.tolist() == [tables[s][p // size] * size + p % size for s, p, _ in flat]
        parts = []  # a prompt's tokens together, others each alone: (seat, first position, end)
        rows = []
        for seat, start, tokens, samples in work:
            end = start + len(tokens)
            inside = min(end, max(start, prompts[seat])) if decoder.backend.capabilities.exact_rows else end
            parts += [(seat, start, inside)] * (inside > start) + [(seat, p, p + 1) for p in range(inside, end)]
            if samples:
                rows.append(sum(last - first for _, first, last in parts) - 1)
        assert inputs.lengths_S.tolist() == [last for *_, last in parts]
        counts = [last - first for _, first, last in parts]
        assert inputs.query_starts_X.tolist() == [sum(counts[:i]) for i in range(len(parts) + 1)]
        assert inputs.prompt_S.tolist() == [first < prompts[seat] for seat, first, _ in parts]
        assert inputs.output_rows_N.tolist() == rows
        for row, (seat, _, last) in zip(inputs.block_tables_SW.tolist(), parts, strict=True):
            used = -(-last // size)
            assert row[:used] == tables[seat][:used]
        dtypes = (inputs.tokens_T, inputs.positions_T, inputs.slots_T, inputs.output_rows_N)
        assert {one.dtype for one in dtypes} == {torch.int64} and inputs.block_tables_SW.dtype == torch.int32
        expected = [decoder.table[(flat[row][2] * 31 + flat[row][1]) % 997].argmax() for row in rows]
        assert result.tokens == [int(token) for token in expected]


def test_only_sampled_rows_reach_the_head():
    decoder = Echo()
    runner = ModelRunner(decoder, 10, 4, 3, 16)
    joins = [Join.of_request(seat, greedy([1, 2, 3, 4])) for seat in range(3)]
    grown = [(seat, 0, (seat,)) for seat in range(3)]
    result = run_step(
        runner, plan(joins, grown, [(0, 0, [1, 2, 3, 4], True), (1, 0, [1, 2], False), (2, 0, [5], False)])
    )
    assert len(result.tokens) == decoder.head_rows == 1
    result = run_step(runner, plan((), (), [(1, 2, [3], False)]))
    assert result.tokens == [] and result.logprobs is None and decoder.head_rows == 1
    assert run_step(runner, plan()).tokens == [] and len(decoder.seen) == 2


def test_rows_go_through_the_head_in_parts(monkeypatch):
    """Thousands of rows over a large vocabulary would not fit at once; parts must not change a thing."""
    requests = [greedy([1, 2], seat, temperature=seat % 3 / 2, logprobs=2 if seat % 2 else None) for seat in range(11)]
    work = [(seat, 0, [seat, 2], seat != 4) for seat in range(11)]
    step = plan(
        [Join.of_request(seat, one) for seat, one in enumerate(requests)], [(s, 0, (s,)) for s in range(11)], work
    )
    results = []
    for size in (1 << 29, 4 * 40 * 3):
        monkeypatch.setattr("batchinfer.runner.model_runner._LOGITS_BYTES", size)
        decoder = Echo()
        results.append(run_step(ModelRunner(decoder, 20, 4, 11, 8), step))
        assert decoder.head_rows == 10
    assert results[0] == results[1] and len(results[0].tokens) == 10


def test_failed_rows_keep_their_number_across_parts(monkeypatch):
    monkeypatch.setattr("batchinfer.runner.model_runner._LOGITS_BYTES", 4 * 40 * 2)
    decoder = Echo()
    decoder.table[(9 * 31 + 0) % 997, 3] = math.nan
    runner = ModelRunner(decoder, 20, 4, 5, 8)
    joins = [Join.of_request(seat, greedy([1])) for seat in range(5)]
    tokens = [4, 5, 9, 6, 9]
    work = [(seat, 0, [tokens[seat]], True) for seat in range(5)]
    result = run_step(runner, plan(joins, [(seat, 0, (seat,)) for seat in range(5)], work))
    assert set(result.failed) == {2, 4} and len(result.tokens) == 5


@pytest.mark.parametrize("token", [-1, 40, 2**62])
def test_tokens_beyond_the_vocabulary_never_reach_the_model(token):
    decoder = Echo()
    runner = ModelRunner(decoder, 4, 4, 1, 8)
    with pytest.raises(ValueError, match=f"token {token} is not in the model's vocabulary of 40 tokens"):
        run_step(runner, plan([Join.of_request(0, greedy([1]))], [(0, 0, (0,))], [(0, 0, [1, token], True)]))
    assert not decoder.seen


def test_a_sequence_beyond_the_context_is_refused():
    runner = ModelRunner(Echo(), 8, 4, 1, 8)
    run_step(runner, plan([Join.of_request(0, greedy([1]))], [(0, 0, (0, 1))], [(0, 0, [1] * 8, True)]))
    with pytest.raises(ValueError, match="9 tokens is beyond the context of 8"):
        run_step(runner, plan((), (), [(0, 8, [1], True)]))


def requests_of(count: int, vocab: int) -> list[Request]:
    generator = np.random.default_rng(count)
    shared = generator.integers(3, vocab, 14).tolist()
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.9, "top_k": 20},
        {"temperature": 1.2, "top_p": 0.9, "logprobs": 3},
        {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "logprobs": 0},
        {"temperature": 0.7, "presence_penalty": 1.0, "logit_bias": {5: 2.0}, "min_tokens": 9},
        {"temperature": 1.0, "allowed_token_ids": tuple(range(2, vocab, 3)), "min_p": 0.01},
    ]
    requests = []
    for number in range(count):
        prompt = shared[: generator.integers(0, 15)] + generator.integers(3, vocab, generator.integers(1, 30)).tolist()
        params = SamplingParams(**kinds[number % len(kinds)])
        words = ((7,), (int(prompt[0]), 8)) if number % 4 == 0 else ()
        length = int(generator.integers(1, 25))
        requests.append(Request(number, prompt, params, length, number * 7919, frozenset({2}), words))
    return requests


@torch.inference_mode()
def alone(decoder, one: Request) -> list[int]:
    """Return the answer by the plainest loop: fresh cache, whole context for every token, a sampler with one seat."""
    output: list[int] = []
    while len(output) < one.max_tokens:
        logits = Paged(decoder, sequences=1).step({0: [*one.prompt, *output]})[-1:]
        sampler = Sampler(1, decoder.config.vocab_size)
        sampler.seat_sequence(Join.of_request(0, one, tuple(output)))
        position = len(one.prompt) + len(output)
        output += sampler.sample(logits, np.array([0]), np.array([position])).tokens
        if output[-1] in one.stop_ids:
            break
    return output


@pytest.fixture(scope="module")
def expected(tiny_llama):
    return {one.request_id: alone(tiny_llama, one) for one in requests_of(30, VOCAB)}


def _counting_copies(engine: Engine) -> list:
    """Return a list that collects the block copies of the engine's runner from now on."""
    copied = []
    cache = engine._runner.cache
    copy = cache.copy
    cache.copy = lambda copies: copied.extend(copies) or copy(copies)
    return copied


@pytest.mark.parametrize(("num_blocks", "budget"), [(400, 1000), (400, 7), (22, 24)])
@pytest.mark.parametrize("caching", [True, False])
def test_batched_chunked_preempted_and_cached_equal_alone(tiny_llama, expected, num_blocks, budget, caching):
    engine = decoder_engine(tiny_llama, num_blocks, caching=caching, step_tokens=budget)
    copied = _counting_copies(engine)
    answers = run_requests(engine, requests_of(30, VOCAB))
    assert {number: answer.token_ids for number, answer in answers.items()} == expected
    assert (engine.stats.prompt_tokens_reused > 0) == caching == bool(copied)
    assert (engine.stats.preemptions > 0) == (num_blocks == 22)
    for answer in answers.values():
        wanted = answer.request.params.logprobs
        if wanted is not None:
            assert [one.token_id for one in answer.logprobs] == answer.token_ids
            assert all(len(one.top) == wanted and one.logprob <= 0 for one in answer.logprobs)


@pytest.mark.parametrize(("num_blocks", "budget"), [(400, 1000), (400, 7), (18, 24)])
@pytest.mark.parametrize("caching", [True, False])
def test_logits_are_the_same_bits_however_prompts_are_cut(tiny_llama, caching, num_blocks, budget):
    """In steps, by what is found in the cache, and by a preemption: a prompt's last token may be computed alone."""
    if isinstance(tiny_llama.head.matrix, DenseMatrix):
        pytest.skip("plain torch")
    shared = list(range(3, 40))
    prompts = [shared[: 1 + 7 * number % 37] + [number % 5] * (number % 3) for number in range(1, 40)]
    params = SamplingParams(temperature=0.0, logprobs=3)
    requests = [Request(n, one, params, 4 + n % 20, stop_ids=frozenset({2})) for n, one in enumerate(prompts)]
    whole = run_requests(decoder_engine(tiny_llama, 400, caching=False, seats=40), requests)
    engine = decoder_engine(tiny_llama, num_blocks, caching=caching, step_tokens=budget)
    answers = run_requests(engine, requests)
    assert (engine.stats.preemptions > 0) == (num_blocks == 18)
    assert {n: one.logprobs for n, one in answers.items()} == {n: one.logprobs for n, one in whole.items()}


@pytest.mark.skipif(cpu.problem() is not None, reason=str(cpu.problem()))
def test_greedy_rows_found_by_bounds_equal_the_argmax_of_all_logits(tmp_path, monkeypatch):
    """Steps of greedy rows alone take the LM head's shorter way, others the long one, with the same tokens."""
    build("llama", tmp_path)
    decoder = load_decoder(tmp_path)
    if isinstance(decoder.head.matrix, DenseMatrix):
        pytest.skip("--eager-kernels")
    requests = [greedy([9, 8, 7, 10 + number], number, max_tokens=5 + number) for number in range(12)]
    expected = {one.request_id: alone(decoder, one) for one in requests}
    found = []
    monkeypatch.setattr(decoder, "_bounds", make_bounds(decoder.head.matrix))
    linear_argmax = decoder.backend.linear_argmax
    monkeypatch.setattr(decoder.backend, "linear_argmax", lambda *args: found.append(linear_argmax(*args)) or found[-1])
    answers = run_requests(decoder_engine(decoder, 60), requests)
    assert {number: answer.token_ids for number, answer in answers.items()} == expected
    steps = len(found)
    assert steps >= 16
    sampled = Request(99, [5, 6], SamplingParams(temperature=1.0), 3, 1)
    answers = run_requests(decoder_engine(decoder, 400, seats=13), [sampled, *requests])
    assert {number: answers[number].token_ids for number in expected} == expected
    assert 0 < len(found) - steps < steps  # not while the other one runs


def test_a_16_bit_cache_holds_a_float32_model(tiny_llama):
    runner = ModelRunner(tiny_llama, 20, 4, 2, 64, kv_dtype=torch.bfloat16)
    assert runner.cache.layers[0].dtype == torch.bfloat16
    request = greedy([5, 6, 7, 8])
    result = run_step(runner, plan([Join.of_request(0, request)], [(0, 0, (3,))], [(0, 0, request.prompt, True)]))
    exact = Paged(tiny_llama, sequences=1).step({0: request.prompt})[-1]
    assert exact[result.tokens[0]] > exact.max() - 0.1


@pytest.mark.parametrize("failure", [torch.OutOfMemoryError("injected"), RuntimeError("injected"), MemoryError()])
def test_a_failed_step_leaves_the_runner_usable(failure):
    """Every seventh step fails; the sequences join again, and end as if nothing had been."""
    requests = [one for one in requests_of(18, 40) if max(one.prompt) < 40]
    undisturbed = run_requests(decoder_engine(Echo(), 60), requests)
    decoder = Echo()
    decoder.fail = failure
    engine = decoder_engine(decoder, 60)
    answers = run_requests(engine, requests)
    assert engine.stats.preemptions > 10 and len(answers) == len(requests)
    for number, answer in answers.items():
        assert answer.error is None and answer.token_ids == undisturbed[number].token_ids


def test_a_row_with_bad_logits_ends_alone(tiny_llama):
    """An embedding that is not a number poisons its own sequence, and no other, whatever blocks they take over."""
    poisoned = 4
    requests = [greedy([9, 8, 7, 10 + number], number, max_tokens=12) for number in range(12)]
    calm = run_requests(decoder_engine(tiny_llama, 16), requests)
    weight = tiny_llama.embedding.matrix.values_OI
    before = weight[poisoned].clone()
    bad = [greedy([11, poisoned, 12], 100 + number, max_tokens=5, logit_bias={4: -100.0}) for number in range(4)]
    mixed = [one for group in zip(requests[::3], requests[1::3], requests[2::3], bad, strict=True) for one in group]
    untouched = all(poisoned not in answer.token_ids for answer in calm.values())
    try:
        with torch.no_grad():
            weight[poisoned] = math.nan
        answers = run_requests(decoder_engine(tiny_llama, 16), mixed)
    finally:
        with torch.no_grad():
            weight[poisoned] = before
    assert untouched
    for one in bad:
        error = answers[one.request_id].error
        assert error is not None and error.retryable and "not finite" in str(error)
    for one in requests:
        assert answers[one.request_id].token_ids == calm[one.request_id].token_ids
