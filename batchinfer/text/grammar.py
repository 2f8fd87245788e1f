"""Compilation of structured outputs for a tokenizer, with llguidance (`pip install llguidance`).

llguidance rather than xgrammar: both are maintained, write bit masks and support JSON schema, regular expressions and
grammars. llguidance is one wheel of 3 MB without dependencies (MIT); xgrammar's is 1.3 MB and requires transformers and
triton (Apache-2.0). llguidance compiles in about a millisecond, because it derives lexer states lazily, which suits
rows with a schema each; it limits the work of a compilation and of a step; and it refuses schema keywords that it
cannot guarantee instead of ignoring them.

Special tokens are never text: an output spells "</s>" with ordinary tokens, whatever a text says.
"""

from __future__ import annotations

import functools
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from batchinfer.errors import BadParameters, InvalidInput
from batchinfer.request import Constraint, Matcher
from batchinfer.structured import StructuredOutputs
from batchinfer.text.grammar_trial import TOO_LARGE, TOO_SLOW, Trials, Vocabulary
from batchinfer.text.schema_numbers import inexact_number, inexact_number_of_grammar, write_integers
from batchinfer.text.tokenizer import ByteTokenizer, Tokenizer

if TYPE_CHECKING:
    import llguidance

_COMPILED = 256  # cached grammars and refusals
_ENCODED = 4096  # cached token sequences of forced texts
# Between the tokens of JSON: one space, or a line break and indentation. Without a bound, a model that is unsure can
# write spaces until its answer is cut off.
_WHITESPACE = r" |\n[ \t]{0,40}"
# explicit, because a schema may otherwise set them with its x-guidance key
_JSON_OPTIONS = {
    "whitespace_flexible": True,
    "whitespace_pattern": _WHITESPACE,
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
    "lenient": False,
}


class Grammars:
    """Cache of compiled constraints for one model.

    The token table is built with the first constraint; each constraint compiles once. vocab_size: size of the model's
    logits; ids beyond the tokenizer's are never allowed. eos_ids: allowed only where a grammar may end. Lookups of
    compiled constraints do not wait for a running compilation.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._table: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[StructuredOutputs, Constraint | str] = OrderedDict()
        self._cache_lock = threading.Lock()  # guards `_compiled`
        self._compile_lock = threading.Lock()  # held by the compiling thread
        self._trials: Trials | None = None

    def compile(self, outputs: StructuredOutputs) -> Constraint:
        """Return the compiled constraint.

        Raises BadParameters if it is invalid, unsupported, too large, or unsatisfiable.
        """
        constraint = self._find(outputs)
        if constraint is None:
            with self._compile_lock:
                constraint = self._find(outputs) or self._compile_and_store(outputs)
        if isinstance(constraint, str):
            raise BadParameters(constraint)
        return constraint

    def _find(self, outputs: StructuredOutputs) -> Constraint | str | None:
        with self._cache_lock:
            if outputs in self._compiled:
                self._compiled.move_to_end(outputs)
            return self._compiled.get(outputs)

    def _compile_and_store(self, outputs: StructuredOutputs) -> Constraint | str:
        result: Constraint | str
        try:
            result = self._compile(outputs)
        except BadParameters as error:
            result = str(error)
        with self._cache_lock:
            self._compiled[outputs] = result
            if len(self._compiled) > _COMPILED:
                self._compiled.popitem(last=False)
        return result

    def _compile(self, outputs: StructuredOutputs) -> Constraint:
        library = _library()
        if self._table is None or self._trials is None:
            table = _TokenTable(self._tokenizer, self._vocab_size, self._eos_ids)
            self._trials = Trials(Vocabulary(table.tokens, table.special_token_ids, table.eos_ids))
            self._table = _token_table(table)
        source = _source(outputs)
        problem = self._trials.problem(source)
        if problem:
            raise _refusal(outputs, problem)
        matcher = library.LLMatcher(self._table, source, log_level=0, limits=_limits())
        if not matcher.is_error():
            matcher.compute_bitmask()  # detects unsatisfiable grammars, and pays for lazy work here
        if matcher.is_error():
            raise _refusal(outputs, matcher.get_error())
        return _Compiled(matcher)


def validate(outputs: StructuredOutputs) -> None:
    """Validate a constraint before a model is loaded: syntax, and limits that do not depend on the tokenizer.

    It is compiled for a byte vocabulary in a separate process. Only its resource limits are reported: a grammar may
    name tokens that only the model has. Raises BadParameters.
    """
    source = _source(outputs)
    problem = _library().LLMatcher.validate_grammar(source, None, limits=_limits())
    if problem and not problem.startswith("WARNING"):
        raise _refusal(outputs, problem)
    table = _TokenTable(ByteTokenizer(), ByteTokenizer.vocab_size, ByteTokenizer.eos_ids)
    trials = Trials(Vocabulary(table.tokens, table.special_token_ids, table.eos_ids))
    try:
        problem = trials.problem(source)
    finally:
        trials.close()
    if problem in (TOO_LARGE, TOO_SLOW):
        raise _refusal(outputs, problem)


class _Compiled:
    """A compiled grammar: a matcher in its start state, copied for every sequence."""

    def __init__(self, beginning: llguidance.LLMatcher) -> None:
        self._beginning = beginning

    def matcher(self, output: Sequence[int]) -> Matcher:
        copy = self._beginning.deep_copy()
        if output:
            copy.consume_tokens(list(output))
        return _Progress(copy)

    def fill(self, matchers: Sequence[Matcher], address: int, row_bytes: int) -> None:
        # about 10 µs each; the library's own threads were slower beside torch's, 2 on 2 cores
        for row, matcher in enumerate(matchers):
            cast(_Progress, matcher).inner.unsafe_compute_mask_ptr(address + row * row_bytes, row_bytes)


class _Progress:
    def __init__(self, inner: llguidance.LLMatcher) -> None:
        self.inner = inner

    def accept(self, token: int) -> None:
        self.inner.consume_token(token)

    @property
    def complete(self) -> bool:
        return self.inner.is_stopped() and not self.inner.is_error()

    @property
    def error(self) -> str:
        return _brief(self.inner.get_error()) if self.inner.is_error() else ""


class _TokenTable:
    """The tokenizer in the library's form (its TokenizerWrapper, without the trial call).

    `tokens` has an entry for each logit; an empty one is never allowed.
    """

    is_tokenizer_wrapper = True
    bos_token_id: int | None = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int]) -> None:
        tokens = tokenizer.token_bytes()
        ends = sorted(token for token in eos_ids if 0 <= token < min(vocab_size, len(tokens or ())))
        if tokens is None:
            raise BadParameters("structured_outputs needs a byte-level or sentencepiece tokenizer, and this is neither")
        if not ends:
            raise BadParameters("structured_outputs needs an end-of-sequence token, and this model names none")
        self.tokens = tokens[:vocab_size] + [b""] * (vocab_size - len(tokens))
        self.special_token_ids = sorted({*ends, *(i for i in tokenizer.special_ids if i < vocab_size)})
        self.eos_ids = ends
        self.eos_token_id = ends[0]
        self._tokenizer = tokenizer
        self._special = frozenset(self.special_token_ids)
        self.encode = functools.lru_cache(_ENCODED)(self._encode)
        self.greedy: Any = None  # the library's own encoder by the longest token, once it has the table

    def __call__(self, text: str) -> list[int]:
        """Return the model's usual tokens for a text that a grammar forces; the mask allows only these."""
        return list(self.encode(text))

    def _encode(self, text: str) -> tuple[int, ...]:
        ids = self._tokenizer.encode_batch([text], add_special_tokens=False)[0]
        if not isinstance(ids, InvalidInput) and self._spells(ids, text):
            return tuple(ids)
        return tuple(self.greedy(text))

    def _spells(self, ids: list[int], text: str) -> bool:
        """Return True if the ids spell the text exactly.

        False if the tokenizer parses a special token in the text, adds a space before it, or normalizes it.
        """
        known = all(token < len(self.tokens) and token not in self._special for token in ids)
        return known and b"".join(self.tokens[token] for token in ids) == text.encode()


