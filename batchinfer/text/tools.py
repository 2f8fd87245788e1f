"""Incremental parser of tool calls in model output.

Three formats cover the common families; the chat template shows which one a model was trained on:

- hermes (Hermes, Qwen 2.5 and 3, SmolLM3): `<tool_call>{"name": …, "arguments": {…}}</tool_call>`
- llama3: the output is `{"name": …, "parameters": {…}}`, perhaps after `<|python_tag|>`; several follow after `;`
- mistral: `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, newer ones `[TOOL_CALLS]name[ARGS]{…}`
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

FORMATS = ("hermes", "llama3", "mistral")

_MARK = {"hermes": "<tool_call>", "llama3": "<|python_tag|>", "mistral": "[TOOL_CALLS]"}
# beginnings of calls without a mark: a special token may have been omitted from the text
_BARE = {"hermes": None, "llama3": re.compile(r"\s*\{"), "mistral": re.compile(r"\s*\[\s*\{")}
_BEFORE = {"hermes": re.compile(r"\s*"), "llama3": re.compile(r"\s*"), "mistral": re.compile(r"\s*\[?\s*")}
_NEXT = {"hermes": None, "llama3": re.compile(r"\s*;?\s*(?=\{)"), "mistral": re.compile(r"\s*,\s*(?=\{)")}
_CLOSE = {"hermes": "</tool_call>", "llama3": ";", "mistral": "]"}

_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_NAMED = re.compile(r"([\w.\-]+)(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*(?=\{)")
_MAYBE_NAMED = re.compile(r"[\w.\-]+(?:\[[A-Z_]*(?:\]\w*)?)*\s*\Z")
_STRUCTURE = re.compile(r'["\\{}\[\]]')


class ToolCall(NamedTuple):
    """A tool call. `arguments` is a JSON object as text, as the model wrote it."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolDelta:
    """A piece of output: text, or a piece of the call number `index`, whose `name` comes with its first piece."""

    content: str = ""
    index: int | None = None
    name: str | None = None
    arguments: str = ""


def detect_format(chat_template: str) -> str | None:
    """Return the call format that a chat template shows its model; None for none or an unsupported one."""
    if "<tool_call>" in chat_template:
        other = "<function=" in chat_template or "<arg_key>" in chat_template  # XML in the same tags
        return None if other else "hermes"
    if "[TOOL_CALLS]" in chat_template:
        return "mistral"
    llama = "<|python_tag|>" in chat_template or "<|start_header_id|>" in chat_template
    return "llama3" if llama and re.search(r'\\?"parameters\\?"\s*:', chat_template) else None


def keeps_special_tokens(dialect: str) -> bool:
    """Return True if the mark of a call is a special token, so that parsing needs skip_special_tokens false."""
    return dialect in ("llama3", "mistral")


def parse_tool_calls(text: str, dialect: str) -> tuple[str | None, list[ToolCall]]:
    """Return the text of a complete output outside its calls (None if there is none), and the calls, in order.

    A malformed or truncated call stays text, unchanged. Space around calls is dropped.
    """
    parser = ToolCallParser(dialect, whole_calls=True)
    deltas = parser.feed(text) + parser.finish()
    content = "".join(delta.content for delta in deltas)
    return content or None, [ToolCall(delta.name, delta.arguments) for delta in deltas if delta.name is not None]


