"""Eager backend: a tuned torch backend, every op vectorised over sequences, on every device that torch has.

State: the device; nothing else outlives a call. Flow: `prepare` cuts a step into buckets of dense attention on the
host, ops read them. Failure: torch's own errors. It is no specification: tests/kernels/naive.py is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from batchinfer_kernels.contract import (
    AttentionFacts,
    BlockNumbers,
    Capabilities,
    CosSin,
    KVMemory,
    LayerStack,
    Report,
    ScoreRule,
    StepInputs,
)
from batchinfer_kernels.eager.activation import gelu_mul, silu_mul
from batchinfer_kernels.eager.copy_blocks import copy_blocks
from batchinfer_kernels.eager.linear import DenseMatrix, gated_linear, linear, pack_linear, packed_rows
from batchinfer_kernels.eager.paged_attention import paged_attention
from batchinfer_kernels.eager.rms_norm import add_rms_norm, rms_norm, rms_norm_quantized
from batchinfer_kernels.eager.rope_kv_write import rope_kv_write
from batchinfer_kernels.eager.step_index import EagerStepIndex, prepare
from batchinfer_kernels.eager.step_kernels import EagerStepKernels
from batchinfer_kernels.formats import Activation, BlockMatrix, DecoderFacts, PackedMatrix, Precision

_CAPABILITIES = Capabilities(
    name="eager",
    exact_rows=False,
    drafts_as_sequences=True,
    max_draft_rows=128,
    slow_int8="the eager kernels multiply 8-bit numbers as float64, for exactness alone",
)


class TensorMemory:
    """KV cache memory as torch allocates it; nothing to prefault."""

    def __init__(self, layers: list[Tensor]) -> None:
        self.layers = layers

    def prefault(self, blocks: int) -> None:
        pass


class EagerBackend:
    """See batchinfer.ops.backend.Backend for what each op means."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        on_host = device.type == "cpu"
        # other devices have units for 16-bit numbers, and the host's matrices in blocks are of no use to them
        self.capabilities = _CAPABILITIES if on_host else replace(_CAPABILITIES, dtype_of_activations=True)
        # on the host nothing is gained by running ahead: the host waits for each step
        self.steps = None if on_host else EagerStepKernels()

    def rms_norm(self, x_NE: Tensor, weight_E: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        return rms_norm(x_NE, weight_E, eps, offset)

    def add_rms_norm(
        self, x_NE: Tensor, residual_NE: Tensor, weight_E: Tensor, eps: float, offset: float = 0.0
    ) -> Tensor:
        return add_rms_norm(x_NE, residual_NE, weight_E, eps, offset)

    def rms_norm_quantized(
        self,
        x_NE: Tensor,
        residual_NE: Tensor | None,
        weight_E: Tensor,
        eps: float,
        offset: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Return the norm as float8_e4m3fn or int8 with one scale per row, for products of 8-bit numbers."""
        return rms_norm_quantized(x_NE, residual_NE, weight_E, eps, offset, dtype)

    def silu_mul(self, x_T2F: Tensor) -> Tensor:
        return silu_mul(x_T2F)

    def gelu_mul(self, x_T2F: Tensor) -> Tensor:
        return gelu_mul(x_T2F)

    def pack(self, weight_OI: Tensor | BlockMatrix, precision: Precision) -> PackedMatrix:
        return pack_linear(weight_OI, precision)

    def pack_gated(self, weight_GI: Tensor | BlockMatrix, precision: Precision) -> PackedMatrix:
        return pack_linear(weight_GI, precision)

    def pack_rows(self, weight_OI: Tensor | BlockMatrix) -> PackedMatrix:
        return DenseMatrix(weight_OI if isinstance(weight_OI, Tensor) else weight_OI.float())

    def linear(self, x_NI: Tensor, matrix_OI: PackedMatrix, bias_O: Tensor | None) -> Tensor:
        return linear(x_NI, matrix_OI, bias_O)

    def gated_linear(
        self, x_NI: Tensor, matrix_GI: PackedMatrix, bias_G: Tensor | None, activation: Activation
    ) -> Tensor:
        return gated_linear(x_NI, matrix_GI, bias_G, activation)

    def packed_rows(self, matrix_OI: PackedMatrix, rows_N: Tensor) -> Tensor:
        return packed_rows(matrix_OI, rows_N)

    def argmax_bounds(self, matrix_OI: PackedMatrix) -> None:
        """Return None: `linear` and a maximum are as fast."""

    def linear_argmax(self, x_NI: Tensor, bounds: None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("there are no bounds to call it with")

    def prepare(self, step: StepInputs, kv_N2KBD: Tensor, attention: AttentionFacts) -> EagerStepIndex:
        return prepare(step, kv_N2KBD, attention)

    def rope_kv_write(
        self,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        cos_sin: CosSin | None,
        kv_N2KBD: Tensor,
        index: EagerStepIndex,
    ) -> None:
        rope_kv_write(q_THD, k_TKD, v_TKD, cos_sin, kv_N2KBD, index)

    def paged_attention(
        self, q_THD: Tensor, kv_N2KBD: Tensor, index: EagerStepIndex, rule: ScoreRule, out_THD: Tensor | None = None
    ) -> Tensor:
        return paged_attention(q_THD, kv_N2KBD, index, rule, out_THD)

    def layer_stack(self, facts: DecoderFacts, op_by_op: LayerStack) -> LayerStack:
        return op_by_op

    def allocate_kv(self, shape: Sequence[int], num_layers: int, dtype: torch.dtype) -> KVMemory:
        return TensorMemory([torch.empty(*shape, dtype=dtype, device=self.device) for _ in range(num_layers)])

    def copy_blocks(self, caches: Sequence[Tensor], sources: BlockNumbers, targets: BlockNumbers) -> None:
        copy_blocks(caches, sources, targets)


def problem(device: str) -> str | None:
    """Return why torch has no such device here, None if it has."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # a device that torch has not, or was built without
        return f"torch: {str(error).splitlines()[0]}"
    return None


def make_backend(device: str, report: Report) -> EagerBackend:
    """Return the backend of a device. `report` is never called: there is nothing to fall back to."""
    return EagerBackend(torch.device(device))
