"""YAML by the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema), with a line for every key.

PyYAML scans and parses; scalars are resolved here, because PyYAML resolves them by YAML 1.1: `yes`, `on`, `1_000`,
`12:30` and `2024-01-01` are text, `1e-3`, `012` and `0o17` are numbers. Keys are text as written, a duplicate key is an
error, and aliases can neither recurse nor multiply beyond `MAX_VALUES`.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from yaml.composer import Composer
from yaml.error import Mark, MarkedYAMLError, YAMLError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from batchinfer.errors import SpecError

Place = tuple[int | str, ...]
"""Keys and indices from the root down; an index and its text are the same."""

MAX_BYTES = 1 << 20
MAX_VALUES = 100_000  # with every alias expanded
MAX_DEPTH = 100

_CORE = "tag:yaml.org,2002:"
_MERGE = "<<"
_RECURSIVE = "an alias refers to a value that contains the alias itself"
_SURROGATE = re.compile("[\ud800-\udfff]")
_BREAK = re.compile("\r\n|\n|\r")
_COMMENT = re.compile(r"[ \t]+(#[^\r\n]*)")
_TEMPLATE = re.compile(r"\{[{%#]")
_SAME_INDENT = "keys of one mapping have the same indentation"
_QUOTE_TEMPLATE = "text with {{ … }} must be in quotes, or in lines of its own below a |"

_NULL = re.compile(r"null|Null|NULL|~|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_FORMS = {"null": _NULL, "bool": _BOOL, "int": _INT, "float": _FLOAT}

# part of PyYAML's message → advice; the first match counts
_ADVICE = (
    (
        "mapping values are not allowed",
        f"a text that holds a colon and a space must be in quotes, and {_SAME_INDENT}",
    ),
    ("scanning an alias", "a value that begins with * must be in quotes"),
    ("undefined alias", "no anchor & with that name comes before it; a value that begins with * must be in quotes"),
    ("scanning an anchor", "a value that begins with & must be in quotes"),
    ("'\\t' that cannot start", "indent with spaces, not with tabs"),
    ("that cannot start any token", "a value that begins with it must be in quotes"),
    ("unknown escape character", "in double quotes \\ begins an escape: write \\\\, or use single quotes"),
    ("quoted scalar", "the quotation mark that opens here is not closed"),
    ("expected a single document", "a file holds one document: nothing may follow a second ---"),
    (
        "found '<scalar>'",
        "nothing may follow a closing quotation mark, or a tab in a text without them; within '…' a ' is written ''",
    ),
    ("expected '<document start>'", _SAME_INDENT),
    ("expected <block end>", f"{_SAME_INDENT}, and so do the items of a list"),
    ("sequence entries are not allowed", "a value that begins with - must be in quotes, and items begin lines"),
    ("chomping or indentation", "the text after | or > begins on the next line"),
    ("found ']'", "a value that begins with it must be in quotes"),
    ("found '}'", "a value that begins with it must be in quotes"),
    ("flow sequence", "a list that opens with [ is closed with ], and a comma stands between its items"),
    ("flow mapping", "a mapping that opens with { is closed with }, and a comma stands between its keys"),
    ("flow node", "the [ or { that opens here is not closed"),
    ("expected ':'", "a line is a key, a colon, a space and a value"),
)


class NotYaml(SpecError):
    """Text that is not YAML at all. Other SpecErrors are about valid YAML that is rejected."""


@dataclass(frozen=True, slots=True)
class Document:
    """The plain values of a text, None if it is empty. No two places share a list or a mapping.

    `lines`: place → line, from 1. `comments`: place of an unquoted text → the comment that ended it. Indices are text.
    """

    value: Any
    lines: dict[tuple[str, ...], int] = field(default_factory=dict)
    comments: dict[tuple[str, ...], str] = field(default_factory=dict)

    def line(self, place: Iterable[int | str]) -> int:
        """Return the line of `place`, or of its deepest part that exists."""
        parts = tuple(map(str, place))
        return next((self.lines[parts[:n]] for n in range(len(parts), -1, -1) if parts[:n] in self.lines), 1)


def read_yaml(data: bytes | str, source: str) -> Document:
    """Parse YAML text. Raises SpecError, prefixed with `source` and a line."""
    text = data if isinstance(data, str) else _decode(data, source)
    places = _Lines(text, source)
    try:
        node = _Composer(text).get_single_node()
    except ReaderError as error:
        raise places.fault(error.position, f"not text: it holds the character U+{int(error.character):04X}") from None
    except MarkedYAMLError as error:
        raise _syntax_error(error, text, places) from None
    except (YAMLError, ValueError, OverflowError) as error:  # the last two: "\U99999999" in a quoted text
        raise NotYaml(f"{source}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise NotYaml(f"{source}: nested too deeply") from None
    if node is None:
        return Document(None)
    builder = _Builder(text, places)
    return Document(builder.build(node, ()), builder.lines, builder.comments)


def _decode(data: bytes, source: str) -> str:
    if len(data) > MAX_BYTES:
        raise NotYaml(f"{source}: not a job file: it has {len(data):,} bytes, and the limit is {MAX_BYTES:,}")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise NotYaml(f"{source}:1: this is UTF-16; save the file as UTF-8")
    zero = data.find(b"\0")
    if zero >= 0:
        line = data.count(b"\n", 0, zero) + 1
        raise NotYaml(f"{source}:{line}: not text: it holds zero bytes, as binary files and UTF-16 do")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise NotYaml(f"{source}:{line}: not UTF-8: byte 0x{byte:02x}; save the file as UTF-8") from None


class _Lines:
    """Index of the line starts of a text, counted as editors count them."""

    def __init__(self, text: str, source: str) -> None:
        self._starts = [0, *(match.end() for match in _BREAK.finditer(text))]
        self._source = source

    def at(self, index: int) -> int:
        return bisect_right(self._starts, index)

    def fault(self, index: int, message: str, kind: type[SpecError] = NotYaml) -> SpecError:
        return kind(f"{self._source}:{self.at(index)}: {message}")


class _Composer(Reader, Scanner, Parser, Composer, BaseResolver):
    """Composer whose nodes have the tags of the core schema."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)

    def scan_to_next_token(self) -> None:
        """Skip tabs as white space, except where they would indent; PyYAML accepts none."""
        Scanner.scan_to_next_token(self)
        while self.peek() == "\t":
            blanks = next(number for number in count(1) if self.peek(number) not in " \t")
            ends_line = self.peek(blanks) in "#\r\n\0"
            if not (ends_line or self.flow_level) and self.allow_simple_key:
                return
            self.forward(blanks)
            Scanner.scan_to_next_token(self)

    def resolve(self, kind: type[Node], value: Any, implicit: Any) -> str:
        if kind is not ScalarNode:
            return _CORE + ("map" if kind is MappingNode else "seq")
        plain, _ = implicit
        return _CORE + (
            next((name for name, form in _FORMS.items() if form.fullmatch(value)), "str") if plain else "str"
        )


