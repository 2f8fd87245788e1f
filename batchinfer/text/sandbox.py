"""Sandboxed Jinja environment of all templates: the model's chat template, and the job's templates over a row.

A sandboxed template can access no underscore attribute, modify none of its arguments, and call only allowed functions.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from batchinfer.errors import SpecError
from batchinfer.values.plain import json_text


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja environment configured as transformers does for chat templates. `options` are Jinja's own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], **options)
        self.globals.update(
            dict=_Dict(), namespace=_Namespace, raise_exception=_raise_exception, strftime_now=_strftime_now
        )


def compile_template(compile_source: Callable[[str], Any], source: str, name: str) -> Any:
    try:
        return compile_source(source)
    except jinja2.TemplateSyntaxError as error:
        raise SpecError(f"line {error.lineno}: {error.message}", key=name) from None
    except Exception as error:  # nesting too deep for the parser, a constant that cannot be folded
        raise SpecError(f"cannot be compiled: {reason(error)}", key=name) from None


def reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, jinja2.TemplateError) and text else f"{type(error).__name__}: {text}"


def json_filter(
    check: Callable[[Any], object] = lambda value: None, nulls: tuple[type, ...] = ()
) -> Callable[..., str]:
    """Return the filter `tojson` without Jinja's HTML escapes, as in transformers, but refusing NaN.

    check: raises for values that must not be written. nulls: see `json_text`. The filter raises InvalidInput.
    """

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        check(value)
        layout = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators, "sort_keys": sort_keys}
        return json_text(value, nulls, **layout)

    return tojson


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)


class _Dict:
    """`dict(a=1)` without the type itself, whose attributes would escape the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _Namespace(Namespace):
    """A namespace that refuses attributes with a leading underscore."""

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
        raise SecurityError(f"a namespace cannot hold {name!r}: names with a leading underscore are refused")


class _Generation(Extension):
    """`{% generation %}`, which marks the assistant's text for training; here its body is rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own declaration is not a ClassVar)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
