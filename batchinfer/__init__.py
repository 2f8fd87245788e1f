"""Offline LLM inference over tables of text: exactly one result per input row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchinfer.llm import LLM
    from batchinfer.request import Completion, SamplingParams

__all__ = ["LLM", "Completion", "SamplingParams", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import batchinfer` stays light."""
    if name == "LLM":
        from batchinfer.llm import LLM

        return LLM
    if name in ("Completion", "SamplingParams"):
        from batchinfer import request

        return getattr(request, name)
    raise AttributeError(f"module 'batchinfer' has no attribute {name!r}")
