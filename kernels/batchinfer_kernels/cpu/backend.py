"""CPU backend: C++ (kernels/csrc) for float32; an op that C++ cannot do is done by the eager backend.

State: the compiled functions of one variant (instruction set), the eager backend, and which fallbacks were reported.
Flow: an op's function returns None or False if its arguments have a dtype or strides that C++ does not read; then the
eager op runs, and the first such call of a kind is reported. Failure: MemoryError if a workspace cannot be allocated.
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
from batchinfer_kernels.cpu import library
from batchinfer_kernels.cpu.activation import gated
from batchinfer_kernels.cpu.copy_blocks import copy_blocks
from batchinfer_kernels.cpu.fused_layers import fuse_layers
from batchinfer_kernels.cpu.gated_linear import GatedPanels, gated_linear, pack_gated
from batchinfer_kernels.cpu.linear import (
    PackedBlocks,
    PackedLinear,
    Panels,
    RoundedPanels,
    linear,
    pack_linear,
    packed_rows,
)
from batchinfer_kernels.cpu.linear_argmax import ArgmaxBounds, bounds_pay, linear_argmax, make_bounds
from batchinfer_kernels.cpu.memory import PagedMemory
from batchinfer_kernels.cpu.paged_attention import paged_attention
from batchinfer_kernels.cpu.rms_norm import rms_norm
from batchinfer_kernels.cpu.rope_kv_write import rope_kv_write
from batchinfer_kernels.cpu.step_index import CPUStepIndex, prepare
from batchinfer_kernels.eager import EagerBackend
from batchinfer_kernels.eager.step_index import EagerStepIndex
from batchinfer_kernels.formats import Activation, BlockMatrix, DecoderFacts, PackedMatrix, Precision


class CPUBackend:
    """See batchinfer.ops.backend.Backend for what each op means. `variant` None: the best for this processor."""

    steps = None  # the host waits for each step

    def __init__(self, report: Report, variant: str | None = None) -> None:
        """Load the library. Raises OSError without it, InterfaceMismatch if it was built from other sources."""
        self.device = torch.device("cpu")
        variant = library.variants()[0] if variant is None else variant
        self.functions = library.load(variant)
        vnni = variant in library.WITH_VNNI
        self.capabilities = Capabilities(
            name=f"C++ {variant}",
            exact_rows=True,
            drafts_as_sequences=True,
            max_draft_rows=128,  # above, a step takes as much longer as it has more rows
            slow_int8=None if vnni else f"the C++ {variant} kernels have no VNNI instructions",
        )
        self._eager = EagerBackend(self.device)
        self._fallbacks = Fallbacks(report)

    # -- norms and activations ------------------------------------------------------------------------------------

    def rms_norm(self, x_NE: Tensor, weight_E: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        out_NE = rms_norm(self.functions, x_NE, None, weight_E, eps, offset)
        if out_NE is not None:
            return out_NE
        self._note("rms_norm", x_NE, weight_E)
        return self._eager.rms_norm(x_NE, weight_E, eps, offset)

    def add_rms_norm(
        self, x_NE: Tensor, residual_NE: Tensor, weight_E: Tensor, eps: float, offset: float = 0.0
    ) -> Tensor:
        out_NE = rms_norm(self.functions, x_NE, residual_NE, weight_E, eps, offset)
        if out_NE is not None:
            return out_NE
        self._note("add_rms_norm", x_NE, residual_NE, weight_E)
        return self._eager.add_rms_norm(x_NE, residual_NE, weight_E, eps, offset)

    def silu_mul(self, x_T2F: Tensor) -> Tensor:
        out_TF = gated(self.functions.silu_mul, x_T2F)
        if out_TF is not None:
            return out_TF
        self._note("silu_mul", x_T2F)
        return self._eager.silu_mul(x_T2F)

    def gelu_mul(self, x_T2F: Tensor) -> Tensor:
        out_TF = gated(self.functions.gelu_mul, x_T2F)
        if out_TF is not None:
            return out_TF
        self._note("gelu_mul", x_T2F)
        return self._eager.gelu_mul(x_T2F)

    # -- matrices -------------------------------------------------------------------------------------------------

    def pack(self, weight_OI: Tensor | BlockMatrix, precision: Precision) -> PackedMatrix:
        packed = pack_linear(self.functions, weight_OI, precision)
        return self._pack_eager(weight_OI, precision) if packed is None else packed

    def pack_gated(self, weight_GI: Tensor | BlockMatrix, precision: Precision) -> PackedMatrix:
        packed = pack_gated(self.functions, weight_GI, precision)
        return self._pack_eager(weight_GI, precision) if packed is None else packed

    def pack_rows(self, weight_OI: Tensor | BlockMatrix) -> PackedMatrix:
        """Keep a tensor as it is, whose rows lie together; blocks stay blocks, for their size."""
        if isinstance(weight_OI, BlockMatrix):
            return self.pack(weight_OI, Precision.FLOAT32)
        return self._eager.pack_rows(weight_OI)

    def linear(self, x_NI: Tensor, matrix_OI: PackedMatrix, bias_O: Tensor | None) -> Tensor:
        if isinstance(matrix_OI, Panels):
            return linear(x_NI, matrix_OI, bias_O)
        self._note("linear", x_NI)
        return self._eager.linear(x_NI, matrix_OI, bias_O)

    def gated_linear(
        self, x_NI: Tensor, matrix_GI: PackedMatrix, bias_G: Tensor | None, activation: Activation
    ) -> Tensor:
        if isinstance(matrix_GI, GatedPanels):
            return gated_linear(x_NI, matrix_GI, bias_G, activation)
        op = self.silu_mul if activation == "silu" else self.gelu_mul
        return op(self.linear(x_NI, matrix_GI, bias_G))

    def packed_rows(self, matrix_OI: PackedMatrix, rows_N: Tensor) -> Tensor:
        if isinstance(matrix_OI, PackedLinear | RoundedPanels | PackedBlocks):
            return packed_rows(matrix_OI, rows_N)
        return self._eager.packed_rows(matrix_OI, rows_N)  # a lookup is torch's own: no fallback

    def argmax_bounds(self, matrix_OI: PackedMatrix) -> ArgmaxBounds | None:
        if not bounds_pay(matrix_OI):
            return None
        assert isinstance(matrix_OI, PackedLinear | PackedBlocks)
        return make_bounds(matrix_OI)

    def linear_argmax(self, x_NI: Tensor, bounds: ArgmaxBounds) -> tuple[Tensor, Tensor]:
        return linear_argmax(x_NI, bounds)

    # -- attention ------------------------------------------------------------------------------------------------

    def prepare(self, step: StepInputs, kv_N2KBD: Tensor, attention: AttentionFacts) -> CPUStepIndex:
        return prepare(step, kv_N2KBD, attention)

    def rope_kv_write(
        self,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        cos_sin: CosSin | None,
        kv_N2KBD: Tensor,
        index: CPUStepIndex,
    ) -> None:
        if not rope_kv_write(self.functions, q_THD, k_TKD, v_TKD, cos_sin, kv_N2KBD, index):
            self._note("rope_kv_write", q_THD, k_TKD, v_TKD, *(cos_sin or ()), cache=kv_N2KBD)
            self._eager.rope_kv_write(q_THD, k_TKD, v_TKD, cos_sin, kv_N2KBD, self._eager_index(index))

    def paged_attention(
        self, q_THD: Tensor, kv_N2KBD: Tensor, index: CPUStepIndex, rule: ScoreRule, out_THD: Tensor | None = None
    ) -> Tensor:
        done_THD = paged_attention(self.functions, q_THD, kv_N2KBD, index, rule, out_THD)
        if done_THD is not None:
            return done_THD
        self._note("paged_attention", q_THD, cache=kv_N2KBD)
        return self._eager.paged_attention(q_THD, kv_N2KBD, self._eager_index(index), rule, out_THD)

    # -- layers and KV cache --------------------------------------------------------------------------------------

    def layer_stack(self, facts: DecoderFacts, op_by_op: LayerStack) -> LayerStack:
        return fuse_layers(self.functions, facts, op_by_op, self._fallbacks)

    def allocate_kv(self, shape: Sequence[int], num_layers: int, dtype: torch.dtype) -> KVMemory:
        return PagedMemory(self.functions, [torch.empty(*shape, dtype=dtype) for _ in range(num_layers)])

    def copy_blocks(self, caches: Sequence[Tensor], sources: BlockNumbers, targets: BlockNumbers) -> None:
        if not copy_blocks(self.functions, caches, sources, targets):
            self._note("copy_blocks", cache=caches[0])
            self._eager.copy_blocks(caches, sources, targets)

    # -- fallbacks ------------------------------------------------------------------------------------------------

    def _pack_eager(self, weight_OI: Tensor | BlockMatrix, precision: Precision) -> PackedMatrix:
        packed = self._eager.pack(weight_OI, precision)
        self._fallbacks.note("pack", "dtype", packed)
        return packed

    def _note(self, op: str, *arguments: Tensor, cache: Tensor | None = None) -> None:
        """Report a fallback: for the dtype of an argument, or else for the gaps in one."""
        everything = arguments if cache is None else (*arguments, cache)
        gaps = [str(x.stride()) for x in everything if not x.is_contiguous()]
        known = all(x.dtype == torch.float32 for x in arguments) and (cache is None or cache.dtype in library.TYPES)
        self._fallbacks.note(op, f"strides {', '.join(gaps)}" if known and gaps else "dtype", *everything)

    def _eager_index(self, index: CPUStepIndex) -> EagerStepIndex:
        """Return the eager index of the same step, built when the first op of the step falls back."""
        if index.eager is None:
            index.eager = self._eager.prepare(*index.source)
        return index.eager


def problem(device: str = "cpu") -> str | None:
    """Return why the compiled library cannot be used, None if it can."""
    why = library.problem()
    return None if why is None else f"the C++ kernels are not there: {why}"


def make_backend(device: str, report: Report) -> CPUBackend:
    """Return the backend with the best variant for this processor."""
    return CPUBackend(report)
