"""vLLM's fields beside OpenAI's: token ids in responses, logprobs of named tokens, truncated prompts."""

from __future__ import annotations

import re

import pytest

from batchinfer import SamplingParams
from tests.server.conftest import Endpoint, fake_llm

CHAT, TEXT, VECTORS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
HI = [{"role": "user", "content": "hi"}]


def test_completions_return_token_ids(tiny):
    asked = {"prompt": ["hé", "there"], "max_tokens": 20, "temperature": 1, "seed": 3, "n": 2, "logprobs": 0}
    plain = tiny.completion(**asked)["choices"]
    assert all("token_ids" not in choice and "prompt_token_ids" not in choice for choice in plain)
    choices = tiny.completion(**asked, return_token_ids=True, return_tokens_as_token_ids=True)["choices"]
    for number, choice in enumerate(choices):
        assert choice["text"] == plain[number]["text"]
        assert choice["prompt_token_ids"] == list(asked["prompt"][number // 2].encode())
        assert [f"token_id:{token}" for token in choice["token_ids"]] == choice["logprobs"]["tokens"]
    streamed = [
        event["choices"][0] for event in tiny.stream(TEXT, **{**asked, "logprobs": None}, return_token_ids=True)
    ]
    for number, choice in enumerate(choices):
        own = [one for one in streamed if one["index"] == number]
        assert own[0]["prompt_token_ids"] == choice["prompt_token_ids"]
        assert not any("prompt_token_ids" in one for one in own[1:])
        assert [token for one in own for token in one["token_ids"]] == choice["token_ids"]


def test_chats_return_token_ids(tiny):
    asked = {"messages": HI, "max_tokens": 12, "temperature": 1, "seed": 3, "n": 2}
    assert "prompt_token_ids" not in tiny.chat(**asked)
    body = tiny.chat(**asked, return_token_ids=True)
    assert body["prompt_token_ids"] == list(b"[user]hi\n")
    events = tiny.stream(CHAT, **asked, return_token_ids=True, stream_options={"include_usage": True})
    assert events[0]["prompt_token_ids"] == body["prompt_token_ids"]
    assert not any("prompt_token_ids" in event for event in events[1:])
    choices = [choice for event in events for choice in event["choices"]]
    for number, whole in enumerate(body["choices"]):
        own = [token for one in choices if one["index"] == number for token in one.get("token_ids", ())]
        assert own == whole["token_ids"] and len(own) == body["usage"]["completion_tokens"] // 2


def test_the_token_that_ends_an_answer_is_among_its_ids(tiny):
    asked = {"prompt": "hi", "max_tokens": 50, "temperature": 1, "seed": 1, "return_token_ids": True}
    choice = tiny.completion(**asked, allowed_token_ids=[97, 257], min_tokens=3)["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["token_ids"][-1] == 257 and set(choice["text"]) == {"a"}
    cut = tiny.completion(**asked, allowed_token_ids=[97], stop="aa")["choices"][0]
    assert cut["text"] == "" and cut["token_ids"] == [97, 97]


def test_echo_only_request_returns_no_answer_ids(tiny):
    choice = tiny.completion(prompt="hi", max_tokens=0, echo=True, return_token_ids=True)["choices"][0]
    assert (choice["text"], choice["token_ids"], choice["prompt_token_ids"]) == ("hi", [], [104, 105])


NAMED = [7, 65, 300 - 43, 0]


def test_named_logprobs_are_those_of_the_whole_vocabulary(tiny):
    asked = {"messages": HI, "max_tokens": 6, "temperature": 0}
    best = tiny.chat(**asked, logprobs=True, top_logprobs=20, return_tokens_as_token_ids=True)
    named = tiny.chat(**asked, logprobs=True, logprob_token_ids=NAMED, return_tokens_as_token_ids=True)
    for ranked, entry in zip(*(one["choices"][0]["logprobs"]["content"] for one in (best, named)), strict=True):
        assert [top["token"] for top in entry["top_logprobs"]] == [f"token_id:{token}" for token in NAMED]
        assert (entry["token"], entry["logprob"]) == (ranked["token"], ranked["logprob"])
        known = {top["token"]: top["logprob"] for top in ranked["top_logprobs"]}
        for top in entry["top_logprobs"]:
            assert top["logprob"] == known.get(top["token"], top["logprob"]) <= 0
            assert top["token"] in known or top["logprob"] <= min(known.values())
    (whole,) = tiny.completion(prompt="[user]hi\n", max_tokens=6, temperature=0, logprobs=1, logprob_token_ids=NAMED)[
        "choices"
    ]
    rows = whole["logprobs"]["top_logprobs"]
    for row, entry in zip(rows, named["choices"][0]["logprobs"]["content"], strict=True):
        values = [top["logprob"] for top in entry["top_logprobs"]]
        assert row["A"] == values[1] and row["</s>"] == values[2] and row["\0"] == values[3]
        assert len(row) <= len(NAMED) + 1
    streamed = [
        event["choices"][0]["logprobs"]
        for event in tiny.stream(CHAT, **asked, logprobs=True, logprob_token_ids=NAMED, return_tokens_as_token_ids=True)
    ]
    assert [one for table in streamed if table for one in table["content"]] == named["choices"][0]["logprobs"][
        "content"
    ]


def test_with_echo_the_prompt_has_its_best_and_the_answer_the_named(tiny):
    asked = {"prompt": "hi", "max_tokens": 2, "temperature": 0, "echo": True, "logprobs": 2, "logprob_token_ids": [65]}
    table = tiny.completion(**asked)["choices"][0]["logprobs"]
    assert table["top_logprobs"][0] is None and len(table["tokens"]) == 4
    assert len(table["top_logprobs"][1]) in (2, 3) and all("A" in top for top in table["top_logprobs"][2:])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"logprobs": 1, "logprob_token_ids": [258]}, "258.*258"),
        ({"logprobs": 1, "logprob_token_ids": [-1]}, "-1"),
        ({"logprobs": 1, "logprob_token_ids": []}, "1 to 128"),
        ({"logprobs": 1, "logprob_token_ids": list(range(129))}, "1 to 128.*129"),
        ({"logprobs": 1, "logprob_token_ids": ["a"]}, "logprob_token_ids"),
        ({"logprobs": 1, "logprob_token_ids": [True]}, "logprob_token_ids"),
        ({"logprob_token_ids": [1]}, "goes with logprobs"),
        ({"logprobs": 1, "logprob_token_ids": [1], "echo": True, "max_tokens": 0}, "max_tokens is 0"),
        ({"prompt_logprob_token_ids": [1]}, "not supported"),
    ],
)
def test_wrong_logprob_token_ids_are_refused(tiny, body, said):
    for path, more in ((TEXT, {"prompt": "hi"}), (CHAT, {"messages": HI})):
        if path == CHAT:
            more = {**more, **({"logprobs": True} if "logprobs" in body else {})}
        if path == CHAT and "echo" in body:
            continue
        error = tiny.refused(path, {**body, **more})
        name = "logprob_token_ids" if "logprob_token_ids" in body else "prompt_logprob_token_ids"
        assert error["param"] == name and re.search(said, error["message"]), error


