"""Tests of stop strings and bad words, with byte-level, sentencepiece and unknown decoders."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders
from tokenizers.models import WordLevel

from batchinfer.errors import BadParameters
from batchinfer.request import StopCheck
from batchinfer.text import detokenize
from batchinfer.text.detokenize import StopStrings, bad_word_ids
from batchinfer.text.fast import FastTokenizer, TokenizerFacts
from batchinfer.text.pieces import BytePieces, DecodedPieces, SentencePieces
from batchinfer.text.tokenizer import ByteTokenizer, Tokenizer

from .test_tokenizer import byte_level, sentencepiece


def metaspace() -> RustTokenizer:
    """Build a tokenizer whose decoder is of neither known kind."""
    rust = RustTokenizer(
        WordLevel({token: i for i, token in enumerate(["<s>", "▁a", "b", "▁", "ab", "▁bc", "c", "é"])})
    )
    rust.decoder = decoders.Metaspace()
    rust.add_special_tokens(["<s>"])
    return rust


def sentencepiece_without_strip() -> RustTokenizer:
    rust = sentencepiece()
    rust.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return rust


def fast(rust: RustTokenizer) -> FastTokenizer:
    return FastTokenizer(rust, TokenizerFacts("test"))


KINDS: dict[str, tuple[Callable[[], Tokenizer], type]] = {
    "bytes": (ByteTokenizer, BytePieces),
    "byte level": (lambda: fast(byte_level()), BytePieces),
    "sentencepiece": (lambda: fast(sentencepiece()), SentencePieces),
    "sentencepiece, no strip": (lambda: fast(sentencepiece_without_strip()), SentencePieces),
    "metaspace": (lambda: fast(metaspace()), DecodedPieces),
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {name: make() for name, (make, _) in KINDS.items()}


def fires_at(check: StopCheck, ids: list[int]) -> int | None:
    """Return the number of tokens after which the check is first true, called as in the engine."""
    return next((count for count, token_id in enumerate(ids, 1) if check(token_id)), None)


def naive_fires_at(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...], skip: bool) -> int | None:
    for count in range(1, len(ids) + 1):
        [text] = tokenizer.decode_batch([ids[:count]], skip)
        if any(s in text for s in stop):
            return count
    return None


def naive_fires(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...], min_tokens: int) -> list[bool]:
    """For every token: did it complete a stop string, among what the text before it had left open?"""
    fires = []
    for count in range(1, len(ids) + 1):
        pieces = tokenizer.pieces(False)
        settled = len("".join([pieces.push(token_id) for token_id in ids[: count - 1]]))
        [text] = tokenizer.decode_batch([ids[:count]], False)
        ends = {start + len(s) for s in stop for start in range(len(text)) if text.startswith(s, start)}
        fires.append(count > min_tokens and any(end > settled for end in ends))
    return fires


# few bytes, so that characters come together and stop strings appear
_BYTES = st.sampled_from([*b"ab \n", 0xE2, 0x82, 0xAC, 0xC3, 0xA9, 0x80, 0xF0, 0x9F, 0x99, 0x82])
STOPS = [
    "a",
    "ab",
    "b a",
    "€",
    "a€",
    "€b",
    "é\n",
    "\n\n",
    "🙂",
    "\ufffd",
    "\ufffda",
    " ",
    "he",
    "llo",
    " hello",
    "aba",
    "ba",
]


def token_ids(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Byte tokens (in SentencePiece <0xE2>), merged ones, special ones, and ids that do not exist."""
    if isinstance(tokenizer, ByteTokenizer):
        one = st.one_of(_BYTES, st.sampled_from([256, 257, 999]))
    else:
        size = tokenizer.vocab_size
        texts = [chr(0x20), "a", "b", "ab", "he", "llo", " hello", "\n", "é", "🙂", "€"]
        found = [ids for ids in tokenizer.encode_batch(texts, False) if isinstance(ids, list)]
        known = [i for ids in found for i in ids] or list(range(size))
        one = st.one_of(st.sampled_from(known), st.sampled_from(known), st.integers(0, size - 1), st.just(size + 9))
        if size > 256:
            bytes_at = 3 if tokenizer.decode_batch([[3 + 0x41]], False) == ["A"] else None
            if bytes_at is not None:
                one = st.one_of(one, _BYTES.map(lambda byte: bytes_at + byte))
    return st.lists(one, max_size=24)


@pytest.mark.parametrize("name", KINDS)
@settings(deadline=None, max_examples=120)
@given(data=st.data())
def test_check_fires_at_the_first_token_that_completes_a_stop_string(
    name: str, tokenizers: dict[str, Tokenizer], data: st.DataObject
) -> None:
    tokenizer = tokenizers[name]
    ids = data.draw(token_ids(tokenizer))
    stop = tuple(data.draw(st.lists(st.sampled_from(STOPS), min_size=1, max_size=3)))
    skip = data.draw(st.booleans())
    strings = StopStrings(tokenizer, stop, include=False, skip_special_tokens=skip)
    assert fires_at(strings.checker(), ids) == naive_fires_at(tokenizer, ids, stop, skip)


