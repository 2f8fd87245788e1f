"""The answer of /v1/embeddings: vectors as numbers, or as base64 of little-endian float32."""

from __future__ import annotations

import base64
import struct
from typing import Any

from batchinfer.openai.request_models import EmbeddingRequest


def embeddings(body: EmbeddingRequest, vectors: list[list[float]], prompt_tokens: int) -> dict[str, Any]:
    """All but the model's name."""
    packed = body.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _base64(vector) if packed else vector}
        for index, vector in enumerate(vectors)
    ]
    return {
        "object": "list",
        "data": data,
        "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens},
    }


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
