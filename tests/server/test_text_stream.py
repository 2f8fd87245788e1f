"""Streamed text equals a job's text, however tokens are chunked, with stop strings and characters of several tokens."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.pipeline.prepare import ModelLimits, Preparer
from batchinfer.pipeline.prompt import Prepared, Prompt
from batchinfer.request import SamplingParams
from batchinfer.server.text_stream import TextStream
from batchinfer.text.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
PREPARER = Preparer(TOKENIZER, ModelLimits(1000, 258, frozenset({257})), SamplingParams(), None)


def prepared_with(**values) -> Prepared:
    (found,) = PREPARER.prepare([Prompt(0, ["x"], SamplingParams(**values))])
    assert isinstance(found, Prepared)
    return found


def run(ids: list[int], cuts: list[int], **values) -> tuple[str, str, str]:
    """Return (a job's text, the streamed text before the last chunk, all streamed text)."""
    prepared = prepared_with(**values)
    request = prepared.requests[0]
    reason = "length"
    for count in range(1, len(ids) + 1):
        if ids[count - 1] in request.stop_ids or (
            request.stop_check is not None and request.stop_check(ids[count - 1])
        ):
            ids, reason = ids[:count], "stop"
            break
    by_token = reason == "stop" and ids[-1] in request.stop_ids
    visible = ids[:-1] if by_token and not request.params.include_stop_str_in_output else ids
    whole = TOKENIZER.decode_batch([visible], True)[0]
    if reason == "stop" and not by_token:
        pieces = TOKENIZER.pieces(True)
        whole = prepared.stop.cut(whole, sum(len(pieces.push(one)) for one in ids[: request.params.min_tokens]))
    stream = TextStream(TOKENIZER, prepared, request)
    places = sorted({cut for cut in cuts if cut < len(ids)})
    shown, at = "", 0
    for place in places:
        shown += stream.push_tokens(ids[at:place])
        at = place
    return whole, shown, shown + stream.finish(ids[at:], reason)


IDS = st.one_of(
    st.text("abc\né🙂", max_size=30).map(lambda text: list(text.encode())),
    st.lists(st.integers(0, 257), max_size=30),
    st.lists(st.sampled_from([97, 98, 0xC3, 0xA9, 0xF0, 257]), max_size=30),
)
STOPS = st.lists(st.text("abcé\n", min_size=1, max_size=4), max_size=4).map(tuple)


@settings(deadline=None, max_examples=400)
@given(IDS, st.lists(st.integers(0, 30), max_size=8), STOPS, st.booleans(), st.integers(0, 6))
def test_streamed_text_equals_the_jobs_text(ids, cuts, stop, include, min_tokens):
    whole, shown, said = run(ids, cuts, stop=stop, include_stop_str_in_output=include, min_tokens=min_tokens)
    assert said == whole
    assert whole.startswith(shown)


def test_a_character_that_the_first_token_after_min_tokens_makes_whole_is_cut():
    for min_tokens, text in ((1, "a"), (2, "a"), (3, "aéb")):
        whole, _, said = run(list("aéb".encode()), [1, 2], stop=("é",), min_tokens=min_tokens, max_tokens=9)
        assert whole == said == text


def test_text_is_held_back_only_for_stop_strings_and_characters():
    prepared = prepared_with(stop=("\n\nQuestion:",))
    stream = TextStream(TOKENIZER, prepared, prepared.requests[0])
    assert stream.push_tokens(list(b"abc")) == "abc"
    assert stream.push_tokens(list(b"\n")) == ""
    assert stream.push_tokens(list(b"d")) == "\nd"
    assert stream.push_tokens([0xF0, 0x9F]) == ""
    assert stream.push_tokens([0x99, 0x82]) == "🙂"
