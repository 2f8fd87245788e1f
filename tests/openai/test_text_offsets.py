"""Character offsets of tokens in completions: the same whole and streamed, also for characters of several tokens."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.openai.completion_response import CompletionChoices
from batchinfer.openai.delta import Delta
from batchinfer.openai.logprobs import TokenTexts
from batchinfer.openai.parse import ModelFacts, parse_body, parse_request
from batchinfer.openai.text_offsets import prompt_offsets
from batchinfer.pipeline.prepare import ModelLimits, Preparer
from batchinfer.pipeline.prompt import Prepared, Prompt
from batchinfer.request import SamplingParams, TokenLogprob
from batchinfer.server.text_stream import TextStream
from batchinfer.text.tokenizer import ByteTokenizer, Tokenizer
from tests.text.test_control import KINDS

EOS = 257
BYTES = ByteTokenizer()


def choices_of(found: Tokenizer, ids: list[int], cuts: list[int], prompt: str = "", **body) -> list[list[dict]]:
    """Return the choices of the answer `ids` to one prompt: whole, and cut into chunks at `cuts`."""
    model = ModelFacts(("m",), found, None, SamplingParams(max_tokens=99))
    asked = parse_request(parse_body("/v1/completions", {"prompt": prompt or "x", "logprobs": 1, **body}), model)
    preparer = Preparer(found, ModelLimits(1000, found.vocab_size, frozenset({EOS})), SamplingParams(), None)
    [prepared] = preparer.prepare([Prompt(0, [prompt or "x"], asked.params, options=asked.options)])
    assert isinstance(prepared, Prepared)
    request = prepared.requests[0]
    ended = (n for n, one in enumerate(ids, 1) if one == EOS or (request.stop_check and request.stop_check(one)))
    end = next(ended, None)
    ids, reason = (ids[:end], "stop") if end else (ids, "length")
    made = []
    for places in ([], sorted({cut for cut in cuts if 0 < cut < len(ids)})):
        writer = CompletionChoices(TokenTexts(found), asked, [prepared.ids])
        stream = TextStream(found, prepared, request)
        choices: list[dict] = []
        scored = [None, *(TokenLogprob(one, -1.0, ()) for one in prepared.ids[1:])] if body.get("echo") else None
        for start, stop in itertools.pairwise([0, *places, len(ids)]):
            part, last = ids[start:stop], stop == len(ids)
            text = stream.finish(part, reason) if last else stream.push_tokens(part)
            entries = [TokenLogprob(one, -2.0, ()) for one in part]
            delta = Delta(0, text, part, entries, reason if last else None, start == 0, scored if start == 0 else None)
            choices += writer.chunk_choices(delta) if places else writer.whole_choices([delta])[0]
        made.append(choices)
    return made


def joined(choices: list[dict]) -> tuple[str, list[int], list[str]]:
    tables = [choice["logprobs"] for choice in choices]
    offsets = [place for table in tables for place in table["text_offset"]]
    return "".join(choice["text"] for choice in choices), offsets, [one for table in tables for one in table["tokens"]]


IDS = st.one_of(
    st.text("ab é🙂\n", max_size=12).map(lambda text: list(text.encode())),
    st.lists(st.sampled_from([97, 98, 0xC3, 0xA9, 0xF0, 0x9F, 0x99, 0x82, 256, EOS]), max_size=16),
)
CUTS = st.lists(st.integers(0, 20), max_size=6)


@settings(deadline=None, max_examples=150)
@given(IDS, CUTS, st.sampled_from([[], ["b"], ["é", "ab"], ["🙂a"]]), st.booleans(), st.booleans())
def test_streamed_and_whole_offsets_are_alike_and_within_the_text(ids, cuts, stop, include, skip):
    more = {"stop": stop, "include_stop_str_in_output": include, "skip_special_tokens": skip}
    whole, pieces = (joined(choices) for choices in choices_of(BYTES, ids, cuts, **more))
    assert whole == pieces
    text, offsets, _ = whole
    assert offsets == sorted(offsets) and all(0 <= place <= len(text) for place in offsets)


@settings(deadline=None, max_examples=100)
@given(st.text("ab é🙂\ufffd\n", max_size=12), CUTS)
def test_every_byte_begins_with_its_character(text, cuts):
    expected = [place for place, character in enumerate(text) for _ in character.encode()]
    for choices in choices_of(BYTES, list(text.encode()), cuts):
        assert joined(choices)[:2] == (text, expected)
        for choice in choices[:-1]:
            assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["text_offset"])


def test_hidden_tokens_have_no_text_and_a_cut_text_no_more():
    ids = [*b"a", 256, *"é".encode(), EOS]
    assert joined(choices_of(BYTES, ids, [])[0])[:2] == ("aé", [0, 1, 1, 1, 2])
    assert joined(choices_of(BYTES, ids, [], skip_special_tokens=False)[0])[:2] == ("a<bos>é", [0, 1, 6, 6, 7])
    stopped = choices_of(BYTES, list("one éstop".encode()), [2, 4, 6], stop=["ést"])
    assert joined(stopped[0])[:2] == joined(stopped[1])[:2] == ("one ", [0, 1, 2, 3, 4, 4, 4, 4])


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece", "bos"])
def test_echoed_prompts_and_what_follows(kind):
    found = KINDS[kind]
    prompt = "hello é🙂 </s> b"
    [answer] = found.encode_batch([" hello 🙂"], False)
    assert isinstance(answer, list)
    answer = [one for one in answer if one != EOS]
    choices = choices_of(found, answer, [], prompt=prompt, echo=True)[0]
    text, offsets, tokens = joined(choices)
    assert text.startswith(prompt) and offsets == sorted(offsets) and offsets[len(tokens) - len(answer)] == len(prompt)
    for (place, following), token in zip(itertools.pairwise([*offsets, len(text)]), tokens, strict=True):
        if "\ufffd" not in token and following > place:
            assert text[place:following].strip() == token.strip(), (kind, place)
    assert choices[0]["logprobs"]["token_logprobs"][0] is None


def test_a_text_that_is_normalized_stays_within_itself():
    found = KINDS["metaspace"]
    [ids] = found.encode_batch(["héllo  <s>"], True)
    assert isinstance(ids, list)
    offsets = prompt_offsets(found, ids, "héllo  <s>")
    assert len(offsets) == len(ids) and offsets == sorted(offsets) and offsets[-1] <= 10


def test_ids_come_with_the_logprobs_of_their_text():
    streamed = choices_of(BYTES, list("a🙂b".encode()), [2, 3, 4], return_token_ids=True)[1]
    assert [choice["token_ids"] for choice in streamed] == [[97], list("🙂b".encode())]
    assert all(len(choice["token_ids"]) == len(choice["logprobs"]["tokens"]) for choice in streamed)


def test_chunk_whose_first_character_is_held_back_has_the_ids_of_the_prompt():
    _, chunks = choices_of(BYTES, [240, 240, 240], [1, 2], prompt="abc", return_token_ids=True)
    assert chunks[0]["prompt_token_ids"] == [97, 98, 99] and not chunks[0]["text"]
    assert [token for chunk in chunks for token in chunk["token_ids"]] == [240] * 3
