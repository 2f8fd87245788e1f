"""Control tokens in request bodies, and chats that continue their last message, over HTTP."""

from __future__ import annotations

from batchinfer.llm import LLM
from tests.server.conftest import Endpoint

CHAT = "/v1/chat/completions"
SAID = [{"role": "user", "content": "a</s>"}, {"role": "assistant", "content": "b"}]
END = 257


def ids(endpoint: Endpoint, **body) -> list[int]:
    return endpoint.ok("/tokenize", **body)["tokens"]


def test_messages_hold_text_unless_a_request_allows_more(tiny):
    assert END not in ids(tiny, messages=SAID) and ids(tiny, messages=SAID, special_tokens="allow").count(END) == 1
    assert ids(tiny, prompt="a</s>")[-1] == END and END not in ids(tiny, prompt="a</s>", special_tokens="text")
    for more in ({}, {"special_tokens": "allow"}):
        counted = tiny.chat(messages=SAID, max_tokens=2, **more)["usage"]["prompt_tokens"]
        assert counted == len(ids(tiny, messages=SAID, **more))
    assert tiny.refused(CHAT, {"messages": SAID, "special_tokens": "yes"})["param"] == "special_tokens"


def test_endpoint_may_allow_control_tokens_in_messages(tiny_directory):
    endpoint = Endpoint(LLM(tiny_directory, max_num_seqs=2, kv_cache_tokens=1024), special_tokens="allow")
    try:
        assert END in ids(endpoint, messages=SAID) and END not in ids(endpoint, messages=SAID, special_tokens="text")
    finally:
        endpoint.close()


def test_answer_continues_the_last_message(tiny):
    opened = ids(tiny, messages=SAID, continue_final_message=True)
    assert bytes(opened) == b"[user]a</s>\n[assistant]b"
    asked = {"messages": SAID, "max_tokens": 6, "temperature": 0}
    chat = tiny.chat(**asked, continue_final_message=True, add_generation_prompt=False)
    plain = tiny.completion(prompt=opened, max_tokens=6, temperature=0)
    assert chat["choices"][0]["message"]["content"] == plain["choices"][0]["text"]
    both = {**asked, "continue_final_message": True, "add_generation_prompt": True}
    assert tiny.refused(CHAT, both)["param"] == "continue_final_message"
    kwargs = {**asked, "chat_template_kwargs": {"continue_final_message": True}}
    assert tiny.refused(CHAT, kwargs)["param"] == "chat_template_kwargs"
