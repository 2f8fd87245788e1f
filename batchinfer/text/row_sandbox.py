"""Jinja environment for templates over a row.

Keys take precedence over methods, uses of nulls and NaN are errors that name the column, and only values can be
printed.
"""

from __future__ import annotations

import datetime
import functools
import math
import types
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.filters import do_round, make_attrgetter
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.utils import Namespace, pass_environment

from batchinfer.errors import InvalidInput
from batchinfer.text.row_names import ROW, TEXT, rewrite
from batchinfer.text.sandbox import Sandbox, json_filter
from batchinfer.values.cell import Struct, Unrepresentable
from batchinfer.values.number import Number, format_percent

# filters that convert their arguments to text
_OF_TEXT = (
    *("string", "upper", "lower", "capitalize", "title", "trim", "replace", "center", "indent", "wordwrap", "truncate"),
    *("wordcount", "striptags", "urlize", "urlencode", "escape", "e", "forceescape", "safe", "pprint", "xmlattr"),
)


_METHODS = [name for name in dir(dict) if not name.startswith("_")]


class NullCell(jinja2.UndefinedError):
    """Error of a null that was printed, compared or computed with."""


class Null(jinja2.StrictUndefined):
    """A null cell: false, equal to none, replaced by `default`, written by `tojson`; any other use is an error.

    None itself would pass every filter and appear in prompts as the text "None".
    """

    __slots__ = ()

    def __bool__(self) -> bool:  # type: ignore[override]
        return False

    def __eq__(self, other: object) -> bool:  # type: ignore[override]
        return other is None or isinstance(other, Null)

    def __ne__(self, other: object) -> bool:  # type: ignore[override]
        return not self == other

    def __repr__(self) -> str:
        return "None"

    __hash__ = None  # type: ignore[assignment]  # unhashable, because it equals values of another type


_UNLISTED = (Iterator, range, KeysView, ValuesView, ItemsView)
_LISTED: tuple[Any, ...] = (list.__repr__, tuple.__repr__)  # named tuples print their type's name
_ROUNDINGS = {"ceil": ROUND_CEILING, "floor": ROUND_FLOOR}
_PLAIN = (str, int, datetime.date, datetime.time, datetime.timedelta, Null)


class _NotFinite(float):
    """NaN or infinity in a cell: it cannot be printed, and NaN cannot be ordered (`x == x` is false)."""

    what = ""

    def _refuse(self, *_: Any) -> NoReturn:
        raise InvalidInput(f"{self.what} is {'NaN' if math.isnan(self) else 'infinite'}")

    __str__ = __repr__ = __format__ = __round__ = __int__ = _refuse
    __hash__ = float.__hash__


class _NotANumber(_NotFinite):
    __bool__ = __lt__ = __le__ = __gt__ = __ge__ = _NotFinite._refuse


class Method:
    """A method looked up as an attribute: it can be called, and nothing else."""

    __slots__ = ("_function", "_name")

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self._function = function
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def _refuse(self, *_: Any) -> NoReturn:
        raise jinja2.TemplateError(f"{self._name!r} is a method, not a value: it is called as {self._name}()")

    __str__ = __repr__ = __format__ = __bool__ = __eq__ = _refuse
    __hash__ = None  # type: ignore[assignment]


class Columns(dict[str, Any]):
    """All columns read from a row."""


def cell(value: Any, what: str) -> Any:
    """Return a value as templates see it. `what`: its name in messages."""
    if type(value) is str:
        return value
    if value is None:
        return Null(hint=f"{what} is null", name=what, exc=NullCell)
    if type(value) is float and not math.isfinite(value):
        number = _NotANumber(value) if math.isnan(value) else _NotFinite(value)
        number.what = what
        return number
    if type(value) is Unrepresentable:
        return Unrepresentable(f"{what}: {value.why}", value.text)
    return value


def printed(value: Any) -> str:
    """Return the text of a value.

    Raises InvalidInput, NullCell, or jinja2.TemplateError for objects that are not values.
    """
    return value if type(value) is str else str(_printable(value))


def _printable(value: Any) -> Any:
    if value is None:
        raise NullCell("an expression of the template is null")
    _check(value)
    return value


def _check(value: Any) -> None:
    """Check that a value, including its nested parts, can be printed."""
    if value is None or isinstance(value, _PLAIN):
        return
    if isinstance(value, float | Decimal):
        if not math.isfinite(value):
            what = value.what if isinstance(value, _NotFinite) else "an expression of the template"
            raise InvalidInput(f"{what} is {'NaN' if math.isnan(value) else 'infinite'}")
    elif isinstance(value, dict):
        _check_all(value)
        _check_all(value.values())
    elif type(value).__repr__ in _LISTED:
        _check_all(value)
    elif isinstance(value, jinja2.Undefined | Unrepresentable | Method):
        str(value)  # raises its own error
    else:
        raise jinja2.TemplateError(f"{_kind(value)} cannot be printed")


