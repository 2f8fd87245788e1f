"""Chat messages of requests: normalised once, then taken as they are by the chat template."""

from __future__ import annotations

from batchinfer.openai.chat_messages import parse_conversation
from batchinfer.openai.request_models import ChatRequest
from batchinfer.text.messages import ChatMessages, ContentForms, normalize_messages, shape_messages

TEXT_ONLY = ContentForms(text=True, parts=False)


def test_messages_of_a_request_are_normalized_and_normalizing_again_returns_them():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = ChatRequest.model_validate({"messages": [{"role": "user", "content": parts, "name": None}]})
    messages, _ = parse_conversation(body, body.messages, "{{ messages }}")
    assert isinstance(messages, ChatMessages) and messages == [{"role": "user", "content": parts}]
    assert normalize_messages(messages) is messages


def test_shaping_messages_for_a_template_leaves_the_normalized_ones_unchanged():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = normalize_messages([{"role": "user", "content": parts}])
    assert shape_messages(messages, TEXT_ONLY) == [{"role": "user", "content": "a\nb"}]
    assert messages == [{"role": "user", "content": parts}]
