"""Tests of the Python API with the fake model: order, errors, samples, stop strings, closing, invalid prompts."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from batchinfer import LLM, Completion, SamplingParams
from batchinfer.errors import BadParameters, InvalidInput, RowError, TemplateError, TooLong, UsageError
from batchinfer.llm import Prompt
from batchinfer.spec import FakeSpec


def fake_llm(**options: object) -> LLM:
    return LLM("fake", fake=FakeSpec(answer_tokens=(3, 30)), **options)


def test_generate_returns_input_order_and_is_deterministic() -> None:
    llm = fake_llm(max_num_seqs=8)
    prompts = [f"prompt number {i} " * (i % 7 + 1) for i in range(50)]
    first = llm.generate(prompts, SamplingParams(max_tokens=64))
    assert [completion.index for completion in first] == list(range(50))
    assert all(c.error is None and len(c.outputs) == 1 and c.outputs[0].finish_reason == "stop" for c in first)
    assert bytes(first[3].prompt_token_ids).decode() == prompts[3]
    again = fake_llm(max_num_seqs=3, max_step_tokens=5, enable_prefix_caching=False).generate(
        prompts, SamplingParams(max_tokens=64)
    )
    assert [c.outputs for c in first] == [c.outputs for c in again]


def test_generate_accepts_every_prompt_type_and_reports_invalid_ones() -> None:
    llm = fake_llm(max_model_len=100)
    prompts: list[object] = [
        "text",
        [1, 2, 3],
        [{"role": "user", "content": "hello"}],
        "",
        [],
        None,
        [1, "x"],
        [99999],
        [-1],
        "x" * 100,
        "lone \ud800 surrogate",
        [{"role": "user"}, 3],
        "last",
    ]
    completions = llm.generate(prompts)  # type: ignore[arg-type]
    errors = {c.index: c.error for c in completions if c.error is not None}
    assert sorted(errors) == [3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert isinstance(errors[9], TooLong) and "100 tokens" in str(errors[9])
    assert all(isinstance(errors[i], InvalidInput) for i in (3, 4, 5, 6, 7, 8, 10, 11))
    assert all(c.outputs and not c.error for c in completions if c.index in (0, 1, 2, 12))
    assert all(not c.outputs for c in completions if c.error)


def test_generate_pairs_params_with_prompts_and_refuses_too_few() -> None:
    llm = fake_llm()
    completions = llm.generate(["a", "b"], [SamplingParams(max_tokens=1), SamplingParams(max_tokens=2)])
    assert [len(c.outputs[0].token_ids) for c in completions] == [1, 2]
    assert [c.outputs[0].finish_reason for c in completions] == ["length", "length"]
    with pytest.raises(UsageError, match="fewer sampling_params than prompts: prompt 1"):
        llm.generate(["a", "b"], [SamplingParams()])
    assert len(llm.generate(["still", "works"])) == 2


def test_samples_differ_and_are_reproducible_with_the_seed() -> None:
    params = SamplingParams(n=4, temperature=1.0, max_tokens=40)
    first, second = (fake_llm(seed=5).generate(["same prompt"] * 2, params) for _ in range(2))
    assert [c.outputs for c in first] == [c.outputs for c in second]
    assert len({tuple(o.token_ids) for c in first for o in c.outputs}) == 8
    assert fake_llm(seed=6).generate(["same prompt"], params)[0].outputs != first[0].outputs
    seeded = fake_llm().generate(["same prompt"] * 2, SamplingParams(n=2, temperature=1.0, seed=3, max_tokens=40))
    assert seeded[0].outputs == seeded[1].outputs
    assert seeded[0].outputs[0] != seeded[0].outputs[1]


def test_stop_string_ends_the_text_after_min_tokens() -> None:
    llm = fake_llm()
    greedy = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    whole = llm.generate(["stop me"], greedy)[0].outputs[0].text
    stop = whole[5:7]
    end = whole.index(stop)
    for include in (False, True):
        params = SamplingParams(
            temperature=0, max_tokens=30, ignore_eos=True, stop=stop, include_stop_str_in_output=include
        )
        output = llm.generate(["stop me"], params)[0].outputs[0]
        assert output.finish_reason == "stop"
        assert output.text == whole[: end + 2 * include]
        assert len(output.token_ids) == end + 2
    # a stop string that is complete before min_tokens tokens neither ends the sequence nor cuts its text
    for min_tokens in (end + 1, end + 2, end + 5):
        later = whole[end + 6]
        params = replace(greedy, stop=(stop, later), min_tokens=min_tokens)
        output = llm.generate(["stop me"], params)[0].outputs[0]
        ends = [place + len(one) for one in (stop, later) for place in range(30) if whole.startswith(one, place)]
        last = min(place for place in ends if place > min_tokens)
        assert (
            len(output.token_ids) == last and output.text == whole[: last - (2 if whole[:last].endswith(stop) else 1)]
        )


def test_stream_of_endless_prompts_is_lazy_and_closes() -> None:
    llm = fake_llm(max_num_seqs=4)
    produced = itertools.count()
    stream = llm.stream((f"prompt {next(produced)}" for _ in itertools.count()), SamplingParams(max_tokens=5))
    seen = [next(stream) for _ in range(100)]
    assert len({completion.index for completion in seen}) == 100
    with pytest.raises(UsageError, match="already running"):
        next(llm.stream(["another"]))
    before = threading.active_count()
    stream.close()
    assert threading.active_count() == before - 1
    assert next(produced) < 2048 + 8 * 64, "look-ahead is bounded"
    assert llm.generate(["again"])[0].error is None


def test_exception_of_the_prompt_iterator_is_raised_and_the_engine_stays_usable() -> None:
    def prompts() -> Iterator[str]:
        yield from ("a", "b", "c")
        raise ConnectionError("the reader broke")

    llm = fake_llm()
    with pytest.raises(ConnectionError, match="the reader broke"):
        llm.generate(prompts())
    assert llm.generate(["after"])[0].error is None


def test_run_passes_prompt_errors_through() -> None:
    llm = fake_llm()
    items = [Prompt(7, (), error=TemplateError("no column x")), Prompt(9, ["fine"])]
    completions = {c.index: c for c in llm.run_prompts(items)}
    assert isinstance(completions[7].error, TemplateError) and completions[9].error is None


def test_invalid_sampling_fails_only_its_own_prompt() -> None:
    llm = fake_llm()
    params = [SamplingParams(), SamplingParams(logit_bias={5000: 1.0}), SamplingParams(stop_token_ids=(7000,))]
    errors = [c.error for c in llm.generate(["a", "b", "c"], params)]
    assert errors[0] is None
    assert isinstance(errors[1], RowError) and "logit_bias names token 5000" in str(errors[1])
    assert isinstance(errors[2], RowError) and "stop_token_ids names token 7000" in str(errors[2])


def test_stats_count_reused_prefix_tokens() -> None:
    llm = fake_llm()
    llm.generate(["a long shared prefix of many bytes, longer than a block or two " + str(i) for i in range(20)])
    stats = llm.stats()
    assert stats.prompt_tokens_reused > 19 * 48 > stats.prompt_tokens_computed > 0
    assert stats.generated_tokens > 0 and stats.steps > 0 and stats.preemptions == 0


def test_unknown_option_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match="did you mean 'max_num_seqs'"):
        LLM("fake", max_num_seq=3)
    with pytest.raises(UsageError, match="kv_cache_tokens"):
        LLM("fake", kv_cache_tokens=-1)


def test_logprobs_have_one_entry_per_token() -> None:
    completion = fake_llm().generate(["a"], SamplingParams(logprobs=2, max_tokens=3))[0]
    assert isinstance(completion, Completion)
    entries = completion.outputs[0].logprobs
    assert entries is not None and [e.token_id for e in entries] == completion.outputs[0].token_ids


def test_logprob_token_ids_select_the_logprobs() -> None:
    params = SamplingParams(max_tokens=4, logprob_token_ids=[65, 66, 65], ignore_eos=True)
    assert params.logprob_token_ids == (65, 66) and params.logprobs == 0
    (completion,) = fake_llm().generate(["hello"], params)
    assert [[token for token, _ in entry.top] for entry in completion.outputs[0].logprobs or ()] == [[65, 66]] * 4
    with pytest.raises(BadParameters, match="1 to 128"):
        SamplingParams(logprob_token_ids=())
    (wrong,) = fake_llm().generate(["hello"], SamplingParams(logprob_token_ids=[999]))
    assert "logprob_token_ids names token 999" in str(wrong.error)