def test_long_prompt_is_truncated_on_the_left(tiny):
    text = "".join(chr(97 + n % 26) for n in range(1000))  # the context is 512
    kept = tiny.completion(prompt=text[-30:], max_tokens=4, temperature=0, logprobs=0)["choices"]
    cut = tiny.completion(prompt=text, max_tokens=4, temperature=0, logprobs=0, truncate_prompt_tokens=30)
    assert cut["choices"] == kept and cut["usage"]["prompt_tokens"] == 30
    ids = tiny.completion(prompt=[list(text.encode()), [65]], max_tokens=1, truncate_prompt_tokens=30)
    assert ids["usage"]["prompt_tokens"] == 31
    first = tiny.completion(
        prompt=text, max_tokens=1, truncate_prompt_tokens=30, truncation_side="right", return_token_ids=True, echo=True
    )["choices"][0]
    assert first["prompt_token_ids"] == list(text[:30].encode()) and first["text"].startswith(text[:30])
    echo = tiny.completion(prompt=text, max_tokens=0, echo=True, logprobs=0, truncate_prompt_tokens=30)["choices"][0]
    assert echo["text"] == text[-30:] and len(echo["logprobs"]["tokens"]) == 30
    # as much as there is room for beside the answer
    assert tiny.completion(prompt=text, max_tokens=12, truncate_prompt_tokens=-1)["usage"]["prompt_tokens"] == 500
    chat = tiny.chat(messages=[{"role": "user", "content": text}], truncate_prompt_tokens=-1, max_tokens=12)
    assert chat["usage"]["prompt_tokens"] == 500
    unlimited = tiny.chat(messages=[{"role": "user", "content": text}], truncate_prompt_tokens=-1)
    assert unlimited["usage"]["prompt_tokens"] == 511 and unlimited["usage"]["completion_tokens"] == 1


