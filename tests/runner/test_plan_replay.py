"""Plans are plain data: pickled and replayed in order, they give a second runner the state of the first."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from batchinfer.engine.engine import Engine
from batchinfer.engine.plan import StepPlan, StepResult
from batchinfer.request import Constraint, Finished, Request, SamplingParams
from batchinfer.runner.model_runner import ModelRunner
from tests.harness import InstantRunner, decoder_runner, expect_short_answers, make_engine, run_requests, run_step
from tests.models.tiny import SIZES
from tests.runner.test_grammar_mask import SetConstraint

VOCAB = SIZES["vocab_size"]
BLOCKS, BLOCK_SIZE, SEATS, CONTEXT = 40, 4, 8, 128


class PicklingRunner(InstantRunner):
    """Runs what unpickling a plan gives; keeps the pickles and the results."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.pickles: list[bytes] = []
        self.results: list[StepResult] = []
        self.drafted = False

    def launch(self, plan: StepPlan, constraints: Mapping[int, Constraint]) -> StepResult:
        self.pickles.append(pickle.dumps(plan))
        self.results.append(self._runner.launch(pickle.loads(self.pickles[-1]), constraints))
        self.drafted |= max(plan.samples) > 1
        return self.results[-1]


def alternating(output: list[int]) -> set[int]:
    """Allow odd and even tokens in turn, twelve in all."""
    return set(range(3 + len(output) % 2, VOCAB, 2)) if len(output) < 12 else set()


class EndsAfter:
    """A stop check that cannot be pickled: it counts in a closure."""

    def __init__(self, tokens: int) -> None:
        self._left = tokens
        self.check = lambda token: self._count()

    def _count(self) -> bool:
        self._left -= 1
        return self._left == 0


def workload(count: int) -> list[Request]:
    """Return samples of prompts with shared prefixes: all kinds of parameters, stop checks and reads, n > 1."""
    generator = np.random.default_rng(11)
    shared = generator.integers(3, VOCAB, 14).tolist()
    repeating = [5, 6, 7, 8, 9] * 4
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 0.9, "top_k": 20, "n": 3},
        {"temperature": 1.2, "top_p": 0.9, "min_p": 0.01, "logprob_token_ids": (4, 9)},
        {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.2},
        {"temperature": 0.7, "logit_bias": {5: 2.0}, "min_tokens": 4, "allowed_token_ids": tuple(range(2, VOCAB, 3))},
    ]
    requests: list[Request] = []
    while len(requests) < count:
        number = len(requests)
        prompt = shared[: generator.integers(0, 15)] + generator.integers(3, VOCAB, generator.integers(1, 20)).tolist()
        params = SamplingParams(**kinds[number % len(kinds)])
        length = int(generator.integers(4, 25))
        one = Request(number, prompt, params, length, stop_ids=frozenset({2}), bad_words=((7,), (prompt[0], 8)))
        if number % len(kinds) == 0:
            one = replace(one, prompt=repeating, bad_words=(), max_tokens=30, stop_ids=frozenset())
        if number % 7 == 3:
            one = replace(one, stop_check=EndsAfter(1 + number % 9).check)
        if number % 9 == 4:
            one = replace(one, score_from=1, params=replace(params, prompt_logprobs=2))
        if number % 9 == 7:
            one = replace(one, pooling=("mean", "last", "cls")[number % 3], max_tokens=0)
        for sample in range(params.n):
            requests.append(replace(one, request_id=len(requests), key=number * 7919 + sample))
    return requests


def runner_of(decoder) -> ModelRunner:
    return decoder_runner(decoder, BLOCKS, BLOCK_SIZE, SEATS, CONTEXT)


def run_all(decoder, requests: list[Request]) -> tuple[PicklingRunner, dict[int, Finished], Engine]:
    runner = PicklingRunner(runner_of(decoder))
    engine = make_engine(runner, BLOCKS, BLOCK_SIZE, seats=SEATS, step_tokens=24, drafts=3)
    expect_short_answers(engine.scheduler)
    answers = run_requests(engine, requests)
    assert all(answer.error is None for answer in answers.values()) and len(answers) == len(requests)
    return runner, answers, engine


def test_replayed_pickles_rebuild_results_on_a_second_runner(tiny_llama):
    first, answers, engine = run_all(tiny_llama, workload(60))
    assert engine.stats.preemptions > 0 and engine.stats.prompt_tokens_reused > 0 and first.drafted
    assert any(answer.prompt_logprobs for answer in answers.values()) and any(a.hidden for a in answers.values())
    second = runner_of(tiny_llama)
    for pickled, result in zip(first.pickles, first.results, strict=True):
        assert run_step(second, pickle.loads(pickled)) == result


def test_plans_with_grammars_pickle_and_the_sampling_runner_follows_the_grammar(tiny_llama):
    """The grammar reaches the runner beside the plan; a preempted sequence brings it along again."""
    requests = [
        replace(one, constraint=SetConstraint(alternating), pooling=None, max_tokens=20, stop_check=None, bad_words=())
        if one.request_id % 3 == 0 and one.params.allowed_token_ids is None and one.pooling is None
        else one
        for one in workload(40)
    ]
    _, answers, engine = run_all(tiny_llama, requests)
    assert engine.stats.preemptions > 0
    constrained = [answer for answer in answers.values() if answer.request.constraint is not None]
    assert len(constrained) >= 8
    for answer in constrained:
        assert all(token % 2 != place % 2 for place, token in enumerate(answer.token_ids) if token != 2)
        assert answer.finish_reason == "stop" and len(answer.token_ids) == 12
