"""Response of /v1/embeddings: vectors as numbers, or as base64 of little-endian float32."""

from __future__ import annotations

import base64
import struct
from typing import Any

from batchinfer.openai.request_models import EmbeddingRequest


def embedding_response(
    body: EmbeddingRequest, vectors: list[list[float]], prompt_tokens: int, model: str
) -> dict[str, Any]:
    """Return the response: one `embedding` per vector, in order."""
    as_base64 = body.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _base64(vector) if as_base64 else vector}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
    return {"object": "list", "data": data, "usage": usage, "model": model}


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
