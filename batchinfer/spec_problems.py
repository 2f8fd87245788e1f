"""Validation messages for job files: the key, the values it accepts, the value it got, and the nearest known name."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Le
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from batchinfer.errors import format_value, normalize_name, suggest
from batchinfer.request import SamplingParams
from batchinfer.yaml_text import Place

Problem = tuple[Place, str]
"""A key and the message about it."""

SAMPLING = "sampling"  # the section whose keys are not fields of a model
_SAMPLING_KEYS = (*(field.name for field in dataclasses.fields(SamplingParams)), "column")

# names of our keys and values in other tools
OTHER_NAMES = {
    "maxnewtokens": "sampling.max_tokens",
    "maxcompletiontokens": "sampling.max_tokens",
    "maxlength": "sampling.max_tokens",
    "numreturnsequences": "sampling.n",
    "stopsequences": "sampling.stop",
    "responseformat": "sampling.structured_outputs",
    "batchsize": "engine.max_num_seqs",
    "maxbatchsize": "engine.max_num_seqs",
    "maxnumbatchedtokens": "engine.max_step_tokens",
    "maxlen": "engine.max_model_len",
    "contextlength": "engine.max_model_len",
    "threads": "engine.num_threads",
    "torchdtype": "engine.dtype",
    "endpointurl": "storage.endpoint",
}
OTHER_VALUES = {
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "gz": "gzip",
    "zst": "zstd",
    "ndjson": "jsonl",
    "json": "jsonl",
    "openai": "openai-batch",
    "avg": "mean",
    "average": "mean",
}
_BOOLEANS = {"yes": "true", "y": "true", "on": "true", "no": "false", "n": "false", "off": "false"}


def unknown_keys(model: type[BaseModel], values: Mapping[Any, Any], place: Place = ()) -> Iterator[Problem]:
    """Yield a problem for each unknown key, in the mapping and in every nested section."""
    known = _keys(model, place)
    for key, value in values.items():
        here = (*place, key if isinstance(key, str) else repr(key))
        if key not in known:
            near = _suggest_key(model, here, known)
            yield here, f"unknown key{near} (known: {', '.join(known)})"
        elif isinstance(value, Mapping) and (_section(model, here) is not None or here == (SAMPLING,)):
            yield from unknown_keys(model, value, here)


def _suggest_key(model: type[BaseModel], place: Place, known: list[str]) -> str:
    """Return `"; did you mean 'x'?"` for the nearest key of the same section or of another one, or an empty string."""
    *parents, key = map(str, place)
    name = normalize_name(key)
    everywhere = [".".join(found) for found in _all_keys(model)]
    beside = {normalize_name(other): other for other in known}
    elsewhere = {normalize_name(other.rpartition(".")[2]): other for other in reversed(everywhere)}
    whole_path = {normalize_name(other): other for other in everywhere}  # engine.maxNumSeqs as one key
    exact = beside.get(name) or whole_path.get(name) or elsewhere.get(name) or OTHER_NAMES.get(name)
    if exact is None and ":" in key and normalize_name(key.partition(":")[0]) in beside:
        return "; a key ends with a colon and a space"
    if exact is None:
        close = difflib.get_close_matches(name, beside, 1, 0.6)
        exact = beside[close[0]] if close else None
    if exact is None:
        close = difflib.get_close_matches(name, elsewhere, 1, 0.8)
        exact = elsewhere[close[0]] if close else None
    if exact is None:
        return ""
    section, _, last = exact.rpartition(".")
    if section and section == ".".join(parents):
        exact = last
    nested = f", which is {last!r} below {section!r}" if section and "." in key else ""
    return f"; did you mean {exact!r}{nested}?"


def _all_keys(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    for name in model.model_fields:
        yield (name,)
        if name == SAMPLING or _section(model, (name,)) is not None:
            yield from ((name, key) for key in _keys(model, (name,)))


def _keys(model: type[BaseModel], place: Place) -> list[str]:
    if place == (SAMPLING,):
        return list(_SAMPLING_KEYS)
    section = _section(model, place)
    return list(section.model_fields) if section is not None else []


def _section(model: type[BaseModel], place: Place) -> type[BaseModel] | None:
    """Return the model of the section at `place`, or None; an empty `place` is the job itself."""
    section: type[BaseModel] | None = model
    for part in place:
        info = section.model_fields.get(str(part)) if section is not None else None
        options = _options(info.annotation) if info is not None else []
        section = next((one for one in options if isinstance(one, type) and issubclass(one, BaseModel)), None)
    return section


def wrong_value(model: type[BaseModel], problem: Any, values: Mapping[str, Any]) -> Problem:
    """Convert one of pydantic's errors to a problem.

    Pydantic adds the names of union branches to an error's location: only the parts that exist in `values` are kept.
    """
    place: Place = ()
    section: type[BaseModel] | None = model
    info: FieldInfo | None = None
    value: Any = values
    for part in problem["loc"]:
        if section is not None:
            place, info = (*place, part), section.model_fields[str(part)]
            section = _section(model, place)
        elif not isinstance(value, list | tuple) or not isinstance(part, int) or not part < len(value):
            break
        else:
            place = (*place, part)
        value = value.get(part) if isinstance(value, Mapping) else value[part]
    kind, message = problem["type"], problem["msg"].removeprefix("Value error, ")
    if kind == "missing":
        return place, "missing"
    if kind == "string_too_short":
        return place, "must not be empty"
    if kind == "value_error":
        return _split_parameter(message) if place == (SAMPLING,) else (place, message)
    item = isinstance(place[-1], int) if place else False
    expected = "text" if item else _describe_type(info, section)
    return place, f"must be {expected}, got {format_value(problem['input'])}{_hint(expected, problem['input'])}"


def _split_parameter(message: str) -> Problem:
    """Split `max_tokens must be …` or `structured_outputs.json is …` into the parameter's key and the rest."""
    match = re.match(r"([a-z_]+(?:\.[a-z_]+)*):? ", message)
    if match is None or match[1].partition(".")[0] not in _SAMPLING_KEYS:
        return (SAMPLING,), message
    return (SAMPLING, *match[1].split(".")), message[match.end() :]


