"""The device runner step by step: a step ahead of its results, rows that wait, failures, and what graphs may read."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field, replace

import pytest
import torch

from batchinfer.engine.plan import Join, StepResult
from batchinfer.errors import EngineError, OutOfDeviceMemory
from batchinfer.ops.streams import UploadRing
from batchinfer.request import Request
from tests.harness import decoder_engine, decoder_runner, run_requests, run_step
from tests.models.tiny import SIZES, build
from tests.runner.devices import CONTEXT, both_decoders, device_engine, device_runner
from tests.runner.test_device_runner import all_kinds, assert_same
from tests.runner.test_grammar_mask import SetConstraint
from tests.runner.test_model_runner import greedy, plan

VOCAB = SIZES["vocab_size"]
SEATS, BLOCK = 5, 8


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    build("llama", folder, num_hidden_layers=2)
    return both_decoders(folder)


@dataclass
class Live:
    """A sequence at a seat: what is known of its answer, and how many tokens of it were launched."""

    request: Request
    output: list[int] = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    failure: object = None
    launched: int = 0


class Server:
    """Serves requests with a fixed set of seats, each with its own blocks: launches `depth` steps ahead of results."""

    def __init__(self, runner, depth: int) -> None:
        self.runner, self.depth = runner, depth
        self.live: dict[int, Live] = {}
        self.flying: deque = deque()
        self.surplus = 0  # rows of sequences that had ended

    def serve(self, requests: list[Request]) -> dict[int, Live]:
        waiting, answers = deque(requests), {}
        while waiting or self.live:
            self.launch(waiting)
            while len(self.flying) > self.depth:
                self.collect(answers)
        while self.flying:
            self.collect(answers)
        return answers

    def launch(self, waiting: deque) -> None:
        joins, grown, work, rows, grammars = [], [], [], [], {}
        for seat in range(SEATS):
            one = self.live.get(seat)
            if one is None and waiting:
                one = self.live[seat] = Live(waiting.popleft())
                joins.append(Join.of_request(seat, one.request))
                blocks = CONTEXT // BLOCK
                grown.append((seat, 0, tuple(range(seat * blocks, (seat + 1) * blocks))))
                work.append((seat, 0, one.request.prompt, 1))
                if one.request.constraint is not None:
                    grammars[seat] = one.request.constraint
            elif one is not None:
                token = one.output[-1] if one.launched == len(one.output) else -1
                work.append((seat, len(one.request.prompt) + one.launched - 1, [token], 1))
            else:
                continue
            one.launched += 1
            rows.append((seat, one))
        self.flying.append((self.runner.launch(plan(joins, grown, work), grammars), rows))

    def collect(self, answers: dict[int, Live]) -> None:
        ticket, rows = self.flying.popleft()
        result = self.runner.collect(ticket)
        for row, (seat, one) in enumerate(rows):
            if self.live.get(seat) is not one:
                self.surplus += 1
                continue
            failure = (result.failed or {}).get(row)
            if failure is None:
                one.output.append(result.tokens[row])
                one.logprobs.append(result.logprobs[row] if result.logprobs else None)
            one.failure = failure
            stops = one.output and one.output[-1] in one.request.stop_ids
            if failure or stops or row in result.ended or len(one.output) == one.request.max_tokens:
                del self.live[seat]
                answers[one.request.request_id] = one


def generating(count: int) -> list[Request]:
    return [replace(one, stop_check=None) for one in all_kinds(count) if one.max_tokens]


def odd_ones(first: int) -> list[Request]:
    """Return requests whose rows fail: for the model's vocabulary, with no token left, by their grammar."""
    return [
        greedy([5, 6], first, logit_bias={VOCAB: 1.0}),
        greedy([5, 6], first + 1, allowed_token_ids=(7,), logprobs=1, logit_bias={7: 1.0}),
        replace(greedy([5, 6], first + 2, allowed_token_ids=(7,)), bad_words=((7,),)),
        replace(greedy([5, 6], first + 3, allowed_token_ids=(7, 9)), constraint=SetConstraint(lambda _: {8})),
        greedy([5, 6], first + 4, logprob_token_ids=(VOCAB,)),
    ]


