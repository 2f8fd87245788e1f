"""A few rows of an output beside the input that they came from."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, TypeVar

from batchinfer.errors import InfrastructureError, OutputConflict, UsageError, UserError, shell_command
from batchinfer.io.rows import RowSpan, rows_of, stream_rows
from batchinfer.job.columns import OutputLayout, output_layout
from batchinfer.job.ledger import CommitRecord, JobOutput
from batchinfer.job.part_reader import read_part
from batchinfer.log import log
from batchinfer.spec import StorageSpec
from batchinfer.values.plain import display_text

T = TypeVar("T")

_CELL_CHARS = 1200  # longer cells are cut, and say so
_SIDE_BY_SIDE = 120  # columns of text that two blocks next to each other need


@dataclass(frozen=True)
class Shown:
    """Output row: where its input is, the input's columns, and the added columns without prefix."""

    file: str
    row: int
    input: dict[str, Any]
    output: dict[str, Any]

    @property
    def failed(self) -> bool:
        return self.output.get("status") == "error" or isinstance(self.output.get("error"), dict)


def pick(
    output: JobOutput, storage: StorageSpec, count: int, *, errors: bool = False, row: int | None = None
) -> list[Shown]:
    """Pick at most `count` rows: spread over what is committed, or the first error rows, or those at position `row`.

    None where no row is an error. Raises UsageError if there is no such row otherwise.
    """
    listing = output.ledger.listing()
    keys = list(listing.in_effect().values())
    if row is not None:
        spans = output.plan.chunks
        keys = [key for key in keys if spans[key.chunk].start <= row < spans[key.chunk].start + spans[key.chunk].count]
    elif not errors:
        keys = _spread(keys, count)
    layout = output_layout(output.spec, output.plan.inputs)
    shown: list[Shown] = []
    for record in listing.in_order(keys):
        wanted = -(-count // len(keys)) if row is None and not errors else count
        rows = rows_of_record(output, layout, record, errors, row)
        shown += _spread(rows, wanted) if row is None and not errors else rows
        if len(shown) >= count:
            break
    if not shown and errors and row is None:
        return []
    if not shown:
        what = f"a row {row}" if row is not None else "a row"
        raise UsageError(f"{output.store.url}: no committed chunk has {what}")
    return _with_inputs(output, storage, shown[:count])


def _spread(items: list[T], count: int) -> list[T]:
    """Return at most `count` of the items, evenly spread."""
    number = min(count, len(items))
    return [items[place * len(items) // number] for place in range(number)]


def rows_of_record(
    output: JobOutput, layout: OutputLayout, record: CommitRecord, errors: bool, row: int | None = None
) -> list[Shown]:
    """Return the rows of a part, or its error rows, or those at position `row`, beside their carried columns."""
    if record.part is None or (errors and not record.errors):
        return []
    data = output.store.read(record.part)
    if data is None:
        raise OutputConflict(
            f"{output.store.url}/{record.part}: missing; "
            f"{shell_command('verify', output.store.url)} lists what is wrong"
        )
    span = output.plan.chunks[record.chunk]
    file = output.plan.inputs.files[span.file].url
    first = output.plan.bases[record.chunk] - span.start  # job index of the file's row 0
    shown = [_shown(values, layout, file, first) for values in read_part(data, record.part)]
    if row is not None:
        return [one for one in shown if one.row == row]
    return [one for one in shown if not errors or one.failed]


def _shown(values: dict[str, Any], layout: OutputLayout, file: str, first: int) -> Shown:
    if layout.format == "openai-batch":
        number = int(values.pop("id").rpartition("_")[2]) - first
        return Shown(file, number, {"custom_id": values.pop("custom_id")}, values)
    carried = {name: values.pop(name, None) for name in layout.carried}
    added = {name.removeprefix(layout.prefix): value for name, value in values.items()}
    return Shown(file, int(added["row"]), carried, added)


def _with_inputs(output: JobOutput, storage: StorageSpec, shown: list[Shown]) -> list[Shown]:
    """Return the rows with their whole input rows in place of the carried columns, if the input can be read."""
    inputs = output.plan.inputs
    if set(inputs.schema.names) <= set(shown[0].input):
        return shown
    if storage == StorageSpec():
        storage = output.spec.storage
    numbers = {file.url: number for number, file in enumerate(inputs.files)}
    wanted = sorted({(numbers[one.file], one.row) for one in shown})
    whole: dict[tuple[int, int], dict[str, Any]] = {}
    try:
        for span, batch in stream_rows(inputs, [RowSpan(file, row, 1) for file, row in wanted], storage):
            whole[span.file, span.start] = rows_of(batch.table, inputs.schema.names, inputs.text_json)[0]
    except (UserError, InfrastructureError) as error:
        log.warning("the input cannot be read; showing only what the output carries of it", reason=str(error))
    return [replace(one, input=whole.get((numbers[one.file], one.row), one.input)) for one in shown]


# -- text -------------------------------------------------------------------------------------------------------


def describe_rows(shown: list[Shown], width: int) -> str:
    """Input and output of each row, next to each other if `width` (columns of text) has room for it."""
    if not shown:
        return "no row that is committed is an error"
    return "\n\n".join("\n".join(_lines(one, width)) for one in shown)


def _lines(one: Shown, width: int) -> Iterator[str]:
    head = f"── row {one.row} of {one.file} "
    yield head + "─" * max(2, width - len(head))
    answer = {name: value for name, value in one.output.items() if name != "row" and value is not None}
    if width < _SIDE_BY_SIDE:
        yield from _block(one.input, width)
        yield "─" * 8
        yield from _block(answer, width)
        return
    half = (width - 3) // 2
    for left, right in zip_longest(_block(one.input, half), _block(answer, half), fillvalue=""):
        yield f"{left:<{half}} │ {right}".rstrip()


def _block(values: Mapping[str, Any], width: int) -> Iterator[str]:
    """`name  value` with a hanging indent; wide characters count as one, as they do for most terminals' wrapping."""
    margin = max(map(len, values), default=0) + 2
    for name, value in values.items():
        label = name.ljust(margin)
        for line in _wrapped(_text(value), max(20, width - margin)):
            yield (label + line).rstrip()
            label = " " * margin


def _wrapped(text: str, width: int) -> Iterator[str]:
    if len(text) > _CELL_CHARS:
        text = f"{text[:_CELL_CHARS]}… ({len(text) - _CELL_CHARS:,} more characters)"
    for line in text.splitlines() or [""]:
        yield from textwrap.wrap(line, width, drop_whitespace=False, replace_whitespace=False) or [""]


def _text(value: Any) -> str:
    """Text as it is, everything else as JSON; no control characters reach the terminal."""
    text = display_text(value)
    return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)
