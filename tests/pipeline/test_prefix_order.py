"""In what order prompts are run: by sweeps over their prefixes, and the longest answers first at the end."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from itertools import count, islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchinfer import LLM, SamplingParams
from batchinfer.engine.plan import StepPlan, StepResult
from batchinfer.pipeline import stream
from batchinfer.pipeline.prefix_order import PrefixOrder, longest_first
from batchinfer.pipeline.prompt import Prepared
from batchinfer.spec import FakeSpec
from tests.harness import InstantRunner

GREEDY = SamplingParams(temperature=0)


def prepared(index: int, ids: list[int]) -> Prepared:
    return Prepared(index, ids, GREEDY, [], None)


def ordered(prompts: list[tuple[list[int], int]]) -> list[int]:
    """Return the indices of (ids, expected tokens) in the order of `longest_first`."""
    given_ = sorted((prepared(i, ids) for i, (ids, _) in enumerate(prompts)), key=lambda p: p.ids)
    return [p.index for p in longest_first(given_, lambda p: prompts[p.index][1])]


def filled(window: int, *prompts: list[int]) -> PrefixOrder:
    order = PrefixOrder(window)
    for index, ids in enumerate(prompts):
        order.add(prepared(index, ids))
    return order


def popped(order: PrefixOrder, count_: int) -> list[list[int]]:
    return [order.pop().ids for _ in range(count_)]


def test_prompts_ahead_of_the_sweep_join_it_and_the_others_wait_for_the_next() -> None:
    order = filled(3, [5], [1, 2], [1])
    assert popped(order, 2) == [[1], [1, 2]]
    for index, ids in enumerate(([0], [1, 2], [3])):
        order.add(prepared(3 + index, ids))
    assert popped(order, 4) == [[1, 2], [3], [5], [0]]
    assert not order


def test_only_so_many_join_a_sweep() -> None:
    order = filled(2, [1], [9], [0], [8])
    assert not order.has_room and len(order) == 4
    seen = popped(order, 1)
    for index in range(20):
        order.add(prepared(4 + index, [2]))
        seen += popped(order, 1)
    assert seen.index([9]) <= 1 + 2 + 2, "prompts that go on coming keep one for ever"


def test_documents_whose_rows_lie_further_apart_than_the_window() -> None:
    """Sixty documents, fifty questions, all documents before the next question: how often a document comes up anew."""
    coming = iter([prepared(60 * q + d, [d, q]) for q in range(50) for d in range(60)])
    order, documents = PrefixOrder(500), []
    while True:
        while order.has_room and (prompt := next(coming, None)) is not None:
            order.add(prompt)
        if not order:
            break
        documents.append(order.pop().ids[0])
    assert len(documents) == 3000
    assert 1 + sum(a != b for a, b in pairwise(documents)) <= 3 * 60, "a sweep hands out no more than a window"


def test_the_end_takes_all_that_is_left_the_longest_first() -> None:
    order = PrefixOrder(3)
    for index, ids in enumerate(([5], [1], [3])):
        order.add(prepared(index, ids))
    assert order.pop().ids == [1]
    order.add(prepared(3, [4]))
    order.finish(lambda prompt: prompt.ids[0])
    assert [order.pop().ids for _ in range(3)] == [[5], [4], [3]]
    order.finish(lambda prompt: 0)
    assert not order


def test_groups_stay_together_and_are_ordered_within() -> None:
    document, other, few_shot = [1] * 50, [2] * 50, [9] * 40
    questions = [
        ([*document, 7], 10),
        ([*other, 7], 5),
        ([*document, 3], 90),
        ([3] * 9, 50),
        ([*other, 8], 40),
        ([4] * 9, 8),
    ]
    assert ordered(questions) == [2, 0, 3, 4, 1, 5]
    assert ordered([([*few_shot, *ids], length) for ids, length in questions]) == [2, 0, 3, 4, 1, 5]


def test_a_short_common_prefix_makes_no_group() -> None:
    assert ordered([([1, 1, *[i] * 30], length) for i, length in enumerate([5, 9, 7])]) == [1, 2, 0]


@given(st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.integers(1, 9)), max_size=30))
def test_every_prompt_is_there_once_and_equal_prompts_are_neighbours(prompts: list[tuple[list[int], int]]) -> None:
    order = ordered(prompts)
    assert sorted(order) == list(range(len(prompts)))
    runs = [tuple(prompts[i][0]) for i in order]
    changes = sum(a != b for a, b in pairwise(runs))
    assert changes == max(0, len(set(runs)) - 1)


def test_a_thousand_turns_of_one_session() -> None:
    turns = [(list(range(4 * i + 4)), 5) for i in range(1000)]
    assert ordered(turns) == list(range(1000)), "every turn begins with all of the one before"


class Recording(InstantRunner):
    """Passes plans on; counts steps, and keeps the answer lengths that the first one has."""

    def __init__(self, llm: LLM) -> None:
        self.steps = 0
        self.first: list[int] = []
        self.begun = threading.Event()
        self._inner = llm._engine._runner
        llm._engine._runner = self

    def launch(self, plan: StepPlan, constraints: object) -> StepResult:
        if not self.steps:
            self.first = [join.params.max_tokens for join in plan.joins]
        self.steps += 1
        self.begun.set()
        return self._inner.launch(plan, constraints)


def lengths(count_: int) -> list[int]:
    rng = random.Random(4)
    return [min(300, 5 + int(rng.expovariate(1 / 40))) for _ in range(count_)]


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is, the first step sees all prompts of a short input."""
    monkeypatch.setattr(stream, "_GATHER_S", 60.0)


