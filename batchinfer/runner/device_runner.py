"""Runner of a device whose host runs ahead of it: launches a step before the tokens of the step before are known.

State: the KV cache with one block that belongs to no sequence, sampling state by seat on the device, static inputs that
graphs read, and the tickets of steps in flight. Owner: the engine. Flow: `launch` uploads what the plan changes,
expands it into the inputs, replays the graph of the smallest rung that the step fits (or runs the decoder's ops one by
one), samples, and starts the downloads; nothing in it waits. `collect` waits for the oldest step.

Sampled tokens stay on the device and are the next step's inputs. Rows whose logits the host edits (grammars, penalties,
logit_bias and the like) need the tokens before: their hidden states wait until the step before is collected, and only
their sampling, not the forward pass, comes later. A step that is launched after that finds their tokens.

Failure: a step that raises counts for nothing; whoever was in it joins again, and steps in flight stay usable.

T tokens of a step · N rows that are sampled · E hidden size
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from batchinfer_kernels.contract import StepInputs
from batchinfer_kernels.steps import SampleRows
from torch import Tensor

from batchinfer.engine.plan import StepPlan, StepResult
from batchinfer.errors import EngineError, OutOfDeviceMemory, RowError
from batchinfer.models.decoder import Decoder
from batchinfer.ops.graphs import GraphBody, Graphs
from batchinfer.ops.out_of_memory import is_out_of_memory
from batchinfer.ops.streams import Download, Streams, UploadBuffer, UploadRing
from batchinfer.request import Constraint, TokenLogprob
from batchinfer.runner.device_inputs import (
    HostStep,
    PackedPlan,
    StaticInputs,
    StepLimits,
    aligned_order,
    check_plan,
    make_seat_state,
    pack_plan,
)
from batchinfer.runner.device_prompt_outputs import DevicePromptReader, ReadsInFlight
from batchinfer.runner.device_sampler import DeviceSampler, HostRows, Samples, SamplesInFlight
from batchinfer.runner.graph_ladder import GraphLadder, Rung, StepFacts
from batchinfer.runner.kv_cache import KVCache

Ints = npt.NDArray[np.int64]


@dataclass(slots=True)
class _Waiting:
    """Rows that are sampled once the step before is collected."""

    hidden_NE: Tensor
    rows: HostRows
    where: SampleRows


@dataclass(slots=True)
class Ticket:
    """Step in flight. Nothing of `uploads` is read after its last download; a step without any has `done`."""

    uploads: UploadBuffer
    num_rows: int
    samples: list[SamplesInFlight]
    waiting: _Waiting | None
    reads: ReadsInFlight | None
    done: Download | None = None


class DeviceRunner:
    """Executes plans in the order in which the scheduler made them, one ahead of the results."""

    depth = 1

    def __init__(
        self,
        decoder: Decoder,
        streams: Streams,
        graphs: Graphs,
        limits: StepLimits,
        num_blocks: int,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate the KV cache, in the decoder's dtype unless told. Raises ModelError without room."""
        backend = decoder.backend
        assert backend.steps is not None, "this backend's host waits for each step: use ModelRunner"
        device = backend.device
        dtype = kv_dtype or decoder.dtype
        self.cache = KVCache(backend, decoder.config.kv_shape, num_blocks + 1, limits.block_size, dtype)
        self.ladder = GraphLadder(
            limits.max_num_seqs, limits.max_step_tokens, limits.max_length, backend.capabilities.max_draft_rows
        )
        self._decoder = decoder
        self._steps = backend.steps
        self._streams = streams
        self._graphs = graphs
        self._limits = limits
        self._ring = UploadRing(streams, device)
        self._state = make_seat_state(limits, num_blocks, device)
        self._inputs = StaticInputs(limits, self._state, device)
        self._hidden_TE = torch.zeros(
            limits.most_tokens, decoder.config.hidden_size, dtype=decoder.dtype, device=device
        )
        self._sampler = DeviceSampler(decoder, self._steps, streams, self._state)
        self._reader = DevicePromptReader(decoder, self._steps, streams)
        self._flying: deque[Ticket] = deque()
        self._ran_out = False  # of memory, in the last call

    # -- steps ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(self, plan: StepPlan, constraints: Mapping[int, Constraint] | None = None) -> Ticket:
        """Start a step. `constraints`: grammars of sequences that join, by seat.

        Raises ValueError for a plan that is out of bounds, OutOfDeviceMemory, and torch's errors.
        """
        with self._device_memory():
            return self._launch(plan, constraints)

    @torch.inference_mode()
    def collect(self, ticket: Ticket) -> StepResult:
        """Wait for the oldest step in flight. Raises what the device could not do, as `launch` does."""
        with self._device_memory():
            return self._collect(ticket)

    def discard(self) -> None:
        """Forget all steps in flight: nothing of them counts, and their sequences join again or are gone.

        Raises EngineError if the device is lost: after a kernel's fault no step can succeed, whoever is in it.
        """
        try:
            self._streams.synchronize()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise EngineError(f"the device is lost, start again: {reason}") from error
        self._flying.clear()

    # -- what a GPU must have memory and graphs for -----------------------------------------------------------------

    @torch.inference_mode()
    def capture_graphs(self, rungs: list[Rung] | None = None) -> None:
        """Capture graphs of these rungs, by default of all, the largest first."""
        for rung in self.ladder.rungs if rungs is None else rungs:
            self._inputs.clear()
            self._graphs.capture(rung, self._body(self._inputs.kept_views(rung), rung.tokens))

    @torch.inference_mode()
    def run_largest_step(self) -> None:
        """Run the step that takes the most memory, on padding alone, and wait for it."""
        self._inputs.clear()
        size = self.ladder.largest[0]
        self._body(self._inputs.views(size), size.tokens).run()
        count = self._limits.max_num_seqs
        uploads = self._ring.take()
        seats_N = np.full(count, count, dtype=np.int32)  # the dummy seat
        zeros_N, none_N = np.zeros(count, dtype=np.int32), np.full(count, -1, dtype=np.int32)
        where = SampleRows(*(uploads.place(values) for values in (zeros_N, seats_N, zeros_N, none_N)))
        self._sampler.launch_largest(self._hidden_TE[:count], where)
        self._streams.synchronize()
        self._ring.give_back(uploads)

    def _body(self, inputs: StepInputs, tokens: int) -> GraphBody:
        hidden_TE, caches, decoder = self._hidden_TE[:tokens], self.cache.layers, self._decoder

        def run() -> None:
            hidden_TE.copy_(decoder(inputs, caches))

        return GraphBody(run, inputs, caches, hidden_TE)

    @contextmanager
    def _device_memory(self) -> Iterator[None]:
        """Raise OutOfDeviceMemory where the device has no room.

        The next step finds all memory free that no tensor uses: until then, the error holds the failed step's tensors.
        """
        if self._ran_out:
            self._ran_out = False
            self._streams.reset_peak()
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._ran_out = True
            raise OutOfDeviceMemory(str(error).partition("\n")[0]) from error

    # -- parts of a step --------------------------------------------------------------------------------------------

    def _launch(self, plan: StepPlan, constraints: Mapping[int, Constraint] | None) -> Ticket:
        assert len(self._flying) <= self.depth and not any(ticket.waiting for ticket in self._flying)
        joins = list({join.seat: join for join in plan.joins}.values())
        for join in joins:
            self._sampler.seat_sequence(join, constraints.get(join.seat) if constraints else None)
            self._reader.seat_sequence(join)
        step = HostStep.of_plan(plan)
        facts = step.facts(self._sampler.seats.prompt_tokens)
        if plan.seats:
            check_plan(plan, facts, self._limits, in_flight=bool(self._flying))
        uploads = self._ring.take()
        rows, num_direct = self._sampler.rows_of(step.seats_N, step.positions_N)
        packed = pack_plan(
            plan, step, self._sampler.join_words(joins), aligned_order(rows.places_N, num_direct), uploads.place
        )
        if plan.joins or plan.grown:
            self._steps.update_seats(packed.updates, self._state)
        ticket = Ticket(uploads, len(rows.places_N), [], None, None)
        if plan.seats:
            self._compute(plan, packed, facts)
            self._sample(ticket, rows, packed.rows, num_direct)
            if plan.reads:
                ticket.reads = self._reader.launch(self._hidden_TE, plan, step.query_starts_X, uploads.place)
        if not (ticket.samples or ticket.waiting or ticket.reads):
            ticket.done = self._streams.download(packed.step.query_starts_X)
        self._flying.append(ticket)
        return ticket

    def _collect(self, ticket: Ticket) -> StepResult:
        assert ticket is self._flying[0], "steps are collected in the order of their launches"
        samples = [(flight.rows, self._sampler.collect(flight)) for flight in ticket.samples]
        self._flying.popleft()
        if self._flying:  # its rows that waited for these tokens
            self._sample_waiting(self._flying[0])
        readings = () if ticket.reads is None else self._reader.collect(ticket.reads)
        if ticket.done is not None:
            ticket.done.wait()
        self._ring.give_back(ticket.uploads)
        return _merge(ticket.num_rows, samples)._replace(readings=readings)

    def _compute(self, plan: StepPlan, packed: PackedPlan, facts: StepFacts) -> None:
        """Run the forward pass: hidden states of the step's tokens come first in `_hidden_TE`."""
        if plan.copies:
            self._decoder.backend.copy_blocks(self.cache.layers, *packed.copies)
        rung = self.ladder.find(facts)
        if rung is not None and rung in self._graphs:
            inputs = self._inputs.kept_views(rung)
            self._steps.expand_step(packed.step, self._state, self._limits.block_size, inputs)
            self._graphs.replay(rung)
        else:
            inputs = self._inputs.views(facts.bounds())
            self._steps.expand_step(packed.step, self._state, self._limits.block_size, inputs)
            self._body(inputs, facts.tokens).run()

    def _sample(self, ticket: Ticket, rows: HostRows, where: SampleRows, num_direct: int) -> None:
        """Sample the first rows now, and the others as soon as the tokens before are known. `where`: of all rows."""
        hidden_NE = self._hidden_TE.index_select(0, where.rows_N)
        if num_direct:
            direct = slice(0, num_direct)
            flight = self._sampler.launch(hidden_NE[direct], rows.select(direct), where, ticket.uploads.place)
            ticket.samples.append(flight)
        if num_direct < len(rows.places_N):
            rest = rows.select(slice(num_direct, len(rows.places_N)))
            first = len(where.rows_N) - len(rest.places_N)
            where = SampleRows(*(values_N[first:] for values_N in where))
            ticket.waiting = _Waiting(hidden_NE[first:], rest, where)
            if not self._flying:
                self._sample_waiting(ticket)

    def _sample_waiting(self, ticket: Ticket) -> None:
        waiting = ticket.waiting
        if waiting is not None:
            ticket.waiting = None
            flight = self._sampler.launch(waiting.hidden_NE, waiting.rows, waiting.where, ticket.uploads.place)
            ticket.samples.append(flight)


def _merge(num_rows: int, found: list[tuple[HostRows, Samples]]) -> StepResult:
    """Return the result of a step whose rows were sampled in groups."""
    tokens_N = np.zeros(num_rows, dtype=np.int64)
    logprobs: list[TokenLogprob | None] | None = None
    failed: dict[int, str | RowError] = {}
    ended: set[int] = set()
    for rows, samples in found:
        tokens_N[rows.places_N] = samples.tokens_N
        failed |= {int(rows.places_N[row]): reason for row, reason in samples.failed.items()}
        ended |= {int(rows.places_N[row]) for row in samples.ended}
        if samples.logprobs:
            logprobs = logprobs or [None] * num_rows
            for row, entry in samples.logprobs.items():
                logprobs[rows.places_N[row]] = entry if row not in samples.failed else None
    return StepResult(tokens_N.tolist(), logprobs, failed or None, frozenset(ended))
