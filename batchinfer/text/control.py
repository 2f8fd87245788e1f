"""Control tokens that data spells are text: in a prompt, only those that its template writes steer the model.

A tokenizer takes "<|im_end|>" for the control token wherever it stands. So before a template gets data that spells one,
a mark (a character that neither has) goes behind the first character of each; what the template made of the data shows
by the marks which of the prompt's control tokens came from it. Data that spells none goes through untouched. A template
that counts, cuts or compares what it is given makes another text of marked data: then its text is that of the data
itself, and what is known about the tokens of the one holds for those of the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from itertools import accumulate, product
from typing import Any

from batchinfer.errors import InvalidInput

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

    def __init__(self, texts: Iterable[str] = ()) -> None:
        known = sorted({text for text in texts if text})
        self._pattern = re.compile(_longest_of(known) if known else r"(?!)")
        self._any_case = re.compile(self._pattern.pattern, re.IGNORECASE)  # a template may have another one
        firsts = "".join(sorted({text[0] for text in known}))
        self._first = re.compile(f"[{re.escape(firsts)}]" if firsts else r"(?!)", re.IGNORECASE)
        self._beginnings = frozenset(text[:length].lower() for text in known for length in range(1, len(text)))
        self._longest = max(map(len, known), default=0)

    def find(self, text: str) -> Iterator[re.Match[str]]:
        """All that looks like a control token."""
        return self._pattern.finditer(text)

    def write(self, data: Mapping[str, Any], template: Callable[[dict[str, Any]], str], source: str = "") -> str:
        """The text that `template` makes of `data`, in which what `data` spells is no control token.

        data: texts, in lists and mappings too, by the names that the template has for them. source: other text that may
        come out.
        """
        texts = texts_of(list(data.values())) if self._longest else []
        if self._first.search("\0".join(texts)) is None or not any(map(self._places, texts)):
            return template(dict(data))
        mark = unused_character([source, *data, *texts])
        text = self._settle(template({name: self._marked(value, mark) for name, value in data.items()}), mark)
        meant = template(dict(data))
        return text if text == meant else self._carried_over(text, meant)

    def literal(self, text: str) -> str:
        """`text` in which nothing is a control token."""
        places = [found.start() for found in self.find(text)]
        return PromptText(text, places) if places else text

    def _marked(self, value: Any, mark: str) -> Any:
        return _mapped(value, lambda text: _inserted(text, self._places(text), mark))

    def _settle(self, text: str, mark: str) -> str:
        """`text` without its marks, also where they were written as JSON."""
        pieces = re.split(rf"{mark}|\\u{ord(mark):04x}", text, flags=re.IGNORECASE)
        places = set(accumulate(map(len, pieces[:-1])))
        plain = "".join(pieces)
        literal = [found.start() for found in self.find(plain) if found.start() + 1 in places]
        return PromptText(plain, literal) if literal else plain

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
        return PromptText(meant, others) if others else meant

    def _places(self, text: str) -> list[int]:
        """Where marks go: into every control token, and into the beginning of one that the text ends with."""
        if self._first.search(text) is None:
            return []
        places = [found.start() + 1 for found in self._any_case.finditer(text)]
        end = len(text.rstrip())  # what follows may be put directly behind it
        tail = self._first.finditer(text, max(0, end - self._longest), end)
        begun = next(
            (found.start() + 1 for found in tail if text[found.start() : end].lower() in self._beginnings), None
        )
        return places if begun is None else sorted({*places, begun})


def unused_character(texts: Iterable[str]) -> str:
    """A character that stands in none of the texts, not even as JSON escapes it. Raises InvalidInput."""
    whole = "\0".join(texts)
    lower = whole.lower()
    for code in _MARKS:
        if chr(code) not in whole and f"\\u{code:04x}" not in lower:
            return chr(code)
    raise InvalidInput("the text holds every character of Unicode's private use area: one must be free")


def _longest_of(words: list[str]) -> str:
    """An expression for any of the words, the longest that fits; what several begin with is looked at once."""
    by_first = {word[0]: [other[1:] for other in words if other[:1] == word[0]] for word in words if word}
    branches = [re.escape(first) + _longest_of(rest) for first, rest in by_first.items()]
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)})" + ("?" if "" in words else "")


def _inserted(text: str, places: list[int], mark: str) -> str:
    return mark.join(text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True))


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
