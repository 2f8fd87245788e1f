"""openai-batch output: results as the response lines that OpenAI's batch endpoint returns.

Nothing in them depends on the time: `created` is 0, ids follow from the row.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson
import pyarrow as pa

from batchinfer.errors import RETRYABLE_KINDS
from batchinfer.job.bodies import CHAT
from batchinfer.job.columns import Layout
from batchinfer.job.results import Row, Sample

_ID = "batch_req_"


def build_lines(layout: Layout, rows: list[Row], carried: pa.Table, base: int, model: str) -> pa.Table:
    """The part of a chunk. `carried` has custom_id and url of the same rows; `base` is the job's index of offset 0."""
    urls = carried.column("url").to_pylist()
    ids = [base + row.offset for row in rows]
    columns = {
        "id": [f"{_ID}{number:09d}" for number in ids],
        "custom_id": carried.column("custom_id").to_pylist(),
        "response": [
            orjson.dumps(_response(row, number, str(url), model)).decode()
            for row, number, url in zip(rows, ids, urls, strict=True)
        ],
        "error": [orjson.dumps(_error(row)).decode() if row.error else None for row in rows],
    }
    return pa.table(columns, schema=layout.schema)


def rows_of_lines(lines: Iterable[dict[str, Any]], base: int) -> list[Row]:
    """The inverse of `build_lines`."""
    rows = []
    for line in lines:
        offset = int(line["id"].removeprefix(_ID)) - base
        body, problem = line["response"]["body"], line["error"]
        if problem is not None:
            rows.append(Row(offset, body["usage"]["prompt_tokens"], None, [], [problem["code"], problem["message"]]))
            continue
        total = body["usage"]["completion_tokens"]
        samples = [_sample_of(choice, total if choice["index"] == 0 else 0) for choice in body["choices"]]
        rows.append(Row(offset, body["usage"]["prompt_tokens"], None, samples, None))
    return sorted(rows, key=lambda row: row.offset)


def _response(row: Row, number: int, url: str, model: str) -> dict[str, Any]:
    chat = url.endswith(CHAT)
    completion_tokens = sum(sample[2] for sample in row.samples)
    usage = {
        "prompt_tokens": row.prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": row.prompt_tokens + completion_tokens,
    }
    if row.error is not None:
        kind, message = row.error
        problem = {"message": message, "type": kind, "param": None, "code": kind}
        status = 500 if kind in RETRYABLE_KINDS else 400
        return {"status_code": status, "request_id": f"req_{number:09d}", "body": {"error": problem, "usage": usage}}
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{number:09d}",
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": model,
        "choices": [_choice(index, sample, chat) for index, sample in enumerate(row.samples)],
        "usage": usage,
    }
    return {"status_code": 200, "request_id": f"req_{number:09d}", "body": body}


def _error(row: Row) -> dict[str, str]:
    kind, message = row.error or ["", ""]
    return {"code": kind, "message": message}


def _choice(index: int, sample: Sample, chat: bool) -> dict[str, Any]:
    text, finish_reason, _, _, logprobs = sample
    choice: dict[str, Any] = {"index": index, "finish_reason": finish_reason}
    if chat:
        choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        choice["logprobs"] = None if logprobs is None else {"content": [_chat_logprob(*entry) for entry in logprobs]}
        return choice
    choice["text"] = text
    choice["logprobs"] = None
    if logprobs is not None:
        choice["logprobs"] = {
            "tokens": [_token(entry[0]) for entry in logprobs],
            "token_logprobs": [entry[1] for entry in logprobs],
            "top_logprobs": [{_token(token): value for token, value in entry[2]} for entry in logprobs],
        }
    return choice


def _token(token: int) -> str:
    return f"token_id:{token}"


def _chat_logprob(token: int, logprob: float, top: list[Any]) -> dict[str, Any]:
    best = [{"token": _token(other), "logprob": value, "bytes": None} for other, value in top]
    return {"token": _token(token), "logprob": logprob, "bytes": None, "top_logprobs": best}


def _sample_of(choice: dict[str, Any], tokens: int) -> Sample:
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return text, choice["finish_reason"], tokens, None, _logprobs_of(choice)


def _logprobs_of(choice: dict[str, Any]) -> list[Any] | None:
    logprobs = choice["logprobs"]
    if logprobs is None:
        return None
    if "content" in logprobs:
        entries = logprobs["content"]
        tops = [[[_id(top["token"]), top["logprob"]] for top in entry["top_logprobs"]] for entry in entries]
        return [[_id(entry["token"]), entry["logprob"], top] for entry, top in zip(entries, tops, strict=True)]
    tops = [[[_id(token), value] for token, value in top.items()] for top in logprobs["top_logprobs"]]
    pairs = zip(logprobs["tokens"], logprobs["token_logprobs"], tops, strict=True)
    return [[_id(token), logprob, top] for token, logprob, top in pairs]


def _id(token: str) -> int:
    return int(token.removeprefix("token_id:"))
