"""Incremental detokenizer: characters and stop strings may span several tokens."""

from __future__ import annotations

from batchinfer.pipeline.prompt import Prepared
from batchinfer.request import FinishReason, Request
from batchinfer.text.tokenizer import Tokenizer


class TextStream:
    """Text of one sample: the results of `push_tokens` and `finish`, joined, equal the text that a job writes for it.

    Held back until more tokens arrive: the bytes of an incomplete character, and an end of the text that may be the
    beginning of a stop string. stopped_by: the stop string that ended the text, if one did.
    """

    def __init__(self, tokenizer: Tokenizer, prepared: Prepared, request: Request) -> None:
        params = request.params
        self._pieces = tokenizer.pieces(params.skip_special_tokens)
        self._cut = prepared.stop
        self._stop = params.stop
        self._stop_ids = request.stop_ids
        self._keeps_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens  # a stop string that these tokens complete does not count
        self._num_tokens = 0
        self._shown_chars = 0
        self._held = ""
        self._min_chars = 0  # no stop string ends before this character
        self.stopped_by: str | None = None

    def push_tokens(self, token_ids: list[int]) -> str:
        """Add tokens that did not end the sample; return the text that can be shown."""
        self._add_tokens(token_ids)
        keep = self._stop_prefix_chars()
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._shown_chars += len(shown)
        return shown

    def finish(self, token_ids: list[int], reason: FinishReason) -> str:
        """Add the last tokens; return the rest of the text."""
        by_token = reason == "stop" and bool(token_ids) and token_ids[-1] in self._stop_ids
        self._add_tokens(token_ids[:-1] if by_token and not self._keeps_stop else token_ids)
        text, self._held = self._held + self._pieces.pending, ""
        if reason == "stop" and not by_token and self._cut is not None:
            shown = self._cut.cut(text, max(0, self._min_chars - self._shown_chars))
            self.stopped_by = self._stop_of(text, shown)
            return shown
        return text

    def _stop_of(self, text: str, shown: str) -> str | None:
        """Return the stop string that `text` was cut at."""
        if self._keeps_stop:
            return next((stop for stop in self._stop if shown.endswith(stop)), None)
        return next((stop for stop in self._stop if text.startswith(stop, len(shown))), None)

    def _add_tokens(self, token_ids: list[int]) -> None:
        push = self._pieces.push
        early = self._min_tokens - self._num_tokens
        self._num_tokens += len(token_ids)
        if 0 < early <= len(token_ids):
            self._held += "".join([push(token) for token in token_ids[:early]])
            self._min_chars = self._shown_chars + len(self._held)
            token_ids = token_ids[early:]
        self._held += "".join([push(token) for token in token_ids])

    def _stop_prefix_chars(self) -> int:
        """Return the length of the longest end of the held text that begins a stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest
