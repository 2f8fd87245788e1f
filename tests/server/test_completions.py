"""/v1/completions as evaluation harnesses use it: forms of prompts, echo, logprobs, samples, stop strings, usage."""

from __future__ import annotations

import math

import pytest

from tests.server.alike import alike
from tests.server.conftest import Endpoint, fake_llm

COMPLETIONS = "/v1/completions"


def texts(body: dict) -> list[str]:
    return [choice["text"] for choice in body["choices"]]


def test_required_fields_are_present(fake):
    body = fake.completion(prompt="hello", max_tokens=5, ignore_eos=True)
    assert body["id"].startswith("cmpl-") and body["object"] == "text_completion" and body["model"] == "test-model"
    assert isinstance(body["created"], int)
    (choice,) = body["choices"]
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    assert body["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 5,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("ab", 1), (["ab", "cd"], 2), ([97, 98], 1), ([[97, 98]], 1), ([[97, 98], [99, 100]], 2)],
)
def test_prompt_may_be_text_ids_or_lists_of_them(fake, prompt, count):
    body = fake.completion(prompt=prompt, max_tokens=4, temperature=0)
    assert [choice["index"] for choice in body["choices"]] == list(range(count))
    same = fake.completion(prompt="ab", max_tokens=4, temperature=0)
    assert texts(body)[0] == texts(same)[0]
    assert body["usage"]["prompt_tokens"] == 2 * count