def _syntax_error(error: MarkedYAMLError, text: str, places: _Lines) -> SpecError:
    """Convert PyYAML's error to one with a line and advice.

    If a line holds an unquoted template, the error is about that line.
    """
    message = f"{error.context or ''} {error.problem or ''}"
    marks = [mark for mark in (error.problem_mark, error.context_mark) if mark is not None]
    advice = next((advice for pattern, advice in _ADVICE if pattern in message), "")
    if not advice.startswith(("in double quotes", "a quotation mark", "a file holds")):
        for mark in marks:
            if _TEMPLATE.search(_line_of(text, mark)):
                return places.fault(mark.index, f"not YAML: {_QUOTE_TEMPLATE}")
    if "quoted scalar" in message:
        marks.reverse()  # report the opening quotation mark
    problem = " ".join((error.problem or error.context or "").split())
    index = min(marks[0].index, max(len(text.rstrip()) - 1, 0)) if marks else 0
    return places.fault(index, f"not YAML: {problem}{f'; {advice}' if advice else ''}")


def _line_of(text: str, mark: Mark) -> str:
    start = text.rfind("\n", 0, mark.index) + 1
    end = text.find("\n", mark.index)
    return text[start : end if end >= 0 else None]


class _Builder:
    """Converter from YAML nodes to plain values."""

    def __init__(self, text: str, places: _Lines) -> None:
        self.lines: dict[tuple[str, ...], int] = {}
        self.comments: dict[tuple[str, ...], str] = {}
        self._text = text
        self._places = places
        self._open: set[Node] = set()
        self._left = MAX_VALUES

    def build(self, node: Node, place: tuple[str, ...]) -> Any:
        self.lines.setdefault(place, self._line(node))
        self._count(node, place)
        if isinstance(node, ScalarNode):
            return self._scalar(node, place)
        if node in self._open:
            raise self._fault(node, place, _RECURSIVE)
        if len(place) > MAX_DEPTH:
            raise self._fault(node, place, f"nested more than {MAX_DEPTH} deep")
        self._open.add(node)
        if isinstance(node, MappingNode):
            value: Any = self._mapping(node, place)
        else:
            self._check_tag(node, place, "seq")
            value = [self.build(item, (*place, str(number))) for number, item in enumerate(node.value)]
        self._open.discard(node)
        return value

    def _mapping(self, node: MappingNode, place: tuple[str, ...]) -> dict[str, Any]:
        self._check_tag(node, place, "map")
        values = {}
        for name, (key, value) in self._pairs(node, place).items():
            self.lines[*place, name] = self._line(key)
            values[name] = self.build(value, (*place, name))
        return values

    def _pairs(self, node: MappingNode, place: tuple[str, ...]) -> dict[str, tuple[Node, Node]]:
        """Return the keys of a mapping and of its `<<` merges; its own keys take precedence."""
        own: dict[str, tuple[Node, Node]] = {}
        for key, value in node.value:
            self._count(key, place)
            name = self._key(node, key, place)
            if name in own:
                first = self._line(own[name][0])
                raise self._fault(key, (*place, name), f"given twice; the first is on line {first}")
            own[name] = (key, value)
        merge = own.get(_MERGE)
        if merge is None or not isinstance(merge[0], ScalarNode) or merge[0].style is not None:  # quoted, it is text
            return own
        del own[_MERGE]
        return self._merged(*merge, place) | own

    def _merged(self, key: Node, value: Node, place: tuple[str, ...]) -> dict[str, tuple[Node, Node]]:
        """Return the keys that `<<` merges; the first of several mappings takes precedence."""
        pairs: dict[str, tuple[Node, Node]] = {}
        for other in value.value if isinstance(value, SequenceNode) else [value]:
            if not isinstance(other, MappingNode):
                raise self._fault(key, place, "<< must be an alias of a mapping, or a list of such aliases")
            if other in self._open:
                raise self._fault(key, place, _RECURSIVE)
            self._open.add(other)
            pairs = self._pairs(other, place) | pairs
            self._open.discard(other)
        return pairs

    def _key(self, node: MappingNode, key: Node, place: tuple[str, ...]) -> str:
        """Return a key as text as it is written, as in JSON."""
        if isinstance(key, ScalarNode):
            return self._whole_text(key, place)
        if self._text.startswith("{{", node.start_mark.index):
            raise self._fault(node, place, _QUOTE_TEMPLATE, NotYaml)
        what = "a list" if isinstance(key, SequenceNode) else "a mapping"
        written = " ".join(self._text[key.start_mark.index : key.end_mark.index].split())
        raise self._fault(key, place, f"a key must be text, and {written[:60]} is {what}", NotYaml)

    def _scalar(self, node: ScalarNode, place: tuple[str, ...]) -> Any:
        comment = _COMMENT.match(self._text, node.end_mark.index) if node.style is None else None
        if comment is not None and node.value:
            self.comments[place] = comment[1]
        kind = node.tag.removeprefix(_CORE)
        if kind == "str":
            return self._whole_text(node, place)
        form = _FORMS.get(kind)
        if form is None or not form.fullmatch(node.value):
            raise self._fault(node, place, f"the tag {node.tag} does not fit the value" if form else _tag(node))
        return self._number(node, place) if kind in ("int", "float") else _CONSTANTS[node.value.lower()]

    def _number(self, node: ScalarNode, place: tuple[str, ...]) -> int | float:
        text = node.value.lower()
        if not node.tag.endswith("int"):
            return float(text.replace(".inf", "inf").replace(".nan", "nan"))
        try:
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        except ValueError:  # Python's limit
            raise self._fault(node, place, f"a number of {len(text):,} digits") from None

    def _whole_text(self, node: ScalarNode, place: tuple[str, ...]) -> str:
        """Join surrogate pairs, as JSON escapes a character beyond 16 bits. Raises SpecError for half a pair."""
        text: str = node.value
        if not _SURROGATE.search(text):
            return text
        try:
            return text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            raise self._fault(node, place, "half of a character: \\ud800 to \\udfff come in pairs") from None

    def _check_tag(self, node: Node, place: tuple[str, ...], tag: str) -> None:
        if node.tag != _CORE + tag:
            raise self._fault(node, place, _tag(node))

    def _count(self, node: Node, place: tuple[str, ...]) -> None:
        self._left -= 1
        if self._left < 0:
            raise self._fault(node, place, f"more than {MAX_VALUES:,} values, with every alias expanded")

    def _line(self, node: Node) -> int:
        return self._places.at(node.start_mark.index)

    def _fault(self, node: Node, place: tuple[str, ...], message: str, kind: type[SpecError] = SpecError) -> SpecError:
        return self._places.fault(node.start_mark.index, f"{dotted(place)}: {message}" if place else message, kind)


_CONSTANTS = {"": None, "~": None, "null": None, "true": True, "false": False}


def _tag(node: Node) -> str:
    return f"the tag {node.tag.replace(_CORE, '!!')} means nothing here; a value that begins with ! must be in quotes"


def dotted(place: Iterable[int | str]) -> str:
    """Return a place as `engine.max_num_seqs`; keys with other characters are quoted."""
    parts = map(str, place)
    return ".".join(part if re.fullmatch(r"[\w-]+", part) else repr(part) for part in parts)