@pytest.mark.usefixtures("patient")
def test_the_batch_is_full_to_the_end() -> None:
    llm = LLM("fake", max_num_seqs=16, fake=FakeSpec(answer_tokens=9))
    recording = Recording(llm)
    wanted = lengths(200)
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in wanted]
    completions = llm.generate([f"{i} " * 5 for i in range(200)], params)
    assert [len(c.outputs[0].token_ids) for c in completions] == wanted
    least = max(max(wanted), -(-sum(wanted) // 16))
    assert recording.steps <= 1.02 * least, f"{recording.steps} steps, {least} would do"


@pytest.mark.usefixtures("patient")
def test_the_first_step_sees_more_than_the_first_batch_of_prompts() -> None:
    params = [SamplingParams(temperature=0, max_tokens=99 if i == 190 else 5, ignore_eos=True) for i in range(200)]
    llm = LLM("fake", max_num_seqs=8)
    recording = Recording(llm)
    llm.generate([f"prompt {i}" for i in range(200)], params)  # the feeder hands them over 64 at a time
    assert 99 in recording.first


def test_a_slow_input_holds_nothing_up() -> None:
    llm = LLM("fake", max_num_seqs=8)
    recording = Recording(llm)

    def slow() -> Iterator[str]:
        yield from (f"prompt {i}" for i in range(64))
        assert recording.begun.wait(60), "the first prompts wait for later ones"
        yield "last"

    assert len(llm.generate(slow(), SamplingParams(temperature=0, max_tokens=3))) == 65


def test_an_endless_input_is_answered_with_bounded_reading() -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        for number in count():
            read += 1
            yield f"prompt {number % 977} {number}"

    llm = LLM("fake", max_num_seqs=8, fake=FakeSpec(answer_tokens=(1, 30)))
    answers = llm.stream(endless(), SamplingParams(temperature=0, max_tokens=30))
    seen = [answer.index for answer in islice(answers, 6000)]
    assert read < 6000 + 2 * 1024 + 10 * 64
    assert set(range(6000 - 3 * 1024)) <= set(seen), "a prompt waits for two windows at most"
    answers.close()
