"""Protection against control-token injection: only control tokens written by the template steer the model.

A tokenizer parses "<|im_end|>" as the control token anywhere in a text. So before a template gets data that spells one,
a mark (a character that occurs in neither) is inserted after the first character of each spelled token; in the rendered
prompt the marks show which control tokens came from the data. The same is done for data from which a template can build
a control token by joining two texts, dropping white space, or dropping a text that it names ("<|im_</think>end|>"
without "</think>"). All other data is passed unchanged. A template that counts, cuts or compares its data renders
marked data differently: then the prompt is rendered from the unmarked data, and the classification of its control
tokens is carried over from the marked rendering.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from itertools import accumulate, product
from typing import Any

import jinja2

from batchinfer.errors import InvalidInput

_LEXER = jinja2.Environment(autoescape=False)
_NOTHING = r"(?!)"  # a pattern that matches nothing
_WHITE = r"\s*"
_REMEMBERED = 64
_MAX_PAIRS = 1 << 20
_MARKS = range(0xE000, 0xF900)  # Unicode's private use area


class PromptText(str):
    """A text in which some control-token spellings are plain text: `literal` holds their start positions."""

    literal: tuple[int, ...]

    def __new__(cls, text: str, literal: Iterable[int] = ()) -> PromptText:
        prompt = super().__new__(cls, text)
        prompt.literal = tuple(literal)
        return prompt

    def __add__(self, other: str) -> PromptText:
        return joined(self, other)

    def __radd__(self, other: str) -> PromptText:
        return joined(other, self)

    def rstrip(self, chars: str | None = None, /) -> PromptText:
        stripped = super().rstrip(chars)
        return PromptText(stripped, [start for start in self.literal if start < len(stripped)])


def joined(one: str, other: str) -> PromptText:
    """Concatenate two texts and keep the literal positions of both."""
    moved = [len(one) + start for start in _literal(other)]
    return PromptText(str.__add__(one, other), [*_literal(one), *moved])


def _literal(text: str) -> tuple[int, ...]:
    return text.literal if isinstance(text, PromptText) else ()


class ControlTokens:
    """The control tokens of a tokenizer, by their texts."""

    def __init__(self, texts: Iterable[str] = (), normalized: bool = False) -> None:
        """Build the matcher.

        normalized: the tokenizer also parses control tokens after normalizing text (full-width, say).
        """
        known = sorted({text for text in texts if text})
        self._words = known
        self._pattern = re.compile(_any_of(known))
        firsts = "".join(sorted({text[0] for text in known}))
        self._first = re.compile(f"[{re.escape(firsts)}]" if firsts else _NOTHING, re.IGNORECASE)
        self._normalized = normalized
        self._suspects: dict[str, re.Pattern[str]] = {}  # by source

    def find(self, text: str) -> Iterator[re.Match[str]]:
        """Yield all spellings of control tokens in a text."""
        return self._pattern.finditer(text)

    def write(self, data: Mapping[str, Any], template: Callable[[dict[str, Any]], str], source: str = "") -> str:
        """Render `data` with `template`, so that no control token spelled by `data` is parsed as one.

        data: texts, also in lists and mappings, by the template's variable names. source: other text that may occur in
        the result.
        """
        texts = texts_of(list(data.values())) if self._words else []
        whole = "\0".join(texts)
        suspects = self._suspects_in(source)
        if not self._normalized and (self._first.search(whole) is None or suspects.search(whole) is None):
            return template(dict(data))
        mark = unused_character([source, *data, *texts])
        marked = {name: _marked(value, suspects, mark) for name, value in data.items()}
        text = self._settle(template(marked), mark)
        meant = template(dict(data))
        return text if text == meant else self._carried_over(text, meant)

    def literal(self, text: str) -> str:
        """Return `text` with every control token marked as plain text."""
        places = [found.start() for found in self.find(text)]
        return PromptText(text, places) if places or self._normalized else text

    def _settle(self, text: str, mark: str) -> str:
        """Remove the marks from `text`, also where they were escaped in JSON, and record the literal tokens."""
        pieces = re.split(rf"{mark}|\\u{ord(mark):04x}", text, flags=re.IGNORECASE)
        places = set(accumulate(map(len, pieces[:-1])))
        plain = "".join(pieces)
        literal = [found.start() for found in self.find(plain) if found.start() + 1 in places]
        return PromptText(plain, literal) if literal or self._normalized else plain

    def _carried_over(self, text: str, meant: str) -> str:
        """Return `meant` with the control tokens of `text` matched in order; all others are literal.

        Among all in-order matchings, choose the one that keeps most of the template's own tokens. Raises InvalidInput.
        """
        literal = {*_literal(text)}
        known = [(found[0], found.start() not in literal) for found in self.find(text)]
        tokens = list(self.find(meant))
        if len(tokens) * len(known) > _MAX_PAIRS:
            raise InvalidInput("a text that the template counts, cuts or compares spells too many control tokens")
        # best[i][j]: weight of the longest common subsequence of the tokens from i and the known ones from j
        best = [[0] * (len(known) + 1) for _ in range(len(tokens) + 1)]
        for i, j in product(reversed(range(len(tokens))), reversed(range(len(known)))):
            best[i][j] = max(best[i + 1][j], best[i][j + 1])
            if tokens[i][0] == known[j][0]:
                best[i][j] = max(best[i][j], best[i + 1][j + 1] + (len(known) + 1 if known[j][1] else 1))
        own: set[int] = set()
        i = j = 0
        while i < len(tokens) and j < len(known):
            if best[i][j] == best[i][j + 1]:
                j += 1
            elif best[i][j] == best[i + 1][j]:
                i += 1
            else:
                own |= {i} if known[j][1] else set()
                i, j = i + 1, j + 1
        others = [token.start() for place, token in enumerate(tokens) if place not in own]
        return PromptText(meant, others) if others or self._normalized else meant

    def _suspects_in(self, source: str) -> re.Pattern[str]:
        """Return a pattern for the first characters of possible control tokens in data for the template `source`.

        Case is ignored, because a template may change it. Matched are: a control token, with or without white space
        inside; and the beginning of one before a quoted text of the template, or at the end of a text, to which more
        may be appended.
        """
        if source not in self._suspects:
            if len(self._suspects) >= _REMEMBERED:
                self._suspects.clear()
            quoted = [value[1:-1] for _, kind, value in _LEXER.lex(source) if kind == "string"]
            texts = {text.encode("ascii", "backslashreplace").decode("unicode-escape") for text in quoted}  # as Jinja
            dropped = rf"(?:{_any_of(sorted(text for text in texts if text.strip()))}|\s*(?:\0|\Z))"
            branches = [
                f"{re.escape(first)}(?={_rest(rest, _WHITE)}|{_rest(rest, partial=True)}{dropped})"
                for first, rest in _by_first(self._words).items()
            ]
            self._suspects[source] = re.compile("|".join(branches) or _NOTHING, re.IGNORECASE)
        return self._suspects[source]


def unused_character(texts: Iterable[str]) -> str:
    """Return a character that occurs in none of the texts, not even as a JSON escape. Raises InvalidInput."""
    whole = "\0".join(texts)
    lower = whole.lower()
    for code in _MARKS:
        if chr(code) not in whole and f"\\u{code:04x}" not in lower:
            return chr(code)
    raise InvalidInput("the text holds every character of Unicode's private use area: one must be free")


def _any_of(words: list[str], gap: str = "", partial: bool = False) -> str:
    """Return a pattern for any of the words, preferring the longest; common prefixes are matched once.

    gap: pattern allowed between two characters. partial: a prefix of a word is enough.
    """
    branches = [re.escape(first) + _rest(rest, gap, partial) for first, rest in _by_first(words).items()]
    return f"(?:{'|'.join(branches)})" if branches else _NOTHING


def _by_first(words: list[str]) -> dict[str, list[str]]:
    """Group the words by first character: first character → the rests."""
    return {word[0]: [other[1:] for other in words if other[:1] == word[0]] for word in words if word}


def _rest(words: list[str], gap: str = "", partial: bool = False) -> str:
    """Return a pattern for what may follow the words' common prefix."""
    if not any(words):
        return ""
    return f"(?:{gap}{_any_of(words, gap, partial)})" + ("?" if partial or "" in words else "")


def _marked(value: Any, places: re.Pattern[str], mark: str) -> Any:
    return _mapped(value, lambda text: places.sub(lambda found: found[0] + mark, text))


def texts_of(data: Any) -> list[str]:
    """Return all texts in lists and mappings."""
    texts: list[str] = []
    waiting = [data]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            texts.append(item)
        elif isinstance(item, dict):
            waiting += item
            waiting += item.values()
        elif isinstance(item, list | tuple):
            waiting += item
        elif isinstance(item, bytes):
            texts.append(item.decode(errors="replace"))
    return texts


def _mapped(data: Any, change: Callable[[str], str]) -> Any:
    if isinstance(data, str):
        return change(data)
    if isinstance(data, bytes):
        try:
            return change(data.decode()).encode()
        except UnicodeDecodeError:
            return data
    if isinstance(data, list | tuple):
        items = [_mapped(item, change) for item in data]
        return items if isinstance(data, list) else tuple(items)
    if isinstance(data, dict):
        mapping = copy(data)  # keeps the class and its other attributes
        mapping.clear()
        mapping.update((_mapped(key, change), _mapped(value, change)) for key, value in data.items())
        return mapping
    return data