@pytest.mark.parametrize("graphs", [True, False])
def test_a_step_ahead_gives_the_tokens_of_a_step_after_the_other(decoders, graphs):
    """Tokens in flight are read on the device; rows of sequences that have ended, and their seats, disturb nobody."""
    requests = generating(24)
    requests[5:5] = odd_ones(1000)
    expected = Server(decoder_runner(decoders[0], SEATS * CONTEXT // BLOCK, BLOCK, SEATS), depth=0).serve(requests)
    runner = device_runner(decoders[1], SEATS * CONTEXT // BLOCK, BLOCK, seats=SEATS, step_tokens=200, graphs=graphs)
    server = Server(runner, depth=1)
    found = server.serve(requests)
    assert server.surplus > 10 and found.keys() == expected.keys()
    for number, one in expected.items():
        other = found[number]
        assert other.output == one.output and repr(other.failure) == repr(one.failure)
        for entry, same in zip(one.logprobs, other.logprobs, strict=True):
            assert (entry is None) == (same is None)
            if entry is not None:
                assert [token for token, _ in entry.top] == [token for token, _ in same.top]
                assert same.logprob == pytest.approx(entry.logprob, abs=1e-4)
    assert sum(one.failure is not None for one in expected.values()) == 4


class LastingConstraint(SetConstraint):
    """Grammar that may not be asked what follows a complete answer."""

    def fill(self, matchers, address, row_bytes):
        assert not any(matcher.complete for matcher in matchers), "the answer is complete"
        super().fill(matchers, address, row_bytes)


def test_a_row_of_a_complete_answer_asks_nothing_of_its_grammar(decoders):
    constraint = LastingConstraint(lambda output: set() if output else {7})
    one = greedy([5, 6, 7], 1)
    runner = device_runner(decoders[1], 12, BLOCK, seats=2)
    first = runner.launch(first_plan(one), {0: constraint})
    surplus = runner.launch(next_plan(one))
    result = runner.collect(first)
    assert result.tokens == [7] and result.ended == {0}
    assert runner.collect(surplus).ended == frozenset()


def one_of_each() -> tuple[Request, Request]:
    """Return a request that is sampled on the device, and one whose rows wait for the tokens before."""
    return greedy([5, 6, 7], 1), greedy([9, 8], 2, repetition_penalty=1.5)


def first_plan(*requests: Request):
    joins = [Join.of_request(seat, one) for seat, one in enumerate(requests)]
    grown = [(seat, 0, (2 * seat, 2 * seat + 1)) for seat in range(len(requests))]
    return plan(joins, grown, [(seat, 0, one.prompt, 1) for seat, one in enumerate(requests)])


def next_plan(*requests: Request, tokens=(-1, -1)):
    return plan((), (), [(seat, len(one.prompt), [tokens[seat]], 1) for seat, one in enumerate(requests)])


def test_only_rows_that_the_host_edits_wait_and_only_for_the_step_before(decoders):
    requests = one_of_each()
    runner = device_runner(decoders[1], 12, BLOCK, seats=2)
    first = runner.launch(first_plan(*requests))
    assert first.waiting is None and len(first.samples) == 2
    second = runner.launch(next_plan(*requests))
    assert len(second.samples) == 1 and second.samples[0].rows.seats_N.tolist() == [0]
    assert second.waiting is not None and second.waiting.rows.seats_N.tolist() == [1]
    assert all(values.data_ptr() % 16 == 0 for values in second.waiting.where)
    runner.collect(first)
    assert second.waiting is None and len(second.samples) == 2
    runner.collect(second)


def test_discarded_steps_count_for_nothing(decoders):
    requests = one_of_each()
    runner = device_runner(decoders[1], 12, BLOCK, seats=2)

    def two_steps() -> list[StepResult]:
        tickets = [runner.launch(first_plan(*requests)), runner.launch(next_plan(*requests))]
        return [runner.collect(ticket) for ticket in tickets]

    expected = two_steps()
    runner.launch(first_plan(*reversed(requests)))
    runner.launch(next_plan(*reversed(requests)))
    runner.discard()
    assert two_steps() == expected


def test_a_launch_that_fails_leaves_the_step_in_flight(decoders, monkeypatch):
    requests = one_of_each()
    runner = device_runner(decoders[1], 12, BLOCK, seats=2)
    expected = [run_step(runner, first_plan(*requests)).tokens]
    expected.append(run_step(runner, next_plan(*requests, tokens=expected[0])).tokens)
    ticket = runner.launch(first_plan(*requests))
    with monkeypatch.context() as patched:
        error = torch.OutOfMemoryError("CUDA out of memory.\nMuch advice")
        patched.setattr(decoders[1], "logits", lambda hidden: (_ for _ in ()).throw(error))
        with pytest.raises(OutOfDeviceMemory, match=r"CUDA out of memory\.$"):
            runner.launch(next_plan(*requests))
    assert runner.collect(ticket).tokens == expected[0]
    assert run_step(runner, next_plan(*requests, tokens=expected[0])).tokens == expected[1]


@pytest.mark.parametrize("token", [-1, VOCAB, 2**62])
def test_tokens_beyond_the_vocabulary_are_refused(decoders, token):
    requests = one_of_each()
    runner = device_runner(decoders[1], 12, BLOCK, seats=2)
    run_step(runner, first_plan(*requests))
    with pytest.raises(ValueError, match=f"token {token} is not in the model's vocabulary of {VOCAB} tokens"):
        runner.launch(next_plan(*requests, tokens=(4, token)))


def test_plans_out_of_bounds_are_refused(decoders):
    runner = device_runner(decoders[1], 12, BLOCK, seats=2, context=16, step_tokens=20)
    run_step(runner, first_plan(*one_of_each()))
    with pytest.raises(ValueError, match="17 tokens is beyond the context of 16"):
        runner.launch(plan((), (), [(0, 16, [1], 1)]))
    with pytest.raises(ValueError, match=r"a step of 21 tokens is beyond engine.max_step_tokens, 20"):
        runner.launch(plan((), (), [(0, 0, [1] * 10, 1), (1, 0, [1] * 11, 1)]))
    with pytest.raises(AssertionError, match="declares 1 tokens but carries 2"):
        runner.launch(replace(plan((), (), [(0, 0, [1, 2], 1)]), counts=[1]))


def test_a_step_without_samples_and_an_empty_plan(decoders):
    runner = device_runner(decoders[1], 12, BLOCK, seats=2)
    request = greedy([5, 6, 7, 8])
    whole = run_step(runner, first_plan(request)).tokens
    half = replace(first_plan(request), counts=[2], samples=[0], tokens=[5, 6])
    first = runner.launch(half)
    second = runner.launch(plan((), (), [(0, 2, [7, 8], 1)]))
    assert runner.collect(first) == StepResult([])
    assert runner.collect(second).tokens == whole
    assert run_step(runner, plan()) == StepResult([])


def test_logits_exist_for_a_few_rows_at_once(decoders, monkeypatch):
    requests = all_kinds(12)
    expected = run_requests(decoder_engine(decoders[0], 100), requests)
    rows = []
    logits = type(decoders[1]).logits
    monkeypatch.setattr(
        type(decoders[1]), "logits", lambda self, hidden: rows.append(len(hidden)) or logits(self, hidden)
    )
    monkeypatch.setattr("batchinfer.runner.device_sampler.LOGITS_BYTES", 4 * VOCAB * 3)
    assert_same(run_requests(device_engine(decoders[1], 100), all_kinds(12)), expected)
    assert max(rows) == 3


def test_the_largest_step_runs_and_its_graphs_are_captured(decoders):
    runner = device_runner(decoders[1], 12, BLOCK, seats=3, step_tokens=40)
    runner.run_largest_step()
    captured = runner._graphs
    captured._bodies.clear()
    runner.capture_graphs(runner.ladder.largest)
    assert list(captured._bodies) == runner.ladder.largest
    requests = one_of_each()
    result = run_step(runner, first_plan(*requests))
    assert result == run_step(device_runner(decoders[1], 12, BLOCK, seats=2, graphs=False), first_plan(*requests))


def test_a_row_with_bad_logits_ends_alone(decoders):
    good = [greedy([9, 8, 7, 10 + number], number, max_tokens=12) for number in range(6)]
    calm = run_requests(device_engine(decoders[1], 40), good)
    poisoned = min(set(range(20, VOCAB)).difference(*(answer.token_ids for answer in calm.values())))
    bad = [greedy([11, poisoned, 12], 100, max_tokens=5), greedy([11, poisoned], 101, repetition_penalty=1.1)]
    weight = decoders[1].embedding.matrix.values_OI
    before = weight[poisoned].clone()
    try:
        with torch.no_grad():
            weight[poisoned] = math.nan
        answers = run_requests(device_engine(decoders[1], 40), [good[0], *bad, *good[1:]])
    finally:
        with torch.no_grad():
            weight[poisoned] = before
    for one in bad:
        assert "not finite" in str(answers[one.request_id].error)
    assert all(answers[one.request_id].token_ids == calm[one.request_id].token_ids for one in good)


def test_failed_steps_leave_the_runner_usable(decoders, monkeypatch):
    """Every seventh launch fails; the sequences join again, and end as if nothing had been."""
    engine = device_engine(decoders[1], 60)
    requests = all_kinds(14)
    expected = run_requests(decoder_engine(decoders[0], 60), requests)
    calls = []
    logits = decoders[1].logits

    def failing(hidden):
        calls.append(1)
        if len(calls) % 11 == 7:
            raise RuntimeError("injected")
        return logits(hidden)

    monkeypatch.setattr(decoders[1], "logits", failing)
    answers = run_requests(engine, all_kinds(14))
    assert engine.stats.preemptions > 10
    assert_same(
        {n: one for n, one in answers.items() if one.error is None},
        {n: expected[n] for n in answers if answers[n].error is None},
    )
    assert sum(one.error is not None for one in answers.values()) <= 2


def test_a_lost_device_ends_the_engine_and_nobody_is_blamed(decoders, monkeypatch):
    """After an illegal access every call fails, those for other sequences too."""
    engine = device_engine(decoders[1], 60)
    for one in all_kinds(14):
        engine.add(one)
    ended = [engine.step().finished for _ in range(3)]

    def lost(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nMuch advice")

    for name in ("upload", "download", "finish", "synchronize"):
        monkeypatch.setattr(engine._runner._streams, name, lost)
    with pytest.raises(
        EngineError, match=r"the device is lost, start again: .* illegal memory access was encountered$"
    ):
        ended += [engine.step().finished for _ in range(64)]
    assert all(one.error is None for answers in ended for one in answers)
    assert not engine.scheduler.take_finished()


def test_the_largest_step_writes_rows_that_are_aligned_as_those_of_any_step(decoders, monkeypatch):
    """Kernels are compiled for the alignment of addresses: otherwise they would be compiled again for the first row."""
    runner = device_runner(decoders[1], 12, BLOCK, seats=3)
    places = []
    sample = runner._steps.sample_rows

    def noting(logits, rows, state, out):
        places.extend(values.data_ptr() % 16 for values in out)
        sample(logits, rows, state, out)

    monkeypatch.setattr(runner._steps, "sample_rows", noting)
    runner.run_largest_step()
    run_step(runner, first_plan(*one_of_each()))
    assert not any(places)


# -- planted faults: what the pretend device is there to notice ---------------------------------------------------


def test_upload_buffers_reused_too_early_are_noticed(decoders, monkeypatch):
    """A ring that forgets that a buffer belongs to a step in flight."""
    take = UploadRing.take

    def hasty(self):
        buffer = take(self)
        self.give_back(buffer)
        return buffer

    monkeypatch.setattr(UploadRing, "take", hasty)
    requests = one_of_each()
    runner = device_runner(decoders[1], 12, BLOCK, seats=2)
    first = runner.launch(first_plan(*requests))
    runner.launch(next_plan(*requests))
    with pytest.raises(AssertionError, match="written before its upload was done"):
        runner.collect(first)


def test_padding_that_writes_into_a_sequences_block_is_noticed(decoders, monkeypatch):
    runner = device_runner(decoders[1], 12, BLOCK, seats=2)
    expand = runner._steps.expand_step

    def careless(step, state, block_size, out):
        expand(step, state, block_size, out)
        out.slots_T[len(step.tokens_T) :] = 0

    monkeypatch.setattr(runner._steps, "expand_step", careless)
    with pytest.raises(AssertionError, match="padding has slots"):
        runner.launch(first_plan(*one_of_each()))


def test_rows_read_beyond_the_step_are_noticed(decoders, monkeypatch):
    runner = device_runner(decoders[1], 12, BLOCK, seats=2)
    sample = runner._sample
    monkeypatch.setattr(
        runner,
        "_sample",
        lambda ticket, rows, where, count: sample(ticket, rows, where._replace(rows_N=where.rows_N + 1), count),
    )
    result = run_step(runner, first_plan(*one_of_each()))
    assert result.failed is not None and "not finite" in str(result.failed[1])


def test_graphs_read_static_inputs_and_block_tables_alone(decoders, monkeypatch):
    """At a replay everything else on the device is garbage: uploads, and what sampling keeps by seat."""
    runner = device_runner(decoders[1], 12, BLOCK, seats=2)
    requests = one_of_each()
    expected = run_step(runner, first_plan(*requests))
    buffers = [runner._ring.take() for _ in range(2)]
    for buffer in buffers:
        runner._ring.give_back(buffer)
    replay = runner._graphs.replay

    def amid_garbage(key):
        others = [buffer._twin for buffer in buffers] + list(runner._state[1:])
        saved = [tensor.clone() for tensor in others]
        for tensor in others:
            tensor.view(torch.uint8).fill_(0x7F)
        replay(key)
        for tensor, old in zip(others, saved, strict=True):
            tensor.copy_(old)

    monkeypatch.setattr(runner._graphs, "replay", amid_garbage)
    assert run_step(runner, first_plan(*requests)) == expected
