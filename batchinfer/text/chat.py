"""Templates: the model's chat template, and the job's templates and filters over a row. All run in Jinja's sandbox.

A sandboxed template reaches no underscore attribute, changes none of its arguments, and calls only what it is given.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from batchinfer.errors import InvalidInput, SpecError, TemplateError
from batchinfer.text.messages import ContentForms, content_forms, shape_messages


class ChatTemplate:
    """A chat template as transformers renders it (`apply_chat_template` without tokenizing)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens` are template variables (bos_token, …). Raises SpecError for bad syntax, with its line."""
        self.source = source
        self._template: jinja2.Template = _compile(_CHAT.from_string, source, "chat template")
        self._variables = {"tools": None, "documents": None, "add_generation_prompt": True, **special_tokens}

    def render(
        self, messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None, **kwargs: Any
    ) -> str:
        """The prompt. tools: as in OpenAI's chat requests. `kwargs` are further variables (enable_thinking, …).

        Content may be text or a list of text parts, and a tool call's arguments a mapping or JSON text, whatever of it
        the template takes. Raises InvalidInput for messages that are not a list of objects with a role, TemplateError
        where the template refuses them or fails.
        """
        shaped = shape_messages(messages, self._forms)
        try:
            return self._write(shaped, tools=list(tools) if tools else None, **kwargs)
        except Exception as error:  # whatever a template does ends this row, not the job
            raise TemplateError(f"chat template: {_reason(error)}") from None

    def _write(self, messages: list[dict[str, Any]], **kwargs: Any) -> str:
        return self._template.render({**self._variables, **kwargs, "messages": messages})

    @functools.cached_property
    def _forms(self) -> ContentForms:
        return content_forms(self._write)


class RowTemplate:
    """A template over a row's columns, compiled once.

    `columns` are the columns that it needs. A name that Jinja has as well (`range`, `dict`, …) is Jinja's function
    where the template only calls it, and a column otherwise. A line that holds only a block leaves no line behind, and
    one newline at the end is dropped.
    """

    def __init__(self, source: str, name: str) -> None:
        """`name` is what errors call the template. Raises SpecError for bad syntax, with its line in the template."""
        self._name = name
        self._template: jinja2.Template = _compile(_ROW.from_string, source, name)
        self.columns = _columns(source)

    def render(self, row: Mapping[str, Any]) -> str:
        """Raises InvalidInput where a null is used other than by testing it, TemplateError where the template fails."""
        try:
            return self._template.render(_variables(row, self.columns))
        except NullCell as error:
            raise InvalidInput(f"{self._name}: {error}") from None
        except Exception as error:
            raise TemplateError(f"{self._name}: {_reason(error)}") from None


class RowFilter:
    """A Jinja expression over a row's columns: `lang == "en" and score > 0.5`."""

    def __init__(self, expression: str, name: str = "where") -> None:
        """Raises SpecError for bad syntax."""
        self._name = name
        self._expression = _compile(lambda source: _ROW.compile_expression(source, False), expression, name)
        self.columns = _columns("{{ (" + expression + ") }}")

    def matches(self, row: Mapping[str, Any]) -> bool:
        """Raises InvalidInput where a null is compared or computed with, TemplateError where the expression fails.

        `score is not none and score > 3` is a filter that nulls pass through as false.
        """
        try:
            return bool(self._expression(_variables(row, self.columns)))
        except NullCell as error:
            raise InvalidInput(f"{self._name}: {error}") from None
        except Exception as error:
            raise TemplateError(f"{self._name}: {_reason(error)}") from None


class NullCell(jinja2.UndefinedError):
    """A null was printed, compared or computed with."""


class _Null(jinja2.StrictUndefined):
    """A null cell: false, equal to none, replaced by `default`, written by `tojson`; anything else is an error.

    None itself would go into prompts as the text "None" through every filter.
    """

    __slots__ = ()

    def __bool__(self) -> bool:  # type: ignore[override]
        return False

    def __eq__(self, other: object) -> bool:  # type: ignore[override]
        return other is None or isinstance(other, _Null)

    def __ne__(self, other: object) -> bool:  # type: ignore[override]
        return not self == other

    __hash__ = None  # type: ignore[assignment]  # as for any value that equals another type's


def _variables(row: Mapping[str, Any], columns: frozenset[str]) -> dict[str, Any]:
    values = {name: row[name] for name in columns if name in row}
    for name, value in values.items():
        if value is None:
            values[name] = _Null(hint=f"column {name!r} is null", name=name, exc=NullCell)
    return values


def _is_none(value: Any) -> bool:
    return value is None or isinstance(value, _Null)


def _no_none(value: Any) -> Any:
    """What is printed: a null inside a nested value must not become the text "None"."""
    if value is None:
        raise NullCell("an expression of the template is null")
    return value


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without Jinja's HTML escapes, as transformers has it."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
        default=_json_default,
    )


def _json_default(value: Any) -> Any:
    if isinstance(value, _Null):
        return None
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    raise TypeError(f"a value of type {type(value).__name__} cannot be written as JSON")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)


class _Dict:
    """`dict(a=1)` without the type itself, whose attributes lead further."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _Namespace(Namespace):
    """A namespace whose attributes cannot be underscore names."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *values = args
        attributes = dict(*values, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: names that begin with _ are refused")


class _Generation(Extension):
    """`{% generation %}`: marks the assistant's text for training; here it is only passed through."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own declaration is not a ClassVar)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment(row: bool) -> ImmutableSandboxedEnvironment:
    undefined = jinja2.StrictUndefined if row else jinja2.Undefined
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=undefined,
        finalize=_no_none if row else None,
        extensions=[_Generation, loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        dict=_Dict(), namespace=_Namespace, raise_exception=_raise_exception, strftime_now=_strftime_now
    )
    if row:
        environment.tests["none"] = _is_none
    return environment


_CHAT = _environment(row=False)
_ROW = _environment(row=True)
_PARSER = _environment(row=True)
_PARSER.globals.clear()  # so that a column with the name of a Jinja function is found


def _compile(compile_source: Callable[[str], Any], source: str, name: str) -> Any:
    try:
        return compile_source(source)
    except jinja2.TemplateSyntaxError as error:
        raise SpecError(f"line {error.lineno}: {error.message}", key=name) from None
    except Exception as error:  # nesting too deep for the parser, a constant that cannot be folded
        raise SpecError(f"cannot be compiled: {_reason(error)}", key=name) from None


def _columns(source: str) -> frozenset[str]:
    """Names that the template takes from outside, less those that it only calls and Jinja has."""
    tree = _PARSER.parse(source)
    found = meta.find_undeclared_variables(tree)
    uses = [node.name for node in tree.find_all(nodes.Name)]
    called = [call.node.name for call in tree.find_all(nodes.Call) if isinstance(call.node, nodes.Name)]
    functions = {name for name in found & _ROW.globals.keys() if uses.count(name) == called.count(name)}
    return frozenset(found - functions)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, jinja2.TemplateError) and text else f"{type(error).__name__}: {text}"
