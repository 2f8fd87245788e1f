"""The real openai client against an endpoint, sync, async and streaming; runs in the clients' own environment.

python openai_calls.py BASE_URL MODEL
"""

import asyncio
import sys
import warnings

import openai

warnings.simplefilter("error")  # pydantic warns where a response is not what the client expects
BASE_URL, MODEL = sys.argv[1:]
ASK = {"model": MODEL, "messages": [{"role": "user", "content": "Name three colours."}], "max_tokens": 16, "seed": 7}


def whole(answer):
    """Check that all fields of a response are present and that it survives a strict dump."""
    answer.model_dump_json(warnings="error")
    assert answer.id and answer.created and answer.model == MODEL, answer
    assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
    assert all(choice.finish_reason in ("stop", "length", "tool_calls") for choice in answer.choices)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    return answer


def joined(chunks):
    text, usage = "", None
    for chunk in chunks:
        chunk.model_dump_json(warnings="error")
        usage = chunk.usage or usage
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert usage is not None and usage.completion_tokens
    return text


def sync(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    first = whole(client.chat.completions.create(**ASK, temperature=1, n=2, logprobs=True, top_logprobs=3))
    again = whole(client.chat.completions.create(**ASK, temperature=1, n=2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices] and texts[0] != texts[1]
    assert len(first.choices[0].logprobs.content[0].top_logprobs) == 3
    options = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
    streamed = joined(client.chat.completions.create(**ASK, **options))
    plain = whole(client.chat.completions.create(**ASK, temperature=0))
    assert streamed == plain.choices[0].message.content, (streamed, plain)
    answer = whole(client.completions.create(model=MODEL, prompt=["One", "Two"], max_tokens=4, logprobs=2))
    assert len(answer.choices) == 2 and len(answer.choices[0].logprobs.token_logprobs) == 4
    echoed = client.completions.create(model=MODEL, prompt="One two three", max_tokens=0, echo=True, logprobs=1)
    assert echoed.choices[0].text == "One two three" and echoed.choices[0].logprobs.token_logprobs[0] is None
    with_parts = [{"role": "user", "content": [{"type": "text", "text": "Name three colours."}]}]
    parts = whole(client.chat.completions.create(**{**ASK, "messages": with_parts}, temperature=0))
    assert parts.choices[0].message.content == streamed
    embedded = client.embeddings.create(model=MODEL, input=["a", "b"])  # base64, which the client decodes
    assert len(embedded.data) == 2 and all(isinstance(value, float) for value in embedded.data[1].embedding)


def responses(client):
    ask = {"model": MODEL, "input": "Name three colours.", "max_output_tokens": 16, "temperature": 0}
    answer = client.responses.create(**ask)
    answer.model_dump_json(warnings="error")
    chat = client.chat.completions.create(**ASK, temperature=0)
    assert answer.output_text == chat.choices[0].message.content and answer.usage.output_tokens <= 16
    events = list(client.responses.create(**ask, stream=True))
    for event in events:
        event.model_dump_json(warnings="error")
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == answer.output_text == events[-1].response.output_text
    try:
        client.responses.create(**ask, previous_response_id=answer.id)
    except openai.BadRequestError as error:
        assert error.param == "previous_response_id", error
    else:
        raise AssertionError("a stored response was accepted")


def errors(client):
    for values, kind in (
        ({"model": "none"}, openai.NotFoundError),
        ({"temperature": -1}, openai.BadRequestError),
        ({"messages": []}, openai.BadRequestError),
        ({"top_logprobs": 21, "logprobs": True}, openai.BadRequestError),
    ):
        try:
            client.chat.completions.create(**{**ASK, **values})
        except kind as error:
            assert error.body["message"] and "type" in error.body, error.body
        else:
            raise AssertionError(f"{values} was accepted")
    try:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 9000}])
    except openai.BadRequestError as error:
        assert error.code == "context_length_exceeded", error
    try:
        openai.OpenAI(base_url=BASE_URL, api_key="wrong", max_retries=0).models.list()
    except openai.AuthenticationError:
        return
    raise AssertionError("a wrong key was accepted")


async def concurrent():
    async with openai.AsyncOpenAI(base_url=BASE_URL, max_retries=0) as client:
        plain = client.chat.completions.create(**ASK, temperature=0)
        streams = [client.chat.completions.create(**ASK, temperature=0, stream=True) for _ in range(8)]
        answer, *opened = await asyncio.gather(plain, *streams)
        texts = await asyncio.gather(*(_text(stream) for stream in opened))
        assert set(texts) == {whole(answer).choices[0].message.content}
        stream = await client.chat.completions.create(**{**ASK, "max_tokens": 500}, stream=True)
        async for _ in stream:
            break
        await stream.close()  # a client that goes away


async def _text(stream):
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])


def main():
    with openai.OpenAI(base_url=BASE_URL, max_retries=0) as client:
        sync(client)
        responses(client)
        errors(client)
    asyncio.run(concurrent())
    print("ok")


if __name__ == "__main__":
    main()
