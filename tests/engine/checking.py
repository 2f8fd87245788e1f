"""A runner that knows what the KV cache must hold: every slot remembers the whole prefix that it stands for."""

from __future__ import annotations

from batchinfer.engine.blocks import BlockPool
from batchinfer.engine.engine import Engine
from batchinfer.engine.plan import StepPlan, StepResult
from batchinfer.engine.scheduler import Scheduler
from batchinfer.request import Request, SamplingParams

VOCAB = 50
EOS = 0


def next_token(context: list[int]) -> int:
    """The model: the next token after `context`, with an end of sequence now and then."""
    return hash(tuple(context)) % VOCAB


class CheckingRunner:
    """Writes all of a step's slots before any is read, as kv_write precedes attention in every layer."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._tables: dict[int, list[int]] = {}
        self._known: dict[int, list[int]] = {}
        self._slots: dict[int, tuple[int, ...]] = {}
        self.fail_if = lambda plan: False
        self.poison: int | None = None

    def run(self, plan: StepPlan) -> StepResult:
        for join in plan.joins:
            self._tables[join.seat] = []
            self._known[join.seat] = [*join.request.prompt, *join.output]
        for seat, first, blocks in plan.grown:
            table = self._tables[seat]
            assert first == len(table), "a table grew with a gap"
            table.extend(blocks)
        if self.fail_if(plan):
            raise RuntimeError("injected")
        assert len(set(plan.seats)) == len(plan.seats), "a seat is twice in a plan"
        at = 0
        for seat, start, count in zip(plan.seats, plan.starts, plan.counts, strict=True):
            tokens, at = plan.tokens[at : at + count], at + count
            known = self._known[seat]
            if start == len(known):
                known.extend(tokens)
            assert known[start : start + count] == tokens, "wrong tokens in the plan"
            for position in range(start, start + count):
                self._slots[self._slot(seat, position)] = tuple(known[: position + 1])
        assert at == len(plan.tokens)
        sampled = []
        for seat, start, count, samples in zip(plan.seats, plan.starts, plan.counts, plan.samples, strict=True):
            known = self._known[seat]
            for position in range(start + count):
                held = self._slots.get(self._slot(seat, position))
                assert held == tuple(known[: position + 1]), f"slot of position {position} holds another prefix"
            if samples:
                assert start + count == len(known), "sampled before all known tokens were computed"
                sampled.append(next_token(known))
        return StepResult(sampled)

    def _slot(self, seat: int, position: int) -> int:
        return self._tables[seat][position // self._block_size] * self._block_size + position % self._block_size


def naive(request: Request) -> list[int]:
    """What the engine must answer, by the plainest loop there is."""
    context, output = list(request.prompt), []
    while len(output) < request.max_tokens:
        output.append(next_token(context))
        context.append(output[-1])
        if output[-1] in request.stop_ids:
            break
    return output


def make_request(request_id: int, prompt: list[int], max_tokens: int) -> Request:
    return Request(request_id, prompt, SamplingParams(temperature=0), max_tokens, stop_ids=frozenset([EOS]))


def make_engine(
    num_blocks: int, block_size: int = 4, max_num_seqs: int = 8, max_step_tokens: int = 32, caching: bool = True
) -> tuple[Engine, CheckingRunner]:
    runner = CheckingRunner(block_size)
    pool = BlockPool(num_blocks, block_size, caching)
    return Engine(Scheduler(pool, max_num_seqs, max_step_tokens), runner), runner