def _describe_type(info: FieldInfo | None, section: type[BaseModel] | None) -> str:
    if section is not None:
        return f"a mapping with {', '.join(section.model_fields)}"
    assert info is not None
    options = _options(info.annotation)
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}
    for option in options:
        if get_origin(option) is Literal:
            return "one of " + ", ".join(map(str, get_args(option)))
        if get_origin(option) is tuple:
            return "text, or a list of texts"
    types = " or ".join(dict.fromkeys(names[get_origin(option) or option] for option in options))
    return types + _bounds(info.metadata)


def _bounds(metadata: Iterable[Any]) -> str:
    low = next((one.ge for one in metadata if isinstance(one, Ge)), None)
    high = next((one.le for one in metadata if isinstance(one, Le)), None)
    if low is not None and high is not None:
        return f" in [{low}, {high}]"
    return f", at least {low}" if low is not None else ""


def _options(annotation: Any) -> list[Any]:
    """Return the member types of a union without None and without annotations."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return [one for part in get_args(annotation) if part is not type(None) for one in _options(part)]
    return _options(get_args(annotation)[0]) if origin is Annotated else [annotation]


def _hint(expected: str, value: Any) -> str:
    if expected.startswith("text"):
        return "; put it in quotes to make it text" if not isinstance(value, list | tuple) and value is not None else ""
    if not isinstance(value, str):
        return ""
    text = value.strip().casefold()
    if expected == "true or false":
        return f"; write {_BOOLEANS[text]}" if text in _BOOLEANS else ""
    if expected.startswith("one of "):
        allowed = expected.removeprefix("one of ").split(", ")
        other = OTHER_VALUES.get(text, "")
        return f"; did you mean {other!r}?" if other in allowed else suggest(text, allowed)
    is_number = re.fullmatch(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?", text)
    return "; without quotes it is a number" if is_number and ("integer" in expected or "number" in expected) else ""