def test_inputs_of_embeddings_are_truncated(tiny):
    text = "".join(chr(97 + n % 26) for n in range(1000))
    kept = tiny.ok(VECTORS, input=text[-30:])
    cut = tiny.ok(VECTORS, input=[text, "short"], truncate_prompt_tokens=30)
    assert cut["data"][0]["embedding"] == kept["data"][0]["embedding"] and cut["usage"]["prompt_tokens"] == 35
    assert tiny.ok(VECTORS, input=text, truncate_prompt_tokens=-1)["usage"]["prompt_tokens"] == 512
    assert tiny.refused(VECTORS, {"input": text})["code"] == "context_length_exceeded"


@pytest.mark.parametrize("kept", [0, -2, 513, 1 << 70, "7", True])
def test_wrong_truncation_is_refused(tiny, kept):
    for path, body in ((TEXT, {"prompt": "hi"}), (VECTORS, {"input": "hi"}), (CHAT, {"messages": HI})):
        error = tiny.refused(path, {**body, "truncate_prompt_tokens": kept})
        assert error["param"] == "truncate_prompt_tokens", error


def test_truncated_prompt_needs_room_for_its_answer(tiny):
    body = {"prompt": "x" * 1000, "truncate_prompt_tokens": 512, "max_tokens": 1}
    assert tiny.refused(TEXT, body)["code"] == "context_length_exceeded"


def test_usage_on_every_chunk_goes_with_usage(fake):
    events = fake.stream(CHAT, messages=HI, max_tokens=5, stream_options={"continuous_usage_stats": True})
    assert all(event["usage"] is None and event["choices"] for event in events)


def test_tokenizing_messages_as_a_chat_does(fake):
    with_turn = fake.ok("/tokenize", messages=HI)
    assert fake.ok("/tokenize", messages=HI, add_generation_prompt=True) == with_turn
    assert with_turn["token_strs"] is None
    without = fake.ok("/tokenize", messages=HI, add_generation_prompt=False, return_token_strs=True)
    tail = b"<|im_start|>assistant\n"
    assert bytes(with_turn["tokens"]) == bytes(without["tokens"]) + tail
    assert "".join(without["token_strs"]).encode() + tail == bytes(with_turn["tokens"])


def test_tokenizing_a_last_message_that_stays_open(fake):
    messages = [*HI, {"role": "assistant", "content": "The answer"}]
    found = fake.ok("/tokenize", messages=messages, continue_final_message=True, add_generation_prompt=False)
    assert bytes(found["tokens"]).decode() == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nThe answer"
    both = {"messages": messages, "continue_final_message": True, "add_generation_prompt": True}
    assert fake.refused("/tokenize", both)["param"] == "continue_final_message"


def test_defaults_that_name_tokens_are_taken_back():
    llm = fake_llm()
    llm.default_params = SamplingParams(logprob_token_ids=[65])
    endpoint = Endpoint(llm)
    try:
        named = endpoint.completion(prompt="hi", max_tokens=2, ignore_eos=True)["choices"][0]["logprobs"]
        assert all("A" in top for top in named["top_logprobs"])
        assert endpoint.completion(prompt="hi", max_tokens=2, logprobs=None)["choices"][0]["logprobs"] is None
        assert endpoint.chat(messages=HI, max_tokens=2, logprobs=False)["choices"][0]["logprobs"] is None
        plain = endpoint.completion(prompt="hi", max_tokens=2, logprob_token_ids=None, ignore_eos=True)
        assert all(len(top) == 1 for top in plain["choices"][0]["logprobs"]["top_logprobs"])
        assert endpoint.completion(prompt="hi", max_tokens=0, echo=True, logprobs=1)["choices"][0]["logprobs"]
    finally:
        endpoint.close()
