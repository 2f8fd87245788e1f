"""Everything that decides an output, as named values: two runs with equal fingerprints write the same rows.

Not in it: where the output lies, how the storage is reached, the engine's capacity and speed, when to give up.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from batchinfer.errors import OutputConflict
from batchinfer.job.columns import OutputLayout
from batchinfer.spec import FAKE_MODEL, JobSpec

FORMAT_VERSION = "3"  # of the output's layout and of how rows become requests; raise it when either changes
ENGINE_DECIDES = {"dtype", "kv_cache_dtype", "max_model_len", "quantization"}  # of the engine's settings
_OUTPUT_DECIDES = {"token_ids", "samples", "prefix", "chunk_rows", "file_column"}  # of the output's settings
_SHOWN_CHARS = 120


def fingerprint(spec: JobSpec, layout: OutputLayout, identities: Mapping[str, str], files_hash: str) -> dict[str, str]:
    """Named parts. `identities` hold the hashes of the model (weights, config, tokenizer, generation_config).

    They also name the device (engine.device), unless it is the host's processor.
    """
    parts = {"format": FORMAT_VERSION, "seed": str(spec.seed), "input.files": files_hash}
    parts |= {name: value for name, value in identities.items() if value}
    if spec.model == FAKE_MODEL:
        parts["fake.answer_tokens"] = _short(spec.fake.answer_tokens)
    if spec.prompt is not None:
        parts |= _named("prompt", spec.prompt.model_dump(exclude_none=True))
    parts |= _named("sampling", spec.sampling)
    if spec.task != "generate":
        parts["task"] = spec.task
    if spec.task in ("score", "choose"):
        parts |= _named("score", spec.score.model_dump(exclude_none=True))
    if spec.task == "embed":
        parts |= _named("embed", spec.embed.model_dump())
    parts |= input_parts(spec)
    parts |= _named("engine", spec.engine.model_dump(exclude_none=True, include=ENGINE_DECIDES))
    parts |= _named("output", spec.output.model_dump(include=_OUTPUT_DECIDES))
    parts |= {"output.format": layout.format, "output.compression": layout.compression}
    return dict(sorted(parts.items()))


def input_parts(spec: JobSpec) -> dict[str, str]:
    """Return the settings that decide which rows are read, besides the files themselves."""
    return _named("input", spec.input.model_dump(exclude_none=True, exclude={"path"}))


def digest(parts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(parts), sort_keys=True).encode()).hexdigest()


def document(fingerprint: str, values: Mapping[str, Any]) -> bytes:
    """Return a JSON object that begins with the digest of its job's fingerprint, and is known by it."""
    return json.dumps({"fingerprint": fingerprint, **values}, indent=1).encode() + b"\n"


def begins_with(data: bytes, fingerprint: str) -> bool:
    """Return True if this is a `document` of the job, or the beginning of one that was cut short."""
    return data.startswith(json.dumps({"fingerprint": fingerprint}, indent=1).removesuffix("\n}").encode())


def refuse_difference(ours: Mapping[str, str], theirs: Mapping[str, str], where: str) -> None:
    """Raise OutputConflict that names every part that differs, with the old and the new value."""
    names = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    if names:
        lines = [f"  {name}: was {theirs.get(name, 'not set')}, is {ours.get(name, 'not set')}" for name in names]
        raise OutputConflict(
            f"{where} belongs to a job with other settings:\n" + "\n".join(lines) + "\n"
            "Give this job another output.path, or run it with the settings that the output was begun with."
        )


def _named(section: str, values: Mapping[str, Any]) -> dict[str, str]:
    return {f"{section}.{name}": _short(value) for name, value in values.items() if value != {}}


def _short(value: Any) -> str:
    """JSON, and for a long text its beginning and its hash."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    if len(text) <= _SHOWN_CHARS:
        return text
    return f"{text[: _SHOWN_CHARS // 2]}… (sha256 {hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:16]})"
