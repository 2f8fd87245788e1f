"""Structured-output constraints: vLLM's `structured_outputs` and OpenAI's `response_format`.

Plain frozen values, so that equal parameters compare and hash equal. Schemas, expressions and grammars are only checked
when they are compiled for a tokenizer (`text.grammar`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from batchinfer.errors import BadParameters, format_value, suggest

Kind = Literal["json", "json_object", "regex", "choice", "grammar"]

KINDS: tuple[Kind, ...] = ("json", "json_object", "regex", "choice", "grammar")
MAX_CHARACTERS = 1 << 17  # length of a schema, an expression, a grammar, or all choices together


@dataclass(frozen=True, slots=True)
class StructuredOutputs:
    """One constraint. `value` is the JSON text of a schema, a regular expression, a grammar, or the choices."""

    kind: Kind
    value: str | tuple[str, ...]

    @classmethod
    def of(cls, given: Any) -> StructuredOutputs | None:
        """Parse a mapping with exactly one of json, json_object, regex, choice, grammar; null keys do not count.

        json: a schema, as a mapping or as JSON text. json_object: true. choice: a list of texts. grammar: Lark, in the
        dialect of llguidance. Return None for None and for a mapping with only nulls. Raises BadParameters.
        """
        if given is None or isinstance(given, StructuredOutputs):
            return given
        if not isinstance(given, Mapping):
            raise BadParameters(
                f"structured_outputs must be a mapping with one of {', '.join(KINDS)}, got {format_value(given)}"
            )
        for name in given:
            if name not in KINDS:
                near = suggest(str(name).removeprefix("guided_"), KINDS)
                known = ", ".join(KINDS)
                raise BadParameters(f"structured_outputs: unknown key {name!r}{near} (known: {known})")
        constraints = {name: value for name, value in given.items() if value is not None}
        if constraints.get("json_object") is False:
            del constraints["json_object"]
        if given and not constraints:
            return None
        if len(constraints) != 1:
            got = " and ".join(constraints) or "none"
            raise BadParameters(f"structured_outputs needs exactly one of {', '.join(KINDS)}; got {got}")
        kind, value = constraints.popitem()
        constraint = cls(kind, _value(kind, value))
        text = constraint.value if isinstance(constraint.value, str) else "".join(constraint.value)
        if len(text) > MAX_CHARACTERS:
            raise BadParameters(
                f"structured_outputs.{kind} has {len(text)} characters; at most {MAX_CHARACTERS} are supported"
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadParameters(f"structured_outputs.{kind} is not valid Unicode: half a surrogate pair") from None
        return constraint


def _value(kind: Kind, value: Any) -> str | tuple[str, ...]:
    if kind == "json":
        return _schema(value)
    if kind == "json_object":
        if value is not True:
            raise BadParameters(f"structured_outputs.json_object must be true, got {format_value(value)}")
        return ""
    if kind == "choice":
        if not isinstance(value, list | tuple) or not value:
            raise BadParameters(f"structured_outputs.choice must be a list of texts, got {format_value(value)}")
        for choice in value:
            if not isinstance(choice, str) or not choice:
                raise BadParameters(
                    f"structured_outputs.choice holds {format_value(choice)}; every choice must be a non-empty text"
                )
        return tuple(value)
    if not isinstance(value, str) or not value.strip():
        raise BadParameters(f"structured_outputs.{kind} must be a non-empty text, got {format_value(value)}")
    return value


def _schema(value: Any) -> str:
    """Return a schema as compact JSON text, with its keys in order: properties are generated in that order."""
    try:
        if isinstance(value, str):
            value = json.loads(value)
        if not isinstance(value, Mapping):
            raise BadParameters(
                f"structured_outputs.json must be a schema, as a mapping or as JSON text; got {type(value).__name__}"
            )
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise BadParameters("structured_outputs.json is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise BadParameters(f"structured_outputs.json is not JSON: {error}") from None


def from_response_format(given: Any) -> StructuredOutputs | None:
    """Parse OpenAI's `response_format`: type text (returns None), json_object, or json_schema. Raises BadParameters."""
    if given is None:
        return None
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputs.of({"json_object": True})
    if kind == "json_schema":
        schema = given.get("json_schema")
        if not isinstance(schema, Mapping) or not isinstance(schema.get("schema"), Mapping):
            raise BadParameters("response_format.json_schema must hold the schema, a mapping, as `schema`")
        return StructuredOutputs.of({"json": schema["schema"]})
    got = repr(kind) if isinstance(given, Mapping) else repr(given)
    raise BadParameters(f"response_format.type must be text, json_object or json_schema, got {got}")