def _token_table(table: _TokenTable) -> llguidance.LLTokenizer:
    library = _library()
    tokenizer: llguidance.LLTokenizer = library.LLTokenizer(
        cast(Any, table), n_vocab=len(table.tokens), eos_token=table.eos_ids, slices=library.LLTokenizer.json_slices()
    )
    table.greedy = tokenizer.greedy_tokenize
    return tokenizer


def _source(outputs: StructuredOutputs) -> str:
    """Return the constraint in the library's form.

    Raises BadParameters for an invalid schema or one that would change.
    """
    build: type[llguidance.LLMatcher] = _library().LLMatcher
    value = outputs.value
    if isinstance(value, tuple):
        # one terminal: as rules, thousands of choices would be thousands of parser items
        return build.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(map(_quoted, value)))
    if outputs.kind == "regex":
        return build.grammar_from_regex(value)
    if outputs.kind == "grammar":
        _check_numbers(outputs, inexact_number_of_grammar(value))
        return build.grammar_from_lark(value)
    schema = json.loads(value) if value else {"type": "object"}
    write_integers(schema)
    _check_numbers(outputs, inexact_number(schema))
    try:
        return build.grammar_from_json_schema(json.dumps(schema), overrides=cast(Any, _JSON_OPTIONS))
    except ValueError as error:
        raise _refusal(outputs, str(error)) from None


def _check_numbers(outputs: StructuredOutputs, inexact: str) -> None:
    if inexact:
        raise _refusal(outputs, f"{inexact} is too large to be exact: use integers up to 2**53, or a pattern of digits")


def _quoted(text: str) -> str:
    """Return a string literal of the grammar language, which is JSON's."""
    return json.dumps(text, ensure_ascii=False)


def _refusal(outputs: StructuredOutputs, reason: str) -> BadParameters:
    return BadParameters(f"structured_outputs.{outputs.kind}: {_brief(reason)}")


def _brief(reason: str) -> str:
    """Return the library's message on one line, without its state dumps."""
    if reason.startswith("panic"):
        return "too large, or not a valid grammar"
    for mark in ("<state>", "<non-verbose", "<backtrace>"):
        reason = reason.partition(mark)[0]
    if reason.startswith("oneOf constraints"):
        reason = "oneOf is supported only where at most one alternative can match; use anyOf"
    if reason.startswith("NoExtension"):
        reason = "no answer can follow it"
    text = " ".join(reason.split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise BadParameters("structured_outputs needs llguidance: pip install llguidance") from None
    return llguidance


@functools.cache
def _limits() -> Any:
    """Return the library's limits, without precomputation of large lexemes: it took seconds for hostile ones."""
    return _library().LLParserLimits(precompute_large_lexemes=False, verbose_errors=False)
