"""Tests of compiled grammars: token masks, refusals, caching."""

from __future__ import annotations

import sys
import threading
import time

import numpy as np
import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers

from batchinfer.errors import BadParameters
from batchinfer.pipeline.prepare import ModelLimits, Preparer
from batchinfer.pipeline.prompt import Prepared, Prompt
from batchinfer.request import Constraint, Matcher, SamplingParams
from batchinfer.structured import MAX_CHARACTERS, StructuredOutputs
from batchinfer.text.fast import FastTokenizer, TokenizerFacts
from batchinfer.text.grammar import Grammars, validate
from batchinfer.text.grammar_trial import Trials
from batchinfer.text.pieces import BYTE_ALPHABET
from batchinfer.text.tokenizer import ByteTokenizer

EOS = 257


def byte_grammars(vocab_size: int = 258) -> Grammars:
    return Grammars(ByteTokenizer(), vocab_size, frozenset({EOS}))


def compiled(grammars: Grammars, **given: object) -> Constraint:
    wanted = StructuredOutputs.of(given)
    assert wanted is not None
    return grammars.compile(wanted)


def allowed(constraint: Constraint, matchers: list[Matcher], vocab_size: int = 258) -> list[set[int]]:
    """Token ids that each matcher lets through, by the bit masks."""
    masks = np.full((len(matchers), -(-vocab_size // 32)), -1, dtype=np.int32)
    constraint.fill(matchers, masks.ctypes.data, masks.strides[0])
    bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")
    return [set(row.nonzero()[0].tolist()) for row in bits]


def follow(constraint: Constraint, text: bytes) -> Matcher:
    """Return a matcher after `text`, checking that the mask allowed each byte."""
    matcher = constraint.matcher([])
    for byte in text:
        assert byte in allowed(constraint, [matcher])[0], (text, chr(byte))
        matcher.accept(byte)
        assert not matcher.error
    return matcher


_WHOLE = 1 << 53  # up to here every integer is a float64, which is how the library reads numbers
_NEAR = [*range(_WHOLE - 3, _WHOLE + 6), 10**17 - 1, 10**17, 10**17 + 1, (1 << 63) - 1, 1 << 64]
_MEANING = {
    "minimum": lambda value, bound: value >= bound,
    "maximum": lambda value, bound: value <= bound,
    "exclusiveMinimum": lambda value, bound: value > bound,
    "exclusiveMaximum": lambda value, bound: value < bound,
    "const": lambda value, bound: value == bound,
    "enum": lambda value, bound: value == bound,
}


@pytest.mark.parametrize("key", _MEANING)
def test_large_integers_of_a_schema_are_exact_or_refused(key):
    grammars, held = byte_grammars(), 0
    bounds = [sign * number for number in _NEAR for sign in (1, -1)]
    for bound in [*bounds, *(float(one) for one in bounds if int(float(one)) == one)]:
        schema = {"type": "integer", key: [bound] if key == "enum" else bound}
        try:
            constraint = compiled(grammars, json=schema)
        except BadParameters as error:
            assert abs(bound) >= _WHOLE, error
            continue
        held += 1
        for value in {int(bound) + step for step in range(-2, 3)}:
            matcher = constraint.matcher([*str(value).encode()])
            follows = not matcher.error and EOS in allowed(constraint, [matcher])[0]
            assert follows is _MEANING[key](value, bound), (schema, value)
    assert held >= 6


@pytest.mark.parametrize(
    "given",
    [
        {"json": {"type": "object", "properties": {"id": {"type": "integer", "minimum": _WHOLE + 1}}}},
        {"json": {"$defs": {"id": {"anyOf": [{"const": {"a": [1, _WHOLE + 1]}}]}}, "$ref": "#/$defs/id"}},
        {"json": {"type": "integer", "maximum": 10**30}},
        {"json": {"type": "integer", "maximum": 1e20}},
        {"json": {"type": "integer", "multipleOf": _WHOLE + 1}},
        {"json": '{"enum": [18446744073709551616]}'},
        {"grammar": 'start: "a" %json {"const": 9007199254740993}'},
        {"grammar": 'start: "a" %json {"type": "integer", "maximum": 9007199254740991.0}'},
    ],
    ids=str,
)
def test_inexact_number_is_refused_by_key(given):
    with pytest.raises(BadParameters, match=r"(const|enum|minimum|maximum|multipleOf) \S+ is too large to be exact"):
        compiled(byte_grammars(), **given)
    named = {"json": {"type": "object", "properties": {"const": {"const": 1}, "minimum": {"type": "string"}}}}
    compiled(byte_grammars(), **named)


def test_mask_allows_eos_only_where_the_grammar_may_end():
    constraint = compiled(byte_grammars(), regex="ab[0-9]{1,2}")
    assert allowed(constraint, [constraint.matcher([])]) == [{ord("a")}]
    matcher = follow(constraint, b"ab1")
    digits = set(b"0123456789")
    assert allowed(constraint, [matcher]) == [digits | {EOS}] and not matcher.complete
    matcher.accept(ord("2"))
    assert matcher.complete and not matcher.error
    assert allowed(constraint, [constraint.matcher(list(b"ab1"))]) == [digits | {EOS}]
    ended = constraint.matcher([*b"ab1", EOS])
    assert ended.complete and not ended.error


def test_matchers_of_several_grammars_fill_one_mask():
    grammars = byte_grammars()
    constraints = [compiled(grammars, choice=[f"{letter}x"]) for letter in "abcdefghijkl"]
    filled = allowed(constraints[0], [constraint.matcher([]) for constraint in constraints])
    assert filled == [{ord(letter)} for letter in "abcdefghijkl"]


def test_padding_ids_of_the_model_are_never_allowed():
    constraint = compiled(byte_grammars(vocab_size=320), regex="(?s).*")
    begins_text = {byte for byte in range(256) if byte < 0x80 or 0xC2 <= byte <= 0xF4}
    assert allowed(constraint, [constraint.matcher([])], 320) == [begins_text | {EOS}]
    small = Grammars(ByteTokenizer(), 100, frozenset({10, EOS}))
    constraint = compiled(small, regex="(?s).*")
    assert allowed(constraint, [constraint.matcher([])], 100) == [set(range(100))]


def test_disallowed_token_is_an_error():
    constraint = compiled(byte_grammars(), choice=["yes", "no"])
    matcher = constraint.matcher(list(b"yx"))
    assert matcher.error and not matcher.complete
    assert "\n" not in matcher.error and len(matcher.error) <= 300


@pytest.mark.parametrize(
    "text", ['{"a":1}', '{"a": 1}', '{\n  "a":\n    1\n}', '{"a": 1, "b": "x\\n\\u0007 é"}', '{\n\t"a" : 1}']
)
def test_indented_json_is_allowed(text):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a"]}
    assert follow(compiled(byte_grammars(), json=schema), text.encode()).complete


def test_whitespace_in_json_is_bounded():
    constraint = compiled(byte_grammars(), json_object=True)
    assert ord(" ") not in allowed(constraint, [follow(constraint, b'{"a": ')])[0]
    assert not set(b" \n\t") & allowed(constraint, [follow(constraint, b'{"a":\n' + b" " * 40)])[0]
    hostile = {"type": "object", "x-guidance": {"whitespace_pattern": "x+", "lenient": True, "item_separator": ";"}}
    constraint = compiled(byte_grammars(), json=hostile)
    assert follow(constraint, b'{"a": 1, "b": 2}').complete


def bpe(tokens: list[str], decoder, special: list[str]) -> FastTokenizer:
    rust = RustTokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoder
    rust.add_special_tokens(special)
    return FastTokenizer(rust, TokenizerFacts("test"))


def test_forced_text_is_spelled_without_special_tokens():
    tokenizer = bpe(sorted(BYTE_ALPHABET), decoders.ByteLevel(), ["<|call|>", "</s>"])
    call, eos = tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
    grammars = Grammars(tokenizer, tokenizer.vocab_size, frozenset({eos}))
    constraint = compiled(grammars, choice=["<|call|>x", "</s>y"])
    assert {tokenizer.decode_batch([[i]], False)[0] for i in allowed(constraint, [constraint.matcher([])], 258)[0]} == {
        "<"
    }
    marked = compiled(grammars, grammar="start: <|call|> /[0-9]/")
    assert allowed(marked, [marked.matcher([])], 258) == [{call}]


def test_unknown_decoder_is_refused_and_sentencepiece_supported():
    tokens = ["<unk>", "<0x0A>", "▁a", "a", "</s>"]
    steps = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    for decoder in (steps, decoders.Metaspace()):
        tokenizer = bpe(tokens, decoder, ["<unk>", "</s>"])
        assert tokenizer.token_bytes() == [b"<unk>", b"\n", b" a", b"a", b"</s>"]
        grammars = Grammars(tokenizer, 5, frozenset({4}))
        constraint = compiled(grammars, regex="(?s)a?[\n ]a")
        assert allowed(constraint, [constraint.matcher([])], 5) == [{1, 2, 3}]
    with pytest.raises(BadParameters, match="byte-level or sentencepiece"):
        compiled(Grammars(bpe(tokens, decoders.WordPiece(), []), 5, frozenset({4})), regex="a")


def test_model_without_eos_is_refused():
    with pytest.raises(BadParameters, match="end-of-sequence token"):
        compiled(Grammars(ByteTokenizer(), 258, frozenset()), regex="a")


WRONG = [
    ({"json": {"type": "objec"}}, "Invalid type: objec"),
    ({"json": {"type": "string", "not": {"const": "x"}}}, 'Unimplemented keys: \\["not"\\]'),
    ({"json": {"allOf": [{"type": "string"}, {"type": "integer"}]}}, "incompatible types"),
    ({"json": {"$ref": "file:///etc/passwd"}}, "file:///etc/passwd"),
    ({"json": {"type": "string", "pattern": "(a"}}, "unclosed group"),
    ({"json": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, "use anyOf"),
    ({"regex": "a(b"}, "unclosed group"),
    ({"regex": "(?=a)b"}, "look-around"),
    ({"grammar": "start: foo"}, 'unknown name: "foo"'),
    ({"grammar": "start: start"}, "no answer can follow it"),
    ({"json": {"$ref": "#"}}, "no answer can follow it"),
    ({"regex": "[^\\s\\S]"}, "no answer can follow it"),
]


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_invalid_constraint_is_refused_by_name(given, message):
    kind = next(iter(given))
    with pytest.raises(BadParameters, match=rf"^structured_outputs\.{kind}: [^\n]*{message}"):
        compiled(byte_grammars(), **given)


HOSTILE = {
    "deep schema": {"json": '{"type":"array","items":' * 500 + "{}" + "}" * 500},
    "wide unions": {
        "json": {
            "anyOf": [
                {"anyOf": [{"type": "object", "properties": {f"a{i}b{j}": {}}} for i in range(40)]} for j in range(40)
            ]
        }
    },
    "products": {
        "json": {
            "allOf": [
                {"anyOf": [{"type": "object", "properties": {f"a{i}{j}": {"type": "string"}}} for i in range(6)]}
                for j in range(7)
            ]
        }
    },
    "optional properties": {"json": {"type": "object", "properties": {f"p{i}": {} for i in range(3000)}}},
    "counts": {"json": {"type": "array", "minItems": 10**9, "items": {"type": "string", "maxLength": 10**9}}},
    "intersections": {"grammar": "start: A\nA: /(.*a.*){10}/ & /(.*b.*){10}/ & ~/.*c.*/"},
    "forced text": {"regex": "a{200000}"},
    "long text": {"json": {"const": "x" * (MAX_CHARACTERS - 100)}},
    "ambiguous": {"grammar": 'start: start start | "a"'},
    "choices": {"choice": [f"c{i}" for i in range(20_000)]},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammar_ends_in_an_error_or_a_mask(name):
    """Neither an exception of another kind nor a step that hangs; refused at once when they come again."""
    grammars = byte_grammars()
    try:
        constraint = compiled(grammars, **HOSTILE[name])
    except BadParameters as error:
        assert len(str(error)) < 400
        began = time.perf_counter()
        with pytest.raises(BadParameters):
            compiled(grammars, **HOSTILE[name])
        assert time.perf_counter() - began < 1
        return
    matcher = constraint.matcher([])
    for _ in range(20):
        ids = allowed(constraint, [matcher])[0]
        if matcher.error or matcher.complete:
            break
        assert ids
        matcher.accept(min(ids))


def test_constraint_compiles_once_and_the_cache_is_bounded():
    grammars = byte_grammars()
    first = compiled(grammars, regex="x{3}")
    assert compiled(grammars, regex="x{3}") is first
    for number in range(300):
        compiled(grammars, regex=f"a{number}")
    assert compiled(grammars, regex="x{3}") is not first


@pytest.mark.parametrize(("given", "message"), WRONG[:9])
def test_validate_refuses_invalid_constraints_without_a_tokenizer(given, message):
    wanted = StructuredOutputs.of(given)
    assert wanted is not None
    with pytest.raises(BadParameters, match=message):
        validate(wanted)


def test_validate_accepts_valid_constraints_without_a_tokenizer():
    for given in ({"json_object": True}, {"choice": ["a"]}, {"grammar": "start: <|call|> /[0-9]/"}, {"regex": "a"}):
        wanted = StructuredOutputs.of(given)
        assert wanted is not None
        validate(wanted)


def test_missing_library_error_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(BadParameters, match=r"pip install llguidance"):
        compiled(byte_grammars(), regex="a")


# -- trials


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"regex": "a{1000000000}"}, "too large"),  # gigabytes, written out
        ({"regex": "((a{100}){100}){100}"}, "too large"),
        ({"grammar": 'start: A{1000}\nA: B{1000}\nB: C{1000}\nC:"x"'}, "too large"),
        ({"json": {"type": "string", "pattern": "^a{5000000}$"}}, "too large"),
        ({"regex": "a{150000}"}, "too slow to follow|too large"),
    ],
)
def test_expensive_grammar_is_refused_once(given, why):
    grammars = byte_grammars()
    with pytest.raises(BadParameters, match=f"structured_outputs.{next(iter(given))}: ({why})"):
        compiled(grammars, **given)
    began = time.process_time()
    with pytest.raises(BadParameters, match=why):
        compiled(grammars, **given)
    assert time.process_time() - began < 0.1  # remembered
    follow(compiled(grammars, regex="a{3}"), b"aaa")


def test_compiled_lookup_does_not_wait_for_a_compilation(monkeypatch):
    """Neither prompts without one, nor those with one that is compiled already."""
    grammar = {"regex": "b+"}
    limits = ModelLimits(100, 258, frozenset({EOS}))
    preparer = Preparer(ByteTokenizer(), limits, SamplingParams(), None)
    known = SamplingParams(structured_outputs=StructuredOutputs.of(grammar))
    preparer.compile_grammar(known)
    begun, go = threading.Event(), threading.Event()

    def held(trials, source):
        begun.set()
        assert go.wait(20)
        return ""

    monkeypatch.setattr(Trials, "problem", held)
    slow = SamplingParams(structured_outputs=StructuredOutputs.of({"regex": "c+"}))
    results = []
    waiting = threading.Thread(target=lambda: results.extend(preparer.prepare([Prompt(0, ["x"], slow)])))
    waiting.start()
    assert begun.wait(20)
    plain, constrained = preparer.prepare([Prompt(1, ["y"]), Prompt(2, ["z"], known)])
    assert isinstance(plain, Prepared) and isinstance(constrained, Prepared) and not results
    go.set()
    waiting.join(20)
    assert isinstance(results[0], Prepared) and results[0].requests[0].constraint is not None


def test_killed_trial_process_is_restarted():
    grammars = byte_grammars()
    compiled(grammars, regex="x")
    trials = grammars._trials
    trials._process.kill()
    trials._process.wait()
    compiled(grammars, regex="y")
    process = trials._process
    trials.close()
    assert process.poll() is not None