class ToolCallParser:
    """Streaming version of `parse_tool_calls`.

    A call's name is emitted as soon as its arguments begin, and these as they are written; with `whole_calls`, each
    call is emitted once, when it is complete and valid. Without, a call that turns out truncated or malformed stays a
    call.
    """

    def __init__(self, dialect: str, whole_calls: bool = False) -> None:
        if dialect not in FORMATS:
            raise ValueError(f"the format of tool calls must be one of {', '.join(FORMATS)}, got {dialect!r}")
        self._dialect = dialect
        self._whole_calls = whole_calls
        self._step = self._begin  # current state; returns None if it needs more text
        self._text = ""  # unsettled
        self._mark = ""  # text before it that announced a call
        self._space = ""  # trailing space of the content: dropped if no content follows the next call
        self._has_content = False
        self._after_call = False
        self._count = 0
        self._call: _OpenCall | None = None
        self._last = False

    def feed(self, text: str) -> list[ToolDelta]:
        """Return the deltas that `text` settles."""
        self._text += text
        deltas: list[ToolDelta] = []
        while (found := self._step()) is not None:
            deltas += found
        return deltas

    def finish(self) -> list[ToolDelta]:
        """Return the remaining deltas at the end of the output."""
        self._last = True
        deltas = self.feed("")
        if self._space and not self._after_call:
            deltas.append(ToolDelta(self._space))
        return deltas

    def _begin(self) -> list[ToolDelta] | None:
        """Handle the first characters: calls without a mark, or text."""
        bare = _BARE[self._dialect]
        if bare is not None and not self._last and len(self._text.lstrip("[ \n\r\t")) == 0:
            return None
        called = bare is not None and bare.match(self._text)
        self._step = self._expect if called else self._read_text
        return []

    def _read_text(self) -> list[ToolDelta] | None:
        mark = _MARK[self._dialect]
        place = self._text.find(mark)
        if place >= 0:
            content, self._text, self._mark = self._text[:place], self._text[place + len(mark) :], mark
            self._step = self._expect
            return self._content(content)
        kept = 0 if self._last else _overlap(self._text, mark)
        cut = len(self._text) - kept
        content, self._text = self._text[:cut], self._text[cut:]
        return self._content(content) if content else None

    def _expect(self) -> list[ToolDelta] | None:
        """Handle the text after a mark: the beginning of a call, or the mark was text."""
        before = _BEFORE[self._dialect].match(self._text)
        start = before.end() if before is not None else 0
        named = _NAMED.match(self._text, start) if self._dialect == "mistral" else None
        if named is not None or self._text.startswith("{", start):
            self._call = _OpenCall(start, named)
            self._step = self._read_call
            return []
        maybe = start == len(self._text) or (self._dialect == "mistral" and _MAYBE_NAMED.match(self._text, start))
        return None if maybe and not self._last else self._no_call()

    def _no_call(self) -> list[ToolDelta]:
        mark, self._mark, self._call = self._mark, "", None
        self._step = self._read_text
        return self._content(mark)

    def _read_call(self) -> list[ToolDelta] | None:
        call = self._call
        assert call is not None
        call.scan(self._text)
        deltas = [] if self._whole_calls else call.pieces(self._text, self._count)
        if call.end is None:
            # truncated: text, unless some of it was emitted
            self._text = "" if self._last and call.announced else self._text
            return deltas or (self._no_call() if self._last and self._text else None)
        if not call.announced:
            found = call.parse(self._text)
            if found is None:
                return self._no_call()
            deltas.append(ToolDelta("", self._count, found.name, found.arguments))
        self._count += 1
        self._text = self._text[call.end :]
        self._space = self._space if self._has_content else ""
        self._mark, self._call, self._after_call = "", None, True
        self._step = self._read_close
        return deltas

    def _read_close(self) -> list[ToolDelta] | None:
        """Handle the text after a call: another call, the end of the run of calls, or text."""
        following = _NEXT[self._dialect]
        found = following.match(self._text) if following is not None else None
        if found is not None:
            self._mark, self._text = found[0], self._text[found.end() :]
            self._step = self._expect
            return []
        rest, close = self._text.lstrip(), _CLOSE[self._dialect]
        maybe = close.startswith(rest) or (following is not None and rest.rstrip() in (",", ";", ""))
        if maybe and not self._last and not (rest == close and self._dialect != "llama3"):
            return None
        if rest.startswith(close):
            self._text = rest[len(close) :]
        self._step = self._read_text
        return []

    def _content(self, text: str) -> list[ToolDelta]:
        """Return text outside calls; trailing space waits for what follows."""
        if self._after_call and (self._space or not self._has_content):
            text = text.lstrip()  # text around a call keeps the space on one side only
        if not text.strip() and self._after_call:
            return []
        self._after_call = False
        text = self._space + text
        bare = text.rstrip()
        self._space = text[len(bare) :]
        self._has_content = self._has_content or bool(bare)
        return [ToolDelta(bare)] if bare else []


class _OpenCall:
    """A call being parsed, at `start` of the text. `end`: its end, once known."""

    def __init__(self, start: int, named: re.Match[str] | None) -> None:
        self._start = start
        self._named = named
        self._name: str | None = named[1] if named is not None else None
        self._whole = _JsonValue(named.end() if named is not None else start)
        self._arguments = self._whole if named is not None else None
        self._sent = 0
        self.announced = False

    @property
    def end(self) -> int | None:
        return self._whole.end

    def scan(self, text: str) -> None:
        self._whole.scan(text)
        if self._arguments is None:
            head = _HEAD.match(text, self._start)
            if head is None:
                return
            try:
                self._name = json.loads(head[1])
            except ValueError:
                return
            self._arguments = _JsonValue(head.end())
        self._arguments.scan(text)

    def pieces(self, text: str, index: int) -> list[ToolDelta]:
        """Return the name and arguments that arrived since the last call of this method."""
        if self._arguments is None:
            return []
        begin = self._arguments.start
        stop = self._arguments.end if self._arguments.end is not None else len(text)
        written = text[begin + self._sent : stop]
        if self.announced and not written:
            return []
        name = None if self.announced else self._name
        self.announced = True
        self._sent += len(written)
        return [ToolDelta("", index, name, written)]

    def parse(self, text: str) -> ToolCall | None:
        """Return the complete call; None if it is malformed."""
        try:
            value = json.loads(text[self._whole.start : self._whole.end], parse_constant=_no_number)
        except (ValueError, RecursionError):
            return None
        if self._named is not None:
            return ToolCall(str(self._name), text[self._whole.start : self._whole.end])
        name, arguments = value.get("name"), value.get("arguments", value.get("parameters"))
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        if self._arguments is not None and self._arguments.end is not None:
            return ToolCall(name, text[self._arguments.start : self._arguments.end])
        return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


class _JsonValue:
    """A JSON object at `start` of a growing text. `end`: the position after its last brace, once known."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.end: int | None = None
        self._at = start
        self._depth = 0
        self._quoted = False

    def scan(self, text: str) -> None:
        while self.end is None and (found := _STRUCTURE.search(text, self._at)) is not None:
            if found[0] == "\\":
                if found.end() == len(text):  # the escaped character has not arrived
                    self._at = found.start()
                    return
                self._at = found.end() + 1
                continue
            self._at = found.end()
            if found[0] == '"':
                self._quoted = not self._quoted
            elif not self._quoted:
                self._depth += 1 if found[0] in "{[" else -1
                self.end = self._at if self._depth == 0 else None
        if self.end is None:
            self._at = max(self._at, len(text))


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _overlap(text: str, mark: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `mark`."""
    longest = min(len(text), len(mark) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(mark[:size])), 0)
