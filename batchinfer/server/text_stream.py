"""From tokens to text that can be shown, piece by piece; stop strings and characters may lie across tokens."""

from __future__ import annotations

from batchinfer.pipeline.prompt import Prepared
from batchinfer.request import FinishReason, Request
from batchinfer.text.tokenizer import Tokenizer


class TextStream:
    """The text of one sample. What `push` and `finish` return, joined, is the text that a job would write for it.

    `stopped_by`: the stop string that ended it, if one did.

    Held back until more is known: the bytes of a character that is not complete, and the end of the text as far as it
    may be the beginning of a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, prepared: Prepared, request: Request) -> None:
        params = request.params
        self._pieces = tokenizer.pieces(params.skip_special_tokens)
        self._cut = prepared.stop
        self._stop = params.stop
        self._stop_ids = request.stop_ids
        self._keeps_stop = params.include_stop_str_in_output
        self._early = params.min_tokens  # a stop string that these tokens complete does not count
        self._tokens = 0
        self._shown = 0  # characters
        self._held = ""
        self._after = 0  # no stop string ends before this character
        self.stopped_by: str | None = None

    def push(self, token_ids: list[int]) -> str:
        """Take in tokens that did not end the sample; the text that can be shown now."""
        self._take(token_ids)
        keep = self._possible_stop()
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._shown += len(shown)
        return shown

    def finish(self, token_ids: list[int], reason: FinishReason) -> str:
        """Take in the last tokens; the rest of the text."""
        by_token = reason == "stop" and bool(token_ids) and token_ids[-1] in self._stop_ids
        self._take(token_ids[:-1] if by_token and not self._keeps_stop else token_ids)
        text, self._held = self._held + self._pieces.pending, ""
        if reason == "stop" and not by_token and self._cut is not None:
            shown = self._cut.cut(text, max(0, self._after - self._shown))
            self.stopped_by = self._stop_of(text, shown)
            return shown
        return text

    def _stop_of(self, text: str, shown: str) -> str | None:
        """The stop string at which `text` was cut."""
        if self._keeps_stop:
            return next((stop for stop in self._stop if shown.endswith(stop)), None)
        return next((stop for stop in self._stop if text.startswith(stop, len(shown))), None)

    def _take(self, token_ids: list[int]) -> None:
        push = self._pieces.push
        before = self._early - self._tokens
        self._tokens += len(token_ids)
        if 0 < before <= len(token_ids):
            self._held += "".join([push(token) for token in token_ids[:before]])
            self._after = self._shown + len(self._held)
            token_ids = token_ids[before:]
        self._held += "".join([push(token) for token in token_ids])

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest
