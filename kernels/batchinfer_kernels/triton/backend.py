"""Triton backend: GPU kernels for norms, activations, attention, cache and steps; torch's products for matrices.

State: the device, the eager backend of the same device, and which fallbacks were reported. Flow: `prepare` keeps the
step's own tensors; every op launches kernels whose grids depend on shapes and bounds alone, and reads the rest from
device memory, so a captured graph replays it. Nothing waits for the device. Failure: torch's and Triton's own errors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from batchinfer_kernels.contract import (
    AttentionFacts,
    BlockNumbers,
    Capabilities,
    CosSin,
    Fallbacks,
    KVMemory,
    LayerStack,
    Report,
    ScoreRule,
    StepInputs,
)
from batchinfer_kernels.eager.backend import EagerBackend, TensorMemory
from batchinfer_kernels.formats import Activation, BlockMatrix, DecoderFacts, PackedMatrix, Precision
from batchinfer_kernels.triton import rms_norm as norms
from batchinfer_kernels.triton.activation import gelu_mul, silu_mul
from batchinfer_kernels.triton.copy_blocks import copy_blocks
from batchinfer_kernels.triton.paged_attention import paged_attention
from batchinfer_kernels.triton.rope_kv_write import rope_kv_write
from batchinfer_kernels.triton.step_index import TritonStepIndex, prepare
from batchinfer_kernels.triton.step_kernels import TritonStepKernels
from batchinfer_kernels.triton.targets import target_of

_GATED = {"silu": silu_mul, "gelu": gelu_mul}


class TritonBackend:
    """See batchinfer.ops.backend.Backend for what each op means."""

    steps = TritonStepKernels()

    def __init__(self, device: torch.device, report: Report) -> None:
        self.device = device
        self.capabilities = Capabilities(
            name=f"Triton {target_of(device).name}",
            exact_rows=False,
            drafts_as_sequences=False,
            max_draft_rows=32,
            slow_int8="matrices of 8-bit numbers are multiplied as float64 on GPUs, for exactness alone",
            dtype_of_activations=True,
            captures_graphs=True,
        )
        self._eager = EagerBackend(device)
        self._fallbacks = Fallbacks(report)

    # -- norms and activations ------------------------------------------------------------------------------------

    def rms_norm(self, x_NE: Tensor, weight_E: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        return norms.rms_norm(x_NE, weight_E, eps, offset)

    def add_rms_norm(
        self, x_NE: Tensor, residual_NE: Tensor, weight_E: Tensor, eps: float, offset: float = 0.0
    ) -> Tensor:
        return norms.add_rms_norm(x_NE, residual_NE, weight_E, eps, offset)

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
        return norms.rms_norm_quantized(x_NE, residual_NE, weight_E, eps, offset, dtype)

    def silu_mul(self, x_T2F: Tensor) -> Tensor:
        return silu_mul(x_T2F)

    def gelu_mul(self, x_T2F: Tensor) -> Tensor:
        return gelu_mul(x_T2F)

    # -- matrices -------------------------------------------------------------------------------------------------

    def pack(self, weight_OI: Tensor | BlockMatrix, precision: Precision) -> PackedMatrix:
        return self._eager.pack(weight_OI, precision)

    def pack_gated(self, weight_GI: Tensor | BlockMatrix, precision: Precision) -> PackedMatrix:
        return self._eager.pack_gated(weight_GI, precision)

    def pack_rows(self, weight_OI: Tensor | BlockMatrix) -> PackedMatrix:
        return self._eager.pack_rows(weight_OI)

    def linear(self, x_NI: Tensor, matrix_OI: PackedMatrix, bias_O: Tensor | None) -> Tensor:
        return self._eager.linear(x_NI, matrix_OI, bias_O)

    def gated_linear(
        self, x_NI: Tensor, matrix_GI: PackedMatrix, bias_G: Tensor | None, activation: Activation
    ) -> Tensor:
        return _GATED[activation](self._eager.linear(x_NI, matrix_GI, bias_G))

    def packed_rows(self, matrix_OI: PackedMatrix, rows_N: Tensor) -> Tensor:
        return self._eager.packed_rows(matrix_OI, rows_N)

    def argmax_bounds(self, matrix_OI: PackedMatrix) -> None:
        """Return None: `linear` and sampling on the device are as fast."""

    def linear_argmax(self, x_NI: Tensor, bounds: None) -> tuple[Tensor, Tensor]:
        return self._eager.linear_argmax(x_NI, bounds)

    # -- attention ------------------------------------------------------------------------------------------------

    def prepare(self, step: StepInputs, kv_N2KBD: Tensor, attention: AttentionFacts) -> TritonStepIndex:
        return prepare(step, kv_N2KBD, attention)

    def rope_kv_write(
        self,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        cos_sin: CosSin | None,
        kv_N2KBD: Tensor,
        index: TritonStepIndex,
    ) -> None:
        rope_kv_write(q_THD, k_TKD, v_TKD, cos_sin, kv_N2KBD, index.step.slots_T)

    def paged_attention(
        self, q_THD: Tensor, kv_N2KBD: Tensor, index: TritonStepIndex, rule: ScoreRule, out_THD: Tensor | None = None
    ) -> Tensor:
        return paged_attention(q_THD, kv_N2KBD, index, rule, out_THD)

    # -- layers and KV cache --------------------------------------------------------------------------------------

    def layer_stack(self, facts: DecoderFacts, op_by_op: LayerStack) -> LayerStack:
        return op_by_op

    def allocate_kv(self, shape: Sequence[int], num_layers: int, dtype: torch.dtype) -> KVMemory:
        """Allocate all layers at once, so that one launch copies blocks of all."""
        kv_LN2KBD = torch.empty(num_layers, *shape, dtype=dtype, device=self.device)
        return TensorMemory(list(kv_LN2KBD.unbind()))

    def copy_blocks(self, caches: Sequence[Tensor], sources: BlockNumbers, targets: BlockNumbers) -> None:
        if all(cache.is_contiguous() for cache in caches):
            copy_blocks(caches, sources, targets)
        else:
            self._fallbacks.note("copy_blocks", "strides", caches[0])
            self._eager.copy_blocks(caches, sources, targets)