@pytest.mark.parametrize("name", KINDS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_pieces_join_to_the_decoded_text(name: str, tokenizers: dict[str, Tokenizer], data: st.DataObject) -> None:
    tokenizer = tokenizers[name]
    ids, skip = data.draw(token_ids(tokenizer)), data.draw(st.booleans())
    pieces = tokenizer.pieces(skip)
    text = "".join(pieces.push(token_id) for token_id in ids) + pieces.pending
    assert [text] == tokenizer.decode_batch([ids], skip)


@pytest.mark.parametrize("name", KINDS)
def test_decoder_kind_is_recognised(name: str, tokenizers: dict[str, Tokenizer]) -> None:
    assert type(tokenizers[name].pieces(True)) is KINDS[name][1]


def naive_cut(text: str, stop: tuple[str, ...], include: bool) -> str:
    for end in range(1, len(text) + 1):
        ended = [s for s in stop if text[:end].endswith(s)]
        if ended:
            return text[:end] if include else text[: end - max(map(len, ended))]
    return text


@settings(deadline=None, max_examples=200)
@given(
    text=st.text("ab\n€", max_size=30),
    stop=st.lists(st.text("ab\n€", min_size=1, max_size=4), min_size=1, max_size=4).map(tuple),
    include=st.booleans(),
)
def test_cut_equals_naive_search(text: str, stop: tuple[str, ...], include: bool) -> None:
    assert StopStrings(ByteTokenizer(), stop, include, True).cut(text) == naive_cut(text, stop, include)


@pytest.mark.parametrize(
    ("stop", "include", "expected"),
    [
        (("###",), False, "one "),
        (("###",), True, "one ###"),
        (("two", "###"), False, "one "),
        (("# two", "##"), False, "one "),
        (("nothing",), True, "one ### two"),
        (("one ### two", "e "), False, "on"),  # "e " is complete first, though the other began before
    ],
)
def test_cut_at_the_first_stop_string(stop: tuple[str, ...], include: bool, expected: str) -> None:
    assert StopStrings(ByteTokenizer(), stop, include, True).cut("one ### two") == expected


@pytest.mark.parametrize("max_transitions", [1 << 15, 5])
@pytest.mark.parametrize("name", KINDS)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_sequences_share_transitions_but_not_state(
    name: str, max_transitions: int, tokenizers: dict[str, Tokenizer], data: st.DataObject
) -> None:
    """Several samples in turns, of one StopStrings, each as if alone; also where its memory is always full."""
    tokenizer = tokenizers[name]
    samples = data.draw(st.lists(token_ids(tokenizer), min_size=1, max_size=4))
    stop = tuple(data.draw(st.lists(st.sampled_from(STOPS), min_size=1, max_size=3)))
    least = data.draw(st.integers(0, 6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detokenize, "_MAX_TRANSITIONS", max_transitions)
        strings = StopStrings(tokenizer, stop, include=False, skip_special_tokens=False)
        checks = [strings.checker(least) for _ in samples]
        fired: list[list[bool]] = [[] for _ in samples]
        for place in range(max(map(len, samples))):
            for sample, check, found in zip(samples, checks, fired, strict=True):
                if place < len(sample):
                    found.append(check(sample[place]))
    assert fired == [naive_fires(tokenizer, sample, stop, least) for sample in samples]


def test_known_transition_is_only_looked_up() -> None:
    class Counting(ByteTokenizer):
        asked = 0

        def bytes_of(self, token_id: int) -> bytes:
            self.asked += 1
            return super().bytes_of(token_id)

    tokenizer = Counting()
    strings = StopStrings(tokenizer, ("\n\n", "end"), False, True)
    text = list("an öd ending\n then€\n".encode())
    assert fires_at(strings.checker(), text) == text.index(ord("e")) + 3
    asked = tokenizer.asked
    assert 0 < asked <= len(text)
    assert fires_at(strings.checker(), text) == text.index(ord("e")) + 3
    assert tokenizer.asked == asked


def test_number_of_transitions_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detokenize, "_MAX_TRANSITIONS", 50)
    strings = StopStrings(ByteTokenizer(), ("abcabd",), False, True)
    rng = random.Random(0)
    for _ in range(40):
        check = strings.checker()
        for _ in range(40):
            check(rng.choice(b"abcabcabcabcxyz\xc3\xa9\xf0\x9f"))
            known = strings._places._known
            assert sum(map(len, known.values())) <= 50 and len(known) <= 51


def test_cost_per_token_is_constant() -> None:
    """Counted, not timed: what is decoded again and searched again per token stays as short as at the start."""
    rust, decoded = metaspace(), []

    def decode(ids: list[int]) -> str:
        decoded.append(len(ids))
        return str(rust.decode(ids))

    class Counting(ByteTokenizer):
        def pieces(self, skip_special_tokens: bool) -> DecodedPieces:
            return DecodedPieces(decode, frozenset())

    check = StopStrings(Counting(), ("▁ never to be seen",), False, True).checker()
    for step in range(2000):
        assert not check(1 + step % 7)
        assert len(check._place.tail) <= 1  # type: ignore[attr-defined]
    assert max(decoded) <= 4 and len(decoded) <= 3 * 2000


def test_bad_words_are_spelled_with_and_without_a_space() -> None:
    tokenizer = fast(byte_level())
    [bare, spaced] = tokenizer.encode_batch(["quick", " quick"], False)
    assert bare != spaced
    found = bad_word_ids(tokenizer, ("quick", " quick"))
    assert found == ((*bare,), (*spaced,)) or found == ((*bare,),)  # type: ignore[misc]
    assert all(tokenizer.decode_batch([list(ids)], False)[0].strip() == "quick" for ids in found)


def test_bad_words_omit_unreachable_sequences() -> None:
    """Of " x" = (space, x) and "x" the second already refuses both."""
    assert bad_word_ids(ByteTokenizer(), ("x", "yz")) == ((120,), (121, 122))


@pytest.mark.parametrize("word", ["", "   ", "\ud800"])
def test_bad_word_without_tokens_is_refused(word: str) -> None:
    with pytest.raises(BadParameters, match="bad_words holds"):
        bad_word_ids(ByteTokenizer(), (word,))
