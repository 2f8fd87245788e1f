"""Cells without a plain Python value: unrepresentable ones, and structs that omit null fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

from batchinfer.errors import InvalidInput


class Unrepresentable:
    """A cell that Python cannot represent: a year beyond 9999, an unknown time zone, bytes that are not text.

    It stays in its row, and any use of it raises the row's error. `text` is its text in JSON lines, None for null.
    """

    __slots__ = ("text", "why")

    def __init__(self, why: str, text: str | None = None) -> None:
        self.why = why
        self.text = text

    def refuse(self, *_: Any) -> NoReturn:
        """Raise InvalidInput."""
        raise InvalidInput(self.why)

    __str__ = __repr__ = __format__ = __bool__ = __len__ = __iter__ = __getitem__ = __contains__ = refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __int__ = __float__ = __neg__ = __abs__ = refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __truediv__ = __rtruediv__ = refuse
    __hash__ = __round__ = __call__ = refuse


def require_representable(value: Any, what: str) -> Any:
    """Return the value. Raises InvalidInput, prefixed with `what`, if it is Unrepresentable."""
    if type(value) is Unrepresentable:
        raise InvalidInput(f"{what}: {value.why}")
    return value


def unrepresentable_parts(value: Any) -> Iterator[Unrepresentable]:
    """Yield all Unrepresentable parts of a value, at any depth."""
    if type(value) is Unrepresentable:
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from unrepresentable_parts(part)


class Struct(dict[str, Any]):
    """The fields of a struct that are not null: an absent field and a null one are the same.

    `nulls` are the names of the null fields, for lookups by name.
    """

    __slots__ = ("nulls",)

    def __init__(self, fields: Any = (), nulls: tuple[str, ...] = ()) -> None:
        super().__init__(fields)
        self.nulls = nulls