def test_token_ids_get_no_special_tokens(tiny):
    assert tiny.completion(prompt=[97, 98], max_tokens=1)["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize("stop", [None, [], "q", ["q"], ["zz", "q", "yy", "xx", "ww", "vv"]])
def test_stop_may_be_null_text_or_list(fake, stop):
    whole = fake.completion(prompt="a long answer", max_tokens=200, temperature=0, ignore_eos=True)
    body = fake.completion(prompt="a long answer", max_tokens=200, temperature=0, ignore_eos=True, stop=stop)
    if not stop:
        assert texts(body) == texts(whole)
        return
    (text,) = texts(whole)
    first = min(
        found for found in (text.find(one) for one in ([stop] if isinstance(stop, str) else stop)) if found >= 0
    )
    assert texts(body) == [text[:first]]
    assert body["choices"][0]["finish_reason"] == "stop"
    streamed = fake.stream(
        COMPLETIONS, prompt="a long answer", max_tokens=200, temperature=0, ignore_eos=True, stop=stop
    )
    assert "".join(event["choices"][0]["text"] for event in streamed) == text[:first]


@pytest.mark.parametrize("logprobs", [None, 1])
def test_token_is_streamed_in_the_step_that_samples_it(logprobs):
    """Also of sequences that no step visits, as those that decode without drafts."""
    endpoint = Endpoint(fake_llm(answer_tokens=60, step_s=0.01, speculative_tokens=0, max_model_len=512))
    try:
        asked = {"prompt": "x", "max_tokens": 40, "temperature": 0, "ignore_eos": True, "logprobs": logprobs}
        events = endpoint.stream(COMPLETIONS, **asked)
        pieces = [choice for event in events for choice in event["choices"] if choice["text"]]
        assert "".join(piece["text"] for piece in pieces) == texts(endpoint.completion(**asked))[0]
        assert len(pieces) > 30 and (logprobs is None or all(len(one["logprobs"]["tokens"]) for one in pieces))
    finally:
        endpoint.close()


def test_default_max_tokens_is_16(fake):
    assert fake.completion(prompt="x", ignore_eos=True)["usage"]["completion_tokens"] == 16


def test_samples_differ_and_repeat_with_the_seed(tiny):
    asked = {"prompt": ["one", "two"], "n": 3, "seed": 7, "temperature": 1.0, "max_tokens": 12, "ignore_eos": True}
    first, again = texts(tiny.completion(**asked)), texts(tiny.completion(**asked))
    assert first == again and len(first) == 6 and len(set(first[:3])) == 3
    assert texts(tiny.completion(**{**asked, "seed": 8})) != first
    body = tiny.completion(**asked)
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    assert body["usage"] == {
        "prompt_tokens": 6,
        "completion_tokens": 72,
        "total_tokens": 78,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_unseeded_samples_differ_between_requests(tiny):
    asked = {"prompt": "one", "temperature": 1.0, "max_tokens": 16}
    assert len({tiny.completion(**asked)["choices"][0]["text"] for _ in range(4)}) > 1


def test_cached_tokens_are_counted(tiny):
    prompt = [number % 250 for number in range(100)]
    tiny.completion(prompt=prompt, max_tokens=1)
    details = tiny.completion(prompt=prompt, max_tokens=1)["usage"]["prompt_tokens_details"]
    assert details == {"cached_tokens": 96}


@pytest.mark.parametrize("count", [0, 1, 5])
def test_logprobs_of_generated_tokens_hold_the_token_and_the_best(tiny, count):
    choice = tiny.completion(prompt="hello", max_tokens=6, temperature=0, logprobs=count)["choices"][0]
    logprobs = choice["logprobs"]
    assert set(logprobs) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert all(len(values) == 6 for values in logprobs.values())
    assert all(isinstance(value, float) and value <= 0 for value in logprobs["token_logprobs"])
    for token, value, top in zip(
        *(logprobs[name] for name in ("tokens", "token_logprobs", "top_logprobs")), strict=True
    ):
        assert top[token] == value  # the same float: this is how lm-eval finds out whether a token is greedy
        assert max(top.values()) == value
        assert 1 <= len(top) <= max(1, count)


def test_return_tokens_as_token_ids_writes_ids(tiny):
    asked = {"prompt": "hello", "max_tokens": 3, "temperature": 0, "logprobs": 3, "return_tokens_as_token_ids": True}
    logprobs = tiny.completion(**asked)["choices"][0]["logprobs"]
    assert all(token.startswith("token_id:") for token in logprobs["tokens"])
    assert all(len(top) == 3 for top in logprobs["top_logprobs"])


def test_echo_without_logprobs_prepends_the_prompt(fake):
    body = fake.completion(prompt=["hello", "ab"], max_tokens=3, temperature=0, echo=True)
    plain = fake.completion(prompt=["hello", "ab"], max_tokens=3, temperature=0)
    assert texts(body) == ["hello" + texts(plain)[0], "ab" + texts(plain)[1]]
    streamed = fake.stream(COMPLETIONS, prompt="hello", max_tokens=3, temperature=0, echo=True)
    assert "".join(event["choices"][0]["text"] for event in streamed) == texts(body)[0]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_zero_max_tokens_scores_the_prompt(fake, stream):
    asked = {"prompt": [[104, 105], [97]], "max_tokens": 0, "echo": True}
    if stream:
        choices = [event["choices"][0] for event in fake.stream(COMPLETIONS, **asked)]
    else:
        body = fake.completion(**asked)
        choices = body["choices"]
        assert body["usage"]["completion_tokens"] == 0 and body["usage"]["prompt_tokens"] == 3
    assert [(choice["index"], choice["text"], choice["finish_reason"]) for choice in choices] == [
        (0, "hi", "length"),
        (1, "a", "length"),
    ]


def test_log_likelihood_request_of_lm_eval_is_answered(tiny, plain_torch):
    prompts = [[104, 101, 108, 108, 111], [97, 98, 99], [104, 101, 108, 108, 111]]
    asked = {"prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    for _ in range(2):  # the second time with a warm prefix cache
        body = tiny.completion(**asked)
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
        for prompt, choice in zip(prompts, body["choices"], strict=True):
            values, tops = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
            assert len(values) == len(tops) == len(prompt) + 1
            assert values[0] is None and tops[0] is None
            for value, top in zip(values[1:-1], tops[1:-1], strict=True):  # lm-eval's slice [ctxlen:-1]
                assert isinstance(value, float) and math.isfinite(value)
                assert value in top.values() and max(top.values()) >= value
    assert alike(body["choices"][0]["logprobs"], body["choices"][2]["logprobs"], plain_torch)


CONTEXT = 512  # of the tiny model, whose tokens are bytes
SCORING = {"temperature": 0, "logprobs": 1, "seed": 1234, "echo": True}  # as lm-eval's local-completions
WRITING = {"temperature": 0, "stop": [], "seed": 1234}
EDGES = [  # what is asked, tokens of the longest prompt that it may have
    ({**SCORING, "max_tokens": 1}, CONTEXT - 1),
    ({**SCORING, "max_tokens": 0}, CONTEXT),
    ({"echo": True, "max_tokens": 0}, CONTEXT),
    ({"prompt_logprobs": 1, "max_tokens": 0}, CONTEXT),
    ({**WRITING, "max_tokens": 32}, CONTEXT - 32),
    ({**WRITING, "max_tokens": 32, "ignore_eos": True, "n": 2}, CONTEXT - 32),
]


@pytest.mark.parametrize("form", ["text", "ids", "texts", "lists of ids"])
@pytest.mark.parametrize(("asked", "most"), EDGES)
def test_longest_prompt_fits_and_one_token_more_is_a_400(tiny, form, asked, most):
    """The longest prompt is answered whole; one token more is a 400 that says so, streamed or not."""

    def prompt(tokens):
        text = "ab" * (tokens // 2) + "c" * (tokens % 2)
        one = list(text.encode()) if "ids" in form else text
        return [[97] if "ids" in form else "a", one] if "s of" in form or form == "texts" else one

    body = tiny.completion(prompt=prompt(most), **asked)
    last = body["choices"][-1]
    several = isinstance(prompt(most), list) and not isinstance(prompt(most)[0], int)
    assert body["usage"]["prompt_tokens"] == most + several
    if "echo" in asked:
        assert last["text"].startswith("abab") and len(last["text"].encode()) >= most
    if "logprobs" in asked:
        values = last["logprobs"]["token_logprobs"]
        assert len(values) == most + asked["max_tokens"]
        assert values[0] is None and all(isinstance(value, float) for value in values[1:])
    if "ignore_eos" in asked:  # nothing was cut
        assert body["usage"]["completion_tokens"] == 32 * len(body["choices"]) and last["finish_reason"] == "length"
    for tokens in (most + 1, CONTEXT + 1, 3 * CONTEXT):
        for stream in (False, True):
            error = tiny.refused(COMPLETIONS, {"prompt": prompt(tokens), **asked, "stream": stream})
            assert error["code"] == "context_length_exceeded" and error["type"] == "invalid_request_error"
            assert f"{tokens}" in error["message"] and f"{CONTEXT}" in error["message"]
    assert tiny.idle()


def test_prompt_logprobs_do_not_depend_on_samples_or_streaming(tiny, plain_torch):
    asked = {"prompt": "some text", "temperature": 1.0, "max_tokens": 2, "logprobs": 2, "seed": 3, "echo": True, "n": 3}
    body = tiny.completion(**asked)
    alone = tiny.completion(**{**asked, "max_tokens": 0, "n": 1})["choices"][0]["logprobs"]
    assert len(alone["tokens"]) == 9 and "".join(alone["tokens"]) == "some text"
    for choice in body["choices"]:
        assert alike(choice["logprobs"]["token_logprobs"][:9], alone["token_logprobs"], plain_torch)
        assert choice["logprobs"]["text_offset"][:9] == list(range(9))
    streamed = [event["choices"][0] for event in tiny.stream(COMPLETIONS, **asked)]
    for one, choice in zip(streamed, body["choices"], strict=True):
        assert alike(one["logprobs"], choice["logprobs"], plain_torch)


def test_prompt_logprobs_are_a_table_of_their_own(tiny):
    choice = tiny.completion(prompt="some", max_tokens=1, prompt_logprobs=2)["choices"][0]
    entries = choice["prompt_logprobs"]
    assert choice["logprobs"] is None and len(entries) == 4 and entries[0] is None
    for entry, byte in zip(entries[1:], b"ome", strict=True):
        assert entry[str(byte)]["decoded_token"] == chr(byte)
        assert sorted(one["rank"] for one in entry.values() if one["rank"] is not None)[:2] == [1, 2]


def test_characters_of_several_tokens_stay_whole(fake):
    """Every byte is a token: text is whole characters in whatever chunks."""
    word = "naïve 東京 🙂"
    ids = list(word.encode())
    asked = {"max_tokens": len(ids), "logit_bias": {}, "ignore_eos": True, "temperature": 0}
    text = fake.completion(prompt=ids, echo=True, **asked)["choices"][0]["text"]
    assert text.startswith(word)
