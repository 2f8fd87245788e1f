"""Grammar masks in the sampler, with matchers of plain sets: rows, seats, preemption, failures and the end."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from batchinfer.errors import BadParameters
from batchinfer.request import Matcher, Request, SamplingParams
from batchinfer.runner.grammar_mask import _bits, _caps
from tests.runner.test_sampler import Batch

VOCAB = 75


class SetMatcher:
    """Lets through what `rule` says for the output so far; complete once that is nothing."""

    def __init__(self, rule: Callable[[list[int]], set[int]], output: Sequence[int]) -> None:
        self.rule = rule
        self.output: list[int] = []
        self.error = ""
        for token in output:
            self.accept(token)

    def accept(self, token: int) -> None:
        if token not in self.rule(self.output):
            self.error = f"token {token} is not allowed"
        self.output.append(token)

    @property
    def complete(self) -> bool:
        return not self.rule(self.output)


class SetConstraint:
    def __init__(self, rule: Callable[[list[int]], set[int]]) -> None:
        self.rule = rule

    def matcher(self, output: Sequence[int]) -> SetMatcher:
        return SetMatcher(self.rule, output)

    def fill(self, matchers: Sequence[Matcher], address: int, row_bytes: int) -> None:
        for row, matcher in enumerate(matchers):
            words = (ctypes.c_uint32 * (row_bytes // 4)).from_address(address + row * row_bytes)
            assert isinstance(matcher, SetMatcher)
            ids = matcher.rule(matcher.output)
            for word in range(len(words)):
                words[word] = sum(1 << bit for bit in range(32) if word * 32 + bit in ids)


def request(params: SamplingParams, rule: Callable[[list[int]], set[int]] | None, key: int = 0) -> Request:
    constraint = SetConstraint(rule) if rule is not None else None
    return Request(0, [1, 2, 3], params, 100, key, frozenset([0]), constraint=constraint)


def rising(output: list[int]) -> set[int]:
    """Each token above the last, in steps of 1 to 9; complete above 60."""
    last = output[-1] if output else 0
    return set(range(last + 1, min(last + 10, VOCAB))) if last <= 60 else set()


def run_out(batch: Batch, members: list[int], seed: int) -> dict[int, list[int]]:
    """Step until every member is complete; preempts one at random now and then."""
    rng = np.random.default_rng(seed)
    left, ended = list(members), {}
    while left:
        order = [int(number) for number in rng.permutation(left)]
        result = batch.step(torch.from_numpy(rng.normal(size=(len(order), VOCAB)).astype(np.float32)), order)
        assert not result.failed
        for row in result.ended:
            ended[order[row]] = batch.outputs[order[row]]
            left.remove(order[row])
        if left and rng.random() < 0.3:
            batch.join(left[0])
    return ended


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(logprobs=2, frequency_penalty=1.5)])
@pytest.mark.parametrize("together", [1, 3 * VOCAB, 1 << 21])
def test_every_answer_follows_its_grammar_to_the_end(params, together, monkeypatch):
    monkeypatch.setattr("batchinfer.runner.grammar_mask._TOGETHER", together)
    batch = Batch([request(params, rising, key) for key in range(7)], VOCAB, seats=[6, 0, 3, 2, 1, 5, 4])
    ended = run_out(batch, list(range(7)), 1)
    for output in ended.values():
        assert all(token in rising(output[:place]) for place, token in enumerate(output))
        assert output[-1] > 60


def test_rows_without_a_grammar_sample_as_without_neighbours():
    rng = np.random.default_rng(2)
    params = SamplingParams(temperature=0.8, logprobs=1)
    free = [request(params, None, key) for key in range(3)]
    mixed = Batch([free[0], request(params, rising, 9), free[1], free[2]], VOCAB)
    alone = Batch(free, VOCAB)
    for _ in range(5):
        logits = torch.from_numpy(rng.normal(size=(4, VOCAB)).astype(np.float32))
        together = mixed.step(logits)
        apart = alone.step(logits[[0, 2, 3]])
        assert [together.tokens[row] for row in (0, 2, 3)] == apart.tokens
        assert together.logprobs is not None and apart.logprobs is not None
        assert [together.logprobs[row] for row in (0, 2, 3)] == apart.logprobs
        assert apart.ended == frozenset()


def test_logprobs_are_those_of_the_unmodified_logits():
    logits = torch.linspace(-3, 3, VOCAB)[None]
    result = Batch([request(SamplingParams(temperature=0, logprobs=1), rising)], VOCAB).step(logits)
    assert result.tokens == [9] and result.logprobs is not None
    expected = torch.log_softmax(logits[0].double(), 0)
    entry = result.logprobs[0]
    assert entry is not None and entry.logprob == pytest.approx(float(expected[9]), abs=1e-6)
    assert entry.top == ((VOCAB - 1, pytest.approx(float(expected[-1]), abs=1e-6)),)


def test_other_edits_act_on_the_tokens_that_the_grammar_allows():
    def rule(output: list[int]) -> set[int]:
        return {0, 4, 5, 6}

    def first(**params: object) -> object:
        one = request(SamplingParams(temperature=0, **params), rule)
        return Batch([one], VOCAB).step(torch.arange(VOCAB, 0, -1)[None].float())

    assert first().tokens == [0]
    assert first(min_tokens=2).tokens == [4]
    assert first(min_tokens=2, logit_bias={5: 50, 70: 90}).tokens == [5]
    assert first(min_tokens=2, allowed_token_ids=[6, 7]).tokens == [6]
    failed = first(allowed_token_ids=[7]).failed
    assert failed is not None and "structured_outputs" in str(failed[0])


def test_a_seat_forgets_its_grammar_with_the_next_sequence():
    batch = Batch([request(SamplingParams(temperature=0), rising), request(SamplingParams(temperature=0), None)], VOCAB)
    logits = torch.arange(VOCAB).float().repeat(2, 1)
    assert batch.step(logits).tokens == [9, VOCAB - 1]
    batch.requests.reverse()
    batch.outputs = [[], []]
    batch.join(0), batch.join(1)
    assert batch.step(logits).tokens == [VOCAB - 1, 9]


def test_a_matcher_that_fails_is_its_rows_own_error():
    class Tired(SetConstraint):
        def matcher(self, output: Sequence[int]) -> SetMatcher:
            found = super().matcher(output)
            found.error = "the lexer has too many states"
            return found

    tired = Request(0, [1], SamplingParams(temperature=0), 100, constraint=Tired(rising))
    batch = Batch([tired, request(SamplingParams(temperature=0), rising)], VOCAB)
    result = batch.step(torch.zeros(2, VOCAB))
    assert result.failed is not None and list(result.failed) == [0]
    assert isinstance(result.failed[0], BadParameters) and "too many states" in str(result.failed[0])
    assert batch.step(torch.full((2, VOCAB), math.nan)).failed.keys() == {0, 1}


def test_bits_become_masks_alike_on_host_and_device():
    rng = np.random.default_rng(0)
    for vocab in (1, 31, 32, 33, 64, 75, 96):
        masks = rng.integers(-(2**31), 2**31, (5, -(-vocab // 32)), dtype=np.int32)
        host = _caps(masks, vocab, torch.device("cpu"), torch.from_numpy)
        assert host.shape == (5, vocab) and host.isinf().all()
        assert torch.equal(host > 0, _bits(torch.from_numpy(masks), vocab) == 1)
        assert all(
            bool(host[row, bit] > 0) == bool(int(masks[row, bit // 32]) >> (bit % 32) & 1)
            for row in range(5)
            for bit in range(vocab)
        )
