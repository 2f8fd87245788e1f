"""Work that is not done twice: repeated prompts, and prefixes whose rows lie far apart."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

from batchinfer import LLM, Completion, SamplingParams
from batchinfer.engine.plan import StepPlan, StepResult
from batchinfer.errors import EngineFailure, InvalidInput
from batchinfer.pipeline.dedup import Repeats, identity
from batchinfer.pipeline.prompt import Prepared, Prompt
from batchinfer.request import CompletionOutput, Request
from batchinfer.spec import FakeSpec
from tests.harness import InstantRunner

GREEDY = SamplingParams(temperature=0, max_tokens=20)


def fake_llm(**options: object) -> LLM:
    return LLM("fake", fake=FakeSpec(answer_tokens=(3, 15)), **options)


def test_repeats_run_once_and_every_row_has_its_answer() -> None:
    rng = random.Random(3)
    distinct = [f"prompt {i} " * 3 for i in range(40)]
    prompts = distinct + [rng.choice(distinct) for _ in range(160)]
    rng.shuffle(prompts)
    llm = fake_llm(max_num_seqs=4)
    completions = llm.generate(prompts, GREEDY)
    assert [bytes(c.prompt_token_ids).decode() for c in completions] == prompts
    alone = {prompt: fake_llm().generate([prompt], GREEDY)[0].outputs for prompt in distinct}
    assert all(c.outputs == alone[prompt] for c, prompt in zip(completions, prompts, strict=True))
    generated = sum(len(outputs[0].token_ids) for outputs in alone.values())
    assert llm.stats().generated_tokens == generated


def test_several_contents_are_one_completion_that_has_each_of_theirs() -> None:
    several = Prompt(3, ["one", "two", "one"], GREEDY, key=5)
    [joined] = fake_llm().run_prompts([several])
    alone = [next(fake_llm().run_prompts([Prompt(0, [text], GREEDY)])) for text in several.contents]
    assert joined.index == 3 and bytes(joined.prompt_token_ids) == b"onetwoone"
    assert joined.outputs == [output for completion in alone for output in completion.outputs]
    assert [one.outputs for one in joined.per_content or []] == [one.outputs for one in alone]
    assert joined.cached_tokens == len("one")  # the repeat


def test_an_error_of_one_content_is_that_of_its_prompt() -> None:
    [joined] = fake_llm().run_prompts([Prompt(3, ["one", "", "two"], GREEDY)])
    assert isinstance(joined.error, InvalidInput) and not joined.outputs
    assert bytes(joined.prompt_token_ids) == b"onetwo"


def test_what_chance_or_other_parameters_decide_is_not_shared() -> None:
    llm = fake_llm()
    sampled = llm.generate(["same"] * 8, SamplingParams(temperature=1.0, max_tokens=20))
    assert len({tuple(c.outputs[0].token_ids) for c in sampled}) > 4
    seeded = llm.generate(["same"] * 8, SamplingParams(temperature=1.0, seed=1, max_tokens=20))
    assert len({tuple(c.outputs[0].token_ids) for c in seeded}) == 1
    lengths = [SamplingParams(temperature=0, max_tokens=n) for n in (1, 2, 3, 2)]
    assert [len(c.outputs[0].token_ids) for c in llm.generate(["same"] * 4, lengths)] == [1, 2, 3, 2]


def test_an_error_reaches_the_followers_and_is_not_kept() -> None:
    class Broken(InstantRunner):
        def __init__(self) -> None:
            self.failing = True

        def launch(self, plan: StepPlan, constraints: object) -> StepResult:
            count = sum(plan.samples)
            failed = dict.fromkeys(range(count), "broken") if self.failing else None
            return StepResult([7] * count, failed=failed)

    llm = fake_llm()
    runner = Broken()
    llm._engine._runner = runner
    completions = llm.generate(["a", "a", "b"], GREEDY)
    assert [type(c.error) for c in completions] == [EngineFailure] * 3
    runner.failing = False
    assert all(c.error is None for c in llm.generate(["a", "a", "b"], GREEDY))


def test_questions_in_any_order_compute_each_document_once() -> None:
    """Eight documents, five questions each, and a cache of three documents (in tokens; bytes are tokens here)."""
    rng = random.Random(5)
    documents = ["".join(rng.choice("abcdefgh ") for _ in range(1500)) for _ in range(8)]
    grouped = [document + f" question {i}" for document in documents for i in range(5)]
    tiled = [document + f" question {i}" for i in range(5) for document in documents]
    shuffled = rng.sample(grouped, len(grouped))
    least = 8 * 1500 + 40 * 11
    answers = []
    for prompts in (grouped, tiled, shuffled):
        llm = fake_llm(kv_cache_tokens=3 * 1600, max_num_seqs=16)
        completions: list[Completion] = llm.generate(prompts, GREEDY)
        answers.append({prompts[c.index]: c.outputs for c in completions})
        assert llm.stats().prompt_tokens_computed < 1.1 * least
    assert answers[0] == answers[1] == answers[2]


def prepared(index: int, ids: list[int]) -> Prepared:
    return Prepared(index, ids, GREEDY, [Request(index, ids, GREEDY, 20)], None)


def test_recent_answers_are_bounded() -> None:
    repeats = Repeats(max_tokens=30)
    answer = Completion(0, [], [CompletionOutput("x", [1], "stop")])
    for one in [prepared(i, [i] * 9) for i in range(5)]:
        key = identity(one)
        assert repeats.recent_answer(key) is None and not repeats.wait_or_run(key, one)
        assert repeats.keep_answer(key, one, answer) == []
    assert repeats.recent_answer(identity(prepared(9, [4] * 9))) is answer
    assert repeats.recent_answer(identity(prepared(9, [0] * 9))) is None, "the oldest went first"


def test_prompts_that_come_late_find_most_documents_still_ahead() -> None:
    """The order keeps what the cache has no room for: rows that come while others run join those of their document."""
    rng = random.Random(5)
    documents = ["".join(rng.choice("abcdefgh ") for _ in range(1500)) for _ in range(30)]
    prompts = [document + f" question {i}" for i in range(5) for document in documents]
    llm = LLM("fake", fake=FakeSpec(answer_tokens=(3, 15), step_s=0.002), kv_cache_tokens=3 * 1600, max_num_seqs=128)

    def source() -> Iterator[str]:
        for place, prompt in enumerate(prompts):
            while place == 64 and llm.stats().steps < 3:
                time.sleep(0.001)
            yield prompt

    assert sum(1 for _ in llm.stream(source(), GREEDY)) == len(prompts)
    computed = llm.stats().prompt_tokens_computed / (30 * 1500 + 150 * 11)
    # how soon the rest is there is up to the threads: the documents that have passed by then are computed again
    assert computed < 1.6, "all that came first ran before the rest was looked at"
