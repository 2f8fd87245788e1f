"""A sequence: the mutable progress of one request. Only the scheduler writes to it."""

from __future__ import annotations

from batchinfer.engine.blocks import ROOT, Block
from batchinfer.request import Request, TokenLogprob


class Sequence:
    """`tokens` are known (prompt, then output); the first `num_computed` of them have their KV in `blocks`.

    A step closes part of the gap between the two. `chain` is the uid of the content of the first `num_indexed` blocks.
    `promised` counts blocks that admission set aside for it and that it has not taken yet. `proven` says that a step
    with it has succeeded since it took its seat.
    """

    __slots__ = (
        "blocks",
        "chain",
        "limit",
        "logprobs",
        "num_computed",
        "num_indexed",
        "output",
        "promised",
        "proven",
        "request",
        "seat",
        "tokens",
    )

    def __init__(self, request: Request) -> None:
        self.request = request
        self.tokens: list[int] = list(request.prompt)
        self.output: list[int] = []
        self.limit = len(request.prompt) + request.max_tokens
        self.logprobs: list[TokenLogprob] | None = None if request.params.logprobs is None else []
        self.proven = False
        self.leave()

    def leave(self) -> None:
        """Back to nothing computed: new, preempted, or finished. The blocks are released by the caller."""
        self.seat = -1
        self.num_computed = 0
        self.blocks: list[Block] = []
        self.num_indexed = 0
        self.chain = ROOT
        self.promised = 0
