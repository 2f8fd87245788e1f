"""Prompt outputs on the device: logprobs of prompt tokens and pooled hidden states, launched with the step.

State: by seat the joins of sequences whose prompt is read. Owner: the device runner. Flow: `seat_sequence` → `launch`
after the forward pass → `collect` when the step is done. Logits exist for a slice of rows at a time. Failure: a reading
that is not finite is a failure of its own.

T tokens of a step · R rows that are scored · E hidden size · V vocabulary · C listed tokens
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from batchinfer.engine.plan import Join, PromptRead, Reading, StepPlan
from batchinfer.models.decoder import Decoder
from batchinfer.ops.step_kernels import StepKernels
from batchinfer.ops.streams import Download, Streams, Upload
from batchinfer.request import TokenLogprob
from batchinfer.runner.device_sampler import rows_at_once
from batchinfer.runner.logprobs import listed_logprobs
from batchinfer.runner.prompt_outputs import PromptJoins, cut_readings, pooled_reading, pooled_states, scored_tokens

Ints = npt.NDArray[np.int64]


class _ScoredSlice(NamedTuple):
    """Some scored rows: float64 [R, 2 + C] with 1 for logits that are not finite, the own logprob, the listed ones."""

    rows: slice
    values: Download
    ids: Download


class ReadsInFlight(NamedTuple):
    """Reads of a step that were launched."""

    reads: tuple[PromptRead, ...]
    joins: list[Join]
    pooled: Download | None  # float64 [pooled reads, E]
    scored: list[_ScoredSlice]


class DevicePromptReader(PromptJoins):
    """Reader of prompts, by seat, without a wait but in `collect`."""

    def __init__(self, decoder: Decoder, steps: StepKernels, streams: Streams) -> None:
        super().__init__()
        self._decoder = decoder
        self._steps = steps
        self._streams = streams

    def launch(self, hidden_TE: Tensor, plan: StepPlan, query_starts_X: Ints, upload: Upload) -> ReadsInFlight:
        """Read hidden states of the step's tokens, which the next step may overwrite."""
        joins = self.joins_of(plan)
        firsts = [int(query_starts_X[read.place]) + read.first - plan.starts[read.place] for read in plan.reads]
        parts = [hidden_TE[first : first + read.rows] for first, read in zip(firsts, plan.reads, strict=True)]
        pooled = [pooled_states(part) for part, join in zip(parts, joins, strict=True) if join.pooling is not None]
        scored = [place for place, join in enumerate(joins) if join.pooling is None]
        slices: list[_ScoredSlice] = []
        if scored:
            hidden_RE = torch.cat([parts[place] for place in scored])
            tokens_R, best_R = scored_tokens([plan.reads[place] for place in scored], [joins[one] for one in scored])
            slices = self._launch_scores(hidden_RE, tokens_R, best_R, upload)
        totals = self._streams.download(torch.stack(pooled)) if pooled else None
        return ReadsInFlight(plan.reads, joins, totals, slices)

    def collect(self, flight: ReadsInFlight) -> list[Reading]:
        """Wait for readings, in the order of the plan's reads."""
        pooled = iter([] if flight.pooled is None else flight.pooled.wait().tolist())
        reads = list(zip(flight.reads, flight.joins, strict=True))
        scored = iter(
            self._collect_scores([(read, join) for read, join in reads if join.pooling is None], flight.scored)
        )
        return [next(scored) if join.pooling is None else pooled_reading(next(pooled)) for _, join in reads]

    def _launch_scores(self, hidden_RE: Tensor, tokens_R: Ints, best_R: Ints, upload: Upload) -> list[_ScoredSlice]:
        vocab = self._decoder.config.vocab_size
        size = rows_at_once(vocab)
        targets_R = upload(tokens_R.astype(np.int32))
        slices = []
        for start in range(0, len(tokens_R), size):
            rows = slice(start, min(start + size, len(tokens_R)))
            logits_RV = self._decoder.logits(hidden_RE[rows])
            unsound_R1 = ~logits_RV.amax(1, keepdim=True).isfinite()
            found = self._steps.gather_logprobs(logits_RV, targets_R[rows], min(int(best_R[rows].max()), vocab))
            values_RC = torch.cat([unsound_R1.double(), found.own_N[:, None], found.values_NC], dim=1)
            download = self._streams.download
            slices.append(_ScoredSlice(rows, download(values_RC), download(found.ids_NC)))
        return slices

    def _collect_scores(self, reads: list[tuple[PromptRead, Join]], slices: list[_ScoredSlice]) -> list[Reading]:
        if not reads:
            return []
        tokens_R, best_R = scored_tokens(*zip(*reads, strict=True))
        best_R = np.minimum(best_R, self._decoder.config.vocab_size)
        unsound_R = np.zeros(len(tokens_R), dtype=bool)
        entries: list[TokenLogprob] = []
        for rows, values, ids in slices:
            values_RC = values.wait().numpy()
            unsound_R[rows] = values_RC[:, 0] != 0
            entries += listed_logprobs(tokens_R[rows], values_RC[:, 1:], ids.wait().numpy(), best_R[rows])
        return cut_readings([read for read, _ in reads], entries, unsound_R)