def _check_all(values: Iterable[Any]) -> None:
    for value in values:
        _check(value)


def _kind(value: Any) -> str:
    if isinstance(value, Macro):
        return f"the macro {value.name}, which must be called,"
    for kind, name in ((Namespace, "a namespace"), (LoopContext, "the loop"), (types.FunctionType, "a function")):
        if isinstance(value, kind):
            return name
    name = type(value).__name__
    return f"a {name}, without | list after it," if isinstance(value, _UNLISTED) else f"a value of type {name}"


class RowSandbox(Sandbox):
    """Jinja environment of templates over a row."""

    intercepted_binops = frozenset({"%"})

    def __init__(self) -> None:
        super().__init__(undefined=jinja2.StrictUndefined, finalize=printed)
        self.filters |= {name: _of_text(self.filters[name]) for name in _OF_TEXT}
        self.filters |= {TEXT: printed, "join": _join, "attr": _attribute, "tojson": json_filter(_check, (Null,))}
        numeric = {"abs": abs, "int": self.filters["int"], "float": self.filters["float"], "round": _rounded}
        self.filters |= {name: _of_number(make) for name, make in numeric.items()} | {"format": _of_text(_formatted)}
        self.tests["none"] = lambda value: value is None or isinstance(value, Null)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        rewrite(source)
        source.set_environment(self)
        return super()._generate(source, *args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, dict):
            return self._key(obj, attribute)
        if type(obj) is Unrepresentable:
            obj.refuse()
        return self._named(super().getattr(obj, attribute), attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(obj, dict):
            return self._key(obj, argument)
        return self._named(super().getitem(obj, argument), argument)

    def method(self, obj: Any, name: str) -> Any:
        """Return the callee of `obj.name(…)`: the method, even if a key has its name."""
        return super().getattr(obj, name)

    def _key(self, obj: dict[Any, Any], key: Any) -> Any:
        """Return the value of a mapping's key. Methods are only found when called."""
        what = f"column {key!r}" if isinstance(obj, Columns) else repr(key)
        try:
            return cell(obj[key], what)
        except (LookupError, TypeError):
            if isinstance(obj, Columns) and ROW in obj:
                return self.getitem(obj[ROW], key)
        if isinstance(obj, Struct) and key in obj.nulls:
            return cell(None, what)
        method = f": its method is called as {key}()" if key in _METHODS else ""
        return self.undefined(hint=f"'dict object' has no attribute {key!r}{method}", obj=obj, name=key)

    def _named(self, value: Any, name: Any) -> Any:
        if isinstance(value, types.FunctionType | types.BuiltinMethodType | types.MethodType):
            return Method(value, str(name))
        return value if isinstance(value, Context) else cell(value, repr(name))

    def wrap_str_format(self, value: Any) -> Any:
        """Wrap str.format as the sandbox does, and check the formatted values."""
        wrapped = super().wrap_str_format(value)
        return wrapped and _of_text(wrapped)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, str):
            for value in right if isinstance(right, tuple) else (right,):
                _printable(value)
            return format_percent(left, right)
        return super().call_binop(context, operator, left, right)


def _of_text(make: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter that converts its arguments to text, so that they are checked as for printing.

    Autoescaping is off, so the result is a plain str: Markup would show its type when printed within a list.
    """
    first = 1 if hasattr(make, "jinja_pass_arg") else 0

    @functools.wraps(make)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for value in args[first:]:
            _printable(value)
        _check_all(kwargs.values())
        result = make(*args, **kwargs)
        return str.__str__(result) if isinstance(result, str) else result

    return checked


def _of_number(make: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter that converts its first argument to a number, so that a null is an error."""

    @functools.wraps(make)
    def checked(value: Any, *args: Any, **kwargs: Any) -> Any:
        if value is None or isinstance(value, Null):
            str(_printable(value))
        return make(value, *args, **kwargs)

    return checked


def _rounded(value: Any, precision: int = 0, method: str = "common") -> Any:
    if isinstance(value, Number) and method in _ROUNDINGS:
        return value.rounded(precision, _ROUNDINGS[method])
    return do_round(value, precision, method)  # type: ignore[arg-type]


def _formatted(value: Any, *args: Any, **kwargs: Any) -> str:
    if args and kwargs:
        raise jinja2.TemplateError("format takes values by position or by name, not both")
    return format_percent(str(value), kwargs or args)


@pass_environment
def _join(environment: RowSandbox, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    items = value if attribute is None else map(make_attrgetter(environment, attribute), value)
    return printed(d).join(map(printed, items))


@pass_environment
def _attribute(environment: RowSandbox, obj: Any, name: str) -> Any:
    return environment.getattr(obj, name)
