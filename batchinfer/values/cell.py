"""Cells that are no plain value of Python: those that it cannot hold, and structs that leave their nulls out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

from batchinfer.errors import InvalidInput


class Unheld:
    """A cell that Python has no value for: a year beyond 9999, a time zone nobody knows, bytes that are no text.

    It rides along with its row, and using it is the row's error. `text` is what lines carry of it, None for nothing.
    """

    __slots__ = ("text", "why")

    def __init__(self, why: str, text: str | None = None) -> None:
        self.why = why
        self.text = text

    def refuse(self, *_: Any) -> NoReturn:
        """Raises InvalidInput."""
        raise InvalidInput(self.why)

    __str__ = __repr__ = __format__ = __bool__ = __len__ = __iter__ = __getitem__ = __contains__ = refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __int__ = __float__ = __neg__ = __abs__ = refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __truediv__ = __rtruediv__ = refuse
    __hash__ = __round__ = __call__ = refuse


def held(value: Any, what: str) -> Any:
    """The value itself. Raises InvalidInput that begins with `what` if it is Unheld."""
    if type(value) is Unheld:
        raise InvalidInput(f"{what}: {value.why}")
    return value


def unheld_in(value: Any) -> Iterator[Unheld]:
    """All parts of a value, at any depth, that are Unheld."""
    if type(value) is Unheld:
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from unheld_in(part)


class Struct(dict[str, Any]):
    """The fields of a struct that are not null: a struct does not tell an absent field from a null one.

    `nulls` names the others, for those who ask for one of them by name.
    """

    __slots__ = ("nulls",)

    def __init__(self, fields: Any = (), nulls: tuple[str, ...] = ()) -> None:
        super().__init__(fields)
        self.nulls = nulls
