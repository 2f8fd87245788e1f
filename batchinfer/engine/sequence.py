"""A sequence: the mutable progress of one request.

State: known tokens, how many of them are computed, blocks, seat. Owner: the scheduler; nobody else writes to it.
"""

from __future__ import annotations

from array import array
from operator import add

from batchinfer.engine.blocks import ROOT, Block
from batchinfer.engine.plan import Reading
from batchinfer.request import FinishReason, Request, TokenLogprob


class PromptRows:
    """The rows of a prompt that are still to be read: positions `at` to before `end`. Survives preemption.

    Reads of the rows before `planned` are in the step being planned, or in flight. `logprobs` is the answer so far,
    `hidden` the sum of the pooled rows so far.
    """

    __slots__ = ("at", "end", "hidden", "logprobs", "planned")

    def __init__(self, request: Request, rows: range) -> None:
        self.at = self.planned = rows.start
        self.end = rows.stop
        self.hidden: array[float] | None = None
        self.logprobs: list[TokenLogprob | None] | None = None
        if request.score_from is not None:
            self.logprobs = [None] * (rows.start + 1)

    @property
    def left(self) -> bool:
        """True if there are rows whose read is not planned yet."""
        return self.planned < self.end

    def append_reading(self, reading: Reading, count: int) -> None:
        """Add the reading of the next `count` rows."""
        self.at += count
        if self.logprobs is not None:
            self.logprobs.extend(reading.logprobs)
        elif self.hidden is None:
            self.hidden = reading.hidden
        elif reading.hidden is not None:
            self.hidden = array("d", map(add, self.hidden, reading.hidden))


class Sequence:
    """Progress of a request: `tokens` are known (prompt, then output), the first `num_computed` have KV in `blocks`.

    A step closes part of the gap between the two. With `limit` known tokens the sequence is at its end; a request that
    generates nothing knows from the start all tokens that it needs: none after the last row that it reads.
    `chain` is the uid of the content of the first `num_indexed` blocks. `promised` counts blocks that admission set
    aside and that were not allocated yet. `proven` is True once a step with the sequence has succeeded since it took
    its seat. `num_cached` prompt tokens were found in the cache. Once it `decodes`, all but the last known token is
    computed, and `tokens` may lack the last few: see `Scheduler.settle`.
    """

    __slots__ = (
        "_computed",
        "blocks",
        "chain",
        "decodes",
        "limit",
        "logprobs",
        "num_cached",
        "num_indexed",
        "num_prompt",
        "promised",
        "proven",
        "request",
        "rows",
        "seat",
        "tokens",
    )

    def __init__(self, request: Request) -> None:
        self.request = request
        rows = request.rows_read()
        self.rows = None if rows is None else PromptRows(request, rows)
        self.num_prompt = len(request.prompt)
        self.tokens: list[int] = list(request.prompt)
        if request.max_tokens == 0 and rows is not None:
            del self.tokens[max(1, rows.stop) :]
        self.limit = len(self.tokens) + request.max_tokens
        self.logprobs: list[TokenLogprob] | None = None if request.params.logprobs is None else []
        self.proven = False
        self.num_cached = 0
        self.leave_seat()

    @property
    def output(self) -> list[int]:
        """The tokens after the prompt, in a new list."""
        return self.tokens[self.num_prompt :]

    @property
    def num_output(self) -> int:
        return max(0, len(self.tokens) - self.num_prompt)

    @property
    def num_computed(self) -> int:
        return len(self.tokens) - 1 if self.decodes else self._computed

    @property
    def reusable(self) -> int:
        """End of the tokens whose KV may come from the cache: before the last known token and the rows to read."""
        last = len(self.tokens) - 1
        return last if self.rows is None or not self.rows.left else min(last, self.rows.planned)

    def next_block(self, start: int, size: int) -> list[int]:
        """Return the tokens of the block that begins at position `start`, as far as they may come from the cache."""
        return self.tokens[start : max(start, min(start + size, self.reusable))]

    def computed(self, count: int) -> None:
        """Count `count` tokens more of the prompt, or of the answer before a preemption, as computed or in flight."""
        self._computed += count

    def append(self, token: int, logprob: TokenLogprob | None) -> FinishReason | None:
        """Append a token sampled after all known ones, which are computed. Return why the sequence ends, or None."""
        self.tokens.append(token)
        self.decodes = True
        if logprob is not None:
            self.add_logprob(logprob)
        if self._stops_with(token):
            return "stop"
        return "length" if len(self.tokens) >= self.limit else None

    def add_logprob(self, logprob: TokenLogprob) -> None:
        """Append the logprob of the last token, if the request asked for logprobs."""
        if self.logprobs is not None:
            self.logprobs.append(logprob)

    def _stops_with(self, token: int) -> bool:
        """Return True if the token ends the answer. The stop check sees every token that is no stop id."""
        check = self.request.stop_check
        return token in self.request.stop_ids or (check is not None and check(token))

    def leave_seat(self) -> None:
        """Reset to nothing computed: new, preempted, or finished. The caller releases the blocks."""
        self.seat = -1
        self._computed = 0
        if self.rows is not None:
            self.rows.planned = self.rows.at
        self.decodes = False
        self.blocks: list[Block] = []
        self.num_indexed = 0
        self.chain = ROOT
        self.promised = 0

    def check_integrity(self, tokens: list[int], computed: int, size: int) -> None:
        """Assert that a running sequence's counts agree with its blocks of `size` tokens.

        `tokens` are up to date, and the first `computed` positions are computed or in flight.
        """
        assert computed <= len(self.blocks) * size, "computed beyond its blocks"
        assert self.num_indexed * size <= computed, "indexed before it is computed"
        for number, block in enumerate(self.blocks):
            if block.key is not None:
                assert number < self.num_indexed, "a block that is not full is indexed"
                assert block.key.endswith(array("I", tokens[number * size : (number + 1) * size]).tobytes()), (
                    "indexed under other tokens"
                )
        rows = self.rows
        assert rows is None or not rows.left or rows.planned >= computed, "rows passed without being read"
        assert rows is None or rows.at <= rows.planned, "rows read before their read was planned"
