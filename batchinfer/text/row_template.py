"""Templates and filters of a job over a row."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jinja2

from batchinfer.errors import InvalidInput, SpecError, TemplateError
from batchinfer.text.row_names import COLUMNS, ROW, uses_of
from batchinfer.text.row_sandbox import Columns, NullCell, RowSandbox, cell
from batchinfer.text.sandbox import compile_template, reason
from batchinfer.values.cell import unrepresentable_parts

_ROWS = RowSandbox()
_ONE_EQUALS = re.compile(r"(?<![=!<>])=(?!=)")
_NOT_WORDS = re.compile(r"&|\||!(?!=)|<>")  # operators of other languages


class _OverRow:
    """Base of templates and filters: a `name` for errors, and the `source` that names columns."""

    def __init__(self, name: str, source: str) -> None:
        self._name = name
        self.source = source
        self._uses = uses_of(source)
        self._called = {name: f"column {name!r}" for name in self._uses.variables}  # in messages

    def columns(self, known: Iterable[str]) -> frozenset[str]:
        """Return the columns needed from an input with the columns `known`."""
        return self._uses.columns(known)

    @property
    def whole(self) -> bool:
        """Return True if any column of the input may be needed."""
        return self._uses.whole

    def _evaluate(self, row: Mapping[str, Any], write: Callable[[dict[str, Any]], Any]) -> Any:
        uses = self._uses
        variables = {name: cell(row[name], what) for name, what in self._called.items() if name in row}
        if uses.own or uses.keys or uses.whole:
            variables[COLUMNS] = columns = Columns(row)
            variables[ROW] = cell(row[ROW], f"column {ROW!r}") if ROW in row else columns
        try:
            return write(variables)
        except (NullCell, InvalidInput) as error:
            why = str(error)
            # a nested value does not know its column
            inside = (name for name, value in row.items() for part in unrepresentable_parts(value) if part.why == why)
            column = next(inside, None)
            raise InvalidInput(f"{self._name}: {f'column {column!r}: ' if column else ''}{why}") from None
        except Exception as error:  # any failure of a template ends this row, not the job
            raise TemplateError(f"{self._name}: {reason(error)}") from None


class RowTemplate(_OverRow):
    """A template over a row's columns, compiled once (`row_names` defines its names).

    A line that holds only a block leaves no line behind, and one newline at the end is dropped.
    """

    def __init__(self, source: str, name: str) -> None:
        """Compile a template. `name` is its name in errors. Raises SpecError for bad syntax, with its line."""
        self._template: jinja2.Template = compile_template(_ROWS.from_string, source, name)
        super().__init__(name, source)

    def render(self, row: Mapping[str, Any]) -> str:
        """Return the text for a row.

        Raises InvalidInput for a use of a cell without a value (a null outside a test, NaN, an unrepresentable value),
        TemplateError if the template fails.
        """
        text: str = self._evaluate(row, self._template.render)
        return text


def _hint(expression: str) -> str:
    """Return advice for an invalid expression, or an empty string."""
    if "{{" in expression or "{%" in expression:
        return "; an expression is written without {{ }}"
    if _ONE_EQUALS.search(expression):
        return "; use == to compare two values"
    return "; use the words and, or, not" if _NOT_WORDS.search(expression) else ""


class RowFilter(_OverRow):
    """A Jinja expression over a row's columns: `lang == "en" and score > 0.5`."""

    def __init__(self, expression: str, name: str = "where") -> None:
        """Compile an expression. Raises SpecError for bad syntax."""
        try:
            self._expression = compile_template(
                lambda source: _ROWS.compile_expression(source, False), expression, name
            )
        except SpecError as error:
            raise SpecError(f"{str(error).removeprefix(f'{name}: ')}{_hint(expression)}", key=name) from None
        super().__init__(name, "{{ (" + expression + ") }}")

    def matches(self, row: Mapping[str, Any]) -> bool:
        """Return True if the row passes.

        Raises InvalidInput if a null is compared or computed with, TemplateError if the expression fails. Nulls fail
        the filter `score is not none and score > 3` without an error.
        """
        matched: bool = self._evaluate(row, lambda variables: bool(self._expression(variables)))
        return matched
