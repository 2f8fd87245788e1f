"""Control tokens that data spells are text: in a prompt, only those that its template writes steer the model.

A tokenizer takes "<|im_end|>" for the control token wherever it stands. So before a template gets data that spells one,
a mark (a character that neither has) goes behind the first character of each; what the template made of the data shows
by the marks which of the prompt's control tokens came from it. So it is with data of which a template can make one when
it joins two texts or drops white space, or a text that it names ("<|im_</think>end|>" without "</think>"). All other
data goes through untouched. A template that counts, cuts or compares what it is given makes another text of marked
data: then its text is that of the data itself, and what is known about the tokens of the one holds for those of the
other.
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
_NOTHING = r"(?!)"  # an expression that nothing fits
_WHITE = r"\s*"
_REMEMBERED = 64
_MOST_PAIRS = 1 << 20
_MARKS = range(0xE000, 0xF900)  # Unicode gives these characters no meaning


class PromptText(str):
    """A text in which some of what looks like a control token is none: `literal` holds where these begin."""

    literal: tuple[int, ...]

    def __new__(cls, text: str, literal: Iterable[int] = ()) -> PromptText:
        made = super().__new__(cls, text)
        made.literal = tuple(literal)
        return made

    def __add__(self, other: str) -> PromptText:
        return joined(self, other)

    def __radd__(self, other: str) -> PromptText:
        return joined(other, self)

    def rstrip(self, chars: str | None = None, /) -> PromptText:
        kept = super().rstrip(chars)
        return PromptText(kept, [start for start in self.literal if start < len(kept)])


def joined(one: str, other: str) -> PromptText:
    """The two as one text; what of either is no control token, is none in it."""
    moved = [len(one) + start for start in _literal(other)]
    return PromptText(str.__add__(one, other), [*_literal(one), *moved])


def _literal(text: str) -> tuple[int, ...]:
    return text.literal if isinstance(text, PromptText) else ()


class ControlTokens:
    """What a tokenizer takes for control tokens, by their texts."""

    def __init__(self, texts: Iterable[str] = (), normalized: bool = False) -> None:
        """normalized: the tokenizer also takes for one what it first makes its text of (of another width, say)."""
        known = sorted({text for text in texts if text})
        self._words = known
        self._pattern = re.compile(_any_of(known))
        firsts = "".join(sorted({text[0] for text in known}))
        self._first = re.compile(f"[{re.escape(firsts)}]" if firsts else _NOTHING, re.IGNORECASE)
        self._normalized = normalized
        self._suspects: dict[str, re.Pattern[str]] = {}  # by source

    def find(self, text: str) -> Iterator[re.Match[str]]:
        """All that looks like a control token."""
        return self._pattern.finditer(text)

    def write(self, data: Mapping[str, Any], template: Callable[[dict[str, Any]], str], source: str = "") -> str:
        """The text that `template` makes of `data`, in which what `data` spells is no control token.

        data: texts, in lists and mappings too, by the names that the template has for them. source: other text that may
        come out.
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
        """`text` in which nothing is a control token."""
        places = [found.start() for found in self.find(text)]
        return PromptText(text, places) if places or self._normalized else text

    def _settle(self, text: str, mark: str) -> str:
        """`text` without its marks, also where they were written as JSON."""
        pieces = re.split(rf"{mark}|\\u{ord(mark):04x}", text, flags=re.IGNORECASE)
        places = set(accumulate(map(len, pieces[:-1])))
        plain = "".join(pieces)
        literal = [found.start() for found in self.find(plain) if found.start() + 1 in places]
        return PromptText(plain, literal) if literal or self._normalized else plain

    def _carried_over(self, text: str, meant: str) -> str:
        """`meant`, in which the control tokens are those of `text`, in the same order; any other there is none.

        Of the ways to find the ones among the others, that which finds most of the template's. Raises InvalidInput.
        """
        literal = {*_literal(text)}
        known = [(found[0], found.start() not in literal) for found in self.find(text)]
        tokens = list(self.find(meant))
        if len(tokens) * len(known) > _MOST_PAIRS:
            raise InvalidInput("a text that the template counts, cuts or compares spells too many control tokens")
        # best[i][j]: the most that the tokens from i on can have in common with the known ones from j on
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
        """An expression for the first characters of what may become a control token in the template `source`.

        In any case, as a template may change it: a control token, with white space in it or without; the beginning of
        one before a text that stands in quotes in the template, or at the end, before what may be put directly behind.
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
    """A character that stands in none of the texts, not even as JSON escapes it. Raises InvalidInput."""
    whole = "\0".join(texts)
    lower = whole.lower()
    for code in _MARKS:
        if chr(code) not in whole and f"\\u{code:04x}" not in lower:
            return chr(code)
    raise InvalidInput("the text holds every character of Unicode's private use area: one must be free")


def _any_of(words: list[str], gap: str = "", partial: bool = False) -> str:
    """An expression for any of the words, the longest that fits; what several begin with is looked at once.

    gap: what may stand between two characters. partial: a word's beginning is enough.
    """
    branches = [re.escape(first) + _rest(rest, gap, partial) for first, rest in _by_first(words).items()]
    return f"(?:{'|'.join(branches)})" if branches else _NOTHING


def _by_first(words: list[str]) -> dict[str, list[str]]:
    """What follows each first character."""
    return {word[0]: [other[1:] for other in words if other[:1] == word[0]] for word in words if word}


def _rest(words: list[str], gap: str = "", partial: bool = False) -> str:
    """What may follow the character that the words had before."""
    if not any(words):
        return ""
    return f"(?:{gap}{_any_of(words, gap, partial)})" + ("?" if partial or "" in words else "")


def _marked(value: Any, places: re.Pattern[str], mark: str) -> Any:
    return _mapped(value, lambda text: places.sub(lambda found: found[0] + mark, text))


def texts_of(data: Any) -> list[str]:
    """All texts in lists and mappings."""
    found: list[str] = []
    waiting = [data]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, dict):
            waiting += item
            waiting += item.values()
        elif isinstance(item, list | tuple):
            waiting += item
        elif isinstance(item, bytes):
            found.append(item.decode(errors="replace"))
    return found


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
        made = copy(data)  # of its own kind, with what that has besides
        made.clear()
        made.update((_mapped(key, change), _mapped(value, change)) for key, value in data.items())
        return made
    return data
